//! The clock as the database keeps it: whole microseconds since the Unix epoch.

/// Now, in microseconds since the Unix epoch.
pub fn now_us() -> i64 {
    jiff::Timestamp::now().as_microsecond()
}
