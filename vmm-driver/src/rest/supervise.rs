//! Follows one VM of these drivers: its VMM's end, its guest's console, a VMM that hangs, a guest that restarts itself.
//!
//! Never decides about a VM's life but for this: Firecracker ends when its guest restarts, and gets a successor on the same tap
//! behind the same gate.

use super::judge::{LastWords, Outcome, judge, last_words};
use super::launch::Tap;
use super::{ApiDriver, Kind, Live, hold};
use crate::confine::scratch::Scratch;
use crate::process::Ended;
use crate::qemu::{append, clean, file};
use crate::spec::{Exit, Observed, VmSpec, VmmError};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval};

/// How often the console is fetched.
const TICK: Duration = Duration::from_secs(1);
/// How often the VMM is asked whether it is there.
const PING: Duration = Duration::from_secs(5);
/// The most that is fetched at once, how often before it is time for other things, and what is kept for looking at. Together
/// they are what the scratch space holds.
const CHUNK: u64 = 256 << 10;
const CHUNKS: usize = 8;
const KEPT: usize = 8 << 10;
/// Between two starts of a guest that restarts itself again and again.
const PAUSE: Duration = Duration::from_secs(1);

/// Why a VMM ends, as far as this side knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Intent {
    /// It is to run.
    Run,
    /// Its guest was asked to shut down.
    ShutDown,
    /// It was killed.
    Kill,
    /// It was killed because its guest is off.
    Off,
    /// It was killed because it hung.
    Hung,
}

/// What the task works with.
pub(super) struct Supervisor {
    pub(super) driver: ApiDriver,
    pub(super) spec: VmSpec,
    pub(super) live: Arc<Mutex<Arc<Live>>>,
    pub(super) observed: watch::Sender<Observed>,
    pub(super) intent: watch::Receiver<Intent>,
    /// Held while somebody may hold the guest.
    pub(super) snapshots: Arc<tokio::sync::Mutex<()>>,
}

impl Supervisor {
    /// Runs until the VM has ended.
    pub(super) async fn run(self) {
        let mut kept = String::new();
        let exit = loop {
            let live = self.live.lock().unwrap_or_else(PoisonError::into_inner).clone();
            let (ended, why) = self.follow(&live, &mut kept).await;
            self.fetch(&live, &mut kept).await;
            let asked = *self.intent.borrow();
            if let Some(why) = live.broken.get().filter(|_| asked != Intent::Kill) {
                break Exit::Crashed(why.clone());
            }
            let intent = if asked == Intent::Kill { asked } else { why.unwrap_or(asked) };
            let complaint = live.scratch.tail("log", 300);
            let words = last_words(&kept);
            match judge(self.driver.kind, ended, intent, words, complaint.lines().last().unwrap_or_default())
            {
                Outcome::Ended(exit) => break exit,
                Outcome::Restart => match self.restart(&live).await {
                    Ok(successor) => {
                        *self.live.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(successor);
                        self.observed.send_modify(|seen| seen.reboots = seen.reboots.saturating_add(1));
                    }
                    Err(error) => match *self.intent.borrow() {
                        Intent::Kill => break Exit::Stopped,
                        Intent::ShutDown => break Exit::GuestShutdown,
                        _ => break Exit::Crashed(format!("it could not be started again: {error}")),
                    },
                },
            }
        };
        if let Exit::Crashed(_) = &exit {
            let live = self.live.lock().unwrap_or_else(PoisonError::into_inner).clone();
            crate::qemu::words(&self.spec.dir, Some(&live.scratch));
        }
        clean(self.driver.cgroups.as_deref(), &self.spec.place());
        self.observed.send_modify(|seen| seen.exit = Some(Arc::new(exit)));
    }

    /// Until this process has ended; the second value is why, if it was ended here.
    async fn follow(&self, live: &Arc<Live>, kept: &mut String) -> (Ended, Option<Intent>) {
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut pinged = Instant::now();
        let mut why = None;
        loop {
            tokio::select! {
                biased;
                ended = live.process.wait() => return (ended.unwrap_or(Ended::Unknown), why),
                _ = tick.tick() => {}
            }
            self.fetch(live, kept).await;
            if self.driver.kind == Kind::Firecracker && last_words(kept) == LastWords::Off {
                why = Some(Intent::Off);
                let _ = live.process.signal(libc::SIGKILL);
            } else if pinged.elapsed() > PING {
                pinged = Instant::now();
                let silent = tokio::select! {
                    ended = live.process.wait() => return (ended.unwrap_or(Ended::Unknown), why),
                    looked = hold::look(&self.driver, &self.spec, live, &self.snapshots) => matches!(looked, Err(VmmError::Silent(_))),
                };
                if silent {
                    tracing::error!(vm = %self.spec.id, "the VMM hangs and is ended");
                    why = Some(Intent::Hung);
                    let _ = live.process.signal(libc::SIGKILL);
                }
            }
        }
    }

    /// Takes what the guest has printed into the console's log, and keeps the end of it.
    async fn fetch(&self, live: &Arc<Live>, kept: &mut String) {
        let (from, log) = (live.clone(), self.spec.dir.join(file::CONSOLE));
        // Files, as many as the guest likes: nothing for a thread that serves others.
        let taken = tokio::task::spawn_blocking(move || take(&from.scratch, &log)).await;
        let Ok((printed, restarts)) = taken else { return };
        kept.push_str(&String::from_utf8_lossy(&printed));
        if kept.len() > KEPT {
            let cut = kept.ceil_char_boundary(kept.len() - KEPT);
            kept.drain(..cut);
        }
        if restarts > 0 {
            self.observed.send_modify(|seen| seen.reboots = seen.reboots.saturating_add(restarts));
        }
    }

    async fn restart(&self, ended: &Live) -> Result<Live, VmmError> {
        tokio::time::sleep(PAUSE).await;
        if *self.intent.borrow() != Intent::Run {
            return Err(VmmError::Gone);
        }
        let network = ended.network.as_ref().ok_or(VmmError::Gone)?;
        let network = network.try_clone().map_err(VmmError::io("its namespace"))?;
        let (_, live) = self.driver.run(&self.spec, Tap::Lent(network)).await?;
        if *self.intent.borrow() == Intent::Kill {
            let _ = live.process.signal(libc::SIGKILL);
        }
        Ok(live)
    }
}

/// Moves what the guest has printed to its log; answers the end of it, and how often the VMM said that the guest restarted. A guest
/// that prints without pause is heard again at the next tick.
fn take(scratch: &Scratch, log: &Path) -> (Vec<u8>, u32) {
    let mut printed = Vec::new();
    for _ in 0..CHUNKS {
        let Ok(bytes) = scratch.drain("console", CHUNK) else { break };
        if bytes.is_empty() {
            break;
        }
        if let Err(error) = append(log, &bytes) {
            tracing::warn!(%error, "the console log cannot be written");
        }
        printed.extend_from_slice(&bytes);
        printed.drain(..printed.len().saturating_sub(KEPT));
    }
    let events = scratch.drain("events", CHUNK).unwrap_or_default();
    let restarts = String::from_utf8_lossy(&events).matches("\"event\": \"rebooted\"").count();
    (printed, u32::try_from(restarts).unwrap_or(u32::MAX))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write as _;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[test]
    fn a_guest_that_prints_without_pause_is_left_for_a_while() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let scratch = Scratch::create(0).unwrap();
        let mut console = scratch.append("console").unwrap();
        console.write_all(b"boot").unwrap();
        let folder = tempfile::tempdir().unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let printing = {
            let stop = stop.clone();
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = console.write_all(b"x");
                }
            })
        };
        let (done, ended) = std::sync::mpsc::channel();
        let log = folder.path().join("console.log");
        let taking = std::thread::spawn(move || {
            let printed = (0..20).map(|_| take(&scratch, &log).0.len()).max();
            let _ = done.send(printed);
        });
        let printed = ended.recv_timeout(Duration::from_secs(60));
        stop.store(true, Ordering::Relaxed);
        printing.join().unwrap();
        taking.join().unwrap();
        let most = printed.expect("it never ends while the guest prints");
        assert!(most.is_some_and(|most| most > 0 && most <= KEPT), "{most:?}");
    }
}
