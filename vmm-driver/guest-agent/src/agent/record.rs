//! How far an agent's task is, on the guest's disk: written before each step, so that none is done twice.

use super::task::Task;
use crate::files;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

const ROOT: &str = "/var/lib/tapgate/agent";

/// The last step that was begun.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// The repository is being cloned.
    Cloning,
    /// The harness was started in this boot.
    Started(String),
    /// It is over; why it failed, if it did.
    Ended(Option<String>),
}

/// What the harness is given.
pub struct Kept {
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its variables.
    pub env: Vec<(String, String)>,
    /// Where it works.
    pub folder: PathBuf,
}

/// One task's folder.
pub struct Record {
    folder: PathBuf,
}

impl Record {
    /// The record of an agent; its id is a plain name.
    pub fn of(agent: &str) -> Self {
        Self { folder: Path::new(ROOT).join(agent) }
    }

    /// What was begun last.
    pub fn step(&self) -> Option<Step> {
        let text = fs::read_to_string(self.folder.join("step")).ok()?;
        let value: Value = serde_json::from_str(&text).ok()?;
        match value.get("step")?.as_str()? {
            "cloning" => Some(Step::Cloning),
            "started" => Some(Step::Started(value.get("boot")?.as_str()?.to_owned())),
            "ended" => Some(Step::Ended(value.get("failure")?.as_str().map(str::to_owned))),
            _ => None,
        }
    }

    /// Writes a step down; it is on the disk when this comes back.
    pub fn set(&self, step: &Step) -> Result<(), String> {
        let value = match step {
            Step::Cloning => json!({"step": "cloning"}),
            Step::Started(boot) => json!({"step": "started", "boot": boot}),
            Step::Ended(failure) => json!({"step": "ended", "failure": failure}),
        };
        self.write("step", &value)
    }

    /// Keeps what the harness is to be given.
    pub fn keep(&self, task: &Task, folder: &Path) -> Result<(), String> {
        let env: Vec<[&str; 2]> =
            task.env.iter().map(|(name, value)| [name.as_str(), value.as_str()]).collect();
        self.write("command", &json!({"argv": task.argv, "env": env, "folder": folder.to_string_lossy()}))
    }

    /// What was kept.
    pub fn command(&self) -> Option<Kept> {
        let value: Value =
            serde_json::from_str(&fs::read_to_string(self.folder.join("command")).ok()?).ok()?;
        let text = |value: &Value| value.as_str().map(str::to_owned);
        let argv = value.get("argv")?.as_array()?.iter().map(text).collect::<Option<Vec<_>>>()?;
        let pair = |pair: &Value| Some((text(pair.get(0)?)?, text(pair.get(1)?)?));
        let env = value.get("env")?.as_array()?.iter().map(pair).collect::<Option<Vec<_>>>()?;
        Some(Kept { argv, env, folder: PathBuf::from(value.get("folder")?.as_str()?) })
    }

    /// Notes the process that waits for the harness.
    pub fn set_harness(&self) -> Result<(), String> {
        self.write("process", &json!({"pid": std::process::id(), "boot": boot_id()}))
    }

    /// Whether that process is there. Not noted yet counts as being there: tmux is about to start it.
    pub fn harness_lives(&self) -> bool {
        let Ok(text) = fs::read_to_string(self.folder.join("process")) else { return self.is_young() };
        let pid = serde_json::from_str::<Value>(&text).ok().and_then(|value| value.get("pid")?.as_u64());
        pid.is_some_and(|pid| Path::new("/proc").join(pid.to_string()).exists())
    }

    /// Whether the start is not older than tmux may take.
    fn is_young(&self) -> bool {
        let age = fs::metadata(self.folder.join("step")).and_then(|meta| meta.modified()).ok();
        age.and_then(|at| at.elapsed().ok()).is_none_or(|age| age.as_secs() < 60)
    }

    /// Notes how the harness ended: `None` is well.
    pub fn set_outcome(&self, failure: Option<&str>) -> Result<(), String> {
        self.write("outcome", &json!({"failure": failure}))
    }

    /// How it ended, if it has.
    pub fn outcome(&self) -> Option<Option<String>> {
        let value: Value =
            serde_json::from_str(&fs::read_to_string(self.folder.join("outcome")).ok()?).ok()?;
        Some(value.get("failure")?.as_str().map(str::to_owned))
    }

    fn write(&self, name: &str, value: &Value) -> Result<(), String> {
        let path = self.folder.join(name);
        files::write(&path, value.to_string().as_bytes(), 0o600)?;
        let synced = File::open(&path).and_then(|file| file.sync_all());
        synced
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .map_err(|e| format!("{}: {e}", path.display()))
    }
}

/// Names this boot of the guest.
pub fn boot_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default().trim().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_and_commands_come_back_as_they_were() {
        let folder = std::env::temp_dir().join(format!("tapgate-agent-record-{}", std::process::id()));
        let record = Record { folder: folder.join("agt_a") };
        assert_eq!(record.step(), None);
        for step in
            [Step::Cloning, Step::Started(boot_id()), Step::Ended(None), Step::Ended(Some("x\n'".into()))]
        {
            record.set(&step).unwrap();
            assert_eq!(record.step(), Some(step));
        }
        assert_eq!(record.outcome(), None);
        record.set_outcome(None).unwrap();
        assert_eq!(record.outcome(), Some(None));
        record.set_harness().unwrap();
        assert!(record.harness_lives());
        fs::remove_dir_all(folder).unwrap();
    }
}
