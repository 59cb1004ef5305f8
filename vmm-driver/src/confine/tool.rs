//! Runs `qemu-img`: unprivileged, in a view with nothing but the files that it works on, whose content a stranger may have written.
//!
//! Must never run it as the daemon's user, nor let it find a file by a name that stands in another.

use super::scratch::Scratch;
use super::view::View;
use super::{Confined, Launch, Network};
use crate::spec::VmmError;
use crate::turn::Wanted;
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::{Pid, getegid, geteuid};
use std::ffi::OsString;
use std::fs::OpenOptions;
use std::os::unix::fs::{OpenOptionsExt as _, chown};
use std::path::{Path, PathBuf};
use std::time::Duration;

/// The user of a tool that works for no VM.
pub const NOBODY: u32 = super::uids::BASE - 1;
const PROGRAM: &str = "/usr/bin/qemu-img";
/// Between two looks at whether it has ended, or nobody wants it any more.
const LOOK: Duration = Duration::from_millis(2);
/// All that it may have in memory of its own: some times what the format's largest tables need.
const DATA: u64 = 2 << 30;

/// For whom it works.
#[derive(Clone, Copy, Debug)]
pub struct Work<'a> {
    /// The user that it runs as.
    pub uid: u32,
    /// Ends it when nobody waits for it any more.
    pub wanted: &'a Wanted,
}

/// Writes the disk in `from` into the raw file `to`, which has its size already. Both files get the user and keep it.
pub(crate) fn convert(from: &Path, format: &str, to: &Path, work: Work<'_>) -> Result<(), VmmError> {
    give(&[from, to], work.uid)?;
    // -n: into the file that is there. Nothing is guessed: a format that is guessed is the content's choice.
    run(&["convert", "-n", "-f", format, "-O", "raw", "/in", "/out"], Some(from), to, work)
}

/// Writes the raw disk in `from` to the new qcow2 file `to`. Both are the daemon's afterwards.
pub(crate) fn pack(from: &Path, to: &Path, work: Work<'_>) -> Result<(), VmmError> {
    new(to)?;
    let _lent = Lent::to(&[from, to], work.uid)?;
    run(&["convert", "-f", "raw", "-O", "qcow2", "/in", "/out"], Some(from), to, work)
}

/// Makes an empty qcow2 file, over a raw disk that it names if there is one. That is not opened.
pub(crate) fn create(to: &Path, bytes: u64, over: Option<&Path>, work: Work<'_>) -> Result<(), VmmError> {
    new(to)?;
    let _lent = Lent::to(&[to], work.uid)?;
    let bytes = bytes.to_string();
    let mut words: Vec<OsString> = ["create", "-q", "-f", "qcow2"].map(Into::into).to_vec();
    if let Some(over) = over {
        words.extend(["-u".into(), "-F".into(), "raw".into(), "-b".into(), over.into()]);
    }
    words.extend(["/out".into(), bytes.into()]);
    run(&words, None, to, work)
}

/// Makes a qcow2 disk larger. What it lies over is neither opened nor changed.
pub(crate) fn grow(disk: &Path, bytes: u64, work: Work<'_>) -> Result<(), VmmError> {
    const ALONE: &str =
        r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/out"},"backing":null}"#;
    let _lent = Lent::to(&[disk], work.uid)?;
    run(&["resize", "-q", ALONE, &bytes.to_string()], None, disk, work)
}

/// Files that are the tool's user's for a while.
struct Lent(Vec<PathBuf>);

impl Lent {
    fn to(files: &[&Path], uid: u32) -> Result<Self, VmmError> {
        let lent = Self(files.iter().map(|file| (*file).to_owned()).collect());
        give(files, uid).map(|()| lent)
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        for file in &self.0 {
            // One that is gone has no owner; any other the daemon reads all the same.
            let _ = chown(file, Some(geteuid().as_raw()), Some(getegid().as_raw()));
        }
    }
}

fn give(files: &[&Path], uid: u32) -> Result<(), VmmError> {
    let give = |file: &&Path| chown(file, Some(uid), Some(uid));
    files.iter().try_for_each(give).map_err(VmmError::io("qemu-img's files: owner"))
}

/// An empty file that nobody else reads.
fn new(path: &Path) -> Result<(), VmmError> {
    let file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path);
    file.map(drop).map_err(VmmError::io(path.display().to_string()))
}

/// Runs it to its end. It sees `from` as `/in` and may write `to` as `/out`, and ends with its caller: with the daemon, or when that
/// gives up.
fn run<S: Clone + Into<OsString>>(
    words: &[S],
    from: Option<&Path>,
    to: &Path,
    work: Work<'_>,
) -> Result<(), VmmError> {
    let failed = |what: &'static str| VmmError::io(format!("qemu-img's view: {what}"));
    super::present(Path::new(PROGRAM), "qemu-utils")?;
    let scratch = Scratch::create(work.uid).map_err(failed("scratch"))?;
    let folder = to.parent().ok_or_else(|| VmmError::Disk("a disk without a folder".into()))?;
    let view = || -> std::io::Result<View> {
        let mut view = View::new(folder, work.uid)?;
        view.program(Path::new(PROGRAM))?;
        if let Some(from) = from {
            view.read_only(from, "/in")?;
        }
        view.writable(to, "/out")?;
        view.scratch(&scratch)?;
        Ok(view)
    };
    let log = || scratch.append("log").map_err(failed("log"));
    let view = view().map_err(failed("files"))?;
    let pid = Launch {
        program: Path::new(PROGRAM),
        args: words.iter().cloned().map(Into::into).collect(),
        stdout: log()?,
        stderr: log()?,
        confined: Some(Confined { uid: work.uid, view, network: Network::None }),
        descriptors: Vec::new(),
        cgroup: None,
        data: Some(DATA),
        ends_with_us: true,
    }
    .spawn()?;
    let ended = loop {
        match waitpid(Pid::from_raw(pid), Some(WaitPidFlag::WNOHANG)) {
            Ok(WaitStatus::StillAlive) if work.wanted.is_over() => {
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
