//! The programs in their place: attached, taken over from other agents and versions, kept, taken off. Needs root.

use tests::conformance::{early, in_each_lab, in_lab, place, upgrade};

#[test]
fn the_kernels_best_way_of_attaching_is_found() {
    in_lab(place::is_found);
}

#[test]
fn a_killed_agent_leaves_the_policy_in_force_and_the_next_takes_over_without_a_gap() {
    in_each_lab(place::is_taken_over);
}

#[test]
fn programs_that_somebody_took_off_are_put_back() {
    in_each_lab(place::is_put_back);
}

#[test]
fn programs_come_first_again_after_somebody_came_ahead() {
    in_each_lab(place::is_first_again);
}

#[test]
fn programs_of_others_are_named() {
    in_each_lab(place::names_others);
}

#[test]
fn another_version_is_taken_over_and_every_packet_counted_once() {
    in_each_lab(upgrade::is_exact);
}

#[test]
fn counts_of_an_older_layout_survive() {
    in_each_lab(upgrade::understands_an_older_layout);
}

#[test]
fn version_2_is_taken_over_though_it_does_not_describe_itself() {
    in_each_lab(upgrade::knows_version_2);
}

#[test]
fn version_3_is_taken_over_with_the_pairs_that_it_kept_in_a_hash() {
    in_each_lab(upgrade::knows_version_3);
}

#[test]
fn an_unknown_layout_is_left_alone_until_the_new_version_enforces_or_the_node_leaves() {
    in_each_lab(upgrade::leaves_the_unknown_alone);
}

#[test]
fn nothing_passes_when_the_former_version_goes_before_there_is_a_policy() {
    in_each_lab(upgrade::is_closed_without_a_former);
}

#[test]
fn pins_that_somebody_removed_are_put_back() {
    in_each_lab(place::is_pinned_again);
}

#[test]
fn another_interface_begins_with_everything_dropped() {
    in_each_lab(place::is_closed_on_another_interface);
}

#[test]
fn tables_of_which_a_part_is_lost_are_not_used() {
    in_each_lab(place::is_closed_without_all_tables);
}

#[test]
fn what_a_killed_attach_leaves_is_taken_up() {
    in_each_lab(place::is_attached_over_leftovers);
}

#[test]
fn detaching_leaves_nothing() {
    in_each_lab(place::leaves_nothing);
}

#[test]
fn denied_packets_are_reported_and_traced() {
    in_each_lab(place::reports);
}

#[test]
fn the_agents_three_capabilities_are_enough() {
    in_each_lab(place::needs_few_capabilities);
}

#[test]
fn foreign_maps_under_our_names_are_refused() {
    in_lab(place::refuses_foreign_maps);
}

#[test]
fn a_packet_too_short_for_a_test_run_is_malformed_on_a_real_interface() {
    in_each_lab(place::drops_short_packets);
}

#[test]
fn the_early_drop_drops_what_could_not_pass() {
    in_each_lab(early::drops_what_could_not_pass);
}

#[test]
fn the_early_drop_leaves_the_rest_to_the_classifier() {
    in_each_lab(early::leaves_the_rest);
}

#[test]
fn the_early_drop_is_kept_as_asked() {
    in_each_lab(early::is_kept_as_asked);
}
