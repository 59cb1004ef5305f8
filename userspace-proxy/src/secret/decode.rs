//! Content codings of a response, undone as a stream so that values can be found in it (RFC 9110 §8.4).
//!
//! Must never buffer a body, never let a coding pass that it cannot read, and never hold more for one than was taken for it.

use super::room::Room;
use async_compression::{
    tokio::bufread::{BrotliDecoder, DeflateDecoder, GzipDecoder, ZlibDecoder, ZstdDecoder},
    zstd::DParameter,
};
use http::{HeaderMap, HeaderValue, header};
use std::{io, pin::Pin};
use tokio::io::{AsyncBufRead, AsyncBufReadExt as _, AsyncRead, BufReader};

/// The codings that are asked of upstreams.
const KNOWN: [&str; 4] = ["gzip", "deflate", "br", "zstd"];
/// Codings on top of each other that are undone; more is an attack.
const DEEPEST: usize = 3;
/// Base-2 logarithm of the largest window that a zstd frame may ask memory for: what RFC 9659 grants it on the web.
const ZSTD_WINDOW: u32 = 23;
/// The same of br: the largest that RFC 7932 has.
const BR_WINDOW: u32 = 24;
/// What a decoder holds besides, in octets: a state, a block that is being put together, what was read ahead and is not passed on.
const ZSTD: usize = 512 * 1024;
/// And of br: three groups of 256 prefix codes, and half as much again where they grow.
const BR: usize = 5 * 1024 * 1024;
/// And of gzip and deflate, the window (32 KiB) included.
const DEFLATE: usize = 64 * 1024;

/// A coding that cannot be undone.
#[derive(Debug, thiserror::Error)]
#[error("the upstream answered in a content coding that cannot be read")]
pub(crate) struct Unreadable;

/// A body being read.
pub(crate) type Reader = Pin<Box<dyn AsyncRead + Send>>;
type Source = Pin<Box<dyn AsyncBufRead + Send>>;

/// Leaves of `Accept-Encoding` what can be undone here. Codings inside messages are not asked for at all: gRPC's own, and
/// those of WebSocket extensions.
pub(crate) fn restrict(headers: &mut HeaderMap) {
    if headers.contains_key("grpc-accept-encoding") {
        headers.insert("grpc-accept-encoding", HeaderValue::from_static("identity"));
    }
    headers.remove(header::SEC_WEBSOCKET_EXTENSIONS);
    if !headers.contains_key(header::ACCEPT_ENCODING) {
        // Without the field, any coding would be acceptable.
        headers.insert(header::ACCEPT_ENCODING, HeaderValue::from_static("identity"));
        return;
    }
    let offers: Vec<String> = headers
        .get_all(header::ACCEPT_ENCODING)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter(|offer| {
            let coding = offer.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
            KNOWN.contains(&coding.as_str()) || coding == "identity"
        })
        .map(|offer| offer.trim().to_owned())
        .collect();
    let offers = if offers.is_empty() { "identity".to_owned() } else { offers.join(", ") };
    if let Ok(value) = HeaderValue::from_str(&offers) {
        headers.insert(header::ACCEPT_ENCODING, value);
    }
}

/// The codings of a response, outermost last; empty if it is plain.
pub(crate) fn codings(headers: &HeaderMap) -> Result<Vec<&'static str>, Unreadable> {
    let mut codings = Vec::new();
    for value in headers.get_all(header::CONTENT_ENCODING) {
        for coding in value.to_str().map_err(|_| Unreadable)?.split(',') {
            let coding = coding.trim().to_ascii_lowercase();
            let coding = coding.strip_prefix("x-").unwrap_or(&coding);
            if coding.is_empty() || coding == "identity" {
                continue;
            }
            codings.push(*KNOWN.iter().find(|known| **known == coding).ok_or(Unreadable)?);
        }
    }
    if codings.len() > DEEPEST { Err(Unreadable) } else { Ok(codings) }
}

/// The most octets that undoing them can take.
pub(crate) fn needs(codings: &[&'static str]) -> usize {
    let each = codings.iter().map(|coding| match *coding {
        "br" => BR + (1 << BR_WINDOW),
        "zstd" => ZSTD + (1 << ZSTD_WINDOW),
        _ => DEFLATE,
    });
    each.sum()
}

/// Undoes the codings in the room that they [need](needs), and gives back what of it is not needed.
pub(crate) async fn decoded(codings: &[&'static str], body: Source, room: &mut Room) -> io::Result<Reader> {
    let mut body = body;
    if body.fill_buf().await?.is_empty() {
        // Some servers name a coding and send nothing, which no coding's form of nothing is.
        return Ok(body);
    }
    for coding in codings.iter().rev() {
        let reader: Reader = match *coding {
            "gzip" => {
                let mut gzip = GzipDecoder::new(body);
                gzip.multiple_members(true);
                Box::pin(gzip)
            }
            "br" => {
                let window = match body.fill_buf().await?.first() {
                    Some(first) => br_window(*first).ok_or_else(|| io::Error::other(Unreadable))?,
                    None => BR_WINDOW,
                };
                room.give_back((1 << BR_WINDOW) - (1 << window));
                Box::pin(BrotliDecoder::new(body))
            }
            "zstd" => {
                let window = zstd_window(body.fill_buf().await?);
                room.give_back((1 << ZSTD_WINDOW) - (1 << window));
                // Holds for the frames after the first too.
                let mut zstd = ZstdDecoder::with_params(body, &[DParameter::window_log_max(window)]);
                zstd.multiple_members(true);
                Box::pin(zstd)
            }
            _ => deflate(body).await?,
        };
        body = Box::pin(BufReader::new(reader));
    }
    Ok(body)
}

/// The logarithm of the window that a stream of br begins with (RFC 7932 §9.1). What is reserved there stands for windows of up to
/// 1 GiB in a later form of br, which is not asked for, and which the library would grant.
fn br_window(first: u8) -> Option<u32> {
    match (first & 1, first >> 1 & 7, first >> 4 & 7) {
        (0, ..) => Some(16),
        (_, 0, 0) => Some(17),
        (_, 0, 1) => None,
        (_, 0, n) => Some(8 + u32::from(n)),
        (_, n, _) => Some(17 + u32::from(n)),
    }
}

/// The logarithm of what holds the window of the frame that this begins (RFC 8878 §3.1.1), the most if that is not to be seen: a
/// frame that is its own window is a short one, and others with windows may follow.
fn zstd_window(start: &[u8]) -> u32 {
    match start {
        [0x28, 0xb5, 0x2f, 0xfd, descriptor, window, ..] if descriptor & 0x20 == 0 => {
            let log = 10 + u32::from(window >> 3) + u32::from(window & 7 != 0);
            log.min(ZSTD_WINDOW)
        }
        _ => ZSTD_WINDOW,
    }
}

/// `deflate` means zlib (RFC 9110 §8.4.1.2), but some servers send it bare. A zlib header is a multiple of 31.
async fn deflate(mut body: Source) -> io::Result<Reader> {
    let start = body.fill_buf().await?;
    let zlib = match start {
        [a, b, ..] => a & 0x0f == 8 && (u16::from(*a) << 8 | u16::from(*b)) % 31 == 0,
        [a] => a & 0x0f == 8,
        [] => true,
    };
    Ok(if zlib { Box::pin(ZlibDecoder::new(body)) } else { Box::pin(DeflateDecoder::new(body)) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::secret::room::Decoders;
    use async_compression::tokio::bufread::{
        BrotliEncoder, DeflateEncoder, GzipEncoder, ZlibEncoder, ZstdEncoder,
    };
    use std::time::Duration;
    use tokio::io::AsyncReadExt as _;

    async fn all(mut reader: impl AsyncRead + Unpin) -> Vec<u8> {
        let mut out = Vec::new();
        reader.read_to_end(&mut out).await.unwrap();
        out
    }

    fn source(bytes: Vec<u8>) -> Source {
        Box::pin(BufReader::new(io::Cursor::new(bytes)))
    }

    async fn decode(codings: &[&'static str], bytes: Vec<u8>) -> io::Result<Vec<u8>> {
        let mut room = Decoders::default().take(needs(codings), Duration::ZERO).await.unwrap();
        let mut out = Vec::new();
        decoded(codings, source(bytes), &mut room).await?.read_to_end(&mut out).await?;
        Ok(out)
    }

    #[tokio::test]
    async fn every_coding_is_undone() {
        let text = "a secret value ".repeat(1000).into_bytes();
        let input = || text.as_slice();
        let gzip = all(GzipEncoder::new(input())).await;
        for (codings, bytes) in [
            (vec!["gzip"], gzip.clone()),
            (vec!["gzip"], [gzip.clone(), all(GzipEncoder::new(&b""[..])).await].concat()),
            (vec!["deflate"], all(ZlibEncoder::new(input())).await),
            (vec!["deflate"], all(DeflateEncoder::new(input())).await),
            (vec!["br"], all(BrotliEncoder::new(input())).await),
            (vec!["zstd"], all(ZstdEncoder::new(input())).await),
            (vec!["gzip", "br"], all(BrotliEncoder::new(gzip.as_slice())).await),
            (vec![], text.clone()),
        ] {
            assert!(decode(&codings, bytes).await.unwrap() == text, "{codings:?}");
        }
    }

    #[tokio::test]
    async fn nothing_is_nothing_in_every_coding() {
        for coding in KNOWN {
            assert!(decode(&[coding], Vec::new()).await.unwrap().is_empty(), "{coding}");
        }
    }

    #[tokio::test]
    async fn a_window_is_what_the_stream_says_and_none_is_larger_than_may_be() {
        // Every header of RFC 7932 §9.1; large windows are none.
        for (first, window) in [
            (0x00, Some(16)),
            (0x21, Some(10)),
            (0x71, Some(15)),
            (0x01, Some(17)),
            (0x03, Some(18)),
            (0x0b, Some(22)),
            (0x0f, Some(24)),
            (0x11, None),
            (0x91, None),
        ] {
            assert_eq!(br_window(first), window, "{first:#x}");
        }
        // Large windows: 2^30, then an empty last metablock. The library takes it.
        assert!(decode(&["br"], vec![0x11, 0xde, 0x00]).await.is_err());
        // A frame with a window, and a block of one octet repeated.
        let frame = |window: u8, length: u32| {
            [&[0x28, 0xb5, 0x2f, 0xfd, 0, window][..], &(length << 3 | 3).to_le_bytes()[..3], b"a"].concat()
        };
        assert_eq!([0x00, 0x01, 0x58, 0x68, 0xf8].map(|w| zstd_window(&frame(w, 1))), [10, 11, 21, 23, 23]);
        assert_eq!(zstd_window(&[0x28, 0xb5, 0x2f, 0xfd, 0x20, 1]), ZSTD_WINDOW);
        assert_eq!(decode(&["zstd"], frame(0x68, 1000)).await.unwrap().len(), 1000);
        assert!(decode(&["zstd"], frame(0x70, 1000)).await.is_err(), "16 MiB");
        let (two, larger) = ([frame(0x58, 9), frame(0x50, 9)], [frame(0x50, 9), frame(0x68, 9)]);
        assert_eq!(decode(&["zstd"], two.concat()).await.unwrap().len(), 18);
        assert!(decode(&["zstd"], larger.concat()).await.is_err(), "no larger than the first one's");
    }

    #[test]
    fn only_known_codings_are_asked_for_and_taken() {
        let mut headers = HeaderMap::new();
        restrict(&mut headers);
        assert_eq!(headers[header::ACCEPT_ENCODING], "identity");
        headers.insert(header::ACCEPT_ENCODING, "gzip;q=0.5, compress, dcz, *;q=0.1, BR".parse().unwrap());
        headers.insert("grpc-accept-encoding", "gzip".parse().unwrap());
        restrict(&mut headers);
        assert_eq!(headers["grpc-accept-encoding"], "identity");
        assert_eq!(headers[header::ACCEPT_ENCODING], "gzip;q=0.5, BR");
        for (value, count) in [
            ("gzip", Some(1)),
            ("x-gzip, BR", Some(2)),
            ("identity", Some(0)),
            ("compress", None),
            ("gzip,gzip,gzip,gzip", None),
        ] {
            headers.insert(header::CONTENT_ENCODING, value.parse().unwrap());
            assert_eq!(codings(&headers).ok().map(|all| all.len()), count, "{value}");
        }
    }
}
