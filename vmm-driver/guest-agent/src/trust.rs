//! Puts the VM's own CA into the system's trust stores, and takes the previous one out.
//!
//! Does what `update-ca-certificates` does, for one certificate and in milliseconds; the certificate also lies where that
//! program looks, so a later run of it comes to the same result.

use crate::files;
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const LOCAL: &str = "/usr/local/share/ca-certificates/tapgate.crt";
const BUNDLE: &str = "/etc/ssl/certs/ca-certificates.crt";
const HASHED: &str = "/etc/ssl/certs";
const JAVA: &str = "/etc/ssl/certs/java/cacerts";
const BEGIN: &str = "-----BEGIN CERTIFICATE-----";
const END: &str = "-----END CERTIFICATE-----";

/// Trusts the certificates of `ca_certs.trusted`.
pub fn apply(user: &Value) -> Result<(), String> {
    let Some(trusted) = user.pointer("/ca_certs/trusted").and_then(Value::as_array) else { return Ok(()) };
    let new: Vec<String> = trusted.iter().filter_map(Value::as_str).flat_map(blocks).collect();
    let text = join(&new);
    let before = fs::read_to_string(LOCAL).unwrap_or_default();
    let old = blocks(&before);
    files::write(Path::new(LOCAL), text.as_bytes(), 0o644)?;
    let bundle = fs::read_to_string(BUNDLE).unwrap_or_default();
    files::write(Path::new(BUNDLE), merge(&bundle, &old, &new).as_bytes(), 0o644)?;
    if old != new {
        unlink_hashed();
        link_hashed()?;
    }
    Ok(())
}

/// Adds the certificate to Java's key store, where there is one. Slow, so it is done after the boot.
pub fn apply_java() -> Result<(), String> {
    let (Some(keytool), true) = (find_keytool(), Path::new(JAVA).exists() && Path::new(LOCAL).exists())
    else {
        return Ok(());
    };
    let run = |args: &[&str]| {
        Command::new(&keytool)
            .args(args)
            .args(["-alias", "tapgate", "-keystore", JAVA, "-storepass", "changeit"])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .map_err(|e| format!("{}: {e}", keytool.display()))
    };
    // Fails where it was never imported, which is as good.
    run(&["-delete"])?;
    let status = run(&["-importcert", "-noprompt", "-trustcacerts", "-file", LOCAL])?;
    if status.success() { Ok(()) } else { Err(format!("keytool: {status}")) }
}

fn find_keytool() -> Option<PathBuf> {
    let mut places = vec![PathBuf::from("/usr/bin/keytool")];
    if let Ok(jvms) = fs::read_dir("/usr/lib/jvm") {
        places.extend(jvms.flatten().map(|entry| entry.path().join("bin/keytool")));
    }
    places.into_iter().find(|path| path.exists())
}

/// The PEM certificates of a text, each from BEGIN to END.
fn blocks(text: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut rest = text;
    while let Some(start) = rest.find(BEGIN) {
        let Some(length) = rest[start..].find(END) else { break };
        let end = start + length + END.len();
        found.push(rest[start..end].replace('\r', ""));
        rest = &rest[end..];
    }
    found
}

fn join(certificates: &[String]) -> String {
    certificates.iter().map(|pem| format!("{pem}\n")).collect()
}

/// The bundle without the old certificates and with the new ones last.
fn merge(bundle: &str, old: &[String], new: &[String]) -> String {
    let mut kept = blocks(bundle);
    kept.retain(|pem| !old.contains(pem) && !new.contains(pem));
    kept.extend_from_slice(new);
    join(&kept)
}

fn unlink_hashed() {
    let Ok(entries) = fs::read_dir(HASHED) else { return };
    for entry in entries.flatten() {
        if fs::read_link(entry.path()).is_ok_and(|target| target == Path::new(LOCAL)) {
            let _ = fs::remove_file(entry.path());
        }
    }
}

/// OpenSSL finds a certificate in a folder by the hash of its subject.
fn link_hashed() -> Result<(), String> {
    let output = Command::new("/usr/bin/openssl")
        .args(["x509", "-noout", "-subject_hash", "-in", LOCAL])
        .stdin(Stdio::null())
        .stderr(Stdio::null())
        .output()
        .map_err(|e| format!("openssl: {e}"))?;
    let hash = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    if hash.len() != 8 || !hash.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err("openssl could not read the CA certificate".into());
    }
    for number in 0..16 {
        let link = PathBuf::from(format!("{HASHED}/{hash}.{number}"));
        if link.symlink_metadata().is_err() {
            return std::os::unix::fs::symlink(LOCAL, &link).map_err(|e| format!("{}: {e}", link.display()));
        }
    }
    Err("too many certificates have this CA's name".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pem(body: &str) -> String {
        format!("{BEGIN}\n{body}\n{END}")
    }

    #[test]
    fn the_old_ca_goes_when_the_new_one_comes() {
        let bundle = format!("# comment\n{}\n{}\n", pem("root"), pem("old"));
        let merged = merge(&bundle, &[pem("old")], &[pem("new")]);
        assert_eq!(merged, format!("{}\n{}\n", pem("root"), pem("new")));
        assert_eq!(merge(&merged, &[pem("new")], &[pem("new")]), merged, "a second run changes nothing");
    }

    #[test]
    fn half_a_certificate_is_none() {
        assert!(blocks(BEGIN).is_empty());
        assert!(blocks("rubbish").is_empty());
        assert_eq!(blocks(&format!("{}x{}", pem("a"), pem("b"))).len(), 2);
    }
}
