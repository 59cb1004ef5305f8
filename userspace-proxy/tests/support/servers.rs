//! Real servers for real clients: nginx with an echo and the package managers' indexes, git's own CGI program, Node's, and Python's
//! servers for events, WebSocket and gRPC. Each lets only the real token in.

use super::{OTHER, SERVER, World, sh};
use base64::{Engine as _, engine::general_purpose::STANDARD};
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use std::{
    convert::Infallible,
    net::Ipv4Addr,
    path::Path,
    process::{Child, Command, Stdio},
};
use tokio::{
    io::AsyncWriteExt as _,
    net::{TcpListener, TcpStream},
};

/// The real token.
pub const VALUE: &str = "ghp_realvalue0123456789";
/// The Python servers'.
pub const EVENTS: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 12);
pub const CHAT: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 13);
pub const GRPC: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 14);
/// Node's.
pub const NODE: Ipv4Addr = Ipv4Addr::new(192, 0, 2, 15);
/// Where the set-up puts the clients and libraries that come from PyPI.
pub const CLIENTS: &str = "/usr/local/tapgate-tools/clients";

/// A server's process, ended with this value.
pub struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

async fn answers(at: Ipv4Addr) {
    for _ in 0..500 {
        if TcpStream::connect((at, 443)).await.is_ok() {
            return;
        }
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    panic!("nothing listens at {at}");
}

fn certificate(w: &World, dir: &Path, name: &str, names: &[&str]) -> (String, String) {
    let (cert, key) = w.ca.mint(names);
    let file = |end: &str| dir.join(format!("{name}.{end}")).display().to_string();
    std::fs::write(file("pem"), cert.pem()).unwrap();
    std::fs::write(file("key"), key.serialize_pem()).unwrap();
    (file("pem"), file("key"))
}

/// nginx on SERVER: `api.example` says back what it was told, compressed if asked for; the others are package indexes.
pub async fn nginx(w: &World, dir: &Path) -> Server {
    let make = dir.join("registries.sh");
    std::fs::write(&make, include_str!("../programs/registries.sh")).unwrap();
    sh(&format!("cd {}; sh {}", dir.display(), make.display()));
    let hosts = ["api.example", "pypi.example", "npm.example", "crates.example", "apt.example"];
    let (cert, key) = certificate(w, dir, "nginx", &hosts);
    let basic = format!("Basic {}", STANDARD.encode(format!("x:{VALUE}")));
    let dir = dir.display();
    let index = |name: &str, right: &str, more: &str| {
        format!(
            "server {{ listen {SERVER}:443 ssl http2; server_name {name}.example; root {dir}/www/{name}; index index.html;
               if ($http_authorization != \"{right}\") {{ return 401; }}
               add_header WWW-Authenticate 'Basic realm=\"{name}\"' always; {more} }}"
        )
    };
    let indexes = [
        index("pypi", &basic, ""),
        index(
            "npm",
            &format!("Bearer {VALUE}"),
            &format!("location = /demo {{ default_type application/json; alias {dir}/www/npm/demo.json; }}"),
        ),
        index("crates", VALUE, ""),
        index("apt", &basic, ""),
    ]
    .concat();
    let config = format!(
        "daemon off; user root; worker_processes 1; error_log {dir}/error.log; pid {dir}/pid;
         events {{ worker_connections 512; }}
         http {{
           access_log {dir}/access.log; gzip on; gzip_min_length 1; gzip_types text/plain; gzip_http_version 1.0;
           client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
           uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s; ssl_certificate {cert}; ssl_certificate_key {key};
           server {{
             listen {SERVER}:443 ssl http2 default_server; listen {SERVER}:80; server_name api.example; keepalive_requests 20;
             location /echo {{ default_type text/plain; return 200 \"$server_protocol $http_authorization end\\n\"; }}
             location /jump {{ return 302 https://api.example/echo?t=$http_authorization; }}
           }} {indexes} }}"
    );
    let path = format!("{dir}/nginx.conf");
    std::fs::write(&path, config).unwrap();
    let child = Command::new("nginx")
        .args(["-c", &path, "-e", &format!("{dir}/error.log")])
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    answers(SERVER).await;
    Server(child)
}

/// Python's servers.
pub async fn python(w: &World, dir: &Path) -> Server {
    let (cert, key) = certificate(w, dir, "python", &["events.example", "chat.example", "grpc.example"]);
    let script = dir.join("servers.py");
    std::fs::write(&script, include_str!("../programs/servers.py")).unwrap();
    let child = Command::new(format!("{CLIENTS}/bin/python"))
        .arg(script)
        .args([cert, key, VALUE.to_owned(), EVENTS.to_string(), CHAT.to_string(), GRPC.to_string()])
        .stdout(Stdio::null())
        .spawn()
        .expect("`cargo xtask setup` installs the Python clients and servers");
    for at in [EVENTS, CHAT, GRPC] {
        answers(at).await;
    }
    Server(child)
}

/// Node's server.
pub async fn node(w: &World, dir: &Path) -> Server {
    let (cert, key) = certificate(w, dir, "node", &["node.example"]);
    let script = dir.join("node_server.mjs");
    std::fs::write(&script, include_str!("../programs/node_server.mjs")).unwrap();
    let child =
        Command::new("node").arg(script).args([cert, key, VALUE.to_owned(), NODE.to_string()]).spawn();
    let server = Server(child.expect("`cargo xtask setup` installs Node"));
    answers(NODE).await;
    server
}

/// git over HTTP on OTHER, by git's own CGI program.
pub async fn git(w: &World, dir: &Path) {
    sh(&format!(
        "cd {}; mkdir served; git init -q --bare served/repo.git; git -C served/repo.git config http.receivepack true
         git init -q -b main seed; cd seed; head -c 300000 /dev/urandom > blob; git add .
         git -c user.name=a -c user.email=a@b commit -qm one; git push -q ../served/repo.git main
         git -C ../served/repo.git symbolic-ref HEAD refs/heads/main",
        dir.display()
    ));
    let root = dir.join("served");
    let right = format!("Basic {}", STANDARD.encode(format!("x:{VALUE}")));
    let tls = w.ca.server(&["git.example"], &["http/1.1"]);
    let listener = TcpListener::bind((OTHER, 443)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (tls, root, right) = (tls.clone(), root.clone(), right.clone());
            tokio::spawn(async move {
                let Ok(stream) = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await else { return };
                let service = hyper::service::service_fn(|request| git_backend(request, &root, &right));
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
}

async fn git_backend(
    request: Request<hyper::body::Incoming>,
    root: &Path,
    right: &str,
) -> Result<Response<Full<Bytes>>, Infallible> {
    let header =
        |name: &str| request.headers().get(name).map_or("", |value| value.to_str().unwrap()).to_owned();
    if header("authorization") != right {
        let refusal = Response::builder().status(401).header("www-authenticate", "Basic realm=\"git\"");
        return Ok(refusal.body(Full::default()).unwrap());
    }
    let mut cgi = tokio::process::Command::new("git")
        .arg("http-backend")
        .env("GIT_PROJECT_ROOT", root)
        .env("GIT_HTTP_EXPORT_ALL", "1")
        .env("REMOTE_USER", "x")
        .env("REQUEST_METHOD", request.method().as_str())
        .env("PATH_INFO", request.uri().path())
        .env("QUERY_STRING", request.uri().query().unwrap_or_default())
        .env("CONTENT_TYPE", header("content-type"))
        .env("HTTP_CONTENT_ENCODING", header("content-encoding"))
        .env("HTTP_GIT_PROTOCOL", header("git-protocol"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = cgi.stdin.take().unwrap();
    let body = request.into_body().collect().await.unwrap().to_bytes();
    tokio::spawn(async move { stdin.write_all(&body).await });
    let said = cgi.wait_with_output().await.unwrap().stdout;
    let end = said.windows(4).position(|window| window == b"\r\n\r\n").unwrap();
    let mut response = Response::builder();
    for line in std::str::from_utf8(&said[..end]).unwrap().lines() {
        let (name, value) = line.split_once(": ").unwrap();
        response = match name {
            "Status" => response.status(value.split(' ').next().unwrap()),
            _ => response.header(name, value),
        };
    }
    Ok(response.body(Full::from(said[end + 4..].to_vec())).unwrap())
}
