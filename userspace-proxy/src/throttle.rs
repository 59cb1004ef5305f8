//! How many octets a second one VM may move through the proxy, both ways together. What is over is made up for by
//! waiting: nothing is dropped, and only that VM waits.

use std::{
    pin::Pin,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::{Duration, Instant},
};
use tokio::time::{Sleep, sleep};

/// A VM's bucket: filled at its rate, at most one second's worth.
pub(crate) struct Throttle {
    /// Octets a second; 0 means no bound.
    rate: AtomicU64,
    bucket: Mutex<(f64, Instant)>,
}

impl Throttle {
    /// A bucket of this rate, full; none means no bound.
    pub(crate) fn new(octets_per_second: Option<u64>) -> Self {
        let rate = octets_per_second.map_or(0, |rate| rate.max(1));
        Self { rate: AtomicU64::new(rate), bucket: Mutex::new((rate as f64, Instant::now())) }
    }

    /// Another rate from now on; what was overdrawn stays so.
    pub(crate) fn set(&self, octets_per_second: Option<u64>) {
        self.rate.store(octets_per_second.map_or(0, |rate| rate.max(1)), Ordering::Relaxed);
    }

    /// Takes what has moved; says how long to wait before the next, if the bucket is overdrawn.
    pub(crate) fn spend(&self, octets: usize, now: Instant) -> Option<Duration> {
        let rate = match self.rate.load(Ordering::Relaxed) {
            0 => return None,
            rate => rate as f64,
        };
        let mut bucket = self.bucket.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = now.saturating_duration_since(bucket.1).as_secs_f64() * rate;
        *bucket = ((bucket.0 + earned).min(rate) - octets as f64, now);
        (bucket.0 < 0.0).then(|| Duration::from_secs_f64((-bucket.0 / rate).min(60.0)))
    }

    /// Takes what has moved, and waits.
    pub(crate) async fn moved(&self, octets: usize) {
        if let Some(pause) = self.spend(octets, Instant::now()) {
            sleep(pause).await;
        }
    }
}

/// The wait of one body between two frames.
#[derive(Default)]
pub(crate) struct Pause(Option<Pin<Box<Sleep>>>);

impl Pause {
    /// Begins a wait.
    pub(crate) fn begin(&mut self, pause: Option<Duration>) {
        self.0 = pause.map(|pause| Box::pin(sleep(pause)));
    }

    /// Whether one has begun and was not seen to end.
    pub(crate) fn is_running(&self) -> bool {
        self.0.is_some()
    }

    /// Whether it is over.
    pub(crate) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if let Some(pause) = &mut self.0 {
            std::task::ready!(pause.as_mut().poll(cx));
            self.0 = None;
        }
        Poll::Ready(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_over_is_waited_for_and_no_more() {
        let throttle = Throttle::new(Some(1000));
        let start = Instant::now();
        assert_eq!(throttle.spend(1000, start), None, "a second's worth is there");
        assert_eq!(throttle.spend(500, start), Some(Duration::from_millis(500)));
        assert_eq!(throttle.spend(0, start + Duration::from_millis(500)), None);
        let later = start + Duration::from_secs(100);
        assert_eq!(throttle.spend(1000, later), None, "rest is not saved up");
        assert_eq!(throttle.spend(1000, later), Some(Duration::from_secs(1)));
        assert_eq!(Throttle::new(None).spend(usize::MAX, start), None);
    }
}
