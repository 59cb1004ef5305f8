//! `tapgate image` from the command line: taken in, listed, checked, kept while a VM needs it, removed.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

use serde_json::Value;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, UNIX_EPOCH};

fn image(folder: &Path, args: &[&str]) -> (bool, String, String) {
    let output = Command::new(env!("CARGO_BIN_EXE_tapgate"))
        .arg("image")
        .args(args)
        .current_dir(folder)
        .env("TAPGATE_IMAGE_DIR", folder.join("images"))
        .env("TAPGATE_DATA_DIR", folder.join("data"))
        .output()
        .unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    (output.status.success(), text(&output.stdout), text(&output.stderr))
}

#[test]
fn an_image_comes_is_checked_and_goes_when_no_vm_needs_it() {
    let folder = tempfile::tempdir().unwrap();
    let folder = folder.path();
    for name in ["kernel", "initrd"] {
        std::fs::write(folder.join(name), name).unwrap();
    }
    std::fs::write(folder.join("disk"), vec![1; 1 << 20]).unwrap();
    let import = |name: &str, cmdline: &str| {
        let kernel = ["--kernel", "kernel", "--initrd", "initrd"];
        image(folder, &[&["import", name, "disk", "--cmdline", cmdline][..], &kernel].concat())
    };
    let (ok, path, error) = import("stock", "root=/dev/vda ro");
    assert!(ok, "{error}");
    assert_eq!(import("stock", "root=/dev/vda ro").1, path, "the same again is the same image");
    assert!(import("Stock", "x").2.contains("is not a name"));
    let (ok, _, error) = image(folder, &["import", "stock", "disk"]);
    assert!(!ok && error.contains("--cmdline"), "{error}");

    let (_, text, _) = image(folder, &["list", "--json"]);
    let list: Value = serde_json::from_str(&text).unwrap();
    assert_eq!(list["images"][0]["name"], "stock");
    assert_eq!(list["images"][0]["disk_bytes"], 1 << 20);
    assert!(image(folder, &["list"]).1.contains("stock"));
    assert!(image(folder, &["verify"]).0);

    let vm = folder.join("data/vms/vm_a");
    std::fs::create_dir_all(&vm).unwrap();
    std::fs::write(vm.join("image.json"), serde_json::to_vec(&path).unwrap()).unwrap();
    let (ok, _, error) = image(folder, &["remove", "stock"]);
    assert!(!ok && error.contains("vm_a"), "{error}");
    // A newer one of the name: the older is kept for the VM, and goes with it.
    assert!(import("stock", "root=/dev/vda rw").0);
    assert_eq!(image(folder, &["prune"]).1, "");
    std::fs::remove_dir_all(&vm).unwrap();
    assert_eq!(image(folder, &["prune"]).1, format!("removed {path}"));

    let (_, text, _) = image(folder, &["list", "--json"]);
    let list: Value = serde_json::from_str(&text).unwrap();
    let left = list["images"][0]["path"].as_str().unwrap().to_owned();
    assert_eq!(list["images"].as_array().unwrap().len(), 1);
    std::fs::write(Path::new(&left).join("disk.raw"), vec![2; 1 << 20]).unwrap();
    let (ok, text, _) = image(folder, &["verify", "stock"]);
    assert!(!ok && text.contains("BROKEN"), "{text}");
    assert!(image(folder, &["remove", "stock"]).0 && !Path::new(&left).exists());
    assert!(image(folder, &["remove", "stock"]).2.contains("there is no image"));
}

/// What `doctor` looks at is what the daemon will use, and what it says to type acts on that.
#[test]
fn doctor_looks_at_the_image_folder_and_the_program_of_the_configuration() {
    let folder = tempfile::tempdir().unwrap();
    let images = folder.path().join("images");
    let mut doctor = Command::new(env!("CARGO_BIN_EXE_tapgate"));
    doctor.args(["doctor", "--json", "--listen", "127.0.0.1:0", "--vmm-program", "/nowhere/qemu"]);
    doctor.arg("--image-dir").arg(&images).arg("--data-dir").arg(folder.path().join("data"));
    let done = doctor.output().unwrap();
    assert!(!done.status.success());
    let said: Value = serde_json::from_slice(&done.stdout).unwrap();
    let check = |name: &str| {
        let found = said["checks"].as_array().unwrap().iter().find(|check| check["name"] == name);
        found.unwrap_or_else(|| panic!("{name}: {said}")).clone()
    };
    let qemu = check("qemu-system-x86_64");
    assert_eq!(qemu["outcome"], "fail");
    assert!(qemu["found"].as_str().unwrap().contains("/nowhere/qemu"), "{qemu}");
    let remedy = check("image")["remedy"].as_str().unwrap().to_owned();
    assert!(remedy.contains(&format!("tapgate image build --image-dir {}", images.display())), "{remedy}");
    check("qemu-img");
}

/// A certificate that clients will refuse is said before they do.
#[test]
fn doctor_looks_at_the_certificate_of_the_api() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path
    };
    let now = rcgen::date_time_ymd(1970, 1, 1) + UNIX_EPOCH.elapsed().unwrap();
    let day = Duration::from_secs(24 * 3600);
    let mint = |until| {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(["api.example.com".to_owned()]).unwrap();
        params.not_before = now - 400 * day;
        params.not_after = until;
        (params.self_signed(&key).unwrap().pem(), key.serialize_pem())
    };
    let (good, key) = mint(rcgen::date_time_ymd(9999, 1, 1));
    let (over, of_over) = mint(now - day);
    let (soon, of_soon) = mint(now + 13 * day);
    let (later, of_later) = mint(now + 15 * day);
    let (key, of_over) = (file("key.pem", &key), file("over.key", &of_over));
    let (of_soon, of_later) = (file("soon.key", &of_soon), file("later.key", &of_later));
    let gone = folder.path().join("gone.key");
    let cases = [
        (file("good.pem", &good), &key, "ok", "until 9999-01-01T00:00:00Z"),
        (file("over.pem", &over), &of_over, "warn", "which is over"),
        (file("soon.pem", &soon), &of_soon, "warn", "which is soon"),
        (file("later.pem", &later), &of_later, "ok", "until"),
        (file("keyless.pem", &good), &gone, "fail", "gone.key"),
        (file("other.pem", &over), &key, "fail", "cannot use the certificate"),
        (file("empty.pem", ""), &key, "fail", "holds no certificate"),
        (folder.path().join("gone.pem"), &key, "fail", "gone.pem"),
    ];
    for (cert, key, outcome, word) in cases {
        let config =
            format!("tls_cert = {cert:?}\ntls_key = {key:?}\ndata_dir = {:?}\n", folder.path().join("data"));
        let config = file("tapgate.toml", &config);
        let mut doctor = Command::new(env!("CARGO_BIN_EXE_tapgate"));
        doctor.args(["doctor", "--json", "--listen", "127.0.0.1:0", "--config"]).arg(config);
        let said: Value = serde_json::from_slice(&doctor.output().unwrap().stdout).unwrap();
        let checks = said["checks"].as_array().unwrap();
        let tls = checks.iter().find(|check| check["name"] == "tls").unwrap_or_else(|| panic!("{said}"));
        assert_eq!(tls["outcome"], outcome, "{tls}");
        assert!(tls["found"].as_str().unwrap().contains(word), "{tls}");
    }
}
