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

#[cfg(test)]
mod tests {
    use super::super::Kind;
    use super::*;
    use crate::confine::scratch::Scratch;
    use crate::process::{Process, ProcessRef};
    use crate::spec::Resume;
    use std::io::{Read as _, Write as _};
    use std::os::unix::net::UnixListener;
    use std::path::Path;
    use std::process::{Child, Command};
    use std::sync::{Arc, Mutex, OnceLock};
    use tapgate_model::{GuestNet, VmId};

    /// A VMM that is held until it is told to go on; answers what it was asked.
    fn held(dir: &Path) -> Arc<Mutex<Vec<String>>> {
        let listener = UnixListener::bind(dir.join(crate::qemu::file::CONTROL)).unwrap();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let heard = asked.clone();
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = stream.unwrap();
                let mut request = [0u8; 4096];
                let n = stream.read(&mut request).unwrap();
                let line =
                    String::from_utf8_lossy(&request[..n]).lines().next().unwrap_or_default().to_owned();
                let mut asked = heard.lock().unwrap();
                asked.push(line);
                let went_on = asked.iter().any(|line| line.contains("resume"));
                let body = format!("{{\"state\":\"{}\"}}", if went_on { RUNS } else { HELD });
                let _ = write!(stream, "HTTP/1.1 200 \r\nContent-Length: {}\r\n\r\n{body}", body.len());
            }
        });
        asked
    }

    struct Sleeping(Child);

    impl Drop for Sleeping {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn a_guest_that_is_held_for_a_copy_is_left_alone() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let asked = held(dir.path());
        let sleeping = Sleeping(Command::new("sleep").arg("1000").spawn().unwrap());
        let process = ProcessRef::of(i32::try_from(sleeping.0.id()).unwrap()).unwrap();
        let live = Live {
            process: Arc::new(Process::open(&process).unwrap().unwrap()),
            scratch: Scratch::create(0).unwrap(),
            network: None,
            broken: OnceLock::new(),
        };
        let (id, net) = (VmId::generate(), GuestNet::new(1, [10, 214, 0, 0].into(), None));
        let seed = crate::Seed {
            instance_id: id.to_string(),
            hostname: "vm".into(),
            ssh_keys: Vec::new(),
            net,
            ca_pem: String::new(),
            env: Vec::new(),
        };
        let spec = VmSpec {
            id,
            dir: dir.path().to_owned(),
            image: None,
            vcpus: 1,
            memory_mib: 128,
            disk_bytes: 0,
            net,
            seed,
            snapshot: None,
            resume: Resume::Never,
            guest_ns: None,
        };
        let driver = ApiDriver::new(Kind::CloudHypervisor, "/nowhere".into());
        let copying = tokio::sync::Mutex::default();
        let went_on = || asked.lock().unwrap().iter().filter(|line| line.contains("resume")).count();

        let copy = copying.lock().await;
        look(&driver, &spec, &live, &copying).await.unwrap();
        assert_eq!(went_on(), 0);
        drop(copy);
        look(&driver, &spec, &live, &copying).await.unwrap();
        assert_eq!(went_on(), 1);
        look(&driver, &spec, &live, &copying).await.unwrap();
        assert_eq!(went_on(), 1);
        assert!(live.broken.get().is_none());
    }
}
