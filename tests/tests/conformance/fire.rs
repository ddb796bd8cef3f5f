//! The datapath while the kernel refuses, agents die, policies change and packets come all the while. Needs root.

use tests::conformance::{failing, in_each_lab, in_lab};

#[test]
fn a_call_that_the_kernel_refuses_changes_nothing_and_the_next_attempt_succeeds() {
    in_each_lab(failing::changes_nothing);
}

#[test]
fn where_tcx_is_refused_the_policy_is_attached_by_clsact() {
    in_lab(failing::is_attached_in_the_other_way);
}
