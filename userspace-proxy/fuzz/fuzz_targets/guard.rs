//! HTTP/1 framing: how the network splits a stream changes nothing of what the library sees.
#![no_main]

use libfuzzer_sys::fuzz_target;
use std::io;
use tapgate_proxy::internal::GuardedIo;
use tokio::io::AsyncReadExt as _;

async fn through(input: &[u8], size: usize) -> Vec<u8> {
    let chunks: Vec<io::Result<bytes::Bytes>> =
        input.chunks(size).map(|chunk| Ok(bytes::Bytes::copy_from_slice(chunk))).collect();
    let mut guarded = GuardedIo::new(tokio_util::io::StreamReader::new(futures_util::stream::iter(chunks)));
    let mut all = Vec::new();
    guarded.read_to_end(&mut all).await.expect("reading from memory");
    all
}

fuzz_target!(|input: (u8, &[u8])| {
    let (size, bytes) = input;
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(async {
        assert_eq!(through(bytes, bytes.len().max(1)).await, through(bytes, usize::from(size).max(1)).await);
    });
});
