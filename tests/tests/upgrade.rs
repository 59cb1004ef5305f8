//! A newer release takes over from an older one, with a guest that talks all the while: what a rule allows goes on on the
//! connection that is there, and nothing else ever arrives.
//!
//! The older release is a binary that `TAPGATE_OLD_BIN` names, as built from an older commit: its programs and maps are
//! others. Without one this binary plays it, its maps put where an older version would have had them.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::{path::PathBuf, thread, time::Duration};
use tapgate_e2e::{
    World,
    daemon::{self, Daemon, Driver, Settings},
    demo::Stage,
    sites,
};

/// In the guest: one connection that says a number ten times a second and wants it back, and datagrams to whom no rule
/// allows.
fn talk(folder: &str) -> String {
    let (allowed, closed) = (sites::FILES.v4, sites::EVIL.v4);
    format!(
        "cat > {folder}/talk <<'END'
exec 3<>/dev/tcp/{allowed}/7 || exit 1
n=0
while [ ! -e {folder}/stop ]; do
    n=$((n + 1)); printf '%08d' $n >&3
    read -r -N 8 -t 20 -u 3 got && [ \"$got\" = \"$(printf '%08d' $n)\" ] || {{ echo lost; exit 1; }}
    echo x > /dev/udp/{closed}/9
    echo $n > {folder}/count
    sleep 0.1
done
echo whole
END
rm -f {folder}/stop {folder}/count; nohup bash {folder}/talk > {folder}/said 2>/dev/null < /dev/null &"
    )
}

fn count(stage: &Stage<'_>, folder: &str) -> u64 {
    let done = stage.sh(&format!("cat {folder}/count 2>/dev/null || echo 0")).unwrap();
    done.out.trim().parse().unwrap_or(0)
}

fn goes_on(stage: &Stage<'_>, folder: &str, when: &str) {
    let before = count(stage, folder);
    for _ in 0..100 {
        if count(stage, folder) > before + 10 {
            return;
        }
        thread::sleep(Duration::from_millis(200));
    }
    panic!("the connection stands still {when}: {:?}", stage.sh(&format!("cat {folder}/said")).unwrap().out);
}

/// Where this world's instance has its pins, and the folders of maps in there.
fn maps(world: &World) -> (PathBuf, Vec<String>) {
    let pins = PathBuf::from("/sys/fs/bpf/tapgate").join(&world.names().world);
    let names = std::fs::read_dir(&pins).unwrap().map(|entry| entry.unwrap().file_name());
    let names = names.map(|name| name.to_string_lossy().into_owned());
    let maps = names.filter(|name| name.starts_with("maps-")).collect();
    (pins, maps)
}

#[test]
fn a_newer_release_takes_over_live_taps() {
    let world = World::new().unwrap();
    let new = daemon::binary().unwrap();
    let old = std::env::var_os("TAPGATE_OLD_BIN").map(PathBuf::from);
    let settings = Settings {
        binary: old.clone().unwrap_or_else(|| new.clone()),
        driver: Driver::Netns,
        images: "/var/cache/tapgate/images".into(),
    };
    let daemon = Daemon::start(&world, settings).unwrap();
    let mut stage = Stage::new(&world, daemon).unwrap();
    stage.boot("box").unwrap();
    let vm = stage.vm().unwrap().to_owned();
    stage.api().rule("cidr", &format!("{}/32", sites::FILES.v4)).unwrap();
    let folder = stage.scratch();
    let before = world.counters().unwrap();
    stage.sh(&talk(&folder)).unwrap();
    goes_on(&stage, &folder, "under the older release");

    stage.daemon_mut().kill().unwrap();
    let guest = stage.guest().unwrap().clone();
    guest.hang_up();
    let (pins, of_old) = maps(&world);
    if old.is_none() {
        std::fs::rename(pins.join(&of_old[0]), pins.join("maps-0")).unwrap();
    }
    // Some of the talk falls into the time without a daemon.
    thread::sleep(Duration::from_secs(2));
    stage.daemon_mut().start_again_as(new).unwrap();
    stage.api().wait_ready(&vm).unwrap();
    stage.enter(vm).unwrap();
    goes_on(&stage, &folder, "under the newer release");
    let (_, of_new) = maps(&world);
    println!("maps before {of_old:?}, after {of_new:?}; a release of its own: {}", old.is_some());
    assert_eq!(of_new.len(), 1, "the older release's maps are gone: {of_new:?}");

    // The rules are the newer release's to change, on the flow that it took over too.
    let done = stage.sh(&format!("touch {folder}/stop; sleep 1; cat {folder}/said")).unwrap();
    assert_eq!(done.out.trim(), "whole", "{done:?}");
    let arrived = world.counters().unwrap().since(&before);
    assert_eq!(arrived.of(sites::EVIL), 0, "something got out: {arrived:?}");
    assert!(arrived.of(sites::FILES) > 20, "{arrived:?}");
    stage.clear().unwrap();
}
