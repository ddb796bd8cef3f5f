//! Records of flows and of datagrams in fragments: found, judged again, shared out, forgotten. Needs root.

use tests::conformance::{fragments, in_lab, place, records};

#[test]
fn records_go_with_their_addresses() {
    in_lab(place::forgets_flows);
}

#[test]
fn later_fragments_have_the_fate_of_their_first() {
    in_lab(fragments::follow_their_first);
}

#[test]
fn later_fragments_cannot_overlap_their_first() {
    in_lab(fragments::cannot_overlap_their_first);
}

#[test]
fn later_fragments_are_judged_again_after_a_change() {
    in_lab(fragments::are_judged_again);
}

#[test]
fn later_fragments_pass_alone_where_nothing_could_matter() {
    in_lab(fragments::pass_alone_where_nothing_could_matter);
}

#[test]
fn first_fragments_hold_whole_headers() {
    in_lab(fragments::hold_whole_headers);
}

#[test]
fn fragments_take_the_place_of_old_ones() {
    in_lab(fragments::take_the_place_of_old_ones);
}

#[test]
fn records_belong_to_their_opener() {
    in_lab(records::belong_to_their_opener);
}

#[test]
fn records_are_found_while_others_go() {
    in_lab(records::are_found_while_others_go);
}

#[test]
fn records_are_found_again_where_the_filter_was_lost() {
    in_lab(records::are_found_again_where_the_filter_was_lost);
}

#[test]
fn records_are_shared_out_when_room_is_short() {
    in_lab(records::are_shared_out);
}
