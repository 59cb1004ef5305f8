//! The process inside the tmux session: runs the harness with its arguments as they are, notes how it ended, and leaves a
//! shell for whoever attaches.

use super::record::{Kept, Record};
use super::task::Task;
use nix::sys::signal::{SigSet, Signal};
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus};

const SEARCH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// What every program of an agent's has; the user's own variables win.
pub const BASE: [(&str, &str); 5] =
    [("HOME", "/root"), ("LANG", "C.UTF-8"), ("PATH", SEARCH), ("SHELL", "/bin/bash"), ("USER", "root")];

/// The harness's program; the error says what is missing.
pub fn find(task: &Task, folder: &Path) -> Result<PathBuf, String> {
    let program = &task.argv[0];
    let path = task.env.iter().rfind(|(name, _)| name == "PATH").map_or(SEARCH, |(_, value)| value.as_str());
    let runs = |file: &PathBuf| {
        fs::metadata(file).is_ok_and(|meta| meta.is_file() && meta.permissions().mode() & 0o111 != 0)
    };
    let found = if program.contains('/') {
        Some(folder.join(program)).filter(runs)
    } else {
        path.split(':').map(|place| Path::new(place).join(program)).find(runs)
    };
    found.ok_or_else(|| {
        format!(
            "the base image has no program `{program}`, which the harness `{}` needs; use an image or a snapshot that has it",
            task.harness
        )
    })
}

/// The harness as a process to be started.
fn command(argv: &[String], env: &[(String, String)], folder: &Path) -> Option<Command> {
    let (program, rest) = argv.split_first()?;
    let mut command = Command::new(program);
    command.args(rest).env_clear().envs(BASE);
    // The terminal is tmux's.
    for name in ["TERM", "TMUX", "TMUX_PANE"] {
        if let Some(value) = std::env::var_os(name) {
            command.env(name, value);
        }
    }
    command.envs(env.iter().map(|(name, value)| (name, value))).current_dir(folder);
    Some(command)
}

/// Runs it; ends by becoming a shell.
pub fn run(agent: Option<&str>) -> Result<(), String> {
    let agent = agent.filter(|agent| agent.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_'));
    let record = Record::of(agent.ok_or("which agent?")?);
    let Kept { argv, env, folder } = record.command().ok_or("there is no command for this agent")?;
    record.set_harness()?;
    // Unlike the guest agent, this may be ended when memory is short.
    let _ = fs::write("/proc/self/oom_score_adj", "0");
    // Keys that interrupt are for the harness; its own mask is empty.
    let mut mask = SigSet::empty();
    [Signal::SIGINT, Signal::SIGQUIT, Signal::SIGTSTP].into_iter().for_each(|signal| mask.add(signal));
    let _ = mask.thread_block();
    let mut command = command(&argv, &env, &folder).ok_or("the command is empty")?;
    let failure = match command.status() {
        Ok(status) => describe(status),
        Err(error) => Some(format!("`{}` cannot be started: {error}", argv[0])),
    };
    record.set_outcome(failure.as_deref())?;
    println!("\n[{}]", failure.as_deref().unwrap_or("the harness has ended"));
    let _ = mask.thread_unblock();
    let mut shell = Command::new("/bin/bash");
    shell.arg("--login").current_dir(&folder);
    shell.envs(BASE).envs(env.iter().map(|(name, value)| (name, value)));
    Err(format!("bash: {}", shell.exec()))
}

fn describe(status: ExitStatus) -> Option<String> {
    match (status.success(), status.code()) {
        (true, _) => None,
        (false, Some(code)) => Some(format!("the harness ended with exit code {code}")),
        (false, None) => Some(format!("the harness was ended by signal {}", status.signal().unwrap_or(0))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn task(program: &str) -> Task {
        let value = serde_json::json!({"id": "a", "name": "n", "harness": "mine", "url": "https://x/r", "directory": "d",
            "argv": [program], "env": [], "status": "provisioning"});
        Task::parse(&value.to_string()).unwrap()
    }

    #[test]
    fn a_program_that_is_not_there_is_named() {
        assert_eq!(find(&task("env"), Path::new("/")).unwrap(), Path::new("/usr/bin/env"));
        assert_eq!(find(&task("usr/bin/env"), Path::new("/")).unwrap(), Path::new("/usr/bin/env"));
        let error = find(&task("no-such-harness"), Path::new("/")).unwrap_err();
        assert!(error.contains("no-such-harness") && error.contains("mine"), "{error}");
        assert!(find(&task("./etc"), Path::new("/")).is_err(), "a folder is no program");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn a_real_process_gets_every_argument_as_it_was(
            words in prop::collection::vec("\\PC{0,12}|-{1,2}[a-z]{0,5}|[\n\t '\"\\\\$(){}`;&|<>*?#~-]{0,20}", 1..6),
        ) {
            // The prompt of a harness is an argument like these: after `-c` and a name, as the template has it.
            let script = "import sys; sys.stdout.buffer.write(b'\\0'.join(a.encode('utf-8', 'surrogateescape') for a in sys.argv[1:]))";
            let mut argv = vec!["python3".to_owned(), "-c".to_owned(), script.to_owned()];
            argv.extend(words.iter().cloned());
            let env = [("PATH".to_owned(), std::env::var("PATH").unwrap())];
            let output = command(&argv, &env, Path::new("/")).unwrap().output().unwrap();
            let got: Vec<String> = String::from_utf8(output.stdout).unwrap().split('\0').map(str::to_owned).collect();
            prop_assert_eq!(got, words);
        }
    }
}
