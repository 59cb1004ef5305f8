//! What is noted is there for who reads the file after this process, and nothing that stands in the file does harm.
#![expect(clippy::unwrap_used, reason = "a test's helper fails by panicking")]

use std::os::unix::fs::{FileExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use tapgate_journal::{FileJournal, Left};
use tapgate_model::{
    AuditEvent, EventId, Mode, Protocol, Reason, RuleId, Stage, UserId, Verdict, VmId, VmPolicy,
};

fn event(vm: &VmId) -> AuditEvent {
    let policy = VmPolicy {
        vm: vm.clone(),
        user: UserId::generate(),
        generation: 1,
        mode: Mode::Warn,
        rules: Default::default(),
        secrets: [].into(),
        secrets_over_http: Default::default(),
    };
    let verdict = Verdict::Allow { rule: Some(RuleId::generate()), reason: Reason::Host };
    AuditEvent {
        id: Some(EventId::generate()),
        host: Some("a.example.com".parse().unwrap()),
        address: Some("2001:db8::7".parse().unwrap()),
        port: Some(443),
        method: Some("GET".into()),
        path: Some("/a/b".into()),
        status: Some(200),
        secrets: vec!["token".into()],
        secrets_withheld: vec!["other".into(), "third".into()],
        bytes_out: 1 << 40,
        bytes_in: 7,
        duration_ms: 9,
        count: 3,
        ..AuditEvent::new(&policy, Protocol::Http, verdict, -5)
    }
}

/// All but the note, which no copy has.
fn text(event: &AuditEvent) -> String {
    format!("{:?}", event.clone())
}

struct Place {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

fn place() -> Place {
    let folder = tempfile::tempdir().unwrap();
    Place { path: folder.path().join("audit.journal"), _folder: folder }
}

fn begin(path: &Path) -> Arc<FileJournal> {
    let journal = FileJournal::beside(path).unwrap();
    journal.put_in_place().unwrap();
    journal
}

/// Notes it, and never takes the note back: as one does who is killed.
fn leave(journal: &Arc<FileJournal>, mut event: AuditEvent, stage: Stage) -> AuditEvent {
    let whole = event.clone();
    event.note = journal.note();
    event.note_down(stage);
    std::mem::forget(event);
    whole
}

#[test]
fn what_was_under_way_is_there_and_what_was_stored_is_not() {
    let place = place();
    let journal = begin(&place.path);
    let vm = VmId::generate();
    let ended = leave(&journal, event(&vm), Stage::Ended);
    let under_way = leave(&journal, event(&vm), Stage::UnderWay);
    let undecided = leave(&journal, event(&vm), Stage::Undecided);
    let refused = Verdict::Deny { reason: Reason::NoRule };
    let refused = leave(&journal, AuditEvent { verdict: refused, ..event(&vm) }, Stage::UnderWay);
    let mut stored = event(&vm);
    stored.note = journal.note();
    stored.note_down(Stage::Ended);
    drop(stored);
    let mut claimed = event(&vm);
    claimed.note = journal.note();
    claimed.note_down(Stage::Ended);
    let id = EventId::generate();
    claimed.note.claim(id.as_str(), 77);
    std::mem::forget(claimed);
    assert_eq!(std::fs::metadata(&place.path).unwrap().mode() & 0o777, 0o600);

    let left = Left::read(&place.path);
    assert!(left.lost.is_empty() && left.fault.is_none(), "{left:?}");
    let told: Vec<String> = left.events.iter().take(4).map(|left| text(&left.event)).collect();
    let reason = Reason::DaemonEnded;
    let rule = under_way.verdict.rule().cloned();
    let under_way = AuditEvent { verdict: Verdict::Allow { rule, reason }, ..under_way };
    let undecided = AuditEvent { verdict: Verdict::Deny { reason }, ..undecided };
    assert_eq!(told, [text(&ended), text(&under_way), text(&undecided), text(&refused)]);
    assert_eq!(left.events.len(), 5);
    assert_eq!(left.events[4].claim, Some((id.clone(), 77)));
    assert_eq!(left.events[4].event.id, Some(id));
}

#[test]
fn what_does_not_fit_is_cut_and_said() {
    let place = place();
    let journal = begin(&place.path);
    let long = |prefix: &str| format!("{prefix}{}", "a".repeat(64 - prefix.len()));
    let mut big = event(&long("vm_").parse().unwrap());
    big.user = long("usr_").parse().unwrap();
    big.id = Some(long("ee_").parse().unwrap());
    big.verdict = Verdict::Allow { rule: Some(long("egr_").parse().unwrap()), reason: Reason::Host };
    big.host = Some([&"a".repeat(63); 4].map(String::as_str).join(".")[..253].parse().unwrap());
    big.method = Some("\u{1f980}".repeat(32));
    big.path = Some(format!("/{}", "\u{1f980}".repeat(255)));
    big.secrets = (0..500).map(|n| format!("secret_{n}")).collect();
    big.secrets_withheld = big.secrets.clone();
    let whole = leave(&journal, big, Stage::Ended);
    let found = Left::read(&place.path).events.remove(0).event;
    assert_eq!((&found.host, &found.method, &found.id), (&whole.host, &whole.method, &whole.id));
    assert_eq!((found.vm, found.user, found.verdict), (whole.vm, whole.user, whole.verdict));
    let (path, of) = (found.path.unwrap(), whole.path.unwrap());
    assert!(path.len() > 50 && of.starts_with(&path), "{path}");
    for names in [&found.secrets, &found.secrets_withheld] {
        let (last, names) = names.split_last().unwrap();
        assert_eq!(last, "...");
        assert!(!names.is_empty() && whole.secrets.starts_with(names), "{names:?}");
    }
}

#[test]
fn what_has_no_slot_is_counted() {
    let place = place();
    let journal = begin(&place.path);
    let vm = VmId::generate();
    let mut taken: Vec<_> = std::iter::repeat_with(|| journal.note()).take(65_536).collect();
    let count = || Left::read(&place.path).lost.iter().map(|lost| lost.count).sum::<u64>();
    assert_eq!(count(), 0);
    let mut over: Vec<AuditEvent> = (0..3).map(|_| AuditEvent { count: 2, ..event(&vm) }).collect();
    for event in &mut over {
        event.note = journal.note();
        event.note_down(Stage::Ended);
    }
    assert_eq!(count(), 6);
    // What is in no event is told in one slot, whichever of them has one.
    let mut lost = std::mem::take(&mut over[0].note);
    lost.lost(std::mem::take(&mut over[1].note), &vm, 4);
    assert_eq!(count(), 6);
    lost.lost(taken.pop().unwrap(), &vm, 5);
    assert_eq!(count(), 7);
    let told = Left::read(&place.path).lost;
    assert!(told.iter().any(|lost| lost.vm.as_ref() == Some(&vm) && lost.count == 5), "{told:?}");
    drop(over);
    assert_eq!(count(), 5);
    drop(lost);
    assert_eq!(count(), 0);
}

#[test]
fn a_note_that_was_not_finished_is_counted_for_its_vm() {
    let place = place();
    let journal = begin(&place.path);
    let vm = VmId::generate();
    leave(&journal, event(&vm), Stage::Ended);
    leave(&journal, event(&vm), Stage::Ended);
    let file = std::fs::OpenOptions::new().write(true).open(&place.path).unwrap();
    // One octet of the second one's body.
    file.write_all_at(&[0xff], 4096 + 1024 + 230).unwrap();
    let left = Left::read(&place.path);
    assert_eq!((left.events.len(), left.lost.len()), (1, 1));
    assert_eq!((left.lost[0].vm.as_ref(), left.lost[0].count), (Some(&vm), 3));
}

/// Anything may stand in the file.
#[test]
fn no_octets_do_harm() {
    let place = place();
    let journal = begin(&place.path);
    let vm = VmId::generate();
    for _ in 0..40 {
        leave(&journal, event(&vm), Stage::UnderWay);
    }
    drop(journal);
    let mut whole = vec![0; 4096 + 1024 * 40];
    std::fs::File::open(&place.path).unwrap().read_exact_at(&mut whole, 0).unwrap();
    let mut random = 7u64;
    let mut next = |below: usize| {
        random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (random >> 33) as usize % below
    };
    for turn in 0..3_000 {
        let mut octets = whole.clone();
        match turn % 4 {
            // All of it, after the header's first words in one half of the turns.
            0 => octets.iter_mut().skip(turn % 8 * 6).for_each(|octet| *octet = next(256) as u8),
            1 => octets.truncate(next(whole.len())),
            _ => {
                for _ in 0..=next(200) {
                    octets[next(whole.len())] = next(256) as u8;
                }
            }
        }
        std::fs::write(&place.path, &octets).unwrap();
        let left = Left::read(&place.path);
        assert!(left.events.len() <= 40, "{left:?}");
        let known = |event: &AuditEvent| event.vm == vm && event.verdict.reason() == Reason::DaemonEnded;
        assert!(left.events.iter().all(|left| known(&left.event)), "an event that never was: {left:?}");
        if octets.len() < whole.len() {
            assert!(!left.lost.is_empty() && left.fault.is_some(), "{left:?}");
        }
    }
}

#[test]
fn what_is_not_ours_is_counted_and_makes_room() {
    let place = place();
    let path = &place.path;
    let counted = |what: &str, count: u64| {
        let left = Left::read(path);
        assert!(left.events.is_empty() && left.fault.is_some(), "{what}: {left:?}");
        assert_eq!(left.lost.iter().map(|lost| lost.count).sum::<u64>(), count, "{what}");
        begin(path);
        assert!(Left::read(path).fault.is_none(), "{what}");
    };
    assert!(Left::read(path).fault.is_none(), "there was none");
    std::fs::create_dir(path).unwrap();
    std::fs::write(path.join("x"), "y").unwrap();
    counted("a folder", 1);
    std::fs::remove_file(path).unwrap();
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
    counted("a pipe", 1);
    std::fs::rename(path, path.with_extension("elsewhere")).unwrap();
    std::os::unix::fs::symlink(path.with_extension("elsewhere"), path).unwrap();
    counted("a link", 1);
    std::fs::write(path, "").unwrap();
    counted("nothing in it", 1);
    let journal = begin(path);
    let vm = VmId::generate();
    for _ in 0..9 {
        leave(&journal, event(&vm), Stage::Ended);
    }
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(&2u64.to_le_bytes(), 8).unwrap();
    counted("another version", 9);
}
