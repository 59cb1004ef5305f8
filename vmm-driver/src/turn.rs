//! Work in a VM's folder that needs a thread of its own: making its disk, starting its VMM. One piece at a time.
//!
//! A caller that gives up cannot take such work back, so the work is told, and whoever comes next waits until it has ended.
//! Must never let two pieces be at one folder.

use crate::spec::VmmError;
use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use tokio::sync::OwnedMutexGuard;

type Lock = tokio::sync::Mutex<()>;

/// The folders that are worked in, or waited for.
static FOLDERS: Mutex<Option<HashMap<PathBuf, Weak<Lock>>>> = Mutex::new(None);

/// Whether anyone still waits for the work.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Arc<AtomicBool>);

impl Wanted {
    /// Whether the caller gave up: what was begun is to end, and what was started with it.
    pub fn is_over(&self) -> bool {
        self.0.load(Ordering::Acquire)
    }

    /// The same between two pieces of work with files.
    ///
    /// # Errors
    /// The caller gave up.
    pub fn check(&self) -> std::io::Result<()> {
        match self.is_over() {
            true => Err(std::io::Error::other("it was not wanted any more")),
            false => Ok(()),
        }
    }
}

/// Says so when the caller's future goes.
struct Caller(Wanted);

impl Drop for Caller {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Release);
    }
}

/// Does the work on a thread that may block, when the folder is nobody else's.
///
/// # Errors
/// The work's own; or it panicked.
pub async fn run<T: Send + 'static>(
    folder: &Path,
    work: impl FnOnce(&Wanted) -> Result<T, VmmError> + Send + 'static,
) -> Result<T, VmmError> {
    let turn = take(folder).await;
    let wanted = Wanted::default();
    let _caller = Caller(wanted.clone());
    let work = move || {
        let _turn = turn;
        work(&wanted)
    };
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| VmmError::Start(error.to_string()))?
}

/// Comes back when nothing is being done in the folder.
pub async fn rest(folder: &Path) {
    drop(take(folder).await);
}

async fn take(folder: &Path) -> OwnedMutexGuard<()> {
    lock_of(folder).lock_owned().await
}

fn lock_of(folder: &Path) -> Arc<Lock> {
    let mut folders = FOLDERS.lock().unwrap_or_else(PoisonError::into_inner);
    let folders = folders.get_or_insert_default();
    if let Some(lock) = folders.get(folder).and_then(Weak::upgrade) {
        return lock;
    }
    // Those that nobody is at any more.
    folders.retain(|_, lock| lock.strong_count() > 0);
    let lock = Arc::new(Lock::default());
    folders.insert(folder.to_owned(), Arc::downgrade(&lock));
    lock
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    #[tokio::test]
    async fn work_that_was_given_up_is_told_and_waited_for() {
        let folder = Path::new("/nowhere/vm");
        let (began, has_begun) = mpsc::channel();
        let (let_go, held) = mpsc::channel::<()>();
        let ended = Arc::new(AtomicBool::new(false));
        let seen = ended.clone();
        let first = tokio::spawn(run(folder, move |wanted| {
            began.send(wanted.clone()).unwrap();
            let _ = held.recv();
            seen.store(true, Ordering::Release);
            Ok(())
        }));
        let wanted = tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
        assert!(!wanted.is_over());
        first.abort();
        assert!(first.await.unwrap_err().is_cancelled());
        assert!(wanted.is_over());
        // Another folder's turn is its own.
        run(Path::new("/nowhere/other"), |_| Ok(())).await.unwrap();
        let at = ended.clone();
        let second = tokio::spawn(run(folder, move |_| Ok(at.load(Ordering::Acquire))));
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert!(!second.is_finished(), "two at one folder");
        let_go.send(()).unwrap();
        assert!(second.await.unwrap().unwrap(), "the second began before the first had ended");
        rest(folder).await;
    }
}
