//! HTTP/2: what becomes of one half of an exchange when the other ends.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use bytes::Bytes;
use h2::{
    Reason, RecvStream,
    client::SendRequest,
    server::{Connection, SendResponse},
};
use http::{Request, Response};
use std::{future::poll_fn, time::Duration};
use support::{SERVER, World, world};
use tapgate_model::Mode;
use tokio::{
    net::{TcpListener, TcpStream},
    sync::mpsc::{UnboundedReceiver, unbounded_channel},
    time::timeout,
};

/// For what otherwise never comes.
const PATIENCE: Duration = Duration::from_secs(20);

type Asked = (Request<RecvStream>, SendResponse<Bytes>);

/// A server whose requests are answered by the test; with each comes the number of its connection. The first is closed after so
/// many requests.
async fn serve(w: &mut World, first: usize) -> UnboundedReceiver<(usize, Asked)> {
    w.zone.set("api.example", &[SERVER]);
    w.rules(Mode::Enforce, &["api.example"], &[]);
    let listener = TcpListener::bind((SERVER, 80)).await.unwrap();
    let (asked, requests) = unbounded_channel();
    tokio::spawn(async move {
        for number in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            let asked = asked.clone();
            tokio::spawn(async move {
                let mut connection: Connection<TcpStream, Bytes> =
                    h2::server::handshake(stream).await.unwrap();
                let mut count = 0;
                while let Some(Ok(request)) = connection.accept().await {
                    asked.send((number, request)).unwrap();
                    count += 1;
                    if (number, count) == (0, first) {
                        connection.graceful_shutdown();
                    }
                }
            });
        }
    });
    requests
}

async fn begin(w: &World) -> SendRequest<Bytes> {
    let (sender, connection) = h2::client::handshake(w.connect((SERVER, 80)).await).await.unwrap();
    tokio::spawn(connection);
    sender.ready().await.unwrap()
}

fn post() -> Request<()> {
    Request::post("http://api.example/").body(()).unwrap()
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(PATIENCE, what).await.expect("it comes")
}

#[test]
fn a_guest_that_gives_up_is_followed_by_its_upload_and_its_answer() {
    world(|mut w| async move {
        let mut requests = serve(&mut w, usize::MAX).await;
        let mut sender = begin(&w).await;
        for answered in [false, true] {
            let (answer, mut body) = sender.send_request(post(), false).unwrap();
            body.send_data(Bytes::from_static(b"first"), false).unwrap();
            let (_, (request, mut respond)) = soon(requests.recv()).await.unwrap();
            let mut upload = request.into_body();
            assert_eq!(soon(upload.data()).await.unwrap().unwrap(), "first");
            if answered {
                let mut sent = respond.send_response(Response::new(()), false).unwrap();
                sent.send_data(Bytes::from_static(b"answer"), false).unwrap();
                let mut got = soon(answer).await.unwrap().into_body();
                assert_eq!(soon(got.data()).await.unwrap().unwrap(), "answer");
                body.send_reset(Reason::CANCEL);
                assert_eq!(soon(poll_fn(|cx| sent.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
            } else {
                body.send_reset(Reason::CANCEL);
                assert_eq!(soon(poll_fn(|cx| respond.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
            }
            assert!(soon(upload.data()).await.unwrap().is_err());
        }
        assert_eq!(w.events(2).await.len(), 2);
        // An answer that has stopped, to a request that was whole.
        let (answer, mut body) = sender.send_request(post(), true).unwrap();
        let (_, (_, mut respond)) = soon(requests.recv()).await.unwrap();
        let mut sent = respond.send_response(Response::new(()), false).unwrap();
        let _got = soon(answer).await.unwrap();
        body.send_reset(Reason::CANCEL);
        assert_eq!(soon(poll_fn(|cx| sent.poll_reset(cx))).await.unwrap(), Reason::CANCEL);
        assert_eq!(w.events(3).await.len(), 3);
    });
}

#[test]
fn an_upload_goes_on_after_its_answer_began_and_both_ways_are_independent() {
    world(|mut w| async move {
        let mut requests = serve(&mut w, usize::MAX).await;
        let mut sender = begin(&w).await;
        let (answer, mut body) = sender.send_request(post(), false).unwrap();
        let (_, (request, mut respond)) = soon(requests.recv()).await.unwrap();
        let mut sent = respond.send_response(Response::new(()), false).unwrap();
        let (mut upload, mut got) = (request.into_body(), soon(answer).await.unwrap().into_body());
        for word in ["one", "two"] {
            sent.send_data(Bytes::from_static(word.as_bytes()), false).unwrap();
            assert_eq!(soon(got.data()).await.unwrap().unwrap(), word);
            body.send_data(Bytes::from_static(word.as_bytes()), false).unwrap();
            assert_eq!(soon(upload.data()).await.unwrap().unwrap(), word);
        }
        sent.send_data(Bytes::new(), true).unwrap();
        assert!(soon(got.data()).await.is_none_or(|rest| rest.unwrap().is_empty()));
        body.send_data(Bytes::from_static(b"three"), true).unwrap();
        assert_eq!(soon(upload.data()).await.unwrap().unwrap(), "three");
        assert!(soon(upload.data()).await.is_none());
    });
}

#[test]
fn a_reset_by_the_server_says_the_same_to_the_guest() {
    world(|mut w| async move {
        let mut requests = serve(&mut w, usize::MAX).await;
        let mut sender = begin(&w).await;
        let (answer, mut body) = sender.send_request(post(), false).unwrap();
        let (_, (_request, mut respond)) = soon(requests.recv()).await.unwrap();
        let mut sent = respond.send_response(Response::new(()), false).unwrap();
        let mut got = soon(answer).await.unwrap().into_body();
        sent.send_reset(Reason::ENHANCE_YOUR_CALM);
        let error = soon(got.data()).await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(Reason::ENHANCE_YOUR_CALM));
        let reset = soon(poll_fn(|cx| body.poll_reset(cx))).await.unwrap();
        assert_eq!(reset, Reason::ENHANCE_YOUR_CALM);
        assert_eq!(w.events(1).await.len(), 1);
    });
}

#[test]
fn what_a_server_does_not_take_is_not_taken_from_the_guest() {
    world(|mut w| async move {
        let mut requests = serve(&mut w, usize::MAX).await;
        let mut sender = begin(&w).await;
        for answered in [false, true] {
            let (answer, mut body) = sender.send_request(post(), false).unwrap();
            let (_, (_upload, mut respond)) = soon(requests.recv()).await.unwrap();
            let mut sent = None;
            let mut got = None;
            if answered {
                sent = Some(respond.send_response(Response::new(()), false).unwrap());
                got = Some(soon(answer).await.unwrap());
            }
            // The server reads nothing of it: the windows of both sides are what may be on the way.
            let mut taken = 0;
            body.reserve_capacity(64 << 20);
            while let Ok(Some(room)) =
                timeout(Duration::from_secs(1), poll_fn(|cx| body.poll_capacity(cx))).await
            {
                let room = room.unwrap();
                body.send_data(vec![0; room].into(), false).unwrap();
                taken += room;
                body.reserve_capacity(64 << 20);
            }
            assert!((65_535..4 << 20).contains(&taken), "{taken}");
            // Whoever gives up is followed all the same.
            body.send_reset(Reason::CANCEL);
            let reset = poll_fn(|cx| match &mut sent {
                Some(sent) => sent.poll_reset(cx),
                None => respond.poll_reset(cx),
            });
            assert_eq!(soon(reset).await.unwrap(), Reason::CANCEL);
            drop(got);
        }
    });
}

#[test]
fn a_connection_that_ends_between_requests_is_replaced() {
    world(|mut w| async move {
        let mut requests = serve(&mut w, 1).await;
        let mut sender = begin(&w).await;
        for connection in [0, 1, 1] {
            let (answer, mut body) = sender.send_request(post(), false).unwrap();
            body.send_data(Bytes::from_static(b"content"), true).unwrap();
            let (number, (_, mut respond)) = soon(requests.recv()).await.unwrap();
            assert_eq!(number, connection);
            respond.send_response(Response::new(()), true).unwrap();
            assert_eq!(soon(answer).await.unwrap().status(), 200);
            // Until the end is known here, whoever asks may be told that it is not known what became of it.
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    });
}
