//! The table of taps: what frames of known flows are held against. It lies in memory that the programs read too, so that a
//! change of a policy is one store of a word, which no frame sees half of.
//!
//! A copy of what is in `VMS`, and never ahead of it: an entry that is missing makes frames slower, never freer.
#![expect(unsafe_code, reason = "shared memory: a mapping, and words that are written by themselves")]

use crate::{DatapathError, error::map_error};
use aya::maps::{Map, MapData, MapError};
use nix::sys::mman::{MapFlags, ProtFlags, mmap, munmap};
use std::{
    io,
    mem::offset_of,
    num::NonZeroUsize,
    os::fd::AsFd as _,
    ptr::NonNull,
    sync::atomic::{AtomicU32, Ordering},
};
use tapgate_ebpf_common::maps::{TAPS, Tap, Vm};

const OCTETS: usize = TAPS as usize * size_of::<Tap>();

/// The mapped table.
pub(crate) struct Taps(NonNull<Tap>);

// SAFETY: the mapping belongs to the process, not to a thread, and this is its only user in it.
unsafe impl Send for Taps {}

impl Taps {
    pub(crate) fn open(map: Map) -> Result<Self, DatapathError> {
        let failed =
            |source: io::Error| DatapathError::Pins { what: "map into memory", path: "TAPS".into(), source };
        let Map::Array(data) = map else {
            return Err(map_error("open", "TAPS")(MapError::InvalidMapType { map_type: 0 }));
        };
        let length = NonZeroUsize::new(OCTETS).ok_or_else(|| failed(io::ErrorKind::InvalidInput.into()))?;
        Self::map(&data, length).map_err(|error| failed(error.into()))
    }

    fn map(data: &MapData, length: NonZeroUsize) -> nix::Result<Self> {
        let access = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
        // SAFETY: a new mapping of as many octets as the map has; nothing else in this process knows its address.
        let at = unsafe { mmap(None, length, access, MapFlags::MAP_SHARED, data.fd().as_fd(), 0) }?;
        Ok(Self(at.cast()))
    }

    /// Makes the table say what these entries of `VMS` do, whatever an earlier daemon left in it.
    pub(crate) fn adopt(&mut self, vms: &[(u32, Vm)]) {
        let mut wanted = vec![Tap::default(); TAPS as usize];
        for (link, vm) in vms {
            let entry = &mut wanted[Tap::place(*link) as usize];
            if entry.link == 0 {
                *entry = Tap::new(*link, vm);
            }
        }
        for (place, wanted) in wanted.iter().enumerate() {
            if self.read(place) != *wanted {
                self.write(place, wanted);
            }
        }
    }

    /// Enters the VM, or its new generation. If another tap has the place the VM goes without.
    pub(crate) fn put(&mut self, link: u32, vm: &Vm) {
        let (place, wanted) = (Tap::place(link) as usize, Tap::new(link, vm));
        let known = self.read(place);
        if known.link != 0 && known.link != link {
            return;
        }
        if (Tap { policy: wanted.policy, ..known }) == wanted {
            self.word(place, offset_of!(Tap, policy)).store(wanted.policy, Ordering::Release);
        } else {
            self.write(place, &wanted);
        }
    }

    /// Removes the tap's entry, if it has one.
    pub(crate) fn clear(&mut self, link: u32) {
        let place = Tap::place(link) as usize;
        if self.read(place).link == link {
            self.holder(place).store(0, Ordering::Release);
        }
    }

    /// Nobody's while it is written.
    fn write(&mut self, place: usize, tap: &Tap) {
        self.holder(place).store(0, Ordering::SeqCst);
        // SAFETY: inside of the mapping; the programs read nothing of an entry that is nobody's.
        unsafe { self.at(place).write_volatile(Tap { link: 0, ..*tap }) };
        self.holder(place).store(tap.link, Ordering::Release);
    }

    fn read(&self, place: usize) -> Tap {
        // SAFETY: inside of the mapping, which this is the only writer of.
        unsafe { self.at(place).read_volatile() }
    }

    fn holder(&self, place: usize) -> &AtomicU32 {
        self.word(place, offset_of!(Tap, link))
    }

    fn word(&self, place: usize, field: usize) -> &AtomicU32 {
        // SAFETY: a word of an entry, aligned as the entry is, for as long as the mapping lives.
        unsafe { AtomicU32::from_ptr(self.at(place).byte_add(field).cast()) }
    }

    fn at(&self, place: usize) -> *mut Tap {
        assert!(place < TAPS as usize, "an index is masked before it gets here");
        // SAFETY: inside of the mapping, by the line above.
        unsafe { self.0.as_ptr().add(place) }
    }
}

impl Drop for Taps {
    fn drop(&mut self) {
        // SAFETY: mapped by `open` with this length, and not used any more.
        let _ = unsafe { munmap(self.0.cast(), OCTETS) };
    }
}
