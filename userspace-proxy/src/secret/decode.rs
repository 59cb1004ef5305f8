//! Content codings of a response, undone as a stream so that values can be found in it (RFC 9110 §8.4).
//!
//! Must never buffer a body, and never let a coding pass that it cannot read.

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

/// Undoes the codings.
pub(crate) async fn decoded(codings: &[&'static str], body: Source) -> io::Result<Reader> {
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
            "br" => Box::pin(BrotliDecoder::new(body)),
            "zstd" => {
                let mut zstd = ZstdDecoder::with_params(body, &[DParameter::window_log_max(ZSTD_WINDOW)]);
                zstd.multiple_members(true);
                Box::pin(zstd)
            }
            _ => deflate(body).await?,
        };
        body = Box::pin(BufReader::new(reader));
    }
    Ok(body)
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
    use async_compression::tokio::bufread::{
        BrotliEncoder, DeflateEncoder, GzipEncoder, ZlibEncoder, ZstdEncoder,
    };
    use tokio::io::AsyncReadExt as _;

    async fn all(mut reader: impl AsyncRead + Unpin) -> Vec<u8> {
        let mut out = Vec::new();
        reader.read_to_end(&mut out).await.unwrap();
        out
    }

    fn source(bytes: Vec<u8>) -> Source {
        Box::pin(BufReader::new(io::Cursor::new(bytes)))
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
            assert!(all(decoded(&codings, source(bytes)).await.unwrap()).await == text, "{codings:?}");
        }
    }

    #[tokio::test]
    async fn nothing_is_nothing_in_every_coding() {
        for coding in KNOWN {
            assert!(all(decoded(&[coding], source(Vec::new())).await.unwrap()).await.is_empty(), "{coding}");
        }
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
