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

/// Longest value in octets: 32,000 characters, whatever they are. The kernel takes 128 KiB for a variable with its name.
pub const MAX_VALUE: usize = 128_000;

/// Checks a variable: a portable name, and a value that every one of the formats below can carry.
pub fn check(name: &str, value: &str) -> Result<(), EnvError> {
    let error =
        |reason| EnvError { name: name.chars().filter(|c| !c.is_control()).take(64).collect(), reason };
    let mut bytes = name.bytes();
    let first = bytes.next().is_some_and(|b| b.is_ascii_alphabetic() || b == b'_');
    if !first || !bytes.all(|b| b.is_ascii_alphanumeric() || b == b'_') || name.len() > 256 {
        return Err(error("needs a name of letters, digits and `_` that does not begin with a digit"));
    }
    if value.contains('\0') {
        return Err(error(
            "has a value with NUL, which no process can be given; encode it, for example as base64",
        ));
    }
    if value.len() > MAX_VALUE {
        return Err(error("has a value of more than 128,000 octets"));
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

/// For SSH sessions: `~/.ssh/environment`, whose lines are taken as they are. A value of several lines has no way to be
/// in it; [`session`] brings those.
pub fn ssh_environment(env: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, value) in env.iter().filter(|(_, value)| !is_long(value)) {
        let _ = writeln!(text, "{name}={value}");
    }
    text
}

/// Where [`session`]'s text lies in the guest. The base image's `/etc/bash.bashrc`, which bash reads for every command
/// that comes by SSH, reads it.
pub const SESSION: &str = "/etc/tapgate/session.sh";

/// Values of several lines for commands over SSH, each only where it is not set yet.
pub fn session(env: &[(String, String)]) -> String {
    let mut text = String::new();
    for (name, value) in env.iter().filter(|(_, value)| is_long(value)) {
        let _ =
            writeln!(text, "[ -n \"${{{name}+x}}\" ] || export {name}='{}'", value.replace('\'', r"'\''"));
    }
    text
}

fn is_long(value: &str) -> bool {
    value.contains(['\n', '\r'])
}

/// For services: `DefaultEnvironment=` of systemd's manager, one assignment a line. systemd takes no control characters
/// but tabs and line feeds; such a value is left out there.
pub fn systemd(env: &[(String, String)]) -> String {
    let mut text = String::from("[Manager]\n");
    let taken = |value: &str| !value.contains(|c: char| c.is_control() && c != '\t' && c != '\n');
    for (name, value) in env.iter().filter(|(_, value)| taken(value)) {
        let mut quoted = String::with_capacity(value.len());
        for c in value.chars() {
            match c {
                '\\' | '"' => quoted.extend(['\\', c]),
                '%' => quoted.push_str("%%"),
                '\t' => quoted.push_str(r"\t"),
                '\n' => quoted.push_str(r"\n"),
                c => quoted.push(c),
            }
        }
        let _ = writeln!(text, "DefaultEnvironment=\"{name}={quoted}\"");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::process::Command;

    const NASTY: &str = r#"a'b"c$(touch /tmp/x)`id` \ %n %% ; # ! é\" \n end "#;
    const LINES: &str = "-----BEGIN-----\n'$(id)'\n\tx\n";

    fn sh(script: &str) -> String {
        let output = Command::new("/bin/sh").args(["-c", script]).output().unwrap();
        assert!(output.stderr.is_empty(), "{output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_shell_reads_the_value_and_runs_nothing() {
        for value in [NASTY, LINES] {
            assert_eq!(sh(&format!("{}printf %s \"$X\"", profile(&[("X".into(), value.into())]))), value);
        }
    }

    #[test]
    fn long_values_reach_ssh_sessions_without_replacing_what_is_set() {
        let env = [("X".to_owned(), LINES.to_owned()), ("Y".to_owned(), NASTY.to_owned())];
        assert_eq!(ssh_environment(&env), format!("Y={NASTY}\n"));
        assert_eq!(sh(&format!("{}printf %s \"$X\"", session(&env))), LINES);
        assert_eq!(sh(&format!("X=mine\n{}printf %s \"$X\"", session(&env))), "mine");
    }

    #[test]
    fn names_and_values_that_break_out_are_refused() {
        for name in ["", "1A", "A-B", "A B", "A=B", "A\nB", "é", "A;reboot"] {
            assert!(check(name, "x").is_err(), "{name:?}");
        }
        for value in ["a\0b", &"x".repeat(MAX_VALUE + 1)] {
            assert!(check("A", value).is_err());
        }
        assert!(check("_A1", NASTY).is_ok() && check("A", LINES).is_ok());
        assert!(!check("A\n\u{1b}B", "x").unwrap_err().to_string().contains('\n'));
    }

    #[test]
    fn systemd_specifiers_and_quotes_are_escaped() {
        let text = systemd(&[("A".into(), "50% \"x\" \\y\nz".into()), ("B".into(), "\u{1b}".into())]);
        assert_eq!(text, "[Manager]\nDefaultEnvironment=\"A=50%% \\\"x\\\" \\\\y\\nz\"\n");
    }

    fn portable(name: &str) -> bool {
        !name.is_empty()
            && !name.starts_with(|c: char| c.is_ascii_digit())
            && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(96))]
        #[test]
        fn every_value_that_is_taken_is_read_back_by_a_shell(
            value in "(\\PC|[\x01-\x1f\x7f '\"\\\\$(){}`;&|<>*?#~%!\n-]){0,40}",
        ) {
            prop_assert!(check("X", &value).is_ok());
            let env = [("X".to_owned(), value.clone())];
            prop_assert_eq!(sh(&format!("{}printf %s \"$X\"", profile(&env))), value.clone());
            if is_long(&value) {
                prop_assert_eq!(sh(&format!("{}printf %s \"$X\"", session(&env))), value);
                prop_assert_eq!(ssh_environment(&env), "");
            } else {
                prop_assert_eq!(ssh_environment(&env), format!("X={value}\n"));
            }
            // What is left out there leaves no half of itself behind.
            let systemd = systemd(&env);
            prop_assert!(systemd.lines().count() <= 2, "{}", systemd);
        }

        #[test]
        fn no_other_name_and_no_nul_is_taken(name in "\\PC{0,8}|[A-Za-z0-9_ =;\n$-]{0,8}", value in "[\x00-\x7f]{0,20}") {
            prop_assert_eq!(check(&name, &value).is_ok(), portable(&name) && !value.contains('\0'));
        }
    }
}
