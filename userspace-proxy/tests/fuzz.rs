//! The fuzz targets' properties without a fuzzer: over the committed seeds, and over mutations of them that are the same in
//! every run. `TAPGATE_FUZZ_SECONDS` makes each target go on for so long from a fresh beginning.
#![allow(clippy::unwrap_used, reason = "tests")]

#[path = "../fuzz/cases/mod.rs"]
#[allow(clippy::expect_used, missing_docs, reason = "shared with the fuzz targets")]
mod cases;

use std::{
    panic::{AssertUnwindSafe, catch_unwind},
    path::Path,
    time::{Duration, Instant, SystemTime},
};

/// Mutations of each target in an ordinary run.
const MUTATIONS: usize = 20_000;
/// What parsers branch on.
const WORDS: &[&[u8]] = &[
    b"\r\n",
    b"\r\n\r\n",
    b"\n",
    b"\0",
    b" ",
    b"\t",
    b":",
    b"Host: a.example\r\n",
    b"Content-Length: 5\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"0\r\n\r\n",
    b"5\r\nhello\r\n",
    b"chunked",
    b"gzip",
    b"HTTP/1.1",
    b"GET / ",
    b"IRONSH_PROXY_a",
    b"IRONSH_PROXY_a-b",
    b"value-one",
    b"value-one-two",
    b"Basic ",
    b"xn--",
    b"%2e",
    b"[::1]",
    b"\x16\x03\x01",
    b"\x00\x00",
    b"\xff\xff",
    b"\xc0\x0c",
    b"@",
    b"#",
    b"..",
];

/// Marsaglia's xorshift: all that is needed is that it differs and can be repeated.
struct Random(u64);

impl Random {
    fn next(&mut self, below: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 >> 11).unwrap() % below.max(1)
    }

    fn mutate(&mut self, seeds: &[Vec<u8>]) -> Vec<u8> {
        let mut input = seeds[self.next(seeds.len())].clone();
        for _ in 0..=self.next(6) {
            let at = self.next(input.len() + 1);
            match self.next(7) {
                0 if at < input.len() => input[at] ^= 1 << self.next(8),
                1 if at < input.len() => input[at] = u8::try_from(self.next(256)).unwrap(),
                2 => input.truncate(at),
                3 => {
                    let end = at + self.next(input.len() - at + 1);
                    input.drain(at..end);
                }
                4 => {
                    let end = at + self.next((input.len() - at).min(64) + 1);
                    let piece = input[at..end].to_vec();
                    input.splice(at..at, piece);
                }
                5 => {
                    let other = &seeds[self.next(seeds.len())];
                    let from = self.next(other.len() + 1);
                    input.truncate(at);
                    input.extend_from_slice(&other[from..]);
                }
                _ => {
                    input.splice(at..at, WORDS[self.next(WORDS.len())].iter().copied());
                }
            }
        }
        input.truncate(4096);
        input
    }
}

fn run(target: &str, case: fn(&[u8])) {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/seeds").join(target);
    let seeds: Vec<Vec<u8>> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| std::fs::read(entry.unwrap().path()).unwrap())
        .collect();
    assert!(!seeds.is_empty());
    let seconds = std::env::var("TAPGATE_FUZZ_SECONDS").ok().map(|text| text.parse::<u64>().unwrap());
    let fresh = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_nanos();
    let mut random =
        Random(if seconds.is_some() { u64::try_from(fresh).unwrap() | 1 } else { 0x9e37_79b9_7f4a_7c15 });
    let until = Instant::now() + Duration::from_secs(seconds.unwrap_or(0));
    let mut count = 0usize;
    let try_one = |input: &[u8]| {
        if catch_unwind(AssertUnwindSafe(|| case(input))).is_err() {
            panic!("{target} does not hold for {:?}", input.escape_ascii().to_string());
        }
    };
    seeds.iter().for_each(|seed| try_one(seed));
    while count < MUTATIONS && seconds.is_none() || seconds.is_some() && Instant::now() < until {
        try_one(&random.mutate(&seeds));
        count += 1;
    }
    println!("{target}: {count} inputs");
}

#[test]
fn hello() {
    run("hello", cases::hello);
}

#[test]
fn head() {
    run("head", cases::head);
}

#[test]
fn guard() {
    run("guard", cases::guard);
}

#[test]
fn authority() {
    run("authority", cases::authority);
}

#[test]
fn substitute() {
    run("substitute", cases::substitute);
}

#[test]
fn clean() {
    run("clean", cases::clean);
}

#[test]
fn dns() {
    run("dns", cases::dns);
}
