//! How many of something one VM may begin in a second. A burst of twice as many is let through; what is over is turned away, not
//! made to wait.

use std::{
    sync::{Mutex, PoisonError},
    time::Instant,
};

/// A VM's bucket: what is left, and when that was counted.
pub(crate) struct Rate(Mutex<(f64, Instant)>);

impl Rate {
    /// A full one.
    pub(crate) fn new(per_second: u32) -> Self {
        Self(Mutex::new((f64::from(per_second) * 2.0, Instant::now())))
    }

    /// Whether there may be one more.
    pub(crate) fn take(&self, per_second: u32, now: Instant) -> bool {
        let rate = f64::from(per_second);
        let mut left = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let earned = now.saturating_duration_since(left.1).as_secs_f64() * rate;
        *left = ((left.0 + earned).min(rate * 2.0), now);
        let one = left.0 >= 1.0;
        if one {
            left.0 -= 1.0;
        }
        one
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    #[test]
    fn a_burst_of_twice_as_many_and_then_so_many_a_second() {
        let (rate, start) = (Rate::new(10), Instant::now());
        let taken = |at: u64| {
            let now = start + Duration::from_secs(at);
            (0..100).filter(|_| rate.take(10, now)).count()
        };
        assert_eq!([taken(1), taken(2), taken(2), taken(100)], [20, 10, 0, 20]);
        assert_eq!((0..100).filter(|_| rate.take(3, start + Duration::from_secs(100))).count(), 0);
    }
}
