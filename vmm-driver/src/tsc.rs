//! The rate of the host's time stamp counter, which is the counter of an emulated guest too.
//!
//! A guest kernel measures the rate against the emulated timer chip, which cannot be done on a busy host: the chip's
//! ticks come late, the kernel gives the counter up and waits for ever. So it is told.

use std::sync::OnceLock;

/// The rate in kHz, measured once in the daemon's life; takes some milliseconds the first time. `None` where there is
/// no such counter, or it cannot be measured.
pub fn khz() -> Option<u32> {
    static RATE: OnceLock<Option<u32>> = OnceLock::new();
    *RATE.get_or_init(measure)
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u32> {
    use std::time::{Duration, Instant};

    /// What lies between the two readings.
    const SPAN: Duration = Duration::from_millis(50);
    /// A reading that took longer was interrupted.
    const BRACKET: Duration = Duration::from_micros(2);
    const TRIES: usize = 1000;

    let read = || {
        (0..TRIES).find_map(|_| {
            let before = Instant::now();
            #[expect(unsafe_code, reason = "the counter has no safe reader")]
            // SAFETY: RDTSC reads a register; every x86-64 processor has it.
            let count = unsafe { std::arch::x86_64::_rdtsc() };
            (before.elapsed() < BRACKET).then_some((before, count))
        })
    };
    let (began, first) = read()?;
    std::thread::sleep(SPAN);
    let (ended, last) = read()?;
    let micros = u64::try_from(ended.duration_since(began).as_micros()).ok()?;
    u32::try_from(last.checked_sub(first)?.checked_mul(1000)?.checked_div(micros)?)
        .ok()
        .filter(|khz| *khz > 0)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u32> {
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    #[cfg(target_arch = "x86_64")]
    fn two_measurements_agree() {
        let (a, b) = (measure().unwrap(), measure().unwrap());
        assert!(a.abs_diff(b) < a / 1000, "{a} and {b} kHz");
        assert_eq!(khz(), khz());
    }
}
