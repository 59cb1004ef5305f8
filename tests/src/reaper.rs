//! Cleaning up, whatever way a test or the demo ends: a process of its own that waits for its parent to close a pipe
//! (which the kernel does even after SIGKILL) and then takes away everything that the world made. Touches nothing
//! that does not carry the world's own name or folder.

use crate::{
    net::{Names, processes},
    sh::{run, sibling},
};
use anyhow::{Context as _, Result};
use std::{
    fs,
    io::Read as _,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    thread,
    time::Duration,
};

/// The parent's side. Dropping it cleans up and waits for that.
pub struct Reaper(Child);

impl Reaper {
    /// Starts it, before anything else is made.
    pub fn start(names: &Names, folder: &Path) -> Result<Self> {
        let mut command = Command::new(sibling("tapgate-world")?);
        command.args(["reap", "--world", &names.world, "--folder"]).arg(folder);
        // A group of its own: Ctrl-C on the terminal must end the parent, not this.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null());
        Ok(Self(command.spawn().context("the cleaning process could not be started")?))
    }
}

impl Drop for Reaper {
    fn drop(&mut self) {
        drop(self.0.stdin.take());
        let _ = self.0.wait();
    }
}

/// The process itself: waits for the parent's end, then cleans up.
pub fn wait_and_reap(names: &Names, folder: &Path) {
    let _ = std::io::stdin().read_to_end(&mut Vec::new());
    reap(names, folder);
}

/// Takes everything away that is there of the world; what is not there is not missed.
pub fn reap(names: &Names, folder: &Path) {
    for _ in 0..50 {
        let namespaces = namespaces(names);
        let mut pids: Vec<u32> = namespaces.iter().flat_map(|namespace| processes(namespace)).collect();
        pids.extend(of_words(folder));
        pids.retain(|pid| *pid != std::process::id());
        if pids.is_empty() {
            break;
        }
        let _ = run("kill", std::iter::once("-KILL".to_owned()).chain(pids.iter().map(u32::to_string)));
        thread::sleep(Duration::from_millis(100));
    }
    for namespace in namespaces(names) {
        let _ = run("ip", ["netns", "delete", &namespace]);
    }
    for pins in pins(names) {
        let _ = fs::remove_dir_all(pins);
    }
    for (vm, groups) in vms(folder).iter().flat_map(|vm| CGROUPS.map(|groups| (vm, groups))) {
        remove_named_after(Path::new(groups), vm, |group| drop(fs::remove_dir(group)));
    }
    let _ = fs::remove_dir_all(names.etc());
    unmount(folder);
    if std::env::var_os("TAPGATE_KEEP").is_none() {
        let _ = fs::remove_dir_all(folder);
    }
}

/// Where the daemon of this world pins its programs and maps.
fn pins(names: &Names) -> [PathBuf; 2] {
    let root = Path::new("/sys/fs/bpf");
    [root.join("tapgate").join(&names.world), root.join(names.egress())]
}

/// The world's namespaces that are there: its own, the daemon's, and those of guests of the namespace driver.
fn namespaces(names: &Names) -> Vec<String> {
    let (egress, guests) = (names.egress(), format!("{}-", names.egress()));
    let ours = |name: &String| {
        [names.internet(), names.host(), egress.clone()].contains(name) || name.starts_with(&guests)
    };
    let entries = fs::read_dir("/run/netns").into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(ours).collect()
}

/// The ids of the VMs that the world's daemon made.
fn vms(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder.join("data/vms")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).filter(|name| name.len() > 8).collect()
}

/// Takes away what a test mounted in the folder. Not before: VMs are found by their folders there.
fn unmount(folder: &Path) {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let places = mounts.lines().filter_map(|line| line.split(' ').nth(1));
    for place in places.filter(|place| Path::new(place).starts_with(folder)) {
        let _ = run("umount", ["--lazy", place]);
    }
}

/// Calls for everything in the folder that carries the VM's id in its name.
fn remove_named_after(folder: &Path, vm: &str, remove: impl Fn(&Path)) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_name().to_string_lossy().contains(vm) {
            remove(&entry.path());
        }
    }
}

/// Where VMs' control groups are: in a tree of version 2 alone, or beside one of version 1.
pub const CGROUPS: [&str; 2] = ["/sys/fs/cgroup/tapgate", "/sys/fs/cgroup/unified/tapgate"];

/// Processes that were started with a file of the world's folder, as the daemon is, or with the id of one of its VMs, as VMMs are.
fn of_words(folder: &Path) -> Vec<u32> {
    let mut needles = vms(folder);
    needles.extend(folder.to_str().map(str::to_owned));
    processes_with(&needles)
}

/// Processes with one of these among their words, but for this one and its parent.
pub fn processes_with(needles: &[String]) -> Vec<u32> {
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<u32>().ok());
    let parent = std::os::unix::process::parent_id();
    pids.filter(|pid| *pid != std::process::id() && *pid != parent)
        .filter(|pid| {
            let words = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            let words = String::from_utf8_lossy(&words);
            needles.iter().any(|needle| words.contains(needle.as_str()))
        })
        .collect()
}
