//! What the end of a VMM means. Pure: its exit status, what was asked of it, and the last that the guest's kernel said.

use super::Kind;
use super::supervise::Intent;
use crate::process::Ended;
use crate::spec::Exit;

/// What has to come next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The guest restarted itself, and its VMM ended with it: it gets another.
    Restart,
    /// It has ended.
    Ended(Exit),
}

/// What the guest's kernel says last.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastWords {
    /// It is off: Firecracker has no power to switch off and runs on.
    Off,
    /// It restarts.
    Restart,
    /// Neither.
    Other,
}

/// Finds the last of the kernel's parting words in the end of a console's text.
pub fn last_words(console: &str) -> LastWords {
    let last = |words: &[&str]| words.iter().filter_map(|w| console.rfind(w)).max();
    let off = last(&["reboot: Power down", "reboot: System halted"]);
    let restart = last(&["reboot: Restarting system", "Linux version "]);
    match (off, restart) {
        (Some(off), restart) if restart.is_none_or(|at| at < off) => LastWords::Off,
        (_, Some(at)) if console[at..].starts_with("reboot") => LastWords::Restart,
        _ => LastWords::Other,
    }
}

/// Judges.
pub fn judge(kind: Kind, ended: Ended, intent: Intent, words: LastWords, complaint: &str) -> Outcome {
    let crashed = |how: String| {
        Outcome::Ended(Exit::Crashed(format!("{how}: {complaint}").trim_end_matches(": ").into()))
    };
    let clean = match ended {
        Ended::Code(0) => true,
        // Its parent was a daemon that is gone, and nobody knows how it ended but by what the guest said.
        Ended::Unknown => words != LastWords::Other,
        _ => false,
    };
    match (intent, kind) {
        (Intent::Kill, _) => Outcome::Ended(Exit::Stopped),
        (Intent::Hung, _) => Outcome::Ended(Exit::Crashed("it hung: its API did not answer".into())),
        (Intent::Off, _) => Outcome::Ended(Exit::GuestShutdown),
        (Intent::ShutDown, _) | (_, Kind::CloudHypervisor) if clean => Outcome::Ended(Exit::GuestShutdown),
        (Intent::Run, Kind::Firecracker) if clean && words != LastWords::Off => Outcome::Restart,
        (Intent::Run, Kind::Firecracker) if clean => Outcome::Ended(Exit::GuestShutdown),
        _ => match ended {
            Ended::Code(code) => crashed(format!("exit code {code}")),
            Ended::Signal(signal) => crashed(format!("signal {signal}")),
            Ended::Unknown => crashed("it is gone".into()),
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_last_words_are_the_last() {
        let off = "Linux version 6\nx\n[ 9.1] reboot: Power down\n";
        assert_eq!(last_words(off), LastWords::Off);
        assert_eq!(last_words("reboot: System halted"), LastWords::Off);
        assert_eq!(last_words(&format!("{off}Linux version 6\n")), LastWords::Other, "it was started again");
        assert_eq!(
            last_words("reboot: Power down\nLinux version\nreboot: Restarting system"),
            LastWords::Restart
        );
        assert_eq!(last_words(""), LastWords::Other);
    }

    #[test]
    fn every_end_has_its_meaning() {
        use Ended::{Code, Signal, Unknown};
        use Intent::{Hung, Kill, Off, Run, ShutDown};
        let of = |kind, ended, intent, words| judge(kind, ended, intent, words, "words");
        let (fc, ch) = (Kind::Firecracker, Kind::CloudHypervisor);
        assert_eq!(of(fc, Code(0), Run, LastWords::Restart), Outcome::Restart);
        assert_eq!(of(fc, Code(0), Run, LastWords::Other), Outcome::Restart, "a kernel that panicked");
        assert_eq!(of(fc, Unknown, Run, LastWords::Restart), Outcome::Restart);
        assert_eq!(of(fc, Unknown, Run, LastWords::Off), Outcome::Ended(Exit::GuestShutdown));
        assert_eq!(of(fc, Code(0), ShutDown, LastWords::Restart), Outcome::Ended(Exit::GuestShutdown));
        assert_eq!(of(fc, Signal(9), Off, LastWords::Off), Outcome::Ended(Exit::GuestShutdown));
        assert_eq!(of(ch, Code(0), Run, LastWords::Other), Outcome::Ended(Exit::GuestShutdown));
        for kind in [fc, ch] {
            assert_eq!(of(kind, Signal(9), Kill, LastWords::Off), Outcome::Ended(Exit::Stopped));
            for (ended, intent) in
                [(Signal(11), Run), (Code(148), ShutDown), (Unknown, Run), (Signal(9), Hung)]
            {
                let outcome = of(kind, ended, intent, LastWords::Other);
                assert!(
                    matches!(outcome, Outcome::Ended(Exit::Crashed(_))),
                    "{kind:?} {ended:?}: {outcome:?}"
                );
            }
        }
    }
}
