//! Points at which a test ends the daemon, as `kill -9` exactly there would, or one of its tasks, as a mistake there would. A released
//! daemon has none: without debug assertions they are nothing. Must never do anything else.
#![forbid(unsafe_code)]

/// The variable that names the file in which a test writes the point it wants.
pub const FILE: &str = "TAPGATE_FAULT";

/// Ends this process if a test wants it ended here.
#[cfg(debug_assertions)]
pub fn point(name: &str) {
    if wanted(name) {
        let _ = nix::sys::signal::raise(nix::sys::signal::Signal::SIGKILL);
    }
}

/// Ends this task if a test wants it ended here.
#[cfg(debug_assertions)]
pub fn mistake(name: &str) {
    assert!(!wanted(name), "a test wants a mistake at {name}");
}

#[cfg(debug_assertions)]
fn wanted(name: &str) -> bool {
    let Some(file) = std::env::var_os(FILE) else { return false };
    std::fs::read_to_string(file).is_ok_and(|wanted| wanted.trim() == name)
}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline]
pub const fn point(_: &str) {}

/// Nothing.
#[cfg(not(debug_assertions))]
#[inline]
pub const fn mistake(_: &str) {}
