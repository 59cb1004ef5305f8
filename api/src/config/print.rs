//! `tapgate config`: checks the configuration and prints it as a file: what is set as it is set, and every other key as a comment
//! with its default. What each key means is said once, in the flags' help; nothing here may say it again.

use super::Settings;
use crate::serve;
use anyhow::Context as _;
use clap::{Arg, Args as _};
use std::io::Write as _;

/// What a key holds that may be a password.
const MASKED: [&str; 1] = ["smtp_url"];
/// The one key that is no flag.
const HARNESS: &str =
    "# How agents' harnesses are started, by name: see docs/agents.md. A table: after all other keys
# [harness.mine]
# argv = [\"/usr/local/bin/run-agent\", \"{args}\", \"--\", \"{prompt}\"]
";

/// Runs `tapgate config`.
///
/// # Errors
/// The configuration cannot be read, or a key is unknown or makes no sense.
pub fn run(args: serve::Args) -> anyhow::Result<()> {
    let settings = args.settings()?;
    settings.clone().check()?;
    Ok(std::io::stdout().write_all(file(&settings)?.as_bytes())?)
}

/// The file.
fn file(settings: &Settings) -> anyhow::Result<String> {
    let set = toml::Table::try_from(settings).context("the configuration cannot be written down")?;
    let mut out =
        String::from("# tapgate's configuration. A key that is commented out has the value that is shown.\n");
    let command = Settings::augment_args(clap::Command::new("serve"));
    for arg in command.get_arguments() {
        let (key, help) = (arg.get_id().as_str(), help(arg));
        let (means, default) = match help.split_once(" [default: ") {
            Some((means, default)) => (means, default.trim_end_matches(']')),
            None => (help.as_str(), ""),
        };
        out.push_str(&format!("\n# {means}\n"));
        match set.get(key) {
            Some(_) if MASKED.contains(&key) => out.push_str(&format!("{key} = \"(set; not shown)\"\n")),
            Some(value) => out.push_str(&format!("{key} = {value}\n")),
            None => out.push_str(&format!("# {key} = {}\n", shown(arg, default))),
        }
    }
    out.push('\n');
    match set.get("harness") {
        Some(harness) => {
            let table = toml::Table::from_iter([("harness".to_owned(), harness.clone())]);
            out.push_str(&toml::to_string(&table).context("the harnesses cannot be written down")?);
        }
        None => out.push_str(HARNESS),
    }
    Ok(out)
}

/// What the key means, with the words that it may be.
fn help(arg: &Arg) -> String {
    let help = arg.get_help().map(ToString::to_string).unwrap_or_default();
    let words: Vec<String> =
        arg.get_possible_values().iter().map(|value| value.get_name().to_owned()).collect();
    match help.split_once(" [default: ") {
        Some((means, default)) if !words.is_empty() => {
            format!("{means}: {} [default: {default}", words.join(", "))
        }
        _ => help,
    }
}

/// The default as the file has it; for a key without one that can be written down, what kind of value it takes.
fn shown(arg: &Arg, default: &str) -> String {
    let number = default.parse::<f64>().is_ok();
    // Words in capitals stand for something else.
    let stands = default.chars().all(|c| c.is_ascii_uppercase() || c == '_');
    let word = !stands && !default.contains([' ', '`', ',']);
    let place = || arg.get_value_names().and_then(|names| names.first()).map_or("", |name| name.as_str());
    match (arg.get_num_args().is_some_and(|range| range.min_values() == 0), number, word) {
        (true, ..) => "false".to_owned(),
        (_, true, _) => default.to_owned(),
        (_, _, true) => format!("\"{default}\""),
        _ => format!("<{}>", place()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The commented keys are the defaults that the program has: taking the comments away changes nothing.
    #[test]
    fn the_defaults_that_are_shown_are_those_that_hold() {
        let plain = format!("{:?}", Settings::default().check().unwrap());
        let text = file(&Settings::default()).unwrap();
        let mut seen = 0;
        for line in text.lines().filter_map(|line| line.strip_prefix("# ")) {
            let Some((key, value)) = line.split_once(" = ").filter(|(key, _)| !key.contains(' ')) else {
                continue;
            };
            if key == "argv" {
                continue;
            }
            seen += 1;
            if value.starts_with('<') {
                continue;
            }
            let one: Settings =
                toml::from_str(&format!("{key} = {value}")).unwrap_or_else(|e| panic!("{line}: {e}"));
            assert_eq!(format!("{:?}", one.check().unwrap()), plain, "{line}");
        }
        assert_eq!(seen, Settings::augment_args(clap::Command::new("x")).get_arguments().count());
        assert!(text.contains("\n# listen = \"127.0.0.1:7070\"\n"), "{text}");
    }

    #[test]
    fn what_is_printed_is_a_configuration_again_without_its_passwords() {
        let text = "data_dir = '/srv/t'\nresolvers = ['192.0.2.53']\nsign_up = 'closed'\nlisten_without_tls = true\n\
                    memory_overcommit = 2.5\nsmtp_url = 'smtps://me:hunter2@mail.example.com'\n\
                    [harness.mine]\nargv = ['run', '{prompt}']\n";
        let settings: Settings = toml::from_str(text).unwrap();
        let printed = file(&settings).unwrap();
        assert!(!printed.contains("hunter2") && printed.contains("smtp_url"), "{printed}");
        let mut again: Settings =
            toml::from_str(&printed).unwrap_or_else(|error| panic!("{error}\n{printed}"));
        again.smtp_url = settings.smtp_url.clone();
        assert_eq!(format!("{again:?}"), format!("{settings:?}"));
    }
}
