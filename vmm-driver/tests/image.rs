//! The base image, really built. Runs where `TAPGATE_TEST_VM=1`: it needs root and, the first time, packages.
#![allow(missing_docs, reason = "a test")]

use tapgate_vmm::image;

#[test]
fn debian_12_builds_and_is_whole() {
    if std::env::var_os("TAPGATE_TEST_VM").is_none() {
        eprintln!("skipped: set TAPGATE_TEST_VM=1 to build the image and boot VMs");
        return;
    }
    let image = image::build_debian12(&image::default_cache()).unwrap();
    image::verify(image.dir()).unwrap();
    assert_eq!(image.name(), "debian-12");
    assert!(image.manifest().packages.iter().any(|p| p.starts_with("openssh-server ")));
    println!("{}", image.dir().display());
}
