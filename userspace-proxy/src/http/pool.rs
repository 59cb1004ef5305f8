//! Upstream connections at rest, kept for the next request of the same VM to the same place. Never shared between VMs;
//! bounded in number and age.

use super::upstream::{Key, Upstream};
use crate::table::VmEntry;
use std::{
    collections::HashMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tapgate_model::VmId;

/// At rest longer, the upstream has likely closed it.
const MAX_REST: Duration = Duration::from_secs(60);
/// For one VM and place.
const PER_KEY: usize = 16;
/// In all.
const MOST: usize = 4096;

type Resting = HashMap<(VmId, Key), Vec<(Upstream, Instant)>>;

/// The connections at rest.
#[derive(Default)]
pub(crate) struct Pool(Mutex<Resting>);

impl Pool {
    fn lock(&self) -> MutexGuard<'_, Resting> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One that can take a request, the latest used first.
    pub(crate) fn take(&self, vm: &VmId, key: &Key) -> Option<Upstream> {
        let mut resting = self.lock();
        let place = (vm.clone(), key.clone());
        let stack = resting.get_mut(&place)?;
        let mut found = None;
        while let Some((upstream, since)) = stack.pop() {
            if since.elapsed() < MAX_REST && upstream.at_rest() {
                found = Some(upstream);
                break;
            }
        }
        if let Some(shared) = found.as_ref().and_then(Upstream::share) {
            stack.push((shared, Instant::now()));
        } else if stack.is_empty() {
            resting.remove(&place);
        }
        found
    }

    /// Keeps one whose last request has ended whole, if its VM has room for it; drops it otherwise.
    pub(crate) fn give(&self, entry: &VmEntry, upstream: Upstream) {
        if !upstream.at_rest() || !entry.may_rest() {
            return;
        }
        let mut resting = self.lock();
        if resting.len() >= MOST {
            resting.retain(|_, stack| {
                stack.retain(|(upstream, since)| since.elapsed() < MAX_REST && upstream.at_rest());
                !stack.is_empty()
            });
            if resting.len() >= MOST {
                return;
            }
        }
        let stack = resting.entry((entry.policy.load().vm.clone(), upstream.key.clone())).or_default();
        if stack.len() >= PER_KEY {
            stack.remove(0);
        }
        stack.push((upstream, Instant::now()));
    }

    /// Closes what has rested too long.
    pub(crate) fn sweep(&self) {
        self.lock().retain(|_, stack| {
            stack.retain(|(upstream, since)| since.elapsed() < MAX_REST && upstream.at_rest());
            !stack.is_empty()
        });
    }
}
