//! Runs `qemu-img` on files whose content a stranger wrote: unprivileged, in a view with nothing but the two files.

use super::scratch::Scratch;
use super::view::View;
use super::{Confined, Launch, Network};
use crate::spec::VmmError;
use crate::turn::Wanted;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;
use std::path::Path;
use std::time::Duration;

/// The user of a tool that works for no VM.
pub const NOBODY: u32 = super::UID_BASE - 1;
const PROGRAM: &str = "/usr/bin/qemu-img";
/// Between two looks at whether it has ended, or nobody wants it any more.
const LOOK: Duration = Duration::from_millis(10);

/// Writes the disk in `from` into the raw file `to`, which has its size already. Both files get the user. The program ends with
/// its caller: with the daemon, or when that gives up.
pub(crate) fn convert(
    from: &Path,
    format: &str,
    to: &Path,
    uid: u32,
    wanted: &Wanted,
) -> Result<(), VmmError> {
    let failed = |what: &'static str| VmmError::io(format!("qemu-img's view: {what}"));
    super::present(Path::new(PROGRAM), "qemu-utils")?;
    let scratch = Scratch::create(uid).map_err(failed("scratch"))?;
    for file in [from, to] {
        std::os::unix::fs::chown(file, Some(uid), Some(uid)).map_err(failed("owner"))?;
    }
    let folder = to.parent().ok_or_else(|| VmmError::Disk("a disk without a folder".into()))?;
    let view = || -> std::io::Result<View> {
        let mut view = View::new(folder, uid)?;
        view.program(Path::new(PROGRAM))?;
        view.read_only(from, "/in")?;
        view.writable(to, "/out")?;
        view.scratch(&scratch)?;
        Ok(view)
    };
    let log = || scratch.append("log").map_err(failed("log"));
    let pid = Launch {
        program: Path::new(PROGRAM),
        // -n: into the file that is there. Nothing is guessed: a format that is guessed is the content's choice.
        args: ["convert", "-n", "-f", format, "-O", "raw", "/in", "/out"].map(Into::into).to_vec(),
        stdout: log()?,
        stderr: log()?,
        confined: Some(Confined { uid, view: view().map_err(failed("files"))?, network: Network::None }),
        descriptors: Vec::new(),
        cgroup: None,
        ends_with_us: true,
    }
    .spawn()?;
    let ended = loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if wanted.is_over() => {
                super::end_child(pid);
                return Err(VmmError::Disk("it was not wanted any more".into()));
            }
            Ok(WaitStatus::StillAlive) => std::thread::sleep(LOOK),
            ended => break ended,
        }
    };
    match ended {
        Ok(WaitStatus::Exited(_, 0)) => Ok(()),
        ended => Err(VmmError::Disk(format!("qemu-img: {} ({ended:?})", scratch.tail("log", 500).trim()))),
    }
}
