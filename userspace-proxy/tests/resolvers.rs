//! Name servers over TLS and HTTPS, verified by name, and the next one where one fails.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use http::{Request, Response};
use http_body_util::{BodyExt as _, Full};
use hyper_util::rt::{TokioExecutor, TokioIo};
use std::convert::Infallible;
use support::{RESOLVER, SERVER, World, world};
use tapgate_model::{Mode, Reason, Verdict};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

/// DNS over TLS on port 853 and over HTTPS on 443, both for `dns.example`.
async fn encrypted(w: &World) {
    let (zone, config) = (w.zone.clone(), w.ca.server(&["dns.example"], &["dot"]));
    let listener = TcpListener::bind((RESOLVER, 853)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (zone, config) = (zone.clone(), config.clone());
            tokio::spawn(async move {
                let Ok(mut stream) = tokio_rustls::TlsAcceptor::from(config).accept(stream).await else {
                    return;
                };
                while let Ok(length) = stream.read_u16().await {
                    let mut question = vec![0; length.into()];
                    stream.read_exact(&mut question).await.unwrap();
                    let answer = zone.answer(&question);
                    let length = u16::try_from(answer.len()).unwrap().to_be_bytes();
                    stream.write_all(&[&length[..], &answer].concat()).await.unwrap();
                }
            });
        }
    });
    let (zone, config) = (w.zone.clone(), w.ca.server(&["dns.example"], &["h2"]));
    let listener = TcpListener::bind((RESOLVER, 443)).await.unwrap();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let (zone, config) = (zone.clone(), config.clone());
            tokio::spawn(async move {
                let Ok(stream) = tokio_rustls::TlsAcceptor::from(config).accept(stream).await else { return };
                let service = hyper::service::service_fn(move |request: Request<hyper::body::Incoming>| {
                    let zone = zone.clone();
                    async move {
                        assert_eq!(request.uri().path(), "/q");
                        let question = request.into_body().collect().await.unwrap().to_bytes();
                        let answer = Bytes::from(zone.answer(&question));
                        let response = Response::builder().header("content-type", "application/dns-message");
                        Ok::<_, Infallible>(response.body(Full::new(answer)).unwrap())
                    }
                });
                let _ = hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    });
}

#[test]
fn names_are_asked_over_tls_and_https_and_of_the_next_where_one_fails() {
    world(|mut w| async move {
        encrypted(&w).await;
        w.zone.set("api.example", &[SERVER]);
        w.serve((SERVER, 80), None).await;
        w.rules(Mode::Enforce, &["api.example"], &[]);
        let ask = "GET / HTTP/1.1\r\nHost: api.example\r\nConnection: close\r\n\r\n";
        for (resolvers, good) in [
            (vec!["tls://203.0.113.53#dns.example"], true),
            (vec!["https://203.0.113.53/q#dns.example"], true),
            // Nobody listens at the first.
            (vec!["203.0.113.53:5399", "tls://203.0.113.53#dns.example"], true),
            (vec!["tls://203.0.113.53:8530#dns.example", "203.0.113.53:5300"], true),
            // Whoever answers there is not who was meant.
            (vec!["tls://203.0.113.53#other.example"], false),
            (vec!["https://203.0.113.53/q#other.example"], false),
        ] {
            let mut config = support::config(&w.ca);
            config.resolvers = resolvers.iter().map(|text| text.parse().unwrap()).collect();
            w.restart(config);
            let answer = w.http((SERVER, 80), ask).await;
            let event = w.event().await;
            if good {
                assert!(answer.starts_with("HTTP/1.1 200"), "{resolvers:?}: {answer}");
            } else {
                assert!(answer.starts_with("HTTP/1.1 502"), "{resolvers:?}: {answer}");
                assert_eq!(event.verdict, Verdict::Deny { reason: Reason::Unresolved });
            }
        }
    });
}
