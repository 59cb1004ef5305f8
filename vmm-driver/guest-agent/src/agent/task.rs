//! A task as the guest service hands it out, parsed once. Its id names a folder and its directory a folder below `/root`, so
//! both are checked here.

use serde_json::Value;

/// What is to be done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Task {
    /// The agent.
    pub id: String,
    /// Its name.
    pub name: String,
    /// Its harness's name.
    pub harness: String,
    /// What to clone.
    pub url: String,
    /// What to check out, if not the default.
    pub branch: Option<String>,
    /// The folder's name.
    pub directory: String,
    /// The program and its arguments.
    pub argv: Vec<String>,
    /// Its variables.
    pub env: Vec<(String, String)>,
    status: String,
}

impl Task {
    /// Reads it; the error says what is wrong.
    pub fn parse(text: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(text).map_err(|e| format!("the task is not JSON: {e}"))?;
        let text = |name: &str| {
            let found = value.get(name).and_then(Value::as_str).filter(|text| !text.contains('\0'));
            found.map(str::to_owned).ok_or_else(|| format!("the task has no `{name}`"))
        };
        let task = Self {
            id: text("id")?,
            name: text("name")?,
            harness: text("harness")?,
            url: text("url")?,
            branch: text("branch").ok(),
            directory: text("directory")?,
            argv: words(&value["argv"])?,
            env: pairs(&value["env"])?,
            status: text("status")?,
        };
        let plain = |text: &str| {
            !text.is_empty()
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        };
        if !plain(&task.id)
            || !plain(&task.directory)
            || task.id.starts_with('.')
            || task.directory.starts_with(['.', '-'])
        {
            return Err("the task's names are no names".into());
        }
        if !(task.url.starts_with("https://") || task.url.starts_with("http://")) {
            return Err("the task's repository is not reached by HTTPS".into());
        }
        Ok(task)
    }

    /// Whether the records say that nothing was begun.
    pub fn is_new(&self) -> bool {
        self.status == "provisioning"
    }
}

fn words(value: &Value) -> Result<Vec<String>, String> {
    let words: Option<Vec<String>> =
        value.as_array().and_then(|list| list.iter().map(|word| word.as_str().map(str::to_owned)).collect());
    let words = words.filter(|words| words.iter().all(|word| !word.contains('\0')));
    words.filter(|words| !words.is_empty()).ok_or_else(|| "the task has no command".to_owned())
}

fn pairs(value: &Value) -> Result<Vec<(String, String)>, String> {
    let pair = |pair: &Value| {
        let (name, value) = (pair.get(0)?.as_str()?, pair.get(1)?.as_str()?);
        let sound = !name.is_empty() && !name.contains(['=', '\0']) && !value.contains('\0');
        sound.then(|| (name.to_owned(), value.to_owned()))
    };
    let pairs: Option<Vec<_>> = value.as_array().and_then(|list| list.iter().map(pair).collect());
    pairs.ok_or_else(|| "the task's variables cannot be read".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn task(change: impl FnOnce(&mut Value)) -> Result<Task, String> {
        let mut value = json!({"id": "agt_a1", "name": "n", "harness": "h", "url": "https://git.example.com/r",
            "branch": null, "directory": "r", "argv": ["run", "--", "$(id)"], "env": [["A", "x\ny"]],
            "status": "provisioning"});
        change(&mut value);
        Task::parse(&value.to_string())
    }

    #[test]
    fn a_task_is_taken_whole_or_not_at_all() {
        let good = task(|_| {}).unwrap();
        assert!(good.is_new() && good.branch.is_none());
        assert_eq!(good.argv, ["run", "--", "$(id)"]);
        for (name, wrong) in [
            ("id", json!("../x")),
            ("id", json!("")),
            ("directory", json!("..")),
            ("directory", json!("-rf")),
            ("url", json!("ext::sh -c id")),
            ("argv", json!([])),
            ("argv", json!(["a\u{0}b"])),
            ("argv", json!("run")),
            ("env", json!([["A=B", "c"]])),
            ("env", json!([["A"]])),
            ("status", json!(null)),
        ] {
            assert!(task(|value| value[name] = wrong.clone()).is_err(), "{name}: {wrong}");
        }
    }
}
