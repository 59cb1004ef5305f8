//! Properties of the parsers, of substitution and of cleaning, over generated input.
#![allow(clippy::unwrap_used, reason = "tests")]

use http::{HeaderMap, header};
use proptest::{collection::vec, prelude::*};
use std::{io, sync::Arc};
use tapgate_model::{
    HostName, Mode, RuleSet, SecretBinding, SecretValue, UserId, VmId, VmPolicy, policy::SecretsOverHttp,
};
use tapgate_proxy::internal::{
    Authority, Channel, Cleaner, Framing, GuardedIo, HelloReader, Named, Patterns, check_head,
    substitute_headers,
};
use tokio::io::AsyncReadExt as _;

fn secrets(all: &[(String, String)]) -> Arc<[SecretBinding]> {
    let bind = |(name, value): &(String, String)| SecretBinding {
        name: name.clone(),
        env_var: "X".into(),
        hosts: vec!["*".parse().unwrap()],
        value: SecretValue::new(value.as_bytes().to_vec()).unwrap(),
    };
    all.iter().map(bind).collect()
}

fn policy(all: &[(String, String)]) -> VmPolicy {
    VmPolicy {
        vm: VmId::generate(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Enforce,
        rules: RuleSet::default(),
        secrets: secrets(all),
        secrets_over_http: SecretsOverHttp::default(),
    }
}

/// Bytes that resemble requests more than noise does.
fn requestish() -> impl Strategy<Value = Vec<u8>> {
    let words = [
        "GET ",
        "POST ",
        "/",
        "*",
        " HTTP/1.1\r\n",
        " HTTP/1.0\r\n",
        "\r\n",
        "\n",
        "\r",
        "Host: a.example\r\n",
        "Host: b\r\n",
        "Content-Length: 3\r\n",
        "Content-Length: 0\r\n",
        "Transfer-Encoding: chunked\r\n",
        "abc",
        "3\r\nabc\r\n",
        "0\r\n\r\n",
        "3;x\r\n",
        "X: y\r\n",
        " folded\r\n",
        "Upgrade: websocket\r\n",
        "\0",
        ": ",
        "http://a.example/",
        "GET / HTTP/1.1\r\nHost: a.example\r\n\r\n",
        "POST / HTTP/1.1\r\nHost: a.example\r\nTransfer-Encoding: chunked\r\n\r\n",
    ];
    vec(prop::sample::select(words.to_vec()), 0..24).prop_map(|words| words.concat().into_bytes())
}

async fn guarded(input: &[u8], size: usize) -> (Vec<u8>, Vec<bool>) {
    let chunks: Vec<io::Result<bytes::Bytes>> =
        input.chunks(size).map(|chunk| Ok(bytes::Bytes::copy_from_slice(chunk))).collect();
    let mut io = GuardedIo::new(tokio_util::io::StreamReader::new(futures_util::stream::iter(chunks)));
    let refusal = io.refusal();
    let mut all = Vec::new();
    io.read_to_end(&mut all).await.unwrap();
    (all, (0..32).map(|n| refusal.of(n).is_some()).collect())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// What is decided on is what the URL library dials and the certificate is asked for.
    #[test]
    fn a_host_has_one_reading(text in "[a-cA-C0-9.:@\\[\\]%_ -]{0,24}") {
        if let Ok(Authority { host: Named::Name(name), port }) = Authority::parse(text.as_bytes()) {
            prop_assert_eq!(HostName::parse_wire(name.as_str().as_bytes()), Ok(name.clone()));
            let uri: http::uri::Authority = text.parse().unwrap();
            let host = uri.host().to_ascii_lowercase();
            prop_assert_eq!(host.strip_suffix('.').unwrap_or(&host), name.as_str());
            prop_assert_eq!(uri.port_u16(), port);
            prop_assert!(rustls_pki_types::ServerName::try_from(name.as_str().to_owned())
                .is_ok_and(|n| matches!(n, rustls_pki_types::ServerName::DnsName(_))));
        }
    }

    #[test]
    fn noise_never_panics(bytes in vec(any::<u8>(), 0..600)) {
        let _ = Authority::parse(&bytes);
        let _ = check_head(&bytes);
        let _ = HelloReader::default().advance(&bytes);
        let record = [&[22, 3, 1, (bytes.len() >> 8) as u8, bytes.len() as u8, 1, 0][..], &bytes].concat();
        let _ = HelloReader::default().advance(&record);
    }

    /// A head that passes has one line for each field, one Host, and one length.
    #[test]
    fn a_head_that_passes_is_plain(bytes in requestish()) {
        if let Ok(head) = check_head(&bytes) {
            let text = std::str::from_utf8(&bytes).unwrap();
            prop_assert_eq!(text.matches("\r\n\r\n").count(), 1);
            prop_assert!(text.matches("Host:").count() <= 1);
            let length = text.contains("Content-Length: 3");
            let chunked = text.contains("Transfer-Encoding");
            prop_assert_eq!(head.framing == Framing::Chunked, chunked);
            prop_assert_eq!(head.framing == Framing::Length(3), length);
            prop_assert!(!(length && chunked));
        }
    }

    /// How the network splits a stream changes nothing of what the library sees.
    #[test]
    fn the_guard_reads_the_same_however_split(bytes in requestish(), size in 1usize..40) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let (whole, parts) = runtime.block_on(async { (guarded(&bytes, 4096).await, guarded(&bytes, size).await) });
        prop_assert_eq!(whole, parts);
    }

    /// Chunk borders change nothing, and no value is left.
    #[test]
    fn cleaning_finds_every_value_across_every_border(
        values in vec("[ab/\"]{4,8}", 1..4),
        text in "[ab/\" c]{0,80}",
        sizes in vec(1usize..9, 1..20),
    ) {
        let named: Vec<_> = values.iter().enumerate().map(|(n, value)| (format!("s{n}"), value.clone())).collect();
        let patterns = Patterns::new(secrets(&named).iter()).unwrap().unwrap();
        let mut cleaner = Cleaner::new(patterns.clone());
        let (mut out, mut rest) = (Vec::new(), text.as_bytes());
        let mut impatient = Cleaner::new(patterns.clone());
        let mut shown = Vec::new();
        for size in sizes.iter().cycle() {
            if rest.is_empty() {
                break;
            }
            let (chunk, after) = rest.split_at(rest.len().min(*size));
            shown.extend(impatient.feed(chunk));
            shown.extend(impatient.show());
            out.extend(cleaner.feed(chunk));
            rest = after;
        }
        out.extend(cleaner.finish());
        let whole = patterns.clean_whole(text.as_bytes()).unwrap_or_else(|| text.clone().into_bytes());
        prop_assert_eq!(&out, &whole);
        shown.extend(impatient.finish());
        let (out, shown) = (String::from_utf8(out).unwrap(), String::from_utf8(shown).unwrap());
        prop_assert_eq!(out.contains("IRONSH_PROXY_"), shown.contains("IRONSH_PROXY_"));
        for value in &values {
            prop_assert!(!shown.contains(value.as_str()), "{:?} is left in {:?}", value, shown);
            prop_assert!(!out.contains(value.as_str()), "{:?} is left in {:?}", value, out);
        }
    }

    /// What is looked for in two sets is found as if it were one.
    #[test]
    fn two_sets_find_what_one_would(
        values in vec("[ab]{4,7}", 2..6),
        text in "[abc]{0,60}",
        size in 1usize..20,
    ) {
        let named = |from: usize, values: &[String]| -> Vec<_> {
            let named = values.iter().enumerate();
            named.map(|(n, value)| (value.clone().into_bytes().into(), format!("<{}>", from + n).into_bytes())).collect()
        };
        let (one, other) = values.split_at(values.len() / 2);
        let all = Patterns::with(None, named(0, &values)).unwrap().unwrap();
        let base = Patterns::with(None, named(0, one)).unwrap();
        let both = Patterns::with(base, named(one.len(), other)).unwrap().unwrap();
        let clean = |patterns| {
            let mut cleaner = Cleaner::new(patterns);
            let mut out: Vec<u8> = text.as_bytes().chunks(size).flat_map(|chunk| cleaner.feed(chunk)).collect();
            out.extend(cleaner.finish());
            String::from_utf8(out).unwrap()
        };
        prop_assert_eq!(clean(both), clean(all));
    }

    /// Whole placeholders become values, once; everything else stays as it is.
    #[test]
    fn substitution_replaces_whole_placeholders_once(
        parts in vec(prop::sample::select(vec!["IRONSH_PROXY_a", "IRONSH_PROXY_b", "IRONSH_PROXY_", "a", "b", "-", "_", " ", ".", ":"]), 0..12),
    ) {
        let policy = policy(&[("a".into(), "one two".into()), ("b".into(), "IRONSH PROXY".into())]);
        let text = parts.concat();
        let mut headers = HeaderMap::new();
        let Ok(value) = text.parse::<http::HeaderValue>() else { return Ok(()) };
        headers.insert(header::COOKIE, value);
        let host = "a.example".parse().unwrap();
        substitute_headers(&mut headers, &policy, &host, Channel::Verified).unwrap();
        let mut expected = String::new();
        let mut rest = text.as_str();
        while let Some((before, after)) = rest.split_once("IRONSH_PROXY_") {
            expected += before;
            let end = after.find(|c: char| !c.is_ascii_alphanumeric() && c != '_' && c != '-').unwrap_or(after.len());
            expected += match &after[..end] {
                "a" => "one two",
                "b" => "IRONSH PROXY",
                _ => &rest[before.len()..before.len() + 13 + end],
            };
            rest = &after[end..];
        }
        expected += rest;
        prop_assert_eq!(headers[header::COOKIE].to_str().unwrap(), expected);
    }
}
