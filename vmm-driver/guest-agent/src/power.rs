//! The power button: the host's way to ask for a clean shutdown where no login manager listens for it.

use std::fs::{self, File};
use std::io::Read as _;
use std::thread;

/// `struct input_event` on a 64-bit machine: time (16 octets), type, code, value.
const EVENT: usize = 24;
const EV_KEY: u16 = 1;
const KEY_POWER: u16 = 116;

/// Listens on every input device that is a power button; the threads live as long as the guest.
pub fn listen() {
    for device in buttons() {
        thread::spawn(move || {
            if let Err(error) = watch(&device) {
                eprintln!("{device}: {error}");
            }
        });
    }
}

fn buttons() -> Vec<String> {
    let Ok(entries) = fs::read_dir("/sys/class/input") else { return Vec::new() };
    entries
        .flatten()
        .filter_map(|entry| entry.file_name().into_string().ok())
        .filter(|name| name.starts_with("event"))
        .filter(|name| {
            fs::read_to_string(format!("/sys/class/input/{name}/device/name"))
                .is_ok_and(|label| label.trim() == "Power Button")
        })
        .map(|name| format!("/dev/input/{name}"))
        .collect()
}

fn watch(device: &str) -> std::io::Result<()> {
    let mut file = File::open(device)?;
    let mut event = [0u8; EVENT];
    loop {
        file.read_exact(&mut event)?;
        if is_press(&event) {
            eprintln!("power button: shutting down");
            power_off();
        }
    }
}

fn is_press(event: &[u8; EVENT]) -> bool {
    let word = |at: usize| u16::from_ne_bytes([event[at], event[at + 1]]);
    word(16) == EV_KEY && word(18) == KEY_POWER && event[20..24] != [0, 0, 0, 0]
}

/// systemd starts `poweroff.target` on the fourth real-time signal.
#[expect(unsafe_code, reason = "real-time signals are not in nix's enumeration")]
pub fn power_off() {
    // SAFETY: plain numbers; PID 1 is systemd.
    unsafe { libc::kill(1, libc::SIGRTMIN() + 4) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_press_of_the_power_key_counts() {
        let event = |kind: u16, code: u16, value: i32| {
            let mut bytes = [0u8; EVENT];
            bytes[16..18].copy_from_slice(&kind.to_ne_bytes());
            bytes[18..20].copy_from_slice(&code.to_ne_bytes());
            bytes[20..24].copy_from_slice(&value.to_ne_bytes());
            bytes
        };
        assert!(is_press(&event(EV_KEY, KEY_POWER, 1)));
        assert!(!is_press(&event(EV_KEY, KEY_POWER, 0)));
        assert!(!is_press(&event(EV_KEY, 30, 1)));
        assert!(!is_press(&event(0, 0, 0)));
    }
}
