//! DNS over TCP: two octets of length before each message (RFC 7766). Bounded in messages and patience.

use super::{
    answer::{Asker, Transport, answer_within_bounds},
    flood,
};
use crate::{
    conn::{Accepted, reset},
    proxy::Shared,
};
use std::{net::SocketAddr, sync::Arc, time::Duration};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    time::timeout,
};

/// Between two questions.
const IDLE: Duration = Duration::from_secs(10);
/// Questions on one connection.
const MOST: usize = 256;
/// Longest question: a name, a type and EDNS options.
const MAX_QUESTION: usize = 4096;

/// Answers what comes on one connection.
pub(crate) async fn serve(shared: Arc<Shared>, accepted: Accepted) {
    let Accepted { mut stream, guest, destination } = accepted;
    let Some(entry) = shared.table.by_address(guest.ip()) else { return };
    let to = SocketAddr::new(destination.ip().to_canonical(), destination.port());
    let Some(_slot) = entry.admit() else {
        Asker { shared: &shared, entry: &entry, to }.limited(1);
        return reset(&stream);
    };
    let talk = async {
        for _ in 0..MOST {
            let Ok(Ok(length)) = timeout(IDLE, stream.read_u16()).await else { return };
            let asker = Asker { shared: &shared, entry: &entry, to };
            let mut message = vec![0; usize::from(length)];
            if message.len() > MAX_QUESTION {
                return asker.malformed();
            }
            let Ok(Ok(_)) = timeout(IDLE, stream.read_exact(&mut message)).await else { return };
            if !flood::admit(&asker) {
                return reset(&stream);
            }
            let reply = answer_within_bounds(asker, &message, Transport::Tcp).await;
            let Some(reply) = reply else { return };
            let Ok(length) = u16::try_from(reply.len()) else { return };
            let framed = [&length.to_be_bytes(), reply.as_slice()].concat();
            let Ok(Ok(())) = timeout(IDLE, stream.write_all(&framed)).await else { return };
        }
    };
    tokio::select! {
        () = talk => {}
        () = shared.stop.cancelled() => {}
    }
}
