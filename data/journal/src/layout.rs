//! Where what stands in the file. A change of anything here is another [`VERSION`]; the header's first words are the same in all.

/// What the file begins with.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"tapgjrnl");
/// The form of the slots.
pub(crate) const VERSION: u64 = 1;
/// Octets of the header: a page.
pub(crate) const HEADER: usize = 4096;
/// Octets of a slot.
pub(crate) const SLOT: usize = 1024;

/// Words of the header, by their offsets. Those that change have a cache line each.
pub(crate) mod header {
    pub(crate) const MAGIC: usize = 0;
    pub(crate) const VERSION: usize = 8;
    /// How many slots there are.
    pub(crate) const SLOTS: usize = 16;
    /// How many are taken: what another version's file is counted by.
    pub(crate) const TAKEN: usize = 64;
    /// Attempts under way that have none.
    pub(crate) const WITHOUT: usize = 128;
    /// No slot from here on was ever taken.
    pub(crate) const END: usize = 192;
}

/// Parts of a slot, by their offsets.
pub(crate) mod slot {
    /// The kind, and the octets of the body above it.
    pub(crate) const STATE: usize = 0;
    /// Over state and body.
    pub(crate) const CHECK: usize = 8;
    /// How many attempts it stands for.
    pub(crate) const COUNT: usize = 16;
    /// The event's number in the log, once it is about to be written there, with a check over it and the id.
    pub(crate) const CLAIM: usize = 24;
    pub(crate) const CLAIM_CHECK: usize = 32;
    pub(crate) const CLAIM_ID: usize = 40;
    /// The VM, with a check: written once, so that it is known whose a slot is of which the body was not finished.
    pub(crate) const VM_CHECK: usize = 112;
    pub(crate) const VM: usize = 120;
    /// What the event says.
    pub(crate) const BODY: usize = 192;
}

/// Octets of an id with its length before it.
pub(crate) const ID: usize = 65;
/// Octets that a body may have.
pub(crate) const BODY: usize = SLOT - slot::BODY;

const _: () = assert!(slot::CLAIM_ID + ID <= slot::VM_CHECK && slot::VM + ID <= slot::BODY);

/// What a slot holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Kind {
    Free = 0,
    /// Somebody is at it.
    Writing = 1,
    Undecided = 2,
    UnderWay = 3,
    Ended = 4,
    /// No event: so many attempts that are in none.
    Lost = 5,
}

impl Kind {
    pub(crate) fn of(state: u64) -> Option<Self> {
        let all = [Self::Free, Self::Writing, Self::Undecided, Self::UnderWay, Self::Ended, Self::Lost];
        all.into_iter().find(|kind| *kind as u64 == state & 0xff)
    }

    pub(crate) fn with(self, length: usize) -> u64 {
        self as u64 | (length as u64) << 8
    }
}

/// Tells octets that were written whole from others; no protection against who means harm, and needs to be none.
pub(crate) fn check(seed: u64, octets: &[u8]) -> u64 {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut sum = (seed ^ MAGIC).wrapping_mul(ODD) ^ octets.len() as u64;
    let mut mix = |word: u64| {
        sum = (sum ^ word).wrapping_mul(ODD);
        sum ^= sum >> 29;
    };
    let (words, rest) = octets.as_chunks::<8>();
    words.iter().for_each(|word| mix(u64::from_le_bytes(*word)));
    let mut last = [0; 8];
    last[..rest.len()].copy_from_slice(rest);
    mix(u64::from_le_bytes(last));
    sum
}
