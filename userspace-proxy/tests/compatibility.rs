//! What workloads use, against real servers, from a guest's namespace: spliced, with a token of the guest's own, and opened,
//! with a placeholder that only the gate can turn into the token. With `TAPGATE_WRITE_COMPATIBILITY` set, the result is kept in
//! `docs/compatibility.md`.
#![allow(clippy::unwrap_used, reason = "tests")]

mod support;

use std::{net::Ipv4Addr, path::Path};
use support::{
    ATTACKER, OTHER, RESOLVER, SERVER, World,
    clients::{self, Client},
    guest::{Guest, serve},
    servers::{self, CHAT, CLIENTS, EVENTS, GRPC, NODE, VALUE},
    sh, world_of,
};
use tapgate_model::{Mode, Protocol};

const HERE: &[Ipv4Addr] = &[SERVER, OTHER, ATTACKER, RESOLVER, EVENTS, CHAT, GRPC, NODE];
const ON_SERVER: [&str; 5] = ["api.example", "pypi.example", "npm.example", "crates.example", "apt.example"];

fn hosts() -> Vec<(&'static str, Ipv4Addr)> {
    let others = [
        ("git.example", OTHER),
        ("events.example", EVENTS),
        ("chat.example", CHAT),
        ("grpc.example", GRPC),
        ("node.example", NODE),
    ];
    ON_SERVER.into_iter().map(|name| (name, SERVER)).chain(others).collect()
}

/// The two ways through.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Spliced,
    Opened,
}

fn rules(w: &mut World, way: Way) {
    let names: Vec<_> = hosts().into_iter().map(|(name, _)| name).collect();
    let secrets: &[(&str, &str, &[&str])] = match way {
        Way::Spliced => &[],
        Way::Opened => &[("token", VALUE, &names)],
    };
    w.rules(Mode::Enforce, &names, secrets);
}

/// What a guest's environment holds.
fn environment(dir: &Path, token: &str) -> String {
    let ca = dir.join("ca.pem");
    let trust =
        ["SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "NODE_EXTRA_CA_CERTS", "GIT_SSL_CAINFO"]
            .map(|name| format!("export {name}={}; ", ca.display()))
            .concat();
    let cargo = env!("CARGO");
    format!(
        "{trust} export RUSTUP_HOME=${{RUSTUP_HOME:-$HOME/.rustup}} HOME={} PATH={CLIENTS}/bin:$PATH GIT_TERMINAL_PROMPT=0 GRPC_DNS_RESOLVER=native; \
         T={token}; CARGO={cargo}; cd $HOME; ",
        dir.display()
    )
}

async fn try_one(w: &mut World, guest: &Guest, client: &Client, way: Way, dir: &Path) -> Result<(), String> {
    let token = if way == Way::Spliced { VALUE } else { "IRONSH_PROXY_token" };
    let home = dir.join("home");
    sh(&format!(
        "rm -rf {0}; mkdir {0}; cp {1}/home-files/* {0}; ln -s {1}/seed {1}/served {0}",
        home.display(),
        dir.display()
    ));
    w.sink.forget();
    let said = guest.shell(&(environment(&home, token) + &client.run)).await?;
    if !said.contains(client.expect) {
        return Err(format!("it printed {said:?}"));
    }
    if way == Way::Opened && said.contains(VALUE) {
        return Err("the guest saw the real value".to_owned());
    }
    let events = w.events(1).await;
    let right =
        |protocol| events.iter().any(|event| event.protocol == protocol && event.verdict.is_allowed());
    let (expected, other) = match way {
        Way::Spliced => (Protocol::Tls, Protocol::Http),
        Way::Opened => (Protocol::Http, Protocol::Tls),
    };
    if !right(expected) || events.iter().any(|event| event.protocol == other) {
        return Err(format!("it went another way: {events:?}"));
    }
    if way == Way::Opened
        && client.run.contains("$T")
        && client.name != "Node WebSocket"
        && !events.iter().any(|event| event.secrets == ["token"])
    {
        return Err("no secret was put in".to_owned());
    }
    Ok(())
}

#[test]
fn clients_of_every_kind_spliced_and_opened() {
    world_of(HERE, |mut w| async move {
        let guest = Guest::new("c");
        let temp = tempfile::tempdir().unwrap();
        let dir = temp.path();
        serve(&w);
        for (name, address) in hosts() {
            w.zone.set(name, &[address]);
        }
        let files = dir.join("home-files");
        std::fs::create_dir(&files).unwrap();
        for (name, text) in clients::FILES {
            std::fs::write(files.join(name), text).unwrap();
        }
        std::fs::write(files.join("ca1.pem"), w.vm_ca.cert_pem()).unwrap();
        std::fs::write(files.join("ca2.pem"), &w.ca.pem).unwrap();
        std::fs::write(files.join("ca.pem"), format!("{}{}", w.vm_ca.cert_pem(), w.ca.pem)).unwrap();
        servers::git(&w, dir).await;
        let _running =
            (servers::nginx(&w, dir).await, servers::python(&w, dir).await, servers::node(&w, dir).await);
        let (mut rows, mut failed) = (Vec::new(), Vec::new());
        for client in clients::all() {
            let mut cells = Vec::new();
            for (way, word) in [(Way::Spliced, "spliced"), (Way::Opened, "opened")] {
                rules(&mut w, way);
                let tried = try_one(&mut w, &guest, &client, way, dir).await;
                cells.push(if tried.is_ok() { "yes" } else { "no" });
                if let Err(why) = tried {
                    failed.push(format!("{}, {word}: {why}", client.name));
                }
            }
            let version = guest.shell(&(environment(&files, "x") + client.version)).await.unwrap_or_default();
            rows.push(format!(
                "| {} | {} | {} | {} |",
                client.name,
                number(&version),
                client.speaks,
                cells.join(" | ")
            ));
        }
        assert!(failed.is_empty(), "{}", failed.join("\n"));
        // Load: many streams and connections, none refused, none confused.
        w.sink.forget();
        let load = "h2load -n 2000 -c 8 -m 16 -H \"authorization: Bearer $T\" https://api.example/echo";
        let said = guest.shell(&(environment(&files, "IRONSH_PROXY_token") + load)).await.unwrap();
        assert!(said.contains("2000 succeeded, 0 failed, 0 errored"), "{said}");
        let events = w.events(2000).await;
        assert!(events.iter().filter(|event| event.secrets == ["token"]).count() >= 2000);
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/compatibility.md");
        if std::env::var_os("TAPGATE_WRITE_COMPATIBILITY").is_some() {
            std::fs::write(&file, page(&rows)).unwrap();
        }
        let kept = std::fs::read_to_string(&file).unwrap();
        assert!(
            unversioned(&kept) == unversioned(&page(&rows)),
            "docs/compatibility.md is not what this run found; write it anew with TAPGATE_WRITE_COMPATIBILITY=1"
        );
    });
}

/// The first thing in the text that looks like a version.
fn number(text: &str) -> &str {
    let parts = text.split(|c: char| c.is_whitespace() || matches!(c, '/' | '"' | '(' | ')' | ','));
    let plain = parts.map(|part| part.trim_start_matches('v'));
    let mut likely =
        plain.filter(|part| part.contains('.') && part.starts_with(|c: char| c.is_ascii_digit()));
    likely.next().unwrap_or("?")
}

/// The page without the clients' versions, which differ between machines.
fn unversioned(page: &str) -> String {
    let lines = page.lines().map(|line| {
        let mut cells: Vec<&str> = line.split(" | ").collect();
        if cells.len() == 5 {
            cells.remove(1);
        }
        cells.join(" | ")
    });
    lines.collect::<Vec<_>>().join("\n")
}

fn page(rows: &[String]) -> String {
    format!(
        "# Clients\n\nWritten by `TAPGATE_WRITE_COMPATIBILITY=1 cargo test -p tapgate-proxy --test compatibility`, which runs each client in a guest's \
         namespace against real servers (nginx, git-http-backend, Node's http2, aiohttp, websockets, grpcio) that let only the real token in. Spliced: the guest has \
         the token and the connection passes untouched. Opened: the guest has a placeholder, the gate puts the token in, and the guest never sees it. The test \
         fails if a client does, or if this page says anything else than the run.\n\nNot offered: HTTP/3. UDP port 443 is refused at once and `Alt-Svc` is taken out of opened answers, so clients use TCP. \
         A client that pins certificates or brings its own roots (and cannot be told of the VM's CA) works spliced only.\n\n\
         | client | version | speaks | spliced | opened |\n| --- | --- | --- | --- | --- |\n{}\n",
        rows.join("\n")
    )
}
