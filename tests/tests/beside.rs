//! Two daemons on one host: what their VMMs run as is never the same user.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::path::Path;
use tapgate_e2e::{
    World,
    daemon::{Daemon, Driver, Settings},
};

fn start(world: &World) -> Daemon<'_> {
    let settings = Settings::of(Driver::Netns).unwrap();
    Daemon::start(world, settings).unwrap()
}

/// The blocks of user ids that the world's daemon has claimed.
fn claimed(world: &World) -> Vec<String> {
    let pins = Path::new("/sys/fs/bpf/tapgate").join(&world.names().world);
    let names = std::fs::read_dir(pins).unwrap().map(|entry| entry.unwrap().file_name());
    names.map(|name| name.into_string().unwrap()).filter(|name| name.starts_with("uids-")).collect()
}

#[test]
fn daemons_beside_each_other_have_user_ids_of_their_own() {
    let worlds = [World::new().unwrap(), World::new().unwrap()];
    let [one, other] = &worlds;
    let mut first = start(one);
    let _second = start(other);
    let before = claimed(one);
    assert_eq!((before.len(), claimed(other).len()), (1, 1));
    assert_ne!(before, claimed(other));
    first.kill().unwrap();
    first.start_again().unwrap();
    assert_eq!(claimed(one), before, "its VMMs run on as who they were");
}
