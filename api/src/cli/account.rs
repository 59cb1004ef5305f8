//! `tapgate signup`, `login`, `logout` and `key`.

use super::exit::{Done, Failure};
use super::output::{json, line, one, rows};
use super::profile::Profile;
use super::{Api, Options};
use serde_json::{Value, json as value};
use std::io::{BufRead as _, IsTerminal as _, Write as _};
use std::time::Duration;

const KEYS: &[(&str, &str)] =
    &[("ID", "id"), ("NAME", "name"), ("CREATED", "created_at"), ("LAST USED", "last_used_at")];
const POLL: Duration = Duration::from_secs(2);

/// `tapgate signup`.
#[derive(clap::Args, Debug)]
pub struct Signup {
    /// First name
    #[arg(long)]
    first_name: Option<String>,
    /// Last name
    #[arg(long)]
    last_name: Option<String>,
    /// Address
    #[arg(long)]
    email: Option<String>,
    /// What the operator's `tapgate admin invite` printed, where sign-up is by invitation
    #[arg(long)]
    invitation: Option<String>,
    /// Print the API key rather than keep it
    #[arg(long)]
    print_key: bool,
    #[command(flatten)]
    options: Options,
}

/// `tapgate login`.
#[derive(clap::Args, Debug)]
pub struct Login {
    /// Log in by address and password rather than by a browser
    #[arg(long)]
    email: Option<String>,
    /// Read an API key from standard input
    #[arg(long, conflicts_with = "email")]
    with_key: bool,
    #[command(flatten)]
    options: Options,
}

/// `tapgate logout`.
#[derive(clap::Args, Debug)]
pub struct Logout {}

/// `tapgate key`.
#[derive(clap::Args, Debug)]
pub struct Keys {
    #[command(subcommand)]
    command: KeyCommand,
    #[command(flatten)]
    options: Options,
}

#[derive(clap::Subcommand, Debug)]
enum KeyCommand {
    /// List them
    #[command(visible_alias = "ls")]
    List,
    /// Make another; its token is shown this once
    Create {
        /// What it is for
        name: String,
    },
    /// Make one useless at once
    Revoke {
        /// Its ID
        key: String,
    },
}

/// A line from a person or a pipe.
fn ask(question: &str, given: Option<String>) -> Done<String> {
    if let Some(given) = given {
        return Ok(given);
    }
    if std::io::stdin().is_terminal() {
        eprint!("{question}: ");
        std::io::stderr().flush()?;
    }
    let mut text = String::new();
    std::io::stdin().lock().read_line(&mut text)?;
    match text.trim() {
        "" => Err(Failure::usage(format!("{question} is missing"))),
        text => Ok(text.to_owned()),
    }
}

/// A line that is not shown while it is typed.
fn ask_hidden(question: &str) -> Done<String> {
    if std::io::stdin().is_terminal() {
        return Ok(rpassword::prompt_password(format!("{question}: "))?);
    }
    ask(question, None)
}

fn keep(api: &Api, key: &str) -> Done {
    let path = Profile { api_url: Some(api.url().to_owned()), api_key: Some(key.to_owned()) }.save()?;
    eprintln!("the API key is kept in {}", path.display());
    Ok(())
}

fn token<'a>(answer: &'a Value, at: &str) -> Done<&'a str> {
    let token = answer.pointer(at).and_then(Value::as_str);
    token.ok_or_else(|| Failure::new(super::exit::Exit::Other, "the API sent no key"))
}

impl Signup {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        let body = value!({
            "first_name": ask("First name", self.first_name)?,
            "last_name": ask("Last name", self.last_name)?,
            "email": ask("Email", self.email)?,
            "password": ask_hidden("Password")?,
            "invitation": self.invitation,
        });
        let answer = api.call("POST", "/v1/users", &[], Some(body))?;
        let key = token(&answer, "/api_key/token")?;
        if self.print_key && !api.json {
            return line(key);
        }
        if api.json {
            return json(&answer);
        }
        keep(&api, key)?;
        one(false, &[("ID", "id"), ("EMAIL", "email"), ("VERIFIED", "email_verified")], &answer["user"])
    }
}

impl Login {
    pub(super) fn run(self) -> Done {
        let mut api = Api::new(&self.options)?;
        let key = if self.with_key {
            ask_hidden("API key")?
        } else if let Some(email) = self.email {
            let body = value!({ "email": email, "password": ask_hidden("Password")? });
            let answer = api.call("POST", "/v1/auth/login", &[], Some(body))?;
            token(&answer, "/api_key/token")?.to_owned()
        } else {
            by_browser(&api)?
        };
        api.set_key(key.clone());
        // One that does not work is not worth keeping.
        api.get("/v1/egress/policy", &[])?;
        keep(&api, &key)
    }
}

fn by_browser(api: &Api) -> Done<String> {
    let asked = api.call("POST", "/v1/auth/device/code", &[], None)?;
    let field = |name: &str| asked["data"][name].as_str().unwrap_or_default().to_owned();
    eprintln!("open {} and enter the code {}", field("verification_uri"), field("code"));
    loop {
        std::thread::sleep(POLL);
        let polled = api.call("GET", "/v1/auth/device/poll", &[("code", field("code"))], None)?;
        match polled["data"]["status"].as_str() {
            Some("pending") => {}
            Some("authorized") => return Ok(token(&polled, "/data/token")?.to_owned()),
            _ => return Err(Failure::usage("the code expired; run `tapgate login` again")),
        }
    }
}

impl Logout {
    pub(super) fn run(self) -> Done {
        let profile = Profile::load()?;
        Profile { api_key: None, ..profile }.save()?;
        line("the API key is forgotten here; `tapgate key revoke` makes one useless everywhere")
    }
}

impl Keys {
    pub(super) fn run(self) -> Done {
        let api = Api::new(&self.options)?;
        match self.command {
            KeyCommand::List => {
                let mut answer = api.get("/v1/keys", &[])?;
                let Value::Array(keys) = answer["data"].take() else {
                    return rows(api.json, KEYS, Vec::new());
                };
                rows(api.json, KEYS, keys)
            }
            KeyCommand::Create { name } => {
                let made = api.send("POST", "/v1/keys", Some(value!({ "name": name })))?;
                one(api.json, &[("ID", "id"), ("NAME", "name"), ("TOKEN", "token")], &made)
            }
            KeyCommand::Revoke { key } => {
                api.send("DELETE", &format!("/v1/keys/{key}"), None)?;
                if api.json { json(&Value::Null) } else { line(&format!("{key} is revoked")) }
            }
        }
    }
}
