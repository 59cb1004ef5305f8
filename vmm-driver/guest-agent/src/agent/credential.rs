//! git's credential helper: asks the guest service which placeholder stands for the password at a host.

use crate::http::{self, Answer};
use serde_json::Value;
use std::io::{Read as _, Write as _};

/// What git sends at most.
const MAX: u64 = 16 << 10;

/// Answers git's question on standard input. Nothing is stored, so other operations are done at once.
pub fn run(operation: Option<&str>) -> Result<(), String> {
    if operation != Some("get") {
        return Ok(());
    }
    let mut text = String::new();
    std::io::stdin().take(MAX).read_to_string(&mut text).map_err(|e| e.to_string())?;
    let Some(path) = path(&text) else { return Ok(()) };
    let Ok(Answer::New(answer, _)) = http::get(&path, None) else { return Ok(()) };
    let asked = field(&text, "username").map(str::to_owned);
    let Some(reply) = reply(&answer, asked) else { return Ok(()) };
    std::io::stdout().write_all(reply.as_bytes()).map_err(|e| e.to_string())
}

fn field<'a>(text: &'a str, name: &str) -> Option<&'a str> {
    text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix('='))
}

fn path(text: &str) -> Option<String> {
    let host = field(text, "host")?;
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'-' | b'_' | b':');
    let web = matches!(field(text, "protocol"), Some("https" | "http"));
    (web && host.bytes().all(plain)).then(|| format!("/v1/git-credential?host={host}"))
}

fn reply(answer: &str, asked: Option<String>) -> Option<String> {
    let value: Value = serde_json::from_str(answer).ok()?;
    let word =
        |name: &str| value.get(name).and_then(Value::as_str).filter(|word| !word.contains(['\n', '\0']));
    let user = asked.or_else(|| word("username").map(str::to_owned))?;
    Some(format!("username={user}\npassword={}\n", word("password")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_host_name_reaches_the_service() {
        assert_eq!(
            path("protocol=https\nhost=git.example.com:8443\n\n").unwrap(),
            "/v1/git-credential?host=git.example.com:8443"
        );
        for bad in [
            "protocol=https\nhost=a b\n",
            "protocol=ssh\nhost=a\n",
            "host=a\n",
            "protocol=https\nhost=a&x=y\n",
        ] {
            assert_eq!(path(bad), None, "{bad}");
        }
    }

    #[test]
    fn a_user_that_git_knows_is_kept() {
        let answer = r#"{"username": "x-access-token", "password": "IRONSH_PROXY_git"}"#;
        assert_eq!(reply(answer, None).unwrap(), "username=x-access-token\npassword=IRONSH_PROXY_git\n");
        assert_eq!(reply(answer, Some("me".into())).unwrap(), "username=me\npassword=IRONSH_PROXY_git\n");
        assert_eq!(reply("{}", None), None);
    }
}
