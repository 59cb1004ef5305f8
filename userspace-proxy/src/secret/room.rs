//! What the decoders of answers may hold, of all of a VM's answers together: a few octets of an upstream's make one that holds
//! megabytes until its answer ends, and a guest that reads nothing keeps it from ending. Taken before a decoder is made, by the most
//! that its coding can need; what the content then says it does not need is given back. Never taken bit by bit, so that no two answers
//! wait for each other.

use std::{sync::Arc, time::Duration};
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::timeout,
};

/// Of one VM, in octets.
const MOST: usize = 128 * 1024 * 1024;

/// Why an answer is not passed on.
#[derive(Debug, thiserror::Error)]
#[error("the answers under way need more than 128 MiB to be decoded; read some to their end first")]
pub(crate) struct NoRoom;

/// How much of it a VM has left.
pub(crate) struct Decoders(Arc<Semaphore>);

/// What the decoders of one answer hold; given back on drop.
pub(crate) struct Room(OwnedSemaphorePermit);

impl Default for Decoders {
    fn default() -> Self {
        Self(Arc::new(Semaphore::new(MOST)))
    }
}

impl Decoders {
    /// So many octets, as soon as they are there: answers end, or show that they need less.
    pub(crate) async fn take(&self, octets: usize, patience: Duration) -> Result<Room, NoRoom> {
        let octets = u32::try_from(octets).map_err(|_| NoRoom)?;
        let taken = timeout(patience, self.0.clone().acquire_many_owned(octets)).await;
        Ok(Room(taken.map_err(|_| NoRoom)?.map_err(|_| NoRoom)?))
    }
}

impl Room {
    /// So many octets are not needed.
    pub(crate) fn give_back(&mut self, octets: usize) {
        drop(self.0.split(octets));
    }
}
