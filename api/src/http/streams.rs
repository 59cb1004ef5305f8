//! How many answers an account has open that go on for long: each reads the log again and again while it lasts.

use super::ApiError;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use tapgate_model::UserId;

/// Of one account at a time.
pub const STREAMS: usize = 32;

/// The streams that are open, by account.
#[derive(Clone, Debug, Default)]
pub(crate) struct Streams(Arc<Mutex<HashMap<UserId, usize>>>);

/// One that counts until it is dropped.
#[derive(Debug)]
pub(crate) struct OpenStream(Streams, UserId);

impl Streams {
    pub(crate) fn open(&self, user: &UserId) -> Result<OpenStream, ApiError> {
        let mut all = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = all.entry(user.clone()).or_default();
        if *count >= STREAMS {
            return Err(ApiError::too_many_streams(STREAMS));
        }
        *count += 1;
        Ok(OpenStream(self.clone(), user.clone()))
    }
}

impl Drop for OpenStream {
    fn drop(&mut self) {
        let mut all = self.0.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(count) = all.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                all.remove(&self.1);
            }
        }
    }
}
