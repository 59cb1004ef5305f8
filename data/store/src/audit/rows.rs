//! Sets of events of one block, as the index keeps them and as a question works with them.
//!
//! A set is kept as the classes that occur in it (a bit each), then a list of places if it is small, else a map of bits.

/// Events of a block at most.
pub(super) const BLOCK: usize = 16_384;
const WORDS: usize = BLOCK / 64;
/// Places listed at most: beyond it the map is smaller.
const LISTED: usize = BLOCK / 16 - 1;
const MASK: usize = 8;

/// A set of places in a block.
pub(super) struct Rows(Box<[u64; WORDS]>);

impl Rows {
    pub(super) fn none() -> Self {
        Self(Box::new([0; WORDS]))
    }

    /// Adds a place. What lies outside of a block is no place.
    pub(super) fn insert(&mut self, at: u16) {
        if let Some(word) = self.0.get_mut(usize::from(at) / 64) {
            *word |= 1 << (at % 64);
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.iter().all(|word| *word == 0)
    }

    pub(super) fn and(&mut self, other: &Self) {
        for (word, other) in self.0.iter_mut().zip(other.0.iter()) {
            *word &= other;
        }
    }

    /// Leaves out those that are not wanted.
    pub(super) fn retain(&mut self, wanted: impl Fn(usize) -> bool) {
        for (index, word) in self.0.iter_mut().enumerate() {
            let mut left = *word;
            while left != 0 {
                let bit = left.trailing_zeros();
                left &= left - 1;
                if !wanted(index * 64 + bit as usize) {
                    *word &= !(1 << bit);
                }
            }
        }
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = usize> {
        self.0.iter().enumerate().flat_map(|(index, word)| {
            let mut left = *word;
            std::iter::from_fn(move || {
                let bit = (left != 0).then(|| left.trailing_zeros() as usize)?;
                left &= left - 1;
                Some(index * 64 + bit)
            })
        })
    }
}

/// A set with the classes in it, as it is kept. The places rise.
pub(super) fn encode(classes: u64, places: &[u16]) -> Vec<u8> {
    let mut kept = classes.to_le_bytes().to_vec();
    if places.len() <= LISTED {
        kept.extend(places.iter().flat_map(|place| place.to_le_bytes()));
    } else {
        let mut rows = Rows::none();
        places.iter().for_each(|place| rows.insert(*place));
        kept.extend(rows.0.iter().flat_map(|word| word.to_le_bytes()));
    }
    kept
}

/// The classes in a kept set.
pub(super) fn classes(kept: &[u8]) -> u64 {
    kept.first_chunk::<MASK>().map_or(0, |mask| u64::from_le_bytes(*mask))
}

/// The places of a kept set.
pub(super) fn decode(kept: &[u8]) -> Rows {
    let mut rows = Rows::none();
    let places = kept.get(MASK..).unwrap_or_default();
    if places.len() == WORDS * 8 {
        for (word, bytes) in rows.0.iter_mut().zip(places.as_chunks::<8>().0) {
            *word = u64::from_le_bytes(*bytes);
        }
    } else {
        numbers(places).for_each(|place| rows.insert(place));
    }
    rows
}

/// A list of places.
pub(super) fn numbers(kept: &[u8]) -> impl Iterator<Item = u16> {
    kept.as_chunks::<2>().0.iter().map(|bytes| u16::from_le_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_come_back_small_and_large() {
        for step in [1, 2, 15, 16, 17, 300, 16_000] {
            let places: Vec<u16> = (0..BLOCK as u16).step_by(step).collect();
            let kept = encode(1 << 35 | 5, &places);
            assert_eq!(classes(&kept), 1 << 35 | 5);
            assert!(kept.len() <= MASK + WORDS * 8);
            let rows = decode(&kept);
            assert_eq!(
                rows.iter().collect::<Vec<_>>(),
                places.iter().map(|p| usize::from(*p)).collect::<Vec<_>>()
            );
            let mut both = decode(&encode(0, &[0, 1, 2, 16_000]));
            both.and(&rows);
            assert!(both.iter().all(|place| place % step == 0) && !both.is_empty());
        }
        let mut few = decode(&encode(0, &[0, 63, 64, 16_000]));
        few.retain(|place| place % 2 == 0 && place != 64);
        assert_eq!(few.iter().collect::<Vec<_>>(), [0, 16_000]);
        assert!(decode(&encode(0, &[])).is_empty());
        assert!(decode(&[]).is_empty(), "a damaged set is empty, and nothing panics");
        assert!(decode(&encode(0, &[u16::MAX])).is_empty());
    }
}
