//! The datapath while the kernel refuses, agents die, policies change and packets come all the while. Needs root.

use tests::conformance::{failing, fire, in_each_lab, in_lab, killed};

#[test]
fn a_call_that_the_kernel_refuses_changes_nothing_and_the_next_attempt_succeeds() {
    in_each_lab(failing::changes_nothing);
}

#[test]
fn where_tcx_is_refused_the_policy_is_attached_by_clsact() {
    in_lab(failing::is_attached_in_the_other_way);
}

#[test]
fn every_packet_sees_the_old_policy_or_the_new() {
    in_each_lab(fire::is_atomic);
}

#[test]
fn agents_killed_at_any_call_leave_the_old_policy_or_the_new() {
    killed::alone("fire::agents_killed_at_any_call_leave_the_old_policy_or_the_new", || {
        in_each_lab(killed::leave_the_old_policy_or_the_new);
    });
}
