//! `tapgate unit`: prints the systemd unit, so that the one binary is all that a host needs to be given.

/// The unit's text.
pub const UNIT: &str = include_str!("../tapgate.service");

/// Prints it.
pub fn run() {
    print!("{UNIT}");
}
