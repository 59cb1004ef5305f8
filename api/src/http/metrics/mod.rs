//! What is counted while requests are served, and the exposition of it all.
//!
//! Labels come from fixed sets (methods, route templates, statuses, reasons, states) or name a VM that lives now: nothing
//! that a client or a guest writes becomes one.

mod expose;
mod token;

pub use token::Token;

pub(crate) use expose::{Now, expose};

use super::AppState;
use axum::extract::{MatchedPath, Request, State};
use axum::http::Method;
use axum::middleware::Next;
use axum::response::Response;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::{family::Family, histogram::Histogram};
use prometheus_client::registry::{Registry, Unit};
use std::time::Instant;

/// Upper ends of the buckets of a request's duration, in seconds.
const BUCKETS: [f64; 14] =
    [0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RequestLabels {
    method: &'static str,
    route: String,
    status: u16,
}

type Durations = Family<RequestLabels, Histogram, fn() -> Histogram>;

/// What lasts from scrape to scrape.
pub(crate) struct Metrics {
    registry: Registry,
    durations: Durations,
    started: Instant,
}

impl Metrics {
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("tapgate");
        let durations: Durations = Family::new_with_constructor(|| Histogram::new(BUCKETS));
        registry.register_with_unit(
            "http_request_duration",
            "Time until the head of the answer, by route template and status",
            Unit::Seconds,
            durations.clone(),
        );
        Self { registry, durations, started: Instant::now() }
    }
}

/// A method as a label: those that the API knows, so that nobody can make up more.
fn method(of: &Method) -> &'static str {
    match *of {
        Method::GET => "GET",
        Method::HEAD => "HEAD",
        Method::POST => "POST",
        Method::PUT => "PUT",
        Method::PATCH => "PATCH",
        Method::DELETE => "DELETE",
        _ => "other",
    }
}

/// Measures every request.
pub(super) async fn observe(State(state): State<AppState>, request: Request, next: Next) -> Response {
    let start = Instant::now();
    let method = method(request.method());
    // The template, never the path: ids are not labels.
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or_else(|| "none".to_owned(), |path| path.as_str().to_owned());
    let response = next.run(request).await;
    let labels = RequestLabels { method, route, status: response.status().as_u16() };
    state.metrics().durations.get_or_create(&labels).observe(start.elapsed().as_secs_f64());
    response
}
