//! The base image, really built: needs root and, the first time, packages.
#![allow(missing_docs, reason = "tests")]
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::os::unix::fs::FileExt as _;
use tapgate_vmm::image;

#[test]
fn real_vm_image_builds_and_is_whole() {
    let image = image::build_debian12(&image::default_cache()).unwrap();
    image::verify(image.dir()).unwrap();
    assert_eq!(image.name(), "debian-12");
    assert!(image.manifest().packages.iter().any(|p| p.starts_with("openssh-server ")));
    assert_eq!(image.manifest().recipe, image::recipe_hash());
    let again = std::time::Instant::now();
    assert_eq!(image::build_debian12(&image::default_cache()).unwrap().dir(), image.dir());
    eprintln!("from the cache in {:?}", again.elapsed());
}

#[test]
fn real_vm_image_that_is_broken_gets_one_clear_sentence() {
    let whole = image::build_debian12(&image::default_cache()).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let copy = |name: &str| {
        let target = dir.path().join(name);
        let _ = std::fs::remove_file(&target);
        std::os::unix::fs::symlink(whole.dir().join(name), target).unwrap();
    };
    let complaint = || image::open(dir.path()).unwrap_err().to_string();
    assert!(complaint().contains("manifest.json cannot be read"), "{}", complaint());
    for name in ["manifest.json", "kernel", "initrd", "disk.raw"] {
        copy(name);
    }
    image::open(dir.path()).unwrap();

    let break_it = |name: &str, content: &[u8]| {
        std::fs::remove_file(dir.path().join(name)).unwrap();
        std::fs::write(dir.path().join(name), content).unwrap();
    };
    break_it("disk.raw", b"short");
    assert!(complaint().contains("disk.raw has 5 bytes instead of"), "{}", complaint());
    copy("disk.raw");

    let mut kernel = std::fs::read(whole.kernel()).unwrap();
    kernel[1000] ^= 1;
    break_it("kernel", &kernel);
    assert!(complaint().contains("kernel is not the file that was built"), "{}", complaint());
    copy("kernel");

    std::fs::remove_file(dir.path().join("initrd")).unwrap();
    assert!(complaint().contains("initrd cannot be read"), "{}", complaint());
    copy("initrd");

    let text = std::fs::read_to_string(whole.dir().join("manifest.json")).unwrap();
    for (from, to, expected) in [
        ("\"format\": 1", "\"format\": 99", "its format is 99"),
        ("\"file\": \"kernel\"", "\"file\": \"../kernel\"", "not a file of the image"),
        ("{", "", "does not parse"),
    ] {
        break_it("manifest.json", text.replacen(from, to, 1).as_bytes());
        assert!(complaint().contains(expected), "{}", complaint());
        assert!(complaint().ends_with("build it again with `tapgate image build`"), "{}", complaint());
    }
}

#[test]
fn real_vm_image_holds_no_identity() {
    let image = image::build_debian12(&image::default_cache()).unwrap();
    let look = |request: &str| {
        let output =
            std::process::Command::new("debugfs").args(["-R", request]).arg(image.disk()).output().unwrap();
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    assert_eq!(look("cat /etc/machine-id"), "");
    assert!(!look("ls -p /etc/ssh").contains("ssh_host_"));
    assert!(!look("ls -p /root").contains("authorized_keys"));
    assert!(look("stat /usr/lib/tapgate/guest-agent").contains("Mode:  0755"));
    let shadow = look("cat /etc/shadow");
    assert!(shadow.lines().any(|line| line.starts_with("root:*:")), "no password opens root's account");
    let mut magic = [0u8; 2];
    std::fs::File::open(image.disk()).unwrap().read_exact_at(&mut magic, 1024 + 56).unwrap();
    assert_eq!(magic, [0x53, 0xef], "a bare ext4 file system");
}
