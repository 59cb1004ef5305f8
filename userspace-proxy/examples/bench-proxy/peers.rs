//! The other proxies, each set up as its manual says for this work, with logging and caching off.

use crate::stage::{NAME, ORIGIN, PEERS, Running, Stage, sh, start};
use anyhow::{Context as _, Result};
use std::{fs, path::PathBuf, process::Command};

/// Ports that the peers listen on.
pub mod port {
    pub const HAPROXY: u16 = 4441;
    pub const NGINX_SPLICE: u16 = 4442;
    pub const NGINX_OPEN: u16 = 4443;
    pub const SQUID_SPLICE: u16 = 4444;
    pub const SQUID_OPEN: u16 = 4445;
    pub const MITMPROXY: u16 = 4446;
}

fn written(stage: &Stage, name: &str, text: &str) -> Result<PathBuf> {
    let file = stage.file(name);
    fs::write(&file, text)?;
    Ok(file)
}

/// TCP with `splice-auto`, two threads.
pub fn haproxy(stage: &Stage) -> Result<Running> {
    let text = format!(
        "global\n maxconn 9000\n maxpipes 500\n nbthread 2\n\
         defaults\n mode tcp\n timeout connect 10s\n timeout client 600s\n timeout server 600s\n option splice-auto\n\
         frontend f\n bind {PEERS}:{}\n tcp-request inspect-delay 5s\n tcp-request content accept if {{ req_ssl_hello_type 1 }}\n \
         use_backend b if {{ req_ssl_sni -i {NAME} }}\n\
         backend b\n server s {ORIGIN}:443\n",
        port::HAPROXY
    );
    let file = written(stage, "haproxy.cfg", &text)?;
    let running =
        start("haproxy".as_ref(), &["-db", "-f", &file.to_string_lossy()], &stage.file("haproxy.log"))?;
    stage.answers((PEERS, port::HAPROXY))?;
    Ok(running)
}

/// `ssl_preread`, two workers.
pub fn nginx_splice(stage: &Stage) -> Result<Running> {
    let dir = stage.dir().display();
    let text = format!(
        "load_module /usr/lib/nginx/modules/ngx_stream_module.so;
         daemon off; user root; worker_processes 2;  error_log {dir}/nginx-splice.log; pid {dir}/nginx-splice.pid;
         events {{ worker_connections 19000; }}
         stream {{
           map $ssl_preread_server_name $to {{ {NAME} {ORIGIN}:443; }}
           server {{ listen {PEERS}:{} backlog=4096; ssl_preread on; proxy_pass $to; tcp_nodelay on; proxy_buffer_size 64k; }} }}",
        port::NGINX_SPLICE
    );
    nginx(stage, "nginx-splice", &text, port::NGINX_SPLICE)
}

/// Terminates, verifies the origin and encrypts again, connections to it kept.
pub fn nginx_open(stage: &Stage) -> Result<Running> {
    let dir = stage.dir().display();
    let text = format!(
        "daemon off; user root; worker_processes 2;  error_log {dir}/nginx-open.log; pid {dir}/nginx-open.pid;
         events {{ worker_connections 19000; }}
         http {{
           access_log off; tcp_nodelay on; keepalive_timeout 600; keepalive_requests 100000000;
           client_body_temp_path {dir}/n1; proxy_temp_path {dir}/n2; fastcgi_temp_path {dir}/n3;
           uwsgi_temp_path {dir}/n4; scgi_temp_path {dir}/n5;
           upstream up {{ server {ORIGIN}:443; keepalive 64; keepalive_requests 100000000; }}
           server {{
             listen {PEERS}:{} ssl backlog=4096; server_name {NAME};
             ssl_certificate {dir}/cert.pem; ssl_certificate_key {dir}/key.pem;
             location / {{
               proxy_pass https://up; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host $host;
               proxy_ssl_server_name on; proxy_ssl_name {NAME}; proxy_ssl_verify on; proxy_ssl_trusted_certificate {dir}/ca.pem;
               proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_max_temp_file_size 0; proxy_buffer_size 16k; proxy_buffers 16 16k;
             }} }} }}",
        port::NGINX_OPEN
    );
    nginx(stage, "nginx-open", &text, port::NGINX_OPEN)
}

fn nginx(stage: &Stage, name: &str, text: &str, port: u16) -> Result<Running> {
    let file = written(stage, &format!("{name}.conf"), text)?;
    let log = stage.file(&format!("{name}.out"));
    let running = start("nginx".as_ref(), &["-c", &file.to_string_lossy()], &log)?;
    stage.answers((PEERS, port))?;
    Ok(running)
}

/// Squid with OpenSSL: `splice` or `bump`. It has to be asked with CONNECT, and has one worker.
pub fn squid(stage: &Stage, open: bool) -> Result<Running> {
    let (name, what, port) = match open {
        true => ("squidopen", "bump", port::SQUID_OPEN),
        false => ("squidsplice", "splice", port::SQUID_SPLICE),
    };
    let home = stage.file(name);
    fs::create_dir(&home)?;
    let (dir, home_text) = (stage.dir().display(), home.display());
    sh(&format!(
        "/usr/lib/squid/security_file_certgen -c -s {home_text}/certs -M 16MB; chown -R proxy: {home_text}"
    ))
    .context("squid's store of certificates")?;
    let text = format!(
        "http_port {PEERS}:{port} ssl-bump generate-host-certificates=on dynamic_cert_mem_cache_size=16MB tls-cert={dir}/ca.pem tls-key={dir}/ca.key\n\
         sslcrtd_program /usr/lib/squid/security_file_certgen -s {home_text}/certs -M 16MB\nsslcrtd_children 2 startup=2\n\
         acl step1 at_step SslBump1\nssl_bump peek step1\nssl_bump {what} all\ntls_outgoing_options cafile={dir}/ca.pem\n\
         http_access allow all\ncache deny all\naccess_log none\ncache_log {home_text}/cache.log\ncache_store_log none\n\
         pid_filename {home_text}/pid\ncoredump_dir {home_text}\nmax_filedescriptors 20000\nvisible_hostname bench\npinger_enable off\n\
         hosts_file {dir}/hosts\nshutdown_lifetime 0 seconds\nclient_lifetime 1 hour\npconn_timeout 10 minutes\nclient_persistent_connections on\n"
    );
    let file = written(stage, &format!("{name}.conf"), &text)?;
    let args = ["-N", "-n", name, "-f", &file.to_string_lossy()];
    let running = start("squid".as_ref(), &args, &stage.file(&format!("{name}.out")))?;
    stage.answers((PEERS, port))?;
    Ok(running)
}

/// mitmproxy without a window, bodies streamed.
pub fn mitmproxy(stage: &Stage) -> Result<Running> {
    let (dir, port) = (stage.dir().display(), port::MITMPROXY.to_string());
    let program = mitmdump();
    let (confdir, ca) =
        (format!("confdir={dir}/mitm"), format!("ssl_verify_upstream_trusted_ca={dir}/ca.pem"));
    let listen = PEERS.to_string();
    let args = [
        "--quiet",
        "--listen-host",
        &listen,
        "--listen-port",
        &port,
        "--set",
        &confdir,
        "--set",
        &ca,
        "--set",
        "stream_large_bodies=64k",
        "--set",
        "block_global=false",
    ];
    let running = start(&program, &args, &stage.file("mitmproxy.out"))?;
    stage.answers((PEERS, port::MITMPROXY))?;
    Ok(running)
}

/// Where the set-up put it, or in `PATH`.
fn mitmdump() -> PathBuf {
    std::env::var_os("BENCH_MITMDUMP").map_or_else(|| PathBuf::from("mitmdump"), PathBuf::from)
}

/// The version of the mitmproxy that is measured.
pub fn mitmproxy_version() -> String {
    version(&mitmdump().to_string_lossy(), &["--version"])
}

/// What the program says of its version.
pub fn version(program: &str, args: &[&str]) -> String {
    let said = Command::new(program).args(args).output();
    let text = said.map(|out| [out.stdout, out.stderr].concat()).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let word = |word: &str| word.chars().next().is_some_and(|c| c.is_ascii_digit());
    let number = text.split(|c: char| c.is_whitespace() || c == '/').find(|part| word(part));
    number.unwrap_or("?").split(['-', '+']).next().unwrap_or("?").to_owned()
}
