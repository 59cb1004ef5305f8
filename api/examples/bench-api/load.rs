//! The load: requests that are due at a fixed rate, whether the ones before were answered or not, and how long each took from
//! when it was due. So a daemon that stalls pays for every request that it kept waiting.

use bytes::Bytes;
use http_body_util::{BodyExt as _, Full};
use hyper::{Method, Request};
use hyper_util::{client::legacy::Client, rt::TokioExecutor};
use serde::{Deserialize, Serialize};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Connections that are kept open.
const CONNECTIONS: usize = 32;
/// Before it counts.
const WARM_UP: Duration = Duration::from_secs(1);

/// What came of it, in microseconds.
#[derive(Serialize, Deserialize)]
pub struct Figures {
    pub rate: u32,
    pub p50: u64,
    pub p99: u64,
    pub worst: u64,
    pub failed: u64,
}

const READS: [&str; 6] = [
    "/v1/env/K7",
    "/v1/egress/rules?limit=20",
    "/v1/vms",
    "/v1/audit/egress?limit=20",
    "/v1/egress/policy",
    "/v1/secrets",
];

/// `load ADDRESS RATE KIND SECONDS KEY…`: prints the figures as JSON.
pub fn run(args: &[String]) {
    let [address, rate, kind, seconds, keys @ ..] = args else {
        panic!("load ADDRESS RATE KIND SECONDS KEY…")
    };
    let rate: u32 = rate.parse().unwrap();
    let time = Duration::from_secs(seconds.parse().unwrap());
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
    let figures = drive(&runtime, address, rate, kind, time, keys);
    println!("{}", serde_json::to_string(&figures).unwrap());
}

/// Paces from a thread of its own: the runtime's timer goes by whole milliseconds, which are no time of the daemon's.
fn drive(
    runtime: &Runtime,
    address: &str,
    rate: u32,
    kind: &str,
    time: Duration,
    keys: &[String],
) -> Figures {
    let client =
        Client::builder(TokioExecutor::new()).pool_max_idle_per_host(CONNECTIONS).build_http::<Full<Bytes>>();
    let turns = Arc::new(tokio::sync::Semaphore::new(CONNECTIONS));
    let start = Instant::now();
    let total = rate * u32::try_from((time + WARM_UP).as_secs()).unwrap();
    let mut tasks = tokio::task::JoinSet::new();
    for n in 0..total {
        let due = start + Duration::from_secs(1) / rate * n;
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
        let write = kind == "write" || (kind == "mixed" && n % 10 == 0);
        let at = n as usize;
        let key = &keys[at % keys.len()];
        let (method, path) = match write {
            true => (Method::PUT, format!("/v1/env/W{}", n % 16)),
            false => (Method::GET, READS[at / keys.len() % READS.len()].to_owned()),
        };
        let body = if write { format!("{{\"value\": \"{n}\"}}") } else { String::new() };
        let request = Request::builder()
            .method(method)
            .uri(format!("http://{address}{path}"))
            .header("authorization", format!("Bearer {key}"))
            .header("content-type", "application/json")
            .body(Full::new(Bytes::from(body)))
            .unwrap();
        let (client, turns) = (client.clone(), turns.clone());
        let asked = async move {
            let _turn = turns.acquire().await;
            let good = match client.request(request).await {
                Ok(answer) => {
                    let good = answer.status().is_success();
                    answer.into_body().collect().await.is_ok() && good
                }
                Err(_) => false,
            };
            let took = due.elapsed();
            (due >= start + WARM_UP).then_some((took, good))
        };
        tasks.spawn_on(asked, runtime.handle());
    }
    let mut times = Vec::new();
    let mut failed = 0;
    while let Some(done) = runtime.block_on(tasks.join_next()) {
        let Some((took, good)) = done.unwrap() else { continue };
        failed += u64::from(!good);
        times.push(u64::try_from(took.as_micros()).unwrap());
    }
    times.sort_unstable();
    let at = |part: f64| times[((times.len() - 1) as f64 * part) as usize];
    Figures { rate, p50: at(0.5), p99: at(0.99), worst: at(1.0), failed }
}
