//! Atomic additions and exchanges, which every kernel from 5.12 on has and `core` does not offer for this target.
#![allow(unsafe_code, reason = "instructions on memory that other CPUs write")]

/// Adds to a counter that other CPUs add to.
///
/// # Safety
/// `counter` points to 8 aligned bytes of a map's value.
#[inline(always)]
pub(crate) unsafe fn add(counter: *mut u64, by: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("lock *(u64 *)({counter} + 0) += {by}", counter = in(reg) counter, by = in(reg) by);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        core::sync::atomic::AtomicU64::from_ptr(counter).fetch_add(by, core::sync::atomic::Ordering::Relaxed);
    }
}

/// Sets bits in a word in which other CPUs set bits.
///
/// # Safety
/// `word` points to 8 aligned bytes of a map's value.
#[inline(always)]
pub(crate) unsafe fn set(word: *mut u64, bits: u64) {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's.
    unsafe {
        core::arch::asm!("lock *(u64 *)({word} + 0) |= {bits}", word = in(reg) word, bits = in(reg) bits);
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        core::sync::atomic::AtomicU64::from_ptr(word).fetch_or(bits, core::sync::atomic::Ordering::Relaxed);
    }
}

/// Takes what is in a counter and leaves 0.
///
/// # Safety
/// `counter` points to 8 aligned bytes of a map's value.
#[inline(always)]
pub(crate) unsafe fn take(counter: *mut u64) -> u64 {
    #[cfg(target_arch = "bpf")]
    // SAFETY: the caller's.
    unsafe {
        let mut value = 0_u64;
        core::arch::asm!(
            "{value} = xchg_64({counter} + 0, {value})",
            counter = in(reg) counter,
            value = inout(reg) value,
        );
        value
    }
    #[cfg(not(target_arch = "bpf"))]
    // SAFETY: the caller's.
    unsafe {
        core::sync::atomic::AtomicU64::from_ptr(counter).swap(0, core::sync::atomic::Ordering::Relaxed)
    }
}
