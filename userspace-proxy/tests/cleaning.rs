//! What comes back is cleaned, and the cleaning itself tells nothing: neither by what is replaced nor by what is held back.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use support::{OTHER, SERVER, World, world};
use tapgate_model::Mode;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
};

const VALUE: &str = "ghp_realvalue0123456789";

/// `api.example` at SERVER, with a secret; `other.example` at OTHER, which it is not for.
fn start(w: &mut World) {
    w.zone.set("api.example", &[SERVER]);
    w.zone.set("other.example", &[OTHER]);
    w.rules(Mode::Enforce, &["api.example", "other.example"], &[("token", VALUE, &["api.example"])]);
}

fn request(host: &str, extra: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "POST /echo HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\nContent-Length: {length}\r\n{extra}\r\n{body}"
    )
}

/// The chunks so far of an answer in chunks of one line.
fn content(answer: &[u8]) -> String {
    let text = String::from_utf8_lossy(answer);
    let (_, chunks) = text.split_once("\r\n\r\n").unwrap_or_default();
    chunks.split("\r\n").skip(1).step_by(2).collect()
}

/// What the guest sees of an answer that begins with this and stands still until the guest has seen all of it or, where
/// `breaks`, breaks off.
async fn seen(w: &World, listener: &TcpListener, text: &str, breaks: bool) -> String {
    let server = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 1024];
        assert!(stream.read(&mut head).await.unwrap() > 0);
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n{text}");
        stream.write_all(answer.as_bytes()).await.unwrap();
        stream
    };
    let guest = async {
        let mut guest = w.connect((SERVER, 80)).await;
        guest.write_all(b"GET / HTTP/1.1\r\nHost: api.example\r\n\r\n").await.unwrap();
        guest
    };
    let (stream, mut guest) = tokio::join!(server, guest);
    if breaks {
        drop(stream);
        let mut all = Vec::new();
        let _ = guest.read_to_end(&mut all).await;
        return content(&all);
    }
    let mut all = Vec::new();
    let patience = std::time::Duration::from_secs(10);
    let read = async {
        while content(&all) != text {
            all.push(guest.read_u8().await.unwrap());
        }
    };
    assert!(tokio::time::timeout(patience, read).await.is_ok(), "{text} is held back");
    text.to_owned()
}

#[test]
fn a_server_and_a_guest_do_not_find_out_how_a_value_goes_on() {
    world(|mut w| async move {
        start(&mut w);
        let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
        for known in [1, 4, 7, 10] {
            let right = format!("= {}", &VALUE[..=known]);
            let wrong = format!("= {}~", &VALUE[..known]);
            // Were the right one held back for what follows, it would not come.
            assert_eq!(seen(&w, &listener, &right, false).await, right);
            assert_eq!(seen(&w, &listener, &wrong, false).await, wrong);
            let (right, wrong) =
                (seen(&w, &listener, &right, true).await, seen(&w, &listener, &wrong, true).await);
            assert_eq!(right.replace(&VALUE[known..=known], "?"), wrong.replace('~', "?"), "after {known}");
        }
    });
}

#[test]
fn what_a_host_cannot_have_been_sent_is_not_looked_for_in_its_answers() {
    world(|mut w| async move {
        start(&mut w);
        w.serve((SERVER, 80), None).await;
        w.serve((OTHER, 80), None).await;
        let guess = format!("is it {VALUE}?");
        let ask = |host: &str| request(host, "", &guess);
        let answer = w.http((SERVER, 80), &ask("api.example")).await;
        assert!(answer.contains("is it IRONSH_PROXY_token?") && !answer.contains(VALUE), "{answer}");
        // Its own guest wrote it, and nobody learns from it whether it was right.
        let answer = w.http((OTHER, 80), &ask("other.example")).await;
        assert!(answer.contains(&guess), "{answer}");
        // What is tolerated is sent nothing through `*`; what a secret names may have been sent it before.
        w.rules(Mode::Warn, &[], &[("token", VALUE, &["*"])]);
        let answer = w.http((OTHER, 80), &ask("other.example")).await;
        assert!(answer.contains(&guess), "{answer}");
    });
}

#[test]
fn what_a_host_was_sent_before_comes_back_neither_in_parts_nor_in_base64() {
    world(|mut w| async move {
        start(&mut w);
        w.serve((SERVER, 443), Some(w.ca.server(&["api.example"], &["http/1.1"]))).await;
        w.serve((OTHER, 80), None).await;
        let range = "Range: bytes=0-9\r\nIf-Range: \"x\"\r\n";
        w.https((SERVER, 443), "api.example", &request("api.example", range, "")).await;
        w.http((OTHER, 80), &request("other.example", range, "")).await;
        let seen = w.log.seen();
        assert_eq!((seen[0].header("range"), seen[0].header("if-range")), (None, None));
        assert_eq!(seen[1].header("range"), Some("bytes=0-9"), "nothing to look for there");
        for user in ["git", "x", "oauth2"] {
            let stored = STANDARD.encode(format!("{user}:{VALUE}"));
            let ask = request("api.example", "", &format!("Basic {stored}"));
            let answer = w.https((SERVER, 443), "api.example", &ask).await;
            assert!(answer.contains("IRONSH_PROXY_token") && !answer.contains(&stored), "{answer}");
        }
    });
}
