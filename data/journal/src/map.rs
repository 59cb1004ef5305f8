//! The file in memory, shared with the kernel: what is written is in the file whatever becomes of this process.
//!
//! Nothing here is ever read as a Rust value but single words: others may have written the file.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

/// A file of so many octets, mapped for writing.
pub(crate) struct Map {
    start: NonNull<u8>,
    length: usize,
}

#[expect(unsafe_code, reason = "shared memory has no owner that the compiler could know")]
// SAFETY: the mapping belongs to nobody's thread; words are atomic, and who copies octets in owns where they go.
unsafe impl Send for Map {}
#[expect(unsafe_code, reason = "as above")]
// SAFETY: as above.
unsafe impl Sync for Map {}

impl Map {
    /// Maps a file that has at least so many octets; one that is cut off later ends this process.
    #[expect(unsafe_code, reason = "nothing safe maps a file for writing")]
    pub(crate) fn new(file: &File, length: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice touches no memory of ours.
        let start = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                length,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                0,
            )
        };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let start = NonNull::new(start.cast()).ok_or_else(|| io::Error::other("mapped at nothing"))?;
        Ok(Self { start, length })
    }

    /// The word at an offset.
    #[expect(unsafe_code, reason = "a word of shared memory")]
    pub(crate) fn word(&self, at: usize) -> &AtomicU64 {
        assert!(at.is_multiple_of(8) && at.checked_add(8).is_some_and(|end| end <= self.length));
        // SAFETY: inside of the mapping, which lives as long as `self` and begins at a page; nobody refers to these octets but by
        // such words (offsets of words and of octets that are copied are apart, see `layout`), and any octets are a word.
        unsafe { AtomicU64::from_ptr(self.start.add(at).as_ptr().cast()) }
    }

    /// Copies octets in. The caller is the only one who writes to where they go.
    #[expect(unsafe_code, reason = "octets of shared memory")]
    pub(crate) fn copy(&self, at: usize, octets: &[u8]) {
        assert!(at.checked_add(octets.len()).is_some_and(|end| end <= self.length));
        // SAFETY: inside of the mapping, which no slice refers to, so that the two are apart.
        unsafe {
            self.start.add(at).as_ptr().copy_from_nonoverlapping(octets.as_ptr(), octets.len());
        }
    }
}

impl Drop for Map {
    #[expect(unsafe_code, reason = "the other half of mmap")]
    fn drop(&mut self) {
        // SAFETY: what `new` mapped, and nothing refers to it any more.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
