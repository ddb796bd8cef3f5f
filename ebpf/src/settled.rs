//! What the compiler may not reason about, for a verifier that reasons less.
#![allow(unsafe_code, reason = "an instruction that moves a register to itself")]

/// A number that the compiler neither computes a second time nor knows anything of: the verifier knows of the register
/// that was compared, and of nothing that equals it.
#[inline(always)]
pub(crate) fn settled(number: usize) -> usize {
    #[cfg(target_arch = "bpf")]
    // SAFETY: a register to itself; without an instruction the debug information would not add up.
    unsafe {
        let mut number = number;
        core::arch::asm!("{number} = {number}", number = inout(reg) number, options(pure, nomem, nostack));
        number
    }
    #[cfg(not(target_arch = "bpf"))]
    number
}

/// An entry of a table; `None` beyond its end. The table has a power of two of them.
#[inline(always)]
pub(crate) fn entry<T, const N: usize>(table: &[T; N], index: u32) -> Option<&T> {
    const { assert!(N.is_power_of_two()) };
    let index = index as usize;
    if index >= N {
        return None;
    }
    // What was compared may be another register, so that the verifier is shown once more.
    table.get(settled(index) & (N - 1))
}
