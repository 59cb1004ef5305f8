//! Which slots are free: the one that was given back last is handed out first, so that few pages of the file are ever touched. No lock.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// A stack of numbers, each in it once at most. The head has a count beside it that rises with each change, so that a number that
/// was taken and given back meanwhile is not mistaken for one that stayed.
pub(crate) struct Free {
    head: AtomicU64,
    /// The number below each; numbers are one more than slots, and 0 is none.
    below: Box<[AtomicU32]>,
    /// Slots from here on were never handed out.
    fresh: AtomicU32,
}

impl Free {
    pub(crate) fn new(slots: u32) -> Self {
        let below = (0..slots).map(|_| AtomicU32::new(0)).collect();
        Self { head: AtomicU64::new(0), below, fresh: AtomicU32::new(0) }
    }

    pub(crate) fn take(&self) -> Option<u32> {
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            let number = head as u32;
            let Some(slot) = number.checked_sub(1) else { return self.take_fresh() };
            let below = self.below.get(slot as usize)?.load(Ordering::Relaxed);
            let next = head.wrapping_add(1 << 32) & !0xffff_ffff | u64::from(below);
            match self.head.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return Some(slot),
                Err(now) => head = now,
            }
        }
    }

    fn take_fresh(&self) -> Option<u32> {
        let more = |fresh: u32| ((fresh as usize) < self.below.len()).then(|| fresh + 1);
        self.fresh.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()
    }

    pub(crate) fn give(&self, slot: u32) {
        let Some(below) = self.below.get(slot as usize) else { return };
        let mut head = self.head.load(Ordering::Acquire);
        loop {
            below.store(head as u32, Ordering::Relaxed);
            let next = head.wrapping_add(1 << 32) & !0xffff_ffff | u64::from(slot + 1);
            match self.head.compare_exchange_weak(head, next, Ordering::AcqRel, Ordering::Acquire) {
                Ok(_) => return,
                Err(now) => head = now,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicBool;

    #[test]
    fn the_last_given_back_is_the_first_handed_out_and_there_is_an_end() {
        let free = Free::new(3);
        assert_eq!([free.take(), free.take(), free.take(), free.take()], [Some(0), Some(1), Some(2), None]);
        free.give(1);
        free.give(0);
        assert_eq!([free.take(), free.take(), free.take()], [Some(0), Some(1), None]);
    }

    #[test]
    fn no_slot_is_anybody_elses_at_the_same_time() {
        let free = Free::new(64);
        let taken: Vec<AtomicBool> = (0..64).map(|_| AtomicBool::new(false)).collect();
        std::thread::scope(|scope| {
            for thread in 0..4 {
                let (free, taken) = (&free, &taken);
                scope.spawn(move || {
                    let mut mine = Vec::new();
                    for turn in 0..50_000 {
                        if (turn * 7 + thread) % 5 < 3
                            && let Some(slot) = free.take()
                        {
                            assert!(!taken[slot as usize].swap(true, Ordering::SeqCst), "{slot} twice");
                            mine.push(slot);
                        } else if let Some(slot) = mine.pop() {
                            taken[slot as usize].store(false, Ordering::SeqCst);
                            free.give(slot);
                        }
                    }
                    mine.into_iter().for_each(|slot| {
                        taken[slot as usize].store(false, Ordering::SeqCst);
                        free.give(slot);
                    });
                });
            }
        });
        assert_eq!(std::iter::from_fn(|| free.take()).count(), 64, "none went missing");
    }
}
