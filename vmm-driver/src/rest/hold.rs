//! A guest whose CPUs are held for a copy of its disk, and how it is let go on.
//!
//! Owns that it goes on or is ended: a guest must never stay held that nobody copies, while its VM is said to run.

use super::{ApiDriver, Live};
use crate::spec::{VmSpec, VmmError};
use std::time::Duration;
use tokio::time::{sleep, timeout};

/// What both VMMs call a guest that is held, and one that is not.
const HELD: &str = "Paused";
const RUNS: &str = "Running";

/// Between two tries to let a guest go on; doubled each time, up to the second.
const PAUSE: Duration = Duration::from_millis(50);
const LONGEST: Duration = Duration::from_secs(2);
/// For all of them.
const TRYING: Duration = Duration::from_secs(10);

/// Lets a guest go on, or says that it is not to be had.
async fn let_go(driver: &ApiDriver, spec: &VmSpec, live: &Live) -> Result<(), VmmError> {
    let mut last = None;
    let trying = async {
        let mut pause = PAUSE;
        loop {
            let Err(error) = driver.ask(spec, live, &driver.kind.hold(false)).await else { return };
            // The answer alone may have been lost, or it was not held.
            if driver.state(spec, live).await.is_ok_and(|state| state == RUNS) {
                return;
            }
            tracing::warn!(vm = %spec.id, %error, "a guest that was held does not go on");
            last = Some(error);
            sleep(pause).await;
            pause = (pause * 2).min(LONGEST);
        }
    };
    let went_on = tokio::select! {
        () = live.process.over() => return Err(VmmError::Gone),
        went_on = timeout(TRYING, trying) => went_on,
    };
    went_on.map_err(|_| {
        let why = last.map_or_else(|| "no answer".to_owned(), |error| error.to_string());
        VmmError::Control(format!("its guest was held and could not be let go on ({why})"))
    })
}

/// The same, and the VMM is ended whose guest cannot be let go on: it would stand still for good.
pub(super) async fn go_on(driver: &ApiDriver, spec: &VmSpec, live: &Live) -> Result<(), VmmError> {
    let Err(error) = let_go(driver, spec, live).await else { return Ok(()) };
    if !matches!(error, VmmError::Gone) {
        tracing::error!(vm = %spec.id, %error, "a VM that stands still is ended");
        let _ = live.broken.set(error.to_string());
        live.process.signal(libc::SIGKILL).map_err(VmmError::io("signal"))?;
    }
    Err(error)
}

/// Looks whether the VMM answers and its guest runs. One that is held without a copy being made was left so by whoever began one.
pub(super) async fn look(
    driver: &ApiDriver,
    spec: &VmSpec,
    live: &Live,
    copying: &tokio::sync::Mutex<()>,
) -> Result<(), VmmError> {
    if driver.state(spec, live).await? != HELD {
        return Ok(());
    }
    let Ok(_nobody_copies) = copying.try_lock() else { return Ok(()) };
    // The copy may have ended between the answer and now.
    if driver.state(spec, live).await? != HELD {
        return Ok(());
    }
    tracing::warn!(vm = %spec.id, "a guest is held that nobody copies");
    go_on(driver, spec, live).await
}
