//! The world itself: it answers as it promises, writes down what arrives, and leaves nothing behind.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::{net::Ipv4Addr, path::Path, process::Command};
use tapgate_e2e::{
    World,
    sh::{self, Done, capture},
    sites::{self, Site},
    world::GIT_TOKEN,
};

fn curl(world: &World, arguments: &[&str]) -> Done {
    capture(world.client_on_host("curl").args(["-sS", "--max-time", "20"]).args(arguments), b"").unwrap()
}

#[test]
fn web_hosts_answer_under_their_own_certificates() {
    let world = World::new().unwrap();
    for site in [sites::API, sites::ECHO, sites::OTHER] {
        let url = format!("https://{}/", site.name);
        let done = curl(&world, &["-v", &url]);
        assert_eq!(done.out, format!("hello from {}\n", site.name), "{}", done.err);
        assert!(done.err.contains(&format!("CN={}", site.name)), "{}", done.err);
        assert_eq!(curl(&world, &["-6", &url]).out, done.out);
        assert_eq!(curl(&world, &[&format!("http://{}/", site.name)]).out, done.out);
    }
    let done = curl(&world, &["https://untrusted.example.com/"]);
    assert_eq!(done.code, 60, "a certificate that nobody vouches for was taken: {done:?}");
}

#[test]
fn requests_are_written_down_and_counted() {
    let world = World::new().unwrap();
    let (before, journal) = (world.counters().unwrap(), world.journal().mark());
    let done =
        curl(&world, &["-H", "X-Token: abc", "-u", "u:p-w", "-d", "body", "https://echo.example.com/echo"]);
    assert!(done.out.contains("x-token: abc"), "{done:?}");
    let seen = journal.http("echo.example.com").unwrap();
    assert_eq!(seen.len(), 1, "{seen:?}");
    assert_eq!((seen[0]["basic"].as_str(), seen[0]["body"].as_str()), (Some("u:p-w"), Some("body")));
    assert_eq!(seen[0]["sni"], "echo.example.com");
    assert!(journal.http("api.example.com").unwrap().is_empty());
    assert!(journal.of("dns").unwrap().iter().any(|entry| entry["name"] == "echo.example.com"));
    let arrived = world.counters().unwrap().since(&before);
    let of = |site: Site| arrived.of(site);
    assert!(of(sites::ECHO) > 4 && of(sites::DNS) > 0, "{arrived:?}");
    assert_eq!((of(sites::API), of(sites::EVIL)), (0, 0));
    assert!(arrived.any() >= of(sites::ECHO) + of(sites::DNS));
}

#[test]
fn an_address_that_nobody_has_is_counted_too() {
    let world = World::new().unwrap();
    let before = world.counters().unwrap();
    capture(world.on_host("ping").args(["-c", "1", "-W", "1", "198.51.100.250"]), b"").unwrap();
    let arrived = world.counters().unwrap().since(&before);
    assert_eq!(arrived.any(), 1, "{arrived:?}");
}

#[test]
fn git_is_cloned_only_with_the_token() {
    let world = World::new().unwrap();
    let clone = |user: &str, into: &str| {
        let url = format!("https://{user}git.example.com/project.git");
        let into = world.folder().join(into);
        let done = capture(world.client_on_host("git").args(["clone", "-q", &url]).arg(&into), b"").unwrap();
        (done, std::fs::read_to_string(into.join("README")).ok())
    };
    let (done, readme) = clone("", "a");
    assert!(!done.ok() && readme.is_none(), "{done:?}");
    let (done, readme) = clone("x:wrong@", "b");
    assert!(!done.ok() && readme.is_none(), "{done:?}");
    let (done, readme) = clone(&format!("x:{GIT_TOKEN}@"), "c");
    assert_eq!(readme.as_deref(), Some("cloned through the gate\n"), "{done:?}");
}

#[test]
fn names_resolve_as_the_table_says() {
    let world = World::new().unwrap();
    let dig = |words: &[&str]| {
        let server = format!("@{}", sites::DNS.v4);
        sh::expect(world.on_host("dig").args([&server, "+short", "+tries=1"]).args(words), b"").unwrap()
    };
    assert_eq!(dig(&["api.example.com", "A"]).trim(), sites::API.v4.to_string());
    assert_eq!(dig(&["API.example.com", "AAAA", "+tcp"]).trim(), sites::API.v6.to_string());
    assert_eq!(dig(&["no-such.example.com", "A"]), "");
    assert_eq!(dig(&["c2VjcmV0.tunnel.example.net", "TXT"]).trim(), "\"arrived\"");
    let turns: Vec<Ipv4Addr> = (0..4).map(|_| dig(&[sites::REBIND, "A"]).trim().parse().unwrap()).collect();
    let [first, second] = sites::REBIND_LATER;
    assert_eq!(turns, [sites::ECHO.v4, first, second, first]);
    let asked = world.journal().of("dns").unwrap();
    assert!(
        asked.iter().any(|entry| entry["name"] == "c2vjcmv0.tunnel.example.net" && entry["type"] == "TXT")
    );
}

#[test]
fn plain_hosts_echo_and_never_end() {
    let world = World::new().unwrap();
    let talk = |script: &str| {
        let mut bash = world.on_host("timeout");
        sh::expect(bash.args(["20", "bash", "-c", script]), b"").unwrap()
    };
    let address = sites::FILES.v4;
    let say = |transport: &str| {
        format!("exec 3<>/dev/{transport}/{address}/7; printf ping-{transport} >&3; head -c 8 <&3")
    };
    assert_eq!(talk(&say("tcp")), "ping-tcp");
    assert_eq!(talk(&say("udp")), "ping-udp");
    let done = curl(&world, &["--max-time", "2", "-o", "/dev/null", "http://198.51.100.20:9000/endless"]);
    assert_eq!(done.code, 28, "the endless download ended: {done:?}");
    assert_eq!(world.journal().of("udp").unwrap()[0]["body"], "ping-udp");
}

#[test]
fn nothing_is_left_behind() {
    let world = World::new().unwrap();
    let (names, folder) = (world.names().clone(), world.folder().to_path_buf());
    // What a daemon and its VMMs would leave: a process in the namespace, another that only has a file of the folder.
    let mut lost = world.on_host("sleep").arg("1000").spawn().unwrap();
    let file = folder.join("disk");
    let mut stray = Command::new("bash").args(["-c", "sleep 1000; :"]).arg(&file).spawn().unwrap();
    drop(world);
    assert!(!lost.wait().unwrap().success() && !stray.wait().unwrap().success());
    let list = sh::ip("netns list").unwrap();
    assert!(!list.contains(&names.world), "{list}");
    assert!(!folder.exists() && !names.etc().exists());
}

#[test]
fn a_world_whose_maker_was_killed_is_cleaned_up() {
    let mut maker = Command::new(std::env::current_exe().unwrap());
    maker.args(["--exact", "makes_a_world_and_waits", "--ignored", "--nocapture"]);
    let mut child = maker.stdout(std::process::Stdio::piped()).spawn().unwrap();
    let mut lines = std::io::BufRead::lines(std::io::BufReader::new(child.stdout.take().unwrap()));
    let world = lines.find_map(|line| line.unwrap().split("world:").nth(1).map(str::to_owned)).unwrap();
    assert!(Path::new("/run/netns").join(format!("{world}-host")).exists());
    child.kill().unwrap();
    child.wait().unwrap();
    let gone =
        || !sh::ip("netns list").unwrap().contains(&world) && !std::env::temp_dir().join(&world).exists();
    assert!((0..200).any(|_| gone() || {
        std::thread::sleep(std::time::Duration::from_millis(100));
        false
    }));
}

/// Not a test: what the one above kills.
#[test]
#[ignore = "run by a_world_whose_maker_was_killed_is_cleaned_up"]
fn makes_a_world_and_waits() {
    let world = World::new().unwrap();
    println!("world:{}", world.names().world);
    std::thread::sleep(std::time::Duration::from_secs(600));
    drop(world);
}
