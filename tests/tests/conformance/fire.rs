//! The datapath while the kernel refuses, agents die, policies change and packets come all the while. Needs root.

use tests::conformance::{failing, fire, in_each_lab, in_lab, killed, large, load, neighbours};

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
    fire::is_atomic();
}

#[test]
fn agents_killed_at_any_call_leave_the_old_policy_or_the_new() {
    killed::alone("fire::agents_killed_at_any_call_leave_the_old_policy_or_the_new", || {
        in_each_lab(killed::leave_the_old_policy_or_the_new);
    });
}

#[test]
fn agents_that_exit_panic_or_are_killed_leave_enforcement() {
    killed::alone("fire::agents_that_exit_panic_or_are_killed_leave_enforcement", || {
        in_each_lab(killed::leave_enforcement);
    });
}

#[test]
fn counters_are_exact_under_load() {
    in_each_lab(load::is_exact);
}

#[test]
fn a_packet_of_many_segments_is_judged_and_counted_at_ingress() {
    in_each_lab(large::is_judged_whole_at_ingress);
}

#[test]
fn a_packet_whose_headers_alone_are_in_one_piece_is_judged_and_counted_at_egress() {
    in_each_lab(large::is_judged_whole_at_egress);
}

#[test]
fn udp_that_its_sender_has_cut_is_judged_and_counted_at_egress() {
    in_each_lab(large::is_counted_by_segments_where_udp_is_cut);
}

#[test]
fn packets_without_a_length_are_refused() {
    in_lab(large::is_refused_without_a_length);
}

#[test]
fn programs_of_others_stay_and_see_what_passed() {
    in_each_lab(neighbours::see_what_passed);
}
