//! TLS to a host that a secret is for, whatever protocol it offers: opened as the upstream answers, and nothing comes back uncleaned.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use rustls::{RootCertStore, ServerConfig, server::WebPkiClientVerifier};
use std::sync::{Arc, Mutex};
use support::{SERVER, World, talk, world};
use tapgate_model::{Mode, Protocol, Reason, Verdict};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
};
use tokio_rustls::server::TlsStream;

const VALUE: &str = "ghp_realvalue0123456789";
const LATER: &str = "glpat_another-value-98765";

fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.rules(Mode::Enforce, &["api.example"], &[("token", VALUE, &["api.example"])]);
}

async fn until<S: AsyncRead + Unpin>(stream: &mut S, end: &str) -> String {
    let mut all = Vec::new();
    while !String::from_utf8_lossy(&all).contains(end) {
        let byte = stream.read_u8().await;
        all.push(byte.unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(&all))));
    }
    String::from_utf8(all).unwrap()
}

/// A TLS server at this port; each connection whose handshake succeeds is served so.
async fn serve<F: Future<Output = ()> + Send>(
    port: u16,
    tls: Arc<ServerConfig>,
    each: impl Fn(TlsStream<TcpStream>) -> F + Clone + Send + 'static,
) {
    let listener = TcpListener::bind((SERVER, port)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (tls, each) = (tls.clone(), each.clone());
            tokio::spawn(async move {
                if let Ok(stream) = tokio_rustls::TlsAcceptor::from(tls).accept(stream).await {
                    each(stream).await;
                }
            });
        }
    });
}

/// Says what it was told by the request before, as many a service does.
async fn storing(mut stream: TlsStream<TcpStream>, stored: Arc<Mutex<String>>) {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        let Ok(byte) = stream.read_u8().await else { return };
        head.push(byte.into());
    }
    let before = stored.lock().unwrap().clone();
    if let Some(line) = head.lines().find(|line| line.to_lowercase().starts_with("authorization:")) {
        line.clone_into(&mut stored.lock().unwrap());
    }
    let answer =
        format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{before}", before.len());
    let _ = stream.write_all(answer.as_bytes()).await;
    let _ = stream.shutdown().await;
}

#[test]
fn a_server_that_ignores_what_is_offered_hands_no_value_back() {
    world(|mut w| async move {
        start(&mut w);
        // It speaks HTTP whatever is offered, and chooses nothing.
        let tls = w.ca.server(&["api.example"], &[]);
        let stored = Arc::<Mutex<String>>::default();
        for port in [443, 993] {
            let stored = stored.clone();
            serve(port, tls.clone(), move |stream| storing(stream, stored.clone())).await;
        }
        let ask = "GET /stored HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\nAuthorization: Bearer IRONSH_PROXY_token\r\n\r\n";
        w.https((SERVER, 443), "api.example", ask).await;
        assert!(stored.lock().unwrap().contains(VALUE));
        w.event().await;
        let http1 = Some("http/1.1");
        let lists: [(u16, &[&str], Option<&str>); 7] = [
            (443, &["foo"], None),
            (443, &["imap"], None),
            // GREASE (RFC 8701).
            (443, &["\n\n", "foo"], None),
            (443, &["foo", "http/1.1"], http1),
            (443, &["http/0.9"], None),
            (443, &[], None),
            (993, &[], None),
        ];
        for (port, offer, chosen) in lists {
            let stream = w.tls((SERVER, port), "api.example", offer).await.unwrap();
            assert!(w.is_opened(&stream), "{offer:?}");
            assert_eq!(stream.get_ref().1.alpn_protocol(), chosen.map(str::as_bytes), "{offer:?}");
            let said = talk(stream, ask).await;
            assert!(said.starts_with("HTTP/1.1 200"), "{offer:?}: {said}");
            assert!(said.contains("IRONSH_PROXY_token") && !said.contains(VALUE), "{offer:?}: {said}");
            let event = w.event().await;
            assert_eq!((event.protocol, event.status), (Protocol::Http, Some(200)), "{offer:?}");
        }
        // Who offers HTTP/2 beside another protocol is not given the other.
        let stream = w.tls((SERVER, 443), "api.example", &["h2", "foo"]).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    });
}

#[test]
fn what_the_upstream_chooses_is_what_the_guest_gets() {
    world(|mut w| async move {
        start(&mut w);
        serve(443, w.ca.server(&["api.example"], &["foo"]), |mut stream| async move {
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"foo"[..]));
            let asked = until(&mut stream, "\n").await;
            // In two pieces, with more than a breath between them.
            stream.write_all(format!("{asked}is {}", &VALUE[..20]).as_bytes()).await.unwrap();
            stream.flush().await.unwrap();
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
            stream.write_all(format!("{}.\n", &VALUE[20..]).as_bytes()).await.unwrap();
            // The guest's half is closed; the answer to that comes all the same.
            assert_eq!(stream.read(&mut [0; 16]).await.unwrap(), 0);
            stream.write_all(b"bye\n").await.unwrap();
            stream.shutdown().await.unwrap();
        })
        .await;
        for offer in [&["foo"][..], &["bar", "foo"], &["\n\n", "foo", "\u{1a}\u{1a}"]] {
            let mut stream = w.tls((SERVER, 443), "api.example", offer).await.unwrap();
            assert!(w.is_opened(&stream), "{offer:?}");
            assert_eq!(stream.get_ref().1.alpn_protocol(), Some(&b"foo"[..]), "{offer:?}");
            stream.write_all(b"WHO\n").await.unwrap();
            assert_eq!(until(&mut stream, ".\n").await, "WHO\nis IRONSH_PROXY_token.\n");
            stream.shutdown().await.unwrap();
            let mut rest = String::new();
            stream.read_to_string(&mut rest).await.unwrap();
            assert_eq!(rest, "bye\n");
            let event = w.event().await;
            assert_eq!((event.protocol, event.verdict.reason()), (Protocol::Tls, Reason::Host));
            assert_eq!((event.bytes_out, event.bytes_in), (4, 31));
        }
        // What it does not speak, it refuses in its own words.
        let error = w.tls((SERVER, 443), "api.example", &["bar"]).await.unwrap_err();
        assert!(error.to_string().contains("NoApplicationProtocol"), "{error}");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Unreachable });
    });
}

#[test]
fn a_server_that_speaks_first_is_heard_cleaned_and_cut_with_the_rule() {
    world(|mut w| async move {
        start(&mut w);
        for (port, alpn) in [(443, &["imap"][..]), (993, &[])] {
            serve(port, w.ca.server(&["api.example"], alpn), |mut stream| async move {
                stream.write_all(format!("* OK {VALUE} ready\r\n").as_bytes()).await.unwrap();
                while let Ok(byte) = stream.read_u8().await {
                    // What is asked for ends with a line.
                    if byte == b'\n' {
                        stream.write_all(format!("* {VALUE} {LATER}\r\n").as_bytes()).await.unwrap();
                    }
                }
            })
            .await;
            let mut stream = w.tls((SERVER, port), "api.example", alpn).await.unwrap();
            assert!(w.is_opened(&stream));
            assert_eq!(until(&mut stream, "\r\n").await, "* OK IRONSH_PROXY_token ready\r\n");
            stream.write_all(b"a1 NOOP\r\n").await.unwrap();
            assert_eq!(until(&mut stream, "\r\n").await, format!("* IRONSH_PROXY_token {LATER}\r\n"));
            // A secret that comes to apply meanwhile is looked for as well: the server may hear of it elsewhere.
            let both: [(&str, &str, &[&str]); 2] =
                [("token", VALUE, &["api.example"]), ("later", LATER, &["api.example"])];
            w.rules(Mode::Enforce, &["api.example"], &both);
            stream.write_all(b"a2 NOOP\r\n").await.unwrap();
            assert_eq!(until(&mut stream, "\r\n").await, "* IRONSH_PROXY_token IRONSH_PROXY_later\r\n");
            w.rules(Mode::Enforce, &[], &[]);
            let _ = stream.read_to_end(&mut Vec::new()).await;
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Revoked });
            start(&mut w);
        }
    });
}

#[test]
fn http_to_a_server_that_spoke_first_is_not_passed_on() {
    world(|mut w| async move {
        start(&mut w);
        // HTTP/2 lets a server begin; what it answers would be compressed, and no value found in it.
        serve(443, w.ca.server(&["api.example"], &["foo"]), |mut stream| async move {
            stream.write_all(b"\0\0\0\x04\0\0\0\0\0").await.unwrap();
            let mut said = Vec::new();
            let _ = stream.read_to_end(&mut said).await;
            assert_eq!(said, b"");
        })
        .await;
        for begin in ["PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "GET / HTTP/1.1\r\n\r\n", "GET /\n"] {
            let mut stream = w.tls((SERVER, 443), "api.example", &["foo"]).await.unwrap();
            let mut settings = [0; 9];
            stream.read_exact(&mut settings).await.unwrap();
            assert_eq!(talk(stream, begin).await, "");
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::BadRequest }, "{begin:?}");
        }
    });
}

#[test]
fn an_upstream_that_cannot_be_verified_is_told_by_an_alert() {
    world(|mut w| async move {
        start(&mut w);
        serve(443, w.ca.server(&["another.example"], &["foo"]), |_| async {}).await;
        for (port, reason) in [(443, Reason::Unverified), (444, Reason::Unreachable)] {
            let error = w.tls((SERVER, port), "api.example", &["foo"]).await.unwrap_err();
            assert!(error.to_string().contains("InternalError"), "{error}");
            let event = w.event().await;
            assert_eq!((event.protocol, event.verdict), (Protocol::Tls, Verdict::Deny { reason }));
        }
        w.zone.set("gone.example", &[]);
        w.rules(Mode::Enforce, &["gone.example"], &[("token", VALUE, &["gone.example"])]);
        let error = w.tls((SERVER, 443), "gone.example", &["foo"]).await.unwrap_err();
        assert!(error.to_string().contains("UnrecognisedName"), "{error}");
        assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Unresolved });
    });
}

#[test]
fn a_server_that_wants_the_guests_certificate_gets_none_and_that_is_said() {
    world(|mut w| async move {
        start(&mut w);
        let mut roots = RootCertStore::empty();
        roots.add(w.ca.der.clone()).unwrap();
        let provider = support::ca::provider();
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let (cert, key) = w.ca.mint(&["api.example"]);
        for (port, version) in [(443, &rustls::version::TLS13), (444, &rustls::version::TLS12)] {
            let key = rustls_pki_types::PrivatePkcs8KeyDer::from(key.serialize_der()).into();
            let mut tls = ServerConfig::builder_with_provider(provider.clone())
                .with_protocol_versions(&[version])
                .unwrap()
                .with_client_cert_verifier(verifier.clone().build().unwrap())
                .with_single_cert(vec![cert.der().clone()], key)
                .unwrap();
            tls.alpn_protocols = vec![b"foo".to_vec()];
            serve(port, tls.into(), |_| async { panic!("it has no certificate") }).await;
            if let Ok(stream) = w.tls((SERVER, port), "api.example", &["foo"]).await {
                assert_eq!(talk(stream, "WHO\n").await, "");
            }
            assert_eq!(w.event().await.verdict, Verdict::Deny { reason: Reason::Unreachable }, "{port}");
        }
    });
}
