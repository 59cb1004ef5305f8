//! A running machine becomes another one: it was copied with its memory, and its original runs too. Done while the host holds its
//! link down, so that nothing leaves under the old name; what fails is said, and the host ends the copy.
//!
//! What programs hold in their own memory (random state, keys that they read, the machine id that systemd remembers) stays.

use crate::{apply, identity, net, seed};
use serde_json::Value;
use std::fs::{self, File};
use std::os::fd::AsRawFd as _;
use std::process::{Command, Stdio};

/// Of the host's randomness, in octets.
const ENTROPY: usize = 32;

/// What `RNDADDENTROPY` takes.
#[repr(C)]
pub struct Pool {
    bits: i32,
    size: i32,
    octets: [u8; ENTROPY],
}

nix::ioctl_write_ptr_bad!(
    /// `RNDADDENTROPY`: puts octets into the kernel's pool and credits them.
    rnd_add_entropy, nix::request_code_write!(b'R', 3, 8), Pool);
nix::ioctl_none!(
    /// `RNDRESEEDCRNG`: everybody's next random number comes from the pool of now.
    rnd_reseed, b'R', 7);

/// Takes the identity: every step has to succeed.
pub fn run(arguments: &Value) -> Result<(), String> {
    let text = |name: &str| arguments.get(name).and_then(Value::as_str).ok_or_else(|| format!("no {name}"));
    let parse = |name: &str| serde_json::from_str::<Value>(text(name)?).map_err(|e| format!("{name}: {e}"));
    let (meta, network) = (parse("meta-data")?, parse("network-config")?);
    let user = seed::user_data(text("user-data")?)?;
    let instance = meta.get("instance-id").and_then(Value::as_str);
    let named = |name: &'static str| move |error: String| format!("{name}: {error}");

    // First: keys are made of it.
    reseed(text("entropy")?).map_err(named("randomness"))?;
    identity::apply(instance).map_err(named("identity"))?;
    identity::set_hostname(&user).map_err(named("hostname"))?;
    net::forget(text("mac")?).map_err(named("old network"))?;
    net::apply(&network).map_err(named("network"))?;
    for (name, result) in apply::user_data(&user) {
        result.map_err(named(name))?;
    }
    identity::host_keys().map_err(named("ssh host keys"))?;
    // Variables for services; and a server that has not read the old keys.
    for words in [&["daemon-reload"][..], &["try-restart", "ssh.service"]] {
        systemctl(words).map_err(named("systemctl"))?;
    }
    identity::settle(instance).map_err(named("writing out"))
}

#[expect(unsafe_code, reason = "the ioctls have no safe form")]
fn reseed(hex: &str) -> Result<(), String> {
    let mut pool = Pool { bits: 8 * ENTROPY as i32, size: ENTROPY as i32, octets: [0; ENTROPY] };
    if hex.len() != 2 * ENTROPY || !hex.is_ascii() {
        return Err(format!("not {ENTROPY} octets"));
    }
    for (octet, digits) in pool.octets.iter_mut().zip(hex.as_bytes().chunks(2)) {
        let digits = std::str::from_utf8(digits).map_err(|e| e.to_string())?;
        *octet = u8::from_str_radix(digits, 16).map_err(|e| e.to_string())?;
    }
    let device = File::open("/dev/urandom").map_err(|e| e.to_string())?;
    // SAFETY: the descriptor is open for both calls; the kernel reads the pool, whose size it is told.
    unsafe { rnd_add_entropy(device.as_raw_fd(), &pool).and_then(|_| rnd_reseed(device.as_raw_fd())) }
        .map(drop)
        .map_err(|e| e.to_string())?;
    // What systemd keeps for the next boot is of the old pool.
    let _ = fs::remove_file("/var/lib/systemd/random-seed");
    Ok(())
}

fn systemctl(words: &[&str]) -> Result<(), String> {
    let mut command = Command::new("/usr/bin/systemctl");
    let status = command.args(words).stdin(Stdio::null()).status().map_err(|e| e.to_string())?;
    if status.success() { Ok(()) } else { Err(format!("{}: {status}", words.join(" "))) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn half_an_identity_changes_nothing() {
        let whole = json!({"meta-data": "{}", "user-data": "#cloud-config\n{}", "network-config": "{}", "mac": "02:00:00:00:00:01"});
        assert!(run(&whole).unwrap_err().contains("no entropy"));
        for bad in ["", "zz", &"z".repeat(64), &"\u{e9}".repeat(32)] {
            assert!(reseed(bad).is_err(), "{bad:?}");
        }
        assert!(run(&json!({})).is_err());
    }
}
