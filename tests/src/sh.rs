//! Running real programs from tests and the demo: captured, and with their own words in the error.

use anyhow::{Context as _, Result, bail};
use std::{
    ffi::OsStr,
    io::Write as _,
    path::PathBuf,
    process::{Command, Stdio},
    thread,
};

/// What a program did.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Done {
    /// Its exit code; -1 if a signal ended it.
    pub code: i32,
    /// What it printed.
    pub out: String,
    /// What it complained of.
    pub err: String,
}

impl Done {
    /// Whether it ended well.
    pub fn ok(&self) -> bool {
        self.code == 0
    }

    /// The last line of its complaint, else of what it printed: what a person would read first.
    pub fn gist(&self) -> &str {
        let last = |text: &'_ str| text.trim_end().lines().last().map(str::len);
        let text = if last(&self.err).is_some() { &self.err } else { &self.out };
        text.trim_end().lines().last().unwrap_or("").trim()
    }
}

/// Runs the command to its end, feeding it the input.
pub fn capture(command: &mut Command, input: &[u8]) -> Result<Done> {
    let what = format!("{:?}", command.get_program());
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child =
        command.spawn().with_context(|| format!("{what} could not be started; is it installed?"))?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let input = input.to_vec();
    let feeder = thread::spawn(move || stdin.write_all(&input));
    let output = child.wait_with_output()?;
    // A program may well end without reading all that it was given.
    let _ = feeder.join();
    Ok(Done {
        code: output.status.code().unwrap_or(-1),
        out: String::from_utf8_lossy(&output.stdout).into_owned(),
        err: String::from_utf8_lossy(&output.stderr).into_owned(),
    })
}

/// Runs a program with arguments; what it printed, or an error that holds what it complained of.
pub fn run<I: IntoIterator<Item = S>, S: AsRef<OsStr>>(program: &str, arguments: I) -> Result<String> {
    let mut command = Command::new(program);
    command.args(arguments);
    expect(&mut command, b"")
}

/// Runs the command; what it printed, or an error that holds what it complained of.
pub fn expect(command: &mut Command, input: &[u8]) -> Result<String> {
    let done = capture(command, input)?;
    if !done.ok() {
        bail!("{command:?} ended with {}: {}", done.code, done.err.trim());
    }
    Ok(done.out)
}

/// `ip` with these words.
pub fn ip(words: &str) -> Result<String> {
    run("ip", words.split_whitespace())
}

/// A program of this workspace, beside the one that runs (or, for tests, in the folder above).
pub fn sibling(name: &str) -> Result<PathBuf> {
    let me = std::env::current_exe()?;
    let beside = me.ancestors().skip(1).take(2).map(|folder| folder.join(name)).find(|file| file.is_file());
    beside.with_context(|| {
        format!("`{name}` is not built; run `cargo build --workspace`, or `cargo xtask test`")
    })
}
