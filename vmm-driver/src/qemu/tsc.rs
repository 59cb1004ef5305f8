//! The host's time stamp counter: an emulated guest counts by it, and finds its rate out by a timer that, on a busy host,
//! is late. A guest that fails at that hangs in its first second; so it is told the rate.

use std::sync::OnceLock;
use std::time::{Duration, Instant};

static KHZ: OnceLock<Option<u64>> = OnceLock::new();

/// The counter's rate in kHz, measured once; `None` where there is no such counter. Blocks while it is being measured.
pub fn khz() -> Option<u64> {
    *KHZ.get_or_init(measure)
}

/// Begins to measure, so that the first VM need not wait for it.
pub fn begin() {
    if KHZ.get().is_none() {
        // Without a thread the first VM measures.
        let _ = std::thread::Builder::new().name("tsc".into()).spawn(khz);
    }
}

#[cfg(target_arch = "x86_64")]
fn measure() -> Option<u64> {
    // The least of three is the one that was interrupted least between the two readings of the clock.
    (0..3).filter_map(|_| measure_once()).min()
}

#[cfg(target_arch = "x86_64")]
#[expect(unsafe_code, reason = "the instruction has no safe form")]
fn measure_once() -> Option<u64> {
    // SAFETY: every x86-64 CPU has the instruction.
    let now = || (Instant::now(), unsafe { std::arch::x86_64::_rdtsc() });
    let (started, first) = now();
    std::thread::sleep(Duration::from_millis(40));
    let (ended, last) = now();
    let nanoseconds = u64::try_from((ended - started).as_nanos()).ok()?;
    last.checked_sub(first)?.checked_mul(1_000_000)?.checked_div(nanoseconds).filter(|khz| *khz > 100_000)
}

#[cfg(not(target_arch = "x86_64"))]
fn measure() -> Option<u64> {
    None
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use crate::accel::Accel;
    use std::time::Duration;

    #[test]
    fn a_driver_that_emulates_measures_before_a_vm_asks() {
        crate::qemu::QemuDriver::new(Accel::Tcg);
        let measured = || super::KHZ.get().is_some();
        for _ in 0..1000 {
            if measured() {
                break;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        assert!(measured());
    }

    #[test]
    fn two_measurements_agree() {
        let (one, other) = (super::measure().unwrap(), super::measure().unwrap());
        assert!(one.abs_diff(other) < one / 50, "{one} {other}");
    }
}
