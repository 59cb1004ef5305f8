//! Clones the repository. Every value is one argument; what looks like an option stands behind `--` or in `--branch=`.

use super::harness::BASE;
use super::task::Task;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

/// Pauses before another attempt; a rule or a name that is just being set up is waited for.
const PAUSES: [Duration; 3] = [Duration::from_secs(2), Duration::from_secs(5), Duration::from_secs(10)];
/// Longest reason that git's words make.
const WORDS: usize = 600;

/// Where the task's repository lies, cloned now.
pub fn clone(task: &Task) -> Result<PathBuf, String> {
    configure(task)?;
    let folder = Path::new("/root").join(&task.directory);
    let part = Path::new("/root").join(format!(".{}.part", task.directory));
    let mut last = String::new();
    for pause in PAUSES.map(Some).into_iter().chain([None]) {
        // What an attempt that was cut off left.
        let _ = fs::remove_dir_all(&part);
        let output = command(task, &part).output().map_err(|e| format!("git cannot be started: {e}"))?;
        if output.status.success() {
            let _ = fs::remove_dir_all(&folder);
            fs::rename(&part, &folder).map_err(|e| format!("{}: {e}", folder.display()))?;
            return Ok(folder);
        }
        last = last_words(&output.stderr);
        if let Some(pause) = pause {
            sleep(pause);
        }
    }
    Err(format!(
        "{} cannot be cloned: {last}; is there a rule for its host, and a secret if it is private?",
        task.url
    ))
}

fn command(task: &Task, to: &Path) -> Command {
    let mut git = Command::new("/usr/bin/git");
    // A transfer that stands still is given up.
    git.args(["-c", "http.lowSpeedLimit=1", "-c", "http.lowSpeedTime=120", "clone", "--quiet"]);
    if let Some(branch) = &task.branch {
        git.arg(format!("--branch={branch}"));
    }
    git.arg("--").arg(&task.url).arg(to);
    git.env_clear().envs(BASE).envs(task.env.iter().map(|(name, value)| (name, value)));
    git.env("GIT_TERMINAL_PROMPT", "0").current_dir("/root").stdin(Stdio::null()).stdout(Stdio::null());
    git
}

/// Credentials come from the guest service by a helper; commits have an author unless somebody sets another.
fn configure(task: &Task) -> Result<(), String> {
    let host = fs::read_to_string("/etc/hostname").unwrap_or_default();
    let email = format!("agent@{}", host.trim());
    for (key, value) in [
        ("credential.helper", "/usr/lib/tapgate/guest-agent git-credential"),
        ("user.name", task.name.as_str()),
        ("user.email", email.as_str()),
    ] {
        let output = Command::new("/usr/bin/git")
            .args(["config", "--system", "--replace-all", "--", key, value])
            .env_clear()
            .envs(BASE)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| format!("the base image has no git: {e}"))?;
        if !output.status.success() {
            return Err(format!("git config: {}", last_words(&output.stderr)));
        }
    }
    Ok(())
}

/// The end of what a program complained of, as one line.
pub fn last_words(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let line: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
    let skip = line.chars().count().saturating_sub(WORDS);
    line.chars().skip(skip).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_of_a_task_is_an_option_of_git() {
        let text = r#"{"id":"a","name":"n","harness":"h","url":"https://x/--upload-pack=id","branch":"--orphan",
            "directory":"d","argv":["x"],"env":[],"status":"provisioning"}"#;
        let task = Task::parse(text).unwrap();
        let command = command(&task, Path::new("/root/.d.part"));
        let words: Vec<_> = command.get_args().map(|word| word.to_string_lossy().into_owned()).collect();
        let end = words.iter().position(|word| word == "--").unwrap();
        assert!(words[..end].contains(&"--branch=--orphan".to_owned()));
        assert_eq!(words[end + 1..], ["https://x/--upload-pack=id", "/root/.d.part"]);
    }

    #[test]
    fn words_are_one_bounded_line() {
        assert_eq!(last_words(b"a\nb\x1b[0m\n"), "a b [0m");
        assert_eq!(last_words(&[b'x'; 5000]).len(), WORDS);
    }
}
