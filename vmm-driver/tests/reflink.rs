//! Disks on a file system that can share blocks: a real btrfs on a loop device, gone with the test.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use tapgate_vmm::disk::{self, Format};

/// A mounted btrfs.
struct Mounted(PathBuf);

impl Mounted {
    fn new(dir: &Path) -> Self {
        let (file, at) = (dir.join("btrfs.img"), dir.join("mounted"));
        std::fs::File::create(&file).unwrap().set_len(512 << 20).unwrap();
        std::fs::create_dir(&at).unwrap();
        run(Command::new("mkfs.btrfs").arg("-q").arg(&file));
        run(Command::new("mount").args(["-o", "loop"]).arg(&file).arg(&at));
        Self(at)
    }

    /// Octets in use, as the file system counts them.
    fn used(&self) -> u64 {
        nix::unistd::sync();
        let data = nix::sys::statvfs::statvfs(&self.0).unwrap();
        (data.blocks() - data.blocks_free()) * data.fragment_size()
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // The loop device goes with the mount.
        let _ = Command::new("umount").arg("--lazy").arg(&self.0).status();
    }
}

fn run(command: &mut Command) {
    assert!(command.status().unwrap().success(), "{command:?}");
}

#[test]
fn disks_share_their_images_blocks_where_the_file_system_can() {
    let dir = tempfile::tempdir().unwrap();
    let mounted = Mounted::new(dir.path());
    let place = mounted.0.join("image");
    let image = common::stand_in(&place);
    // Nothing that could be stored as a hole or squeezed.
    let mut full = vec![0u8; 64 << 20];
    std::io::Read::read_exact(&mut std::fs::File::open("/dev/urandom").unwrap(), &mut full).unwrap();
    let image = common::reseal(image.dir(), &full);
    let before = mounted.used();
    let mut disks = Vec::new();
    for n in 0..4 {
        let vm = mounted.0.join(format!("vm{n}"));
        std::fs::create_dir(&vm).unwrap();
        let made =
            disk::prepare(&vm, &disk::origin(&vm, &image).unwrap(), None, 96 << 20, common::work()).unwrap();
        assert_eq!(made.format, Format::Raw);
        assert_eq!(made.path.metadata().unwrap().len(), 96 << 20, "grown to what was asked");
        disks.push(made.path);
    }
    let grown = mounted.used() - before;
    assert!(grown < 16 << 20, "four disks of 64 MiB took {grown} octets");

    let open = |path: &Path| std::fs::File::options().read(true).write(true).open(path).unwrap();
    open(&disks[0]).write_all_at(b"the first VM's", 1 << 20).unwrap();
    for other in [image.disk(), disks[1].clone()] {
        let mut there = [0u8; 14];
        std::fs::File::open(&other).unwrap().read_exact_at(&mut there, 1 << 20).unwrap();
        assert_eq!(there, full[1 << 20..][..14], "{}", other.display());
    }
    let again = disk::prepare(&mounted.0.join("vm0"), &image, None, 96 << 20, common::work()).unwrap();
    let mut kept = [0u8; 14];
    std::fs::File::open(&again.path).unwrap().read_exact_at(&mut kept, 1 << 20).unwrap();
    assert_eq!(&kept, b"the first VM's", "a disk that is there is not made anew");
    tapgate_vmm::image::verify(image.dir()).unwrap();
}
