//! One set of variables, written in the formats that a guest's programs read: each value arrives as it was, whatever it
//! holds. Owns the quoting and nothing else.

use std::fmt::Write as _;

/// A variable that cannot be handed to a guest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("environment variable `{name}` {reason}")]
pub struct EnvError {
    name: String,
    reason: &'static str,
}

/// Longest value in octets; the kernel takes 128 KiB for one argument or variable.
pub const MAX_VALUE: usize = 96 * 1024;

/// Checks a variable: a portable name, and a value that every one of the formats below can carry.
pub fn check(name: &str, value: &str) -> Result<(), EnvError> {
    let error = |reason| EnvError { name: name.chars().filter(|c| !c.is_control()).take(64).collect(), reason };
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !first || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') || name.len() > 256 {
        return Err(error("needs a name of letters, digits and `_` that does not begin with a digit"));
    }
    if value.contains(['\0', '\n', '\r']) {
        return Err(error("has a value with a line break or NUL; encode it, for example as base64"));
    }
    if value.len() > MAX_VALUE {
        return Err(error("has a value of more than 96 KiB"));
    }
    Ok(())
}

/// For login shells: `/etc/profile.d`. Inside single quotes a shell reads nothing but the closing quote.
pub fn profile(env: &[(String, String)]) -> String {
    let mut text = String::from("# Written at every boot; set variables with `tapgate env`.\n");
    for (name, value) in env {
        let _ = writeln!(text, "export {name}='{}'", value.replace('\'', r"'\''"));
    }
    text
}

/// For SSH sessions: `~/.ssh/environment`, whose lines are taken as they are.
pub fn ssh_environment(env: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, value) in env {
        let _ = writeln!(text, "{name}={value}");
    }
    text
}

/// For services: `DefaultEnvironment=` of systemd's manager, one assignment a line. systemd takes no control characters
/// but tabs; such a value is left out there.
pub fn systemd(env: &[(String, String)]) -> String {
    let mut text = String::from("[Manager]\n");
    for (name, value) in env.iter().filter(|(_, value)| !value.contains(|c: char| c.is_control() && c != '\t')) {
        let quoted = value.replace('\\', r"\\").replace('"', "\\\"").replace('%', "%%").replace('\t', r"\t");
        let _ = writeln!(text, "DefaultEnvironment=\"{name}={quoted}\"");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    const NASTY: &str = r#"a'b"c$(touch /tmp/x)`id` \ %n %% ; # ! é\" \n end "#;

    #[test]
    fn a_shell_reads_the_value_and_runs_nothing() {
        let script = format!("{}printf %s \"$X\"", profile(&[("X".into(), NASTY.into())]));
        let output = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), NASTY);
        assert!(output.stderr.is_empty());
    }

    #[test]
    fn names_and_values_that_break_out_are_refused() {
        for name in ["", "1A", "A-B", "A B", "A=B", "A\nB", "é", "A;reboot"] {
            assert!(check(name, "x").is_err(), "{name:?}");
        }
        for value in ["a\nb", "a\0b", "a\rb", &"x".repeat(MAX_VALUE + 1)] {
            assert!(check("A", value).is_err());
        }
        assert!(check("_A1", NASTY).is_ok());
        assert!(!check("A\n\u{1b}B", "x").unwrap_err().to_string().contains('\n'));
    }

    #[test]
    fn systemd_specifiers_and_quotes_are_escaped() {
        let text = systemd(&[("A".into(), r#"50% "x" \y"#.into()), ("B".into(), "\u{1b}".into())]);
        assert_eq!(text, "[Manager]\nDefaultEnvironment=\"A=50%% \\\"x\\\" \\\\y\"\n");
    }
}
