//! Harnesses: the programs that run an agent's prompt, as a table of the configuration. A template's elements become
//! arguments one to one; nothing is ever joined into a line.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;

/// Where the prompt goes: one argument.
const PROMPT: &str = "{prompt}";
/// Where the agent's own arguments go: any number.
const ARGS: &str = "{args}";

/// How one harness is started.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, Serialize)]
#[serde(deny_unknown_fields)]
pub struct Harness {
    /// The program and its arguments. `{prompt}` stands for the prompt, `{args}` for the agent's arguments; both are
    /// whole elements.
    pub argv: Vec<String>,
    /// Variables that it needs, where the user has none of that name.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
}

/// Why an agent cannot be given this command.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum HarnessError {
    /// Not in the table.
    #[error("`harness` must be one of {0}; the operator adds others to the daemon's configuration")]
    Unknown(String),
    /// Quotes that do not close.
    #[error(
        "`agent_args` does not parse: each quote needs its end (words and quotes as in a shell; nothing is expanded)"
    )]
    Args,
    /// A template that cannot work.
    #[error("harness `{0}` {1}")]
    Template(String, &'static str),
}

/// The table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Harnesses(BTreeMap<String, Harness>);

impl Default for Harnesses {
    fn default() -> Self {
        let harness = |argv: &[&str], env: &[(&str, &str)]| Harness {
            argv: argv.iter().map(|word| (*word).to_owned()).collect(),
            env: env.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect(),
        };
        // The VM is the sandbox: the programs' own questions would wait for nobody.
        let claude = ["claude", "--print", "--dangerously-skip-permissions", ARGS, "--", PROMPT];
        let codex = ["codex", "exec", "--dangerously-bypass-approvals-and-sandbox", ARGS, "--", PROMPT];
        Self(BTreeMap::from([
            ("claude".to_owned(), harness(&claude, &[("IS_SANDBOX", "1")])),
            ("codex".to_owned(), harness(&codex, &[])),
        ]))
    }
}

impl Harnesses {
    /// The built-in ones and the operator's, which win; an empty `argv` takes one away.
    ///
    /// # Errors
    /// A template without program or prompt, or a name that is none.
    pub fn with(own: BTreeMap<String, Harness>) -> Result<Self, HarnessError> {
        let mut all = Self::default();
        for (name, harness) in own {
            let plain = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
            if name.is_empty() || name.len() > 64 || name.starts_with('-') || !name.chars().all(plain) {
                return Err(HarnessError::Template(name, "needs a name of letters, digits, `-`, `_`, `.`"));
            }
            let count = |word| harness.argv.iter().filter(|element| *element == word).count();
            let why = match harness.argv.first().map(String::as_str) {
                None => {
                    all.0.remove(&name);
                    continue;
                }
                Some("" | PROMPT | ARGS) => Some("must begin with a program"),
                _ if count(PROMPT) != 1 => Some("needs `{prompt}` as one element of its argv"),
                _ if count(ARGS) > 1 => Some("may have `{args}` once"),
                _ if harness.argv.iter().any(|word| word.contains('\0')) => Some("must not hold NUL"),
                _ => None,
            };
            if let Some(why) = why {
                return Err(HarnessError::Template(name, why));
            }
            all.0.insert(name, harness);
        }
        Ok(all)
    }

    /// The harness of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<&Harness, HarnessError> {
        self.0.get(name).ok_or_else(|| {
            let names: Vec<&str> = self.0.keys().map(String::as_str).collect();
            HarnessError::Unknown(names.join(", "))
        })
    }
}

impl Harness {
    /// The program and its arguments for this prompt and these arguments of the agent.
    ///
    /// # Errors
    /// The agent's arguments do not parse.
    pub fn argv(&self, prompt: &str, args: Option<&str>) -> Result<Vec<String>, HarnessError> {
        let args = shlex::split(args.unwrap_or("")).ok_or(HarnessError::Args)?;
        let mut argv = Vec::with_capacity(self.argv.len() + args.len());
        for element in &self.argv {
            match element.as_str() {
                PROMPT => argv.push(prompt.to_owned()),
                ARGS => argv.extend(args.iter().cloned()),
                _ => argv.push(element.clone()),
            }
        }
        Ok(argv)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn table(text: &str) -> Result<Harnesses, HarnessError> {
        Harnesses::with(toml::from_str(text).unwrap())
    }

    #[test]
    fn the_operators_table_adds_replaces_and_removes() {
        let all = table("mine.argv = ['run', '{prompt}']\ncodex.argv = []\nclaude.argv = ['c', '{prompt}']")
            .unwrap();
        assert_eq!(all.get("mine").unwrap().argv("p", Some("ignored")).unwrap(), ["run", "p"]);
        assert_eq!(all.get("claude").unwrap().argv("p", None).unwrap(), ["c", "p"]);
        assert!(all.get("codex").unwrap_err().to_string().contains("claude, mine"));
        for bad in [
            "x.argv = ['{prompt}']",
            "x.argv = ['run']",
            "x.argv = ['run', '{prompt}', '{prompt}']",
            "'a b'.argv = ['run', '{prompt}']",
            "-x.argv = ['run', '{prompt}']",
        ] {
            assert!(table(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn placeholders_are_whole_elements() {
        let all = table("x.argv = ['run', '--p={prompt}', '{prompt}']").unwrap();
        assert_eq!(all.get("x").unwrap().argv("$(id)", None).unwrap(), ["run", "--p={prompt}", "$(id)"]);
    }

    proptest! {
        #[test]
        fn every_argument_arrives_as_it_was(
            prompt in "\\PC*|-{1,2}[a-z'\"$()`\n ]*|[\n\t '\"\\\\$(){}`;&|<>*?#~-]{0,40}",
            args in prop::collection::vec("[a-z0-9\n '\"\\\\$(){}`;&|<>*?#~=-]{0,20}", 0..6),
        ) {
            let quoted = shlex::try_join(args.iter().map(String::as_str)).unwrap();
            let argv = Harnesses::default().get("claude").unwrap().argv(&prompt, Some(&quoted)).unwrap();
            prop_assert_eq!(argv.last(), Some(&prompt));
            prop_assert_eq!(&argv[3..3 + args.len()], &args[..]);
            prop_assert_eq!(&argv[3 + args.len()], "--");
            prop_assert_eq!(argv.len(), args.len() + 5);
        }
    }
}
