//! The journal of this daemon: made beside the one that the last daemon left, and put in its place once it holds all that is still to be
//! stored of that one. Its room on the disk is taken at once, so that a full disk never stands between a note and the file.

use crate::free::Free;
use crate::layout::{BODY, HEADER, Kind, MAGIC, SLOT, VERSION, check, header, slot};
use crate::map::Map;
use crate::slot as form;
use nix::fcntl::posix_fallocate;
use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering, compiler_fence};
use tapgate_model::{AuditEvent, Journal, Note, Stage, VmId};

/// Slots, as many as there is room for on the disk: 64 MiB at first.
const SLOTS: [u32; 3] = [65_536, 8_192, 1_024];

/// A journal that is written to.
pub struct FileJournal {
    map: Map,
    free: Free,
    file: File,
    beside: PathBuf,
    path: PathBuf,
}

impl std::fmt::Debug for FileJournal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FileJournal").field("path", &self.path).finish_non_exhaustive()
    }
}

impl FileJournal {
    /// Makes one beside the file of this name, which stays as it is.
    ///
    /// # Errors
    /// The file cannot be made or mapped, for want of room perhaps.
    pub fn beside(path: &Path) -> io::Result<Arc<Self>> {
        let mut last = io::Error::other("no size");
        for slots in SLOTS {
            match Self::of(path, slots) {
                Ok(journal) => return Ok(Arc::new(journal)),
                Err(error) => last = error,
            }
        }
        Err(last)
    }

    pub(crate) fn of(path: &Path, slots: u32) -> io::Result<Self> {
        let beside = path.with_extension("journal-new");
        // What a start that was cut off left, if it did.
        let _ = std::fs::remove_file(&beside);
        let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(&beside)?;
        let made = Self::fill(&file, slots);
        let map = made.inspect_err(|_| drop(std::fs::remove_file(&beside)))?;
        Ok(Self { map, free: Free::new(slots), file, beside, path: path.into() })
    }

    fn fill(file: &File, slots: u32) -> io::Result<Map> {
        let length = HEADER + slots as usize * SLOT;
        posix_fallocate(file, 0, i64::try_from(length).map_err(io::Error::other)?)?;
        let map = Map::new(file, length)?;
        map.word(header::SLOTS).store(slots.into(), Ordering::Relaxed);
        map.word(header::VERSION).store(VERSION, Ordering::Relaxed);
        map.word(header::MAGIC).store(MAGIC, Ordering::Release);
        Ok(map)
    }

    /// Puts it in the place of the last one.
    ///
    /// # Errors
    /// The disk.
    pub fn put_in_place(&self) -> io::Result<()> {
        self.file.sync_data()?;
        if let Err(error) = std::fs::rename(&self.beside, &self.path) {
            // A folder, say.
            let aside = self.path.with_extension("journal-foreign");
            std::fs::rename(&self.path, &aside).map_err(|_| error)?;
            std::fs::rename(&self.beside, &self.path)?;
        }
        // Else, after a power cut, the old one is there again, and its events twice.
        match self.path.parent() {
            Some(folder) => File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }

    /// A note for an attempt that begins.
    pub fn note(self: &Arc<Self>) -> Note {
        let slot = self.free.take();
        if let Some(slot) = slot {
            self.map.word(header::TAKEN).fetch_add(1, Ordering::Relaxed);
            let end = self.map.word(header::END);
            if end.load(Ordering::Relaxed) <= slot.into() {
                end.fetch_max(u64::from(slot) + 1, Ordering::Relaxed);
            }
        }
        Note::new(self.clone(), slot)
    }

    fn word(&self, slot: u32, part: usize) -> &AtomicU64 {
        self.map.word(HEADER + slot as usize * SLOT + part)
    }

    fn copy(&self, slot: u32, part: usize, octets: &[u8]) {
        self.map.copy(HEADER + slot as usize * SLOT + part, octets);
    }

    /// Writes a slot that is the caller's: until the state is there again, it is one that somebody is at.
    fn put(&self, slot: u32, vm: &VmId, count: u64, kind: Kind, body: &[u8]) {
        let state = self.word(slot, slot::STATE);
        let fresh = state.load(Ordering::Relaxed) == Kind::Free as u64;
        self.word(slot, slot::COUNT).store(count, Ordering::Relaxed);
        if fresh {
            self.word(slot, slot::CLAIM).store(0, Ordering::Relaxed);
        }
        state.store(Kind::Writing as u64, Ordering::Relaxed);
        // What a killed process had written is in the file in the order of its program: only the compiler could change that.
        compiler_fence(Ordering::SeqCst);
        if fresh {
            let vm = form::id(vm.as_str());
            self.copy(slot, slot::VM, &vm);
            self.word(slot, slot::VM_CHECK).store(check(0, &vm), Ordering::Relaxed);
        }
        let now = kind.with(body.len());
        self.copy(slot, slot::BODY, body);
        self.word(slot, slot::CHECK).store(check(now, body), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        state.store(now, Ordering::Release);
    }
}

impl Journal for FileJournal {
    fn write(&self, slot: u32, event: &AuditEvent, stage: Stage) {
        let mut body = [0; BODY];
        let length = form::write(&mut body, event);
        let kind = match stage {
            Stage::Undecided => Kind::Undecided,
            Stage::UnderWay => Kind::UnderWay,
            Stage::Ended => Kind::Ended,
        };
        self.put(slot, &event.vm, event.count.max(1).into(), kind, &body[..length]);
    }

    fn write_lost(&self, slot: u32, vm: &VmId, count: u64) {
        self.put(slot, vm, count, Kind::Lost, &[]);
    }

    fn claim(&self, slot: u32, id: &str, seq: i64) {
        let (id, seq) = (form::id(id), seq.cast_unsigned());
        self.word(slot, slot::CLAIM).store(0, Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        self.copy(slot, slot::CLAIM_ID, &id);
        self.word(slot, slot::CLAIM_CHECK).store(check(seq, &id), Ordering::Relaxed);
        compiler_fence(Ordering::SeqCst);
        self.word(slot, slot::CLAIM).store(seq, Ordering::Release);
    }

    fn free(&self, slot: u32) {
        self.word(slot, slot::STATE).store(Kind::Free as u64, Ordering::Release);
        self.map.word(header::TAKEN).fetch_sub(1, Ordering::Relaxed);
        self.free.give(slot);
    }

    fn more_without(&self, count: u64) {
        self.map.word(header::WITHOUT).fetch_add(count, Ordering::Relaxed);
    }

    fn fewer_without(&self, count: u64) {
        self.map.word(header::WITHOUT).fetch_sub(count, Ordering::Relaxed);
    }
}
