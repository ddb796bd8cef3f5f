//! The packet parser against etherparse. `cargo fuzz run packet --fuzz-dir tests/fuzz`; where there is no nightly tool
//! chain, `RUSTC_BOOTSTRAP=1 cargo fuzz run -s none packet --fuzz-dir tests/fuzz`.
#![no_main]

use libfuzzer_sys::fuzz_target;

#[path = "../../ebpf/common/tests/against/mod.rs"]
mod against;

fuzz_target!(|bytes: &[u8]| against::compare(bytes));
