//! What is left of VMs' and images' files when the host loses its power.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

mod common;

use tapgate_e2e::power::Disk;
use tapgate_vmm::{disk, image};

#[test]
fn which_image_a_disk_was_made_from_is_known_after_a_power_cut() {
    let folder = tempfile::tempdir().unwrap();
    let image = common::stand_in(&folder.path().join("image"));
    let host = Disk::new(folder.path(), 256).unwrap();
    let vm = host.path().join("vm");
    std::fs::create_dir(&vm).unwrap();
    disk::prepare(&vm, &disk::origin(&vm, &image).unwrap(), None, 16 << 20, common::work()).unwrap();
    host.cut().unwrap();
    let from = disk::origin(&vm, &image).unwrap();
    assert_eq!(from.dir(), image.dir());
    disk::prepare(&vm, &from, None, 16 << 20, common::work()).unwrap();
}

#[test]
fn an_image_that_was_imported_is_whole_after_a_power_cut() {
    let folder = tempfile::tempdir().unwrap();
    let given = common::stand_in(&folder.path().join("given"));
    let host = Disk::new(folder.path(), 256).unwrap();
    let cache = host.path().join("images");
    std::fs::create_dir(&cache).unwrap();
    let (disk, kernel, initrd) = (given.disk(), given.kernel(), given.initrd());
    let import = image::Import {
        name: "stock",
        disk: &disk,
        kernel: Some((&kernel, &initrd)),
        cmdline: Some("root=/dev/vda rw"),
    };
    let dir = image::import(&cache, &import).unwrap().dir().to_owned();
    host.cut().unwrap();
    image::verify(&dir).unwrap();
}
