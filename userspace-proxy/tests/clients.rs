//! Real clients in a guest's namespace against real servers: every one gets its answer, the server the value, the guest
//! the placeholder alone.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::TokioIo;
use std::{convert::Infallible, net::Ipv4Addr, path::Path, process::Stdio, sync::Arc};
use support::{
    ATTACKER, OTHER, PRIVATE, RESOLVER, SERVER, World,
    guest::{Guest, serve},
    world_of,
};
use tapgate_model::Mode;
use tokio::{io::AsyncWriteExt as _, net::TcpListener};

const HERE: &[Ipv4Addr] = &[SERVER, OTHER, ATTACKER, RESOLVER, PRIVATE];
const VALUE: &str = "ghp_realvalue0123456789";

/// nginx on SERVER for `api.example`: says back what it was told, compressed if asked for.
struct Nginx(std::process::Child);

impl Nginx {
    fn start(w: &World, dir: &Path) -> Self {
        let (cert, key) = w.ca.mint(&["api.example"]);
        std::fs::write(dir.join("cert.pem"), cert.pem()).unwrap();
        std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
        let dir = dir.display();
        let config = format!(
            "daemon off; worker_processes 1; error_log {dir}/error.log; pid {dir}/pid;
             events {{ worker_connections 512; }}
             http {{
               access_log {dir}/access.log; gzip on; gzip_min_length 1; gzip_types text/plain; gzip_http_version 1.0;
               client_body_temp_path {dir}/b; proxy_temp_path {dir}/p; fastcgi_temp_path {dir}/f;
               uwsgi_temp_path {dir}/u; scgi_temp_path {dir}/s;
               server {{
                 listen {SERVER}:443 ssl http2; listen {SERVER}:80; server_name api.example;
                 ssl_certificate {dir}/cert.pem; ssl_certificate_key {dir}/key.pem;
                 location /echo {{ default_type text/plain; return 200 \"$server_protocol $http_authorization end\\n\"; }}
                 location /jump {{ return 302 https://api.example/echo?t=$http_authorization; }}
               }} }}"
        );
        let path = format!("{dir}/nginx.conf");
        std::fs::write(&path, config).unwrap();
        let child = std::process::Command::new("nginx")
            .args(["-c", &path, "-e", &format!("{dir}/error.log")])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Nginx {
    fn drop(&mut self) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.0.id()).unwrap());
        let _ = nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM);
        let _ = self.0.wait();
    }
}

async fn start(w: &mut World, dir: &Path, secrets: &[(&str, &str, &[&str])]) {
    serve(w);
    w.zone.set("api.example", &[SERVER]);
    w.zone.set("git.example", &[OTHER]);
    w.rules(Mode::Enforce, &["api.example", "git.example"], secrets);
    std::fs::write(dir.join("ca.pem"), format!("{}{}", w.vm_ca.cert_pem(), w.ca.pem)).unwrap();
}

/// What a guest's environment holds.
fn environment(dir: &Path) -> String {
    let ca = dir.join("ca.pem");
    ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"]
        .map(|name| format!("export {name}={}; ", ca.display()))
        .concat()
        + &format!("export HOME={}; T=IRONSH_PROXY_token; cd $HOME; ", dir.display())
}

#[test]
fn http_clients_of_every_kind() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("c");
        let dir = tempfile::tempdir().unwrap();
        start(&mut w, dir.path(), &[("token", VALUE, &["api.example"])]).await;
        let _nginx = Nginx::start(&w, dir.path());
        while tokio::net::TcpStream::connect((SERVER, 443)).await.is_err() {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        std::fs::write(
            dir.path().join("Get.java"),
            "import java.net.*; import java.net.http.*;
             class Get { public static void main(String[] a) throws Exception {
               var q = HttpRequest.newBuilder(URI.create(\"https://api.example/echo\")).header(\"Authorization\", \"Bearer \" + a[0]).build();
               System.out.print(HttpClient.newHttpClient().send(q, HttpResponse.BodyHandlers.ofString()).body());
               var c = (HttpURLConnection) URI.create(\"https://api.example/echo\").toURL().openConnection();
               c.setRequestProperty(\"Authorization\", \"Bearer \" + a[0]);
               System.out.print(new String(c.getInputStream().readAllBytes())); } }",
        )
        .unwrap();
        let header = "-H \"Authorization: Bearer $T\"";
        let url = "https://api.example/echo";
        let cases = [
            ("curl HTTP/1.1", format!("curl -sS --http1.1 {header} {url}"), "HTTP/1.1"),
            ("curl HTTP/1.0", format!("curl -sS -0 {header} {url}"), "HTTP/1"),
            ("curl HTTP/2", format!("curl -sS --http2 {header} {url}"), "HTTP/2.0"),
            ("curl, compressed", format!("curl -sS --compressed {header} {url}"), "HTTP/2.0"),
            ("curl, TLS 1.2", format!("curl -sS --tls-max 1.2 {header} {url}"), "HTTP/2.0"),
            ("curl, no ALPN", format!("curl -sS --no-alpn {header} {url}"), "HTTP/1.1"),
            ("curl, clear text", format!("curl -sS {header} http://api.example/echo"), "HTTP/1.1"),
            ("curl, h2c offered", format!("curl -sS --http2 {header} http://api.example/echo"), "HTTP/1.1"),
            ("curl, redirect", format!("curl -sSi {header} https://api.example/jump"), "t=Bearer"),
            ("curl, twice on one connection", format!("curl -sS {header} {url} {url}"), "HTTP/2.0"),
            ("wget", format!("wget -qO- --header \"Authorization: Bearer $T\" --ca-certificate=$SSL_CERT_FILE {url}"), "HTTP/1.1"),
            (
                "openssl s_client",
                "(printf \"GET /echo HTTP/1.1\\r\\nHost: api.example\\r\\nAuthorization: Bearer $T\\r\\nConnection: close\\r\\n\\r\\n\"; sleep 1) |
                 openssl s_client -quiet -verify_return_error -CAfile $SSL_CERT_FILE -servername api.example -connect api.example:443 2>/dev/null"
                    .to_owned(),
                "HTTP/1.1",
            ),
            ("nghttp", format!("nghttp -H \"authorization: Bearer $T\" {url}"), "HTTP/2.0"),
            (
                "Python urllib",
                format!("python3 -c \"import urllib.request as u; print(u.urlopen(u.Request('{url}', headers={{'Authorization': 'Bearer $T'}})).read().decode())\""),
                "HTTP/1.1",
            ),
            (
                "Node fetch",
                format!("node -e \"fetch('{url}', {{headers: {{authorization: 'Bearer $T'}}}}).then(r => r.text()).then(console.log)\""),
                "HTTP/1.1",
            ),
            (
                "Node https",
                format!("node -e \"require('https').get('{url}', {{headers: {{authorization: 'Bearer $T'}}}}, r => r.pipe(process.stdout))\""),
                "HTTP/1.1",
            ),
            (
                "Node http2",
                "node -e \"const c = require('http2').connect('https://api.example'); const r = c.request({':path': '/echo', authorization: 'Bearer $T'}); r.pipe(process.stdout); r.on('end', () => c.close())\""
                    .to_owned(),
                "HTTP/2.0",
            ),
            (
                "Java",
                "keytool -importcert -noprompt -file ca.pem -keystore trust -storepass changeit >/dev/null 2>&1;
                 java -Djavax.net.ssl.trustStore=trust -Djavax.net.ssl.trustStorePassword=changeit Get.java $T"
                    .to_owned(),
                "HTTP/2.0",
            ),
        ];
        let mut failed = Vec::new();
        for (client, command, expected) in &cases {
            let said = guest.shell(&(environment(dir.path()) + command)).await;
            let good = said.as_ref().is_ok_and(|text| {
                text.contains(expected) && text.contains("Bearer IRONSH_PROXY_token") && !text.contains(VALUE)
            });
            if !good {
                failed.push((client, said));
            }
        }
        assert!(failed.is_empty(), "{failed:#?}");
        // Load: many streams and connections, none refused, none confused.
        let load = format!("h2load -n 2000 -c 8 -m 16 -H \"authorization: Bearer $T\" {url}");
        let said = guest.shell(&(environment(dir.path()) + &load)).await.unwrap();
        assert!(said.contains("2000 succeeded, 0 failed, 0 errored"), "{said}");
        let events = w.events(cases.len() + 2000).await;
        assert!(events.iter().all(|event| event.verdict.is_allowed()));
        assert!(events.iter().filter(|event| event.secrets == ["token"]).count() >= cases.len() + 2000);
    });
}

/// git over HTTP, by git's own CGI program; only the real token is let in.
async fn git_server(w: &World, dir: &Path) {
    use base64::{Engine as _, engine::general_purpose::STANDARD};
    let root = dir.join("served");
    std::fs::create_dir(&root).unwrap();
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

#[test]
fn git_clones_and_pushes_with_a_token_that_the_guest_never_has() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("g");
        let dir = Arc::new(tempfile::tempdir().unwrap());
        start(&mut w, dir.path(), &[("token", VALUE, &["git.example"])]).await;
        git_server(&w, dir.path()).await;
        support::sh(&format!(
            "cd {}; git init -q --bare served/repo.git; git -C served/repo.git config http.receivepack true
             git init -q -b main seed; cd seed; head -c 300000 /dev/urandom > blob; git add .
             git -c user.name=a -c user.email=a@b commit -qm one; git push -q ../served/repo.git main
             git -C ../served/repo.git symbolic-ref HEAD refs/heads/main",
            dir.path().display()
        ));
        let script = "git clone -q https://x:$T@git.example/repo.git work; cd work; cmp blob ../seed/blob
            echo two > two; git add two; git -c user.name=a -c user.email=a@b commit -qm two; git push -q
            cat .git/config; git -C ../served/repo.git log --oneline main";
        let said = guest.shell(&(environment(dir.path()) + script)).await.unwrap();
        assert!(
            said.contains("two") && said.contains("IRONSH_PROXY_token") && !said.contains(VALUE),
            "{said}"
        );
        let without = guest
            .shell(&(environment(dir.path()) + "git clone -q https://x:wrong@git.example/repo.git no"))
            .await;
        assert!(without.unwrap_err().contains("Authentication failed"));
    });
}
