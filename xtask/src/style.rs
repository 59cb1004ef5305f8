//! The house style that no other tool checks: how long a file is, and that it opens by saying what it owns.

use crate::run::{output, program, root};
use anyhow::{Context as _, Result, bail};
use std::{fs, path::Path};

/// From here on a file is probably two ideas.
const SOFT: usize = 400;
/// Beyond this it is refused.
const HARD: usize = 600;

/// Checks every Rust file that git knows or would add.
pub fn check() -> Result<()> {
    let mut git = program("git");
    git.args(["ls-files", "--cached", "--others", "--exclude-standard", "*.rs"]);
    let files = output(&mut git).context("`git ls-files` failed; the style check needs the repository")?;
    let mut faults = Vec::new();
    for name in files.lines() {
        let path = root().join(name);
        if !path.exists() {
            continue;
        }
        let text = fs::read_to_string(&path).with_context(|| format!("{name} cannot be read"))?;
        match judge(Path::new(name), &text) {
            Ok(None) => {}
            Ok(Some(advice)) => eprintln!("note: {advice}"),
            Err(fault) => faults.push(fault),
        }
    }
    if !faults.is_empty() {
        bail!("house style:\n  {}", faults.join("\n  "));
    }
    Ok(())
}

/// The file's fault, or advice.
fn judge(file: &Path, text: &str) -> Result<Option<String>, String> {
    let name = file.display();
    if !text.starts_with("//!") {
        return Err(format!("{name} does not open with a `//!` line that says what it owns"));
    }
    if is_test(file) {
        return Ok(None);
    }
    let lines = code_lines(text);
    if lines > HARD {
        return Err(format!("{name} has {lines} lines without its tests; {HARD} is the limit, split it"));
    }
    Ok((lines > SOFT).then(|| format!("{name} has {lines} lines without its tests; is it two ideas?")))
}

/// Whether the file is a crate's test, which may be as long as it has cases. (The folder `tests/` is a crate itself.)
fn is_test(file: &Path) -> bool {
    file.iter().skip(1).any(|part| part == "tests")
}

/// Lines up to the file's own tests.
fn code_lines(text: &str) -> usize {
    text.lines().take_while(|line| *line != "#[cfg(test)]").count()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn long_files_and_files_that_say_nothing_are_refused() {
        let file = |code: usize, tests: usize| {
            format!("//! What.\n{}#[cfg(test)]\n{}", "x\n".repeat(code - 1), "t\n".repeat(tests))
        };
        let of = |name: &str, text: &str| judge(Path::new(name), text);
        let judge = |text: &str| judge(Path::new("tests/src/a.rs"), text);
        assert_eq!(judge(&file(SOFT, 5000)), Ok(None));
        assert!(judge(&file(SOFT + 1, 0)).unwrap().is_some());
        assert!(judge(&file(HARD + 1, 0)).unwrap_err().contains("split"));
        assert_eq!(of("api/tests/a.rs", &file(HARD + 1, 0)), Ok(None));
        assert!(judge("use std::fs;\n").is_err());
        assert!(of("api/tests/a.rs", "use std::fs;\n").is_err());
    }
}
