//! What a daemon that is gone left in its journal. Nothing in the file is trusted, and reading it never fails: what cannot be read is
//! counted.

use crate::layout::{HEADER, Kind, MAGIC, SLOT, VERSION, header};
use crate::slot::{self, Found};
use nix::libc::{O_NOFOLLOW, O_NONBLOCK};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;
use tapgate_model::{AuditEvent, EventId, Reason, Verdict, VmId};

/// Slots that are read at once.
const STEP: usize = 256;
/// No daemon had more attempts under way.
const MOST: u64 = 1 << 32;

/// An event that may not be stored yet.
#[derive(Debug)]
pub struct LeftEvent {
    /// As it is to be stored.
    pub event: AuditEvent,
    /// The id and the number that it has in the log, if it came to that.
    pub claim: Option<(EventId, i64)>,
}

/// Attempts that are in no event.
#[derive(Debug)]
pub struct Lost {
    /// Whose, where that is known.
    pub vm: Option<VmId>,
    /// How many.
    pub count: u64,
    /// If they were counted in the log, it has grown to this number at least.
    pub claim: Option<i64>,
}

/// All of it.
#[derive(Debug, Default)]
pub struct Left {
    /// Events.
    pub events: Vec<LeftEvent>,
    /// What is counted.
    pub lost: Vec<Lost>,
    /// Why the file, or a part of it, could not be read.
    pub fault: Option<String>,
}

impl Left {
    /// Reads the file of this name.
    pub fn read(path: &Path) -> Self {
        let mut left = Self::default();
        match open(path) {
            Ok(Some(file)) => left.read_file(&file),
            Ok(None) => {}
            Err(error) => left.give_up(1, error.to_string()),
        }
        left
    }

    fn give_up(&mut self, count: u64, why: String) {
        if count > 0 {
            self.lost.push(Lost { vm: None, count, claim: None });
        }
        self.fault = Some(why);
    }

    fn read_file(&mut self, file: &File) {
        let mut head = [0; HEADER];
        if let Err(error) = file.read_exact_at(&mut head, 0) {
            return self.give_up(1, format!("it has no header: {error}"));
        }
        let word = |at: usize| head[at..].first_chunk().map_or(0, |word| u64::from_le_bytes(*word));
        if word(header::MAGIC) != MAGIC {
            return self.give_up(1, "it is no journal".into());
        }
        if word(header::VERSION) != VERSION {
            let count = word(header::TAKEN).min(MOST) + word(header::WITHOUT).min(MOST);
            return self.give_up(count, format!("it is of version {}", word(header::VERSION)));
        }
        if let without @ 1.. = word(header::WITHOUT) {
            self.lost.push(Lost { vm: None, count: without.min(MOST), claim: None });
        }
        let end = word(header::END).min(word(header::SLOTS)).min(u32::MAX.into());
        self.read_slots(file, usize::try_from(end).unwrap_or(0));
    }

    fn read_slots(&mut self, file: &File, end: usize) {
        let mut slots = vec![0; STEP * SLOT];
        for first in (0..end).step_by(STEP) {
            let part = &mut slots[..STEP.min(end - first) * SLOT];
            let read = read_some(file, part, (HEADER + first * SLOT) as u64);
            let whole = read.as_ref().map_or(0, |octets| octets / SLOT);
            part.chunks_exact(SLOT).take(whole).for_each(|octets| self.take(slot::read(octets)));
            if whole < part.len() / SLOT {
                let why = read.err().map_or("it was cut off".into(), |error| error.to_string());
                // Those that were taken and are not among what was read are not known by their number either.
                return self.give_up(1, why);
            }
        }
    }

    fn take(&mut self, found: Found) {
        match found {
            Found::Nothing => {}
            Found::Lost { vm, count, claim } => self.lost.push(Lost { vm, count, claim }),
            Found::Event { kind, mut event, claim } => {
                event.verdict = told(kind, event.verdict.clone());
                if let Some((id, _)) = &claim {
                    event.id = Some(id.clone());
                }
                self.events.push(LeftEvent { event: *event, claim });
            }
        }
    }
}

/// What is told of an attempt that was at this stage.
fn told(kind: Kind, verdict: Verdict) -> Verdict {
    let reason = Reason::DaemonEnded;
    match (kind, verdict) {
        (Kind::Undecided, _) => Verdict::Deny { reason },
        (Kind::UnderWay, Verdict::Allow { rule, .. }) => Verdict::Allow { rule, reason },
        (Kind::UnderWay, Verdict::Tolerate { .. }) => Verdict::Tolerate { reason },
        // That it was refused, and why, is so however the refusal was told.
        (_, verdict) => verdict,
    }
}

/// The file, if there is one; what is not ours is none.
fn open(path: &Path) -> io::Result<Option<File>> {
    let opened = OpenOptions::new().read(true).custom_flags(O_NOFOLLOW | O_NONBLOCK).open(path);
    let file = match opened {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        opened => opened?,
    };
    let about = file.metadata()?;
    let ours = about.is_file() && about.uid() == nix::unistd::geteuid().as_raw() && about.mode() & 0o077 == 0;
    if ours { Ok(Some(file)) } else { Err(io::Error::other("it is no file that we made")) }
}

/// Reads as much as there is.
fn read_some(file: &File, octets: &mut [u8], at: u64) -> io::Result<usize> {
    let mut read = 0;
    while read < octets.len() {
        match file.read_at(&mut octets[read..], at + read as u64) {
            Ok(0) => break,
            Ok(more) => read += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(read)
}
