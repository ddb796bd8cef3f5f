//! A map in this process's memory: what is written there is there for the programs.
#![allow(unsafe_code, reason = "mmap(2), and memory that the kernel's programs read")]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr::{self, NonNull};
use std::sync::atomic::{AtomicU64, Ordering};

use aya::Pod;

/// An array map that was made with `BPF_F_MMAPABLE`. Never lent out as a slice: others read and write it too.
pub(crate) struct Mapping {
    start: NonNull<u8>,
    length: usize,
}

// SAFETY: the memory belongs to no thread; writes need `&mut self`.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// The first `length` bytes of a map's values.
    pub(crate) fn of(map: BorrowedFd<'_>, length: usize, writable: bool) -> io::Result<Self> {
        let protection = libc::PROT_READ | if writable { libc::PROT_WRITE } else { 0 };
        // SAFETY: a new mapping wherever there is room for it; nothing that exists is touched.
        let start = unsafe { libc::mmap(ptr::null_mut(), length, protection, libc::MAP_SHARED, map.as_raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        match NonNull::new(start.cast()) {
            Some(start) => Ok(Self { start, length }),
            None => Err(io::Error::other("the kernel mapped it at address 0")),
        }
    }

    /// Writes values from byte `at` on.
    pub(crate) fn write<T: Pod>(&mut self, at: usize, values: &[T]) {
        self.check::<T>(at, values.len());
        // SAFETY: inside the mapping, as was checked, and aligned; `T` is plain data.
        unsafe { ptr::copy_nonoverlapping(values.as_ptr(), self.start.as_ptr().add(at).cast(), values.len()) };
    }

    /// Sets bits in the word at byte `at`, where programs set bits too.
    pub(crate) fn set(&mut self, at: usize, bits: u64) {
        self.word(at).fetch_or(bits, Ordering::SeqCst);
    }

    /// Writes the word at byte `at` after everything that was written before.
    pub(crate) fn publish(&mut self, at: usize, value: u64) {
        self.word(at).store(value, Ordering::SeqCst);
    }

    fn word(&mut self, at: usize) -> &AtomicU64 {
        self.check::<u64>(at, 1);
        // SAFETY: inside the mapping, as was checked, and aligned; the programs that write there do so in whole words.
        unsafe { AtomicU64::from_ptr(self.start.as_ptr().add(at).cast()) }
    }

    /// Reads `count` values from byte `at` on.
    pub(crate) fn read<T: Pod>(&self, at: usize, count: usize) -> Vec<T> {
        self.check::<T>(at, count);
        let mut values = Vec::with_capacity(count);
        // SAFETY: inside the mapping, as was checked, and aligned; `T` is plain data, of which any bytes are a value.
        unsafe {
            ptr::copy_nonoverlapping(self.start.as_ptr().add(at).cast(), values.as_mut_ptr(), count);
            values.set_len(count);
        }
        values
    }

    fn check<T>(&self, at: usize, count: usize) {
        let fits = count.checked_mul(size_of::<T>()).and_then(|bytes| bytes.checked_add(at));
        assert!(fits.is_some_and(|end| end <= self.length), "{count} values at {at} are not in the map");
        assert!(at.is_multiple_of(align_of::<T>()), "{at} is no place for a value");
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `of` with this length, and nobody else has the address.
        unsafe { libc::munmap(self.start.as_ptr().cast(), self.length) };
    }
}
