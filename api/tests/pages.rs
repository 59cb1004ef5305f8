//! The pages behind links, as a browser without script sees them, and the mails that lead there.
#![allow(missing_docs, clippy::unwrap_used, reason = "tests")]

mod common;

use axum::body::Body;
use axum::http::{Request, header};
use common::{Answer, TestApp, no_limits};
use serde_json::json;
use std::path::Path;
use tapgate::Settings;
use tapgate::http::Rate;
use tapgate::mail::Via;

/// A browser: keeps one cookie and the hidden fields of the last page.
struct Browser<'a> {
    app: &'a TestApp,
    cookie: String,
    hidden: Vec<(String, String)>,
}

impl<'a> Browser<'a> {
    fn new(app: &'a TestApp) -> Self {
        Self { app, cookie: String::new(), hidden: Vec::new() }
    }

    async fn send(&mut self, request: axum::http::request::Builder, body: Body) -> Answer {
        let answer = self.app.send(request.header(header::COOKIE, &self.cookie).body(body).unwrap()).await;
        if let Some(set) = answer.headers.get(header::SET_COOKIE) {
            let set = set.to_str().unwrap();
            assert!(set.contains("HttpOnly") && set.contains("SameSite=Strict"), "{set}");
            self.cookie = set.split(';').next().unwrap().to_owned();
        }
        assert_eq!(answer.headers["x-frame-options"], "DENY");
        let page = answer.body.as_str().unwrap_or_default();
        assert!(!page.contains("<script"));
        let inputs = page.split("<input type=hidden name=").skip(1);
        self.hidden = inputs
            .map(|input| {
                let (name, rest) = input.split_once(" value=\"").unwrap();
                (name.to_owned(), rest.split('"').next().unwrap().to_owned())
            })
            .collect();
        answer
    }

    async fn open(&mut self, path: &str) -> Answer {
        self.send(Request::get(path), Body::empty()).await
    }

    async fn submit(&mut self, path: &str, fields: &[(&str, &str)]) -> Answer {
        let hidden = self.hidden.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let body = url::form_urlencoded::Serializer::new(String::new())
            .extend_pairs(hidden.chain(fields.iter().copied()))
            .finish();
        let request = Request::post(path).header(header::CONTENT_TYPE, "application/x-www-form-urlencoded");
        self.send(request, Body::from(body)).await
    }
}

fn settings(folder: &Path) -> Settings {
    Settings {
        mail: Via::Spool(folder.join("mail")),
        mail_from: "tapgate@example.com".into(),
        public_url: "https://tapgate.example.com".into(),
        rates: no_limits(),
        ..Settings::default()
    }
}

/// The newest mail in the spool that has this subject, once it is there.
async fn mail(folder: &Path, subject: &str) -> String {
    for _ in 0..500 {
        let entries = std::fs::read_dir(folder.join("mail")).into_iter().flatten().flatten();
        let mut paths: Vec<_> =
            entries.map(|entry| entry.path()).filter(|p| p.extension().is_some()).collect();
        paths.sort();
        let texts = paths.iter().rev().map(|path| std::fs::read_to_string(path).unwrap());
        if let Some(text) = texts.into_iter().find(|text| text.contains(subject)) {
            return text;
        }
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    panic!("no mail about {subject}");
}

/// The link of a mail, lines joined again, without the host.
fn link(mail: &str) -> String {
    let text = mail.replace("=\r\n", "").replace("=3D", "=");
    let start = text.find("https://tapgate.example.com/").unwrap() + "https://tapgate.example.com".len();
    text[start..].split_whitespace().next().unwrap().to_owned()
}

#[tokio::test]
async fn an_address_is_confirmed_by_the_link_and_a_click() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::with(settings(folder.path()));
    let key = app.user("alice@example.com").await;
    let text = mail(folder.path(), "Confirm your address").await;
    assert!(text.contains("To: alice@example.com") && text.contains("From: tapgate@example.com"), "{text}");
    let user = app.store.authenticate(&key).await.unwrap().unwrap().user;
    let mut browser = Browser::new(&app);
    browser.open(&link(&text)).await.is(200);
    assert!(!app.store.user(&user).await.unwrap().email_verified, "looking is not confirming");
    browser.submit("/verify", &[]).await.is(200);
    assert!(app.store.user(&user).await.unwrap().email_verified);
    browser.open("/verify?ticket=%22%3E%3Cb%3E").await.is(200);
    browser.submit("/verify", &[]).await.is(404);
}

#[tokio::test]
async fn a_device_code_is_confirmed_in_two_steps() {
    let app = TestApp::new();
    app.user("alice@example.com").await;
    let asked = app.call("", "POST", "/v1/auth/device/code", None).await.is(200);
    let code = asked["data"]["code"].as_str().unwrap().to_owned();
    let mut browser = Browser::new(&app);
    browser.open("/activate").await.is(200);
    let right = [("code", code.as_str()), ("email", "alice@example.com"), ("password", "s3cureP@ssword")];
    let kept = browser.hidden.clone();
    for (place, wrong, status) in [(1, "bob@example.com", 401), (2, "wrong", 401), (0, "ZZZZ-0000", 404)] {
        let mut fields = right;
        fields[place].1 = wrong;
        browser.hidden = kept.clone();
        let page = browser.submit("/activate", &fields).await.is(status);
        assert!(page.as_str().unwrap().contains("<a href=\"/activate\">Try again</a>"), "{page}");
    }
    // Another site's form: the cookie comes along, the ticket does not, or is another visitor's.
    browser.hidden.clear();
    browser.submit("/activate", &right).await.is(403);
    let mut other = Browser::new(&app);
    other.open("/activate").await.is(200);
    browser.hidden = other.hidden.clone();
    browser.submit("/activate", &right).await.is(403);

    browser.hidden = kept;
    let page = browser.submit("/activate", &right).await.is(200);
    assert!(page.as_str().unwrap().contains("unknown"), "says who asks: {page}");
    let poll = format!("/v1/auth/device/poll?code={code}");
    assert_eq!(app.get("", &poll).await.is(200)["data"]["status"], "pending");
    browser.submit("/activate/confirm", &[]).await.is(200);
    assert_eq!(app.get("", &poll).await.is(200)["data"]["status"], "authorized");
    browser.open("/activate").await.is(200);
    browser.submit("/activate/confirm", &[("ticket", "x")]).await.is(404);
}

#[tokio::test]
async fn guesses_of_codes_and_passwords_are_few() {
    let mut rates = no_limits();
    rates.password = Rate { burst: 3, per_minute: 1 };
    let app = TestApp::with(Settings { rates, ..Settings::default() });
    app.user("alice@example.com").await;
    let mut browser = Browser::new(&app);
    browser.open("/activate").await.is(200);
    let kept = browser.hidden.clone();
    let guess = [("code", "ABCD-1234"), ("email", "alice@example.com"), ("password", "guess-guess")];
    for status in [401, 401, 429] {
        browser.hidden = kept.clone();
        browser.submit("/activate", &guess).await.is(status);
    }
}

/// Whether an account exists is told by sign-up alone, as the contract has it, and a few times a minute.
#[tokio::test]
async fn nobody_learns_from_a_login_which_accounts_exist() {
    let mut rates = no_limits();
    rates.password = Rate { burst: 8, per_minute: 1 };
    let app = TestApp::with(Settings { rates, ..Settings::default() });
    app.user("alice@example.com").await;
    let disabled = app.user("bob@example.com").await;
    let bob = app.store.authenticate(&disabled).await.unwrap().unwrap().user;
    app.store.user_disable(&bob, true).await.unwrap();
    let login = async |email: &str, password: &str| {
        let answer = app.post("", "/v1/auth/login", json!({ "email": email, "password": password })).await;
        (answer.status, answer.body)
    };
    let wrong = login("alice@example.com", "not-the-password").await;
    assert_eq!(wrong.0, 401);
    assert_eq!(login("nobody@example.com", "s3cureP@ssword").await, wrong);
    assert_eq!(login("bob@example.com", "s3cureP@ssword").await, wrong, "disabled, the right password");

    let mut browser = Browser::new(&app);
    browser.open("/activate").await.is(200);
    let kept = browser.hidden.clone();
    let mut activate = async |email: &str| {
        browser.hidden = kept.clone();
        let fields = [("code", "ABCD-1234"), ("email", email), ("password", "not-the-password")];
        let answer = browser.submit("/activate", &fields).await;
        (answer.status, answer.body)
    };
    assert_eq!(activate("alice@example.com").await, activate("nobody@example.com").await);

    let again = json!({"first_name": "A", "last_name": "B", "email": "alice@example.com", "password": "s3cureP@ssword"});
    app.post("", "/v1/users", again.clone()).await.is(409);
    app.post("", "/v1/users", again).await.is(429);
}

#[tokio::test]
async fn a_forgotten_password_is_replaced_once() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::with(settings(folder.path()));
    let key = app.user("alice@example.com").await;
    let user = app.store.authenticate(&key).await.unwrap().unwrap().user;
    app.store.user_verified(&user).await.unwrap();
    let mut browser = Browser::new(&app);
    browser.open("/reset").await.is(200);
    let kept = browser.hidden.clone();
    let known = browser.submit("/reset", &[("email", "Alice@example.com")]).await;
    browser.hidden = kept;
    let unknown = browser.submit("/reset", &[("email", "nobody@example.com")]).await;
    assert_eq!((known.status, known.body), (unknown.status, unknown.body));
    let link = link(&mail(folder.path(), "A new password").await);
    browser.open(&link).await.is(200);
    let kept = browser.hidden.clone();
    browser.submit("/reset/choose", &[("password", "short")]).await.is(422);
    browser.hidden = kept.clone();
    browser.submit("/reset/choose", &[("password", "an0ther password")]).await.is(200);
    browser.hidden = kept;
    browser.submit("/reset/choose", &[("password", "a third password")]).await.is(404);
    let login = async |password: &str| {
        app.post("", "/v1/auth/login", json!({ "email": "alice@example.com", "password": password })).await
    };
    login("an0ther password").await.is(201);
    login("s3cureP@ssword").await.is(401);

    let change = async |current: &str, new: &str| {
        let body = json!({ "current_password": current, "new_password": new });
        app.call(&key, "PUT", "/v1/auth/password", Some(body)).await
    };
    assert_eq!(change("wrong", "yet an0ther").await.error(403), "password_wrong");
    change("an0ther password", "yet an0ther").await.is(204);
    login("yet an0ther").await.is(201);
}

/// Somebody signs up with another's address and waits until that one, who finds it taken, asks for a new password.
#[tokio::test]
async fn whoever_signed_up_with_anothers_address_is_out_once_that_one_has_shown_it_is_theirs() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::with(settings(folder.path()));
    let strangers = app.user("alice@example.com").await;
    app.get(&strangers, "/v1/vms").await.is(200);
    mail(folder.path(), "Confirm your address").await;
    let mut browser = Browser::new(&app);
    let mut replace = async |password: &str| {
        let whole = |entry: std::io::Result<std::fs::DirEntry>| entry.unwrap().path().extension().is_some();
        let mails = || {
            std::fs::read_dir(folder.path().join("mail")).unwrap().map(whole).filter(|whole| *whole).count()
        };
        let before = mails();
        browser.open("/reset").await.is(200);
        browser.submit("/reset", &[("email", "alice@example.com")]).await.is(200);
        while mails() == before {
            tokio::time::sleep(std::time::Duration::from_millis(10)).await;
        }
        browser.open(&link(&mail(folder.path(), "A new password").await)).await.is(200);
        browser.submit("/reset/choose", &[("password", password)]).await.is(200)
    };
    let told = replace("alice's own").await;
    assert!(told.as_str().unwrap().contains("no longer work"), "{told}");
    app.get(&strangers, "/v1/vms").await.is(401);
    let login = json!({ "email": "alice@example.com", "password": "alice's own" });
    let hers = app.post("", "/v1/auth/login", login).await.is(201);
    assert_eq!(hers["user"]["email_verified"], true);
    // From then on the address is hers, and so are its keys.
    let told = replace("another of hers").await;
    assert!(told.as_str().unwrap().contains("work as before"), "{told}");
    app.get(hers["api_key"]["token"].as_str().unwrap(), "/v1/vms").await.is(200);
}

/// However many addresses ask, and nobody is told: neither that there is an account, nor that others asked.
#[tokio::test]
async fn an_account_is_sent_few_links_whoever_asks() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::with(settings(folder.path()));
    app.user("alice@example.com").await;
    app.user("bob@example.com").await;
    let mut browser = Browser::new(&app);
    browser.open("/reset").await.is(200);
    let kept = browser.hidden.clone();
    let mut ask = async |email: &str| {
        browser.hidden = kept.clone();
        let answer = browser.submit("/reset", &[("email", email)]).await;
        (answer.status, answer.headers, answer.body)
    };
    let nobody = ask("nobody@example.com").await;
    assert_eq!(nobody.0, 200);
    for spelling in ["alice@example.com", "Alice@Example.com"].iter().cycle().take(8) {
        assert_eq!(ask(spelling).await, nobody);
    }
    // Of another account nothing is taken; its mail is the last that is written.
    assert_eq!(ask("bob@example.com").await, nobody);
    mail(folder.path(), "To: bob@example.com\r\nSubject: A new password").await;
    let links = || {
        let mails = std::fs::read_dir(folder.path().join("mail")).unwrap().map(|mail| mail.unwrap().path());
        let texts = mails
            .filter(|path| path.extension().is_some())
            .map(|path| std::fs::read_to_string(path).unwrap());
        texts.filter(|text| text.contains("To: alice@") && text.contains("A new password")).count()
    };
    while links() < 3 {
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
    assert_eq!(links(), 3);
}

/// Who changes a password because another knows it is not to find the other's in its place.
#[tokio::test]
async fn a_password_that_was_changed_meanwhile_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let app = TestApp::with(settings(folder.path()));
    let key = app.user("alice@example.com").await;
    let change = async |new: &str| {
        let body = json!({ "current_password": "s3cureP@ssword", "new_password": new });
        app.call(&key, "PUT", "/v1/auth/password", Some(body)).await.status.as_u16()
    };
    let login = async |password: &str| {
        let body = json!({ "email": "alice@example.com", "password": password });
        app.post("", "/v1/auth/login", body).await.status.as_u16()
    };
    let (one, other) = tokio::join!(change("the owner's own"), change("the other's own"));
    assert_eq!([one.min(other), one.max(other)], [204, 403]);
    assert_eq!(login("the owner's own").await, if one == 204 { 201 } else { 401 });

    // A link of a mail, used twice at once.
    let mut browser = Browser::new(&app);
    browser.open("/reset").await.is(200);
    browser.submit("/reset", &[("email", "alice@example.com")]).await.is(200);
    let link = link(&mail(folder.path(), "A new password").await);
    browser.open(&link).await.is(200);
    let mut second = Browser::new(&app);
    second.open(&link).await.is(200);
    let (first, second) = tokio::join!(
        browser.submit("/reset/choose", &[("password", "of the first")]),
        second.submit("/reset/choose", &[("password", "of the second")])
    );
    let (first, second) = (first.status.as_u16(), second.status.as_u16());
    assert_eq!([first.min(second), first.max(second)], [200, 404]);
}

/// A real mail server. `TAPGATE_AIOSMTPD` names another program.
#[tokio::test]
async fn mails_go_out_by_smtp() {
    let program = common::tool("TAPGATE_AIOSMTPD", "aiosmtpd");
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let mut server = std::process::Command::new(program)
        .args(["-n", "-l", &format!("127.0.0.1:{port}"), "-c", "aiosmtpd.handlers.Debugging", "stdout"])
        .env("PYTHONUNBUFFERED", "1")
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    while tokio::net::TcpStream::connect(("127.0.0.1", port)).await.is_err() {
        tokio::time::sleep(std::time::Duration::from_millis(20)).await;
    }
    let app = TestApp::with(Settings {
        mail: Via::Smtp(format!("smtp://127.0.0.1:{port}")),
        ..settings(Path::new("/nowhere"))
    });
    let lines = std::io::BufRead::lines(std::io::BufReader::new(server.stdout.take().unwrap()));
    let (arriving, mut arrived) = tokio::sync::mpsc::unbounded_channel();
    std::thread::spawn(move || {
        let mut mail = String::new();
        for line in lines.map_while(Result::ok) {
            mail.push_str(&line);
            mail.push_str("\r\n");
            if line.contains("END MESSAGE") {
                let _ = arriving.send(std::mem::take(&mut mail));
            }
        }
    });
    let key = app.user("alice@example.com").await;
    let mail = arrived.recv().await.unwrap();
    assert!(
        mail.contains("Subject: Confirm your address") && mail.contains("To: alice@example.com"),
        "{mail}"
    );
    let mut browser = Browser::new(&app);
    browser.open(&link(&mail)).await.is(200);
    browser.submit("/verify", &[]).await.is(200);
    let user = app.store.authenticate(&key).await.unwrap().unwrap().user;
    assert!(app.store.user(&user).await.unwrap().email_verified);

    browser.open("/reset").await.is(200);
    browser.submit("/reset", &[("email", "alice@example.com")]).await.is(200);
    let mail = arrived.recv().await.unwrap();
    assert!(mail.contains("Subject: A new password"), "{mail}");
    browser.open(&link(&mail)).await.is(200);
    browser.submit("/reset/choose", &[("password", "an0ther password")]).await.is(200);
    let login = json!({ "email": "alice@example.com", "password": "an0ther password" });
    app.post("", "/v1/auth/login", login).await.is(201);
    server.kill().unwrap();
    server.wait().unwrap();
}
