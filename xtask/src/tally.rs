//! Counting what passed and failed over several test runners, from what each prints at its end.

use anyhow::{Result, bail};
use std::fmt;

/// Passed and failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    /// How many passed.
    pub passed: u64,
    /// How many did not.
    pub failed: u64,
}

impl Tally {
    /// Reads every summary in what a runner printed: cargo's own, nextest's and the demo's.
    pub fn read(text: &str) -> Self {
        let mut tally = Self::default();
        for line in text.lines().filter(|line| is_summary(line)) {
            let words: Vec<&str> =
                line.split([' ', ',', ';', ':', '.', '(', ')']).filter(|w| !w.is_empty()).collect();
            for pair in words.windows(2) {
                let Ok(count) = pair[0].parse::<u64>() else { continue };
                match pair[1] {
                    "passed" => tally.passed += count,
                    "failed" | "exec" | "timed" => tally.failed += count,
                    _ => {}
                }
            }
        }
        tally
    }

    /// What a runner did: a runner that ends badly without naming a failure counts as one.
    pub fn of_run(text: &str, success: bool) -> Self {
        let mut tally = Self::read(text);
        if !success && tally.failed == 0 {
            tally.failed = 1;
        }
        tally
    }

    /// Adds another runner's.
    pub fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// Prints the line that ends a run; an error if anything failed, or if nothing ran at all.
    pub fn conclude(self) -> Result<()> {
        println!("{self}");
        if self.failed > 0 {
            bail!("{} failed", self.failed);
        }
        if self.passed == 0 {
            bail!("no test ran");
        }
        Ok(())
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} passed, {} failed", self.passed, self.failed)
    }
}

/// Whether the line is one that a runner ends with, and not a test's own output that looks similar (which nextest
/// indents, unlike its own end).
fn is_summary(line: &str) -> bool {
    let counts_alone = || {
        let words: Vec<&str> = line.split(' ').collect();
        matches!(words[..], [p, "passed,", f, "failed"] if p.parse::<u64>().is_ok() && f.parse::<u64>().is_ok())
    };
    line.starts_with("test result: ")
        || (line.trim_start().starts_with("Summary [") && line.contains(" run: "))
        || counts_alone()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_runner_is_understood() {
        let of = |text| {
            let Tally { passed, failed } = Tally::read(text);
            (passed, failed)
        };
        assert_eq!(of("     Summary [   0.010s] 5 tests run: 5 passed, 1 skipped"), (5, 0));
        let mixed =
            "Summary [ 1.0s] 9 tests run: 5 passed (1 slow), 2 failed, 1 timed out, 1 exec failed, 0 skipped";
        assert_eq!(of(mixed), (5, 4));
        assert_eq!(of("  Summary [ 1.0s] 3/9 tests run: 2 passed, 1 failed, 6 skipped"), (2, 1));
        let libtest = "test result: ok. 3 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out\n\
            test result: FAILED. 1 passed; 2 failed; 0 ignored";
        assert_eq!(of(libtest), (4, 2));
        assert_eq!(of("1. create ... ok\n8 passed, 0 failed\n"), (8, 0));
    }

    #[test]
    fn what_only_looks_like_a_summary_is_not_counted() {
        assert_eq!(Tally::read("    test result: FAILED. 0 passed; 1 failed; 0 ignored"), Tally::default());
        assert_eq!(Tally::read("the guest said: 5 passed, 3 failed\n7 failed logins"), Tally::default());
    }

    #[test]
    fn a_runner_that_dies_is_a_failure() {
        assert_eq!(Tally::of_run("error: could not compile", false), Tally { passed: 0, failed: 1 });
        assert_eq!(
            Tally::of_run("test result: FAILED. 1 passed; 2 failed", false),
            Tally { passed: 1, failed: 2 }
        );
        assert!(Tally::default().conclude().is_err());
        assert!(Tally { passed: 1, failed: 0 }.conclude().is_ok());
    }
}
