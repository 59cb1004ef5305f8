//! What answers are made of: times and the list envelope.

use serde::Serialize;

/// A time as the contract writes it: `2026-02-28T12:00:00Z`.
pub fn time(us: i64) -> String {
    let seconds = us.div_euclid(1_000_000);
    jiff::Timestamp::from_second(seconds).unwrap_or_default().to_string()
}

/// A time with its microseconds, where events lie close together.
pub fn exact_time(us: i64) -> String {
    format!("{:.6}", jiff::Timestamp::from_microsecond(us).unwrap_or_default())
}

/// The list envelope.
#[derive(Debug, Serialize)]
pub struct List<T> {
    /// The page.
    pub data: Vec<T>,
    /// Whether there is another.
    pub has_more: bool,
    /// How to get it.
    pub cursor: Option<String>,
}

impl<T> List<T> {
    /// The envelope of a page.
    pub fn of<R>(page: tapgate_store::Page<R>, view: impl FnMut(R) -> T) -> Self {
        Self {
            has_more: page.cursor.is_some(),
            cursor: page.cursor,
            data: page.items.into_iter().map(view).collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_as_the_contract_writes_them() {
        assert_eq!(time(1_772_280_000_000_000), "2026-02-28T12:00:00Z");
        assert_eq!(time(1_772_280_000_999_999), "2026-02-28T12:00:00Z");
        assert_eq!(exact_time(1_772_280_000_000_001), "2026-02-28T12:00:00.000001Z");
    }
}
