//! No difference where there is none; every change of a word that changes an answer is found and named.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ebpf_common::table::{EXTERNAL, LOCAL, Leaf};
use ebpf_common::{EGRESS, INGRESS, reason};
use policy::{Flow, Matrix, Network, NodeId, Revision, Slice, arbitrary};
use proptest::prelude::*;

use super::{Difference, Direction, Said, Services, Verification, Word, verify};
use crate::lower::{Outcome, RuleSlots, Tables, lower};

/// As read back: whose counter is whose is not in the kernel.
fn read_back(tables: &Tables) -> Tables {
    Tables { rule_slots: Default::default(), ..tables.clone() }
}

/// A random network as one of its nodes enforces it, with flows that the node has an end of.
fn enforced() -> impl Strategy<Value = (Slice, Tables, Vec<Flow>)> {
    arbitrary::network()
        .prop_filter_map("no active node", |network: Network| arbitrary::flow_at(&network).map(|flow| (network, flow)))
        .prop_flat_map(|(network, flow)| (Just(network), prop::collection::vec(flow, 1..100)))
        .prop_map(|(network, flows): (Network, Vec<(NodeId, Flow)>)| {
            let node = flows[0].0;
            let matrix = Matrix::compile(&network).expect("within limits");
            let slice = matrix.slice(node, Revision(7)).expect("active");
            let tables = lower(&slice, &mut RuleSlots::new()).expect("within limits");
            let flows = flows.into_iter().filter(|(of, _)| *of == node).map(|(_, flow)| flow);
            // No packet goes between families.
            let flows = flows.filter(|flow| flow.source.is_ipv4() == flow.destination.is_ipv4()).collect();
            (slice, tables, flows)
        })
}

fn check(slice: &Slice, tables: &Tables) -> Verification {
    let slots = tables.rule_slots.iter().map(|(rule, slot)| (*rule, *slot)).collect();
    verify(slice, &read_back(tables), &slots)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    /// Breaks if the watch that runs by itself cries wolf.
    #[test]
    fn what_was_lowered_is_what_was_meant((slice, tables, _) in enforced()) {
        let verification = check(&slice, &tables);
        prop_assert_eq!(&verification.differences, &Vec::new());
        prop_assert_eq!(verification.prefixes, slice.prefixes.len());
        let own = slice.own_classes().len();
        let classes: BTreeSet<_> = slice.prefixes.values().map(|(class, _)| *class).collect();
        prop_assert!(verification.cells >= own * classes.len(), "every pair in both directions");
    }
}

/// One word of the tables that is not what was written, by random numbers.
#[derive(Clone, Copy, Debug)]
struct Corruption {
    table: u8,
    index: prop::sample::Index,
    word: prop::sample::Index,
    value: u32,
    flip: bool,
}

fn corruption() -> impl Strategy<Value = Corruption> {
    (0u8..18, any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u32>(), any::<bool>())
        .prop_map(|(table, index, word, value, flip)| Corruption { table, index, word, value, flip })
}

impl Corruption {
    /// Either some bit, or another small number: most of those refer to something that is there.
    fn of(self, old: u32, most: usize) -> u32 {
        if self.flip { old ^ 1 << (self.value % 32) } else { self.value % (most as u32 + 1) }
    }

    fn short(self, old: u16, most: usize) -> u16 {
        self.of(old.into(), most) as u16
    }

    fn long(self, old: u64) -> u64 {
        old ^ 1 << (self.value % 64)
    }

    /// Spoils the tables; `false`: there is no such word.
    fn apply(self, tables: &mut Tables) -> bool {
        let (blocks, paths, leaves) = (tables.blocks.len(), tables.paths.len(), tables.leaves.len());
        let (pages, ports) = (tables.pages.len(), tables.ports.len());
        let decisions = tables.decisions.len();
        let at = |length: usize| (length > 0).then(|| self.index.index(length.max(1)));
        let spoil = |tables: &mut Tables| -> Option<()> {
            match self.table {
                0 => {
                    let path = &mut tables.paths[at(paths)?];
                    let word = if self.flip { &mut path.mask } else { &mut path.prefix };
                    word.0[self.word.index(2)] = self.long(word.0[self.word.index(2)]);
                }
                1 => {
                    let path = &mut tables.paths[at(paths)?];
                    let entry = if self.word.index(2) == 0 { &mut path.inside } else { &mut path.outside };
                    *entry = self.of(*entry, leaves);
                }
                2 | 3 => {
                    let entries = &mut tables.blocks[at(blocks)?].entries;
                    entries[self.word.index(256)] = entries[self.index.index(256)];
                }
                4 | 5 => {
                    let entry = &mut tables.blocks[at(blocks)?].entries[self.word.index(256)];
                    *entry = self.of(*entry, leaves);
                }
                6 => {
                    let class = &mut tables.leaves[at(leaves)?].class;
                    *class = self.of(*class, tables.header.classes as usize);
                }
                7 => {
                    let cidr = &mut tables.leaves[at(leaves)?].cidr;
                    *cidr = self.of(*cidr, 20);
                }
                8 => {
                    let flags = &mut tables.leaves[at(leaves)?].flags;
                    *flags = self.of(*flags, 4) & 0x3ff;
                }
                9..=11 => {
                    let cell = at(tables.matrix.len())?;
                    let word = &mut tables.matrix[cell];
                    *word ^= 1 << [30, 31, 0, 1, 2, 3, 4][self.value as usize % 7];
                }
                12 if self.word.index(2) == 0 => {
                    let few = &mut tables.pages[at(pages)?].few;
                    match self.value % 3 {
                        0 => few.known ^= 1,
                        1 => {
                            let start = &mut few.starts[self.index.index(7)];
                            *start = self.of(*start, 1 << 24);
                        }
                        _ => {
                            let decision = &mut few.decisions[self.index.index(8)];
                            *decision = self.short(*decision, decisions);
                        }
                    }
                }
                12 => {
                    let page = &mut tables.pages[at(pages)?];
                    let runs = page.tcp.iter_mut().chain(&mut page.udp);
                    let mut runs = runs.chain([&mut page.icmp, &mut page.icmpv6, &mut page.protocol]);
                    let run = runs.nth(self.word.index(515))?;
                    *run = self.short(*run, ports);
                }
                13 => {
                    let decision = &mut tables.ports[at(ports)?].decisions[self.word.index(256)];
                    *decision = self.short(*decision, decisions);
                }
                14 | 15 => {
                    let decision = &mut tables.decisions[at(decisions)?];
                    match self.value % 4 {
                        0 => decision.verdict ^= 1,
                        1 => decision.reason ^= 1 << self.word.index(4),
                        2 => decision.flags ^= 1,
                        _ => decision.rule = self.of(decision.rule, 8),
                    }
                }
                16 => {
                    let header = &mut tables.header;
                    let size = if self.flip { &mut header.own } else { &mut header.classes };
                    *size = self.value % (*size + 3);
                }
                _ => {
                    let header = &mut tables.header;
                    let root = if self.flip { &mut header.root_v4 } else { &mut header.root_v6 };
                    *root = self.of(*root, leaves);
                }
            }
            Some(())
        };
        spoil(tables).is_some()
    }
}

/// What a leaf means, apart from numbers that mean nothing by themselves.
fn meaning(leaf: Option<Leaf>) -> Option<(bool, u32, u32, bool)> {
    leaf.map(|leaf| (leaf.class != 0, leaf.cidr, leaf.flags & (LOCAL | EXTERNAL), leaf.holder() != 0))
}

fn number(direction: Direction) -> u32 {
    match direction {
        Direction::Egress => EGRESS,
        Direction::Ingress => INGRESS,
    }
}

/// Whether a difference is about this flow at this hook.
fn concerns(difference: &Difference, slice: &Slice, flow: &Flow, at: u32) -> bool {
    let cidr = |address: IpAddr| slice.lookup(address).map(|(_, cidr)| slice.cidrs[&cidr].to_string());
    let ends = |direction: Direction, source: &super::End, destination: &super::End| {
        number(direction) == at
            && cidr(flow.source).as_ref() == Some(&source.cidr)
            && cidr(flow.destination).as_ref() == Some(&destination.cidr)
    };
    match difference {
        Difference::Revision { .. } => false,
        // Its addresses are named by the block or path only.
        Difference::Malformed { .. } => true,
        Difference::Prefix { addresses, .. } => addresses.contains(flow.source) || addresses.contains(flow.destination),
        Difference::Cell { direction, source, destination, service, .. } => {
            let serves = match service {
                Services::Any => true,
                Services::Range(range) => {
                    range.protocol == flow.protocol && (range.low..=range.high).contains(&flow.port)
                }
            };
            serves && ends(*direction, source, destination)
        }
        Difference::Record { direction, source, destination, .. } => ends(*direction, source, destination),
    }
}

/// Whether tables do with a flow what was said of them.
fn is_said(outcome: &Outcome, said: &Said) -> bool {
    outcome.passes == (said.verdict == Word::Allow)
        && reason::name(outcome.reason) == said.reason
        && outcome.rule == said.slot
        && outcome.log == said.log
}

/// Panics unless what is named is so: the whole tables do what was intended, the spoilt ones what was found.
fn check_named(difference: &Difference, whole: &Tables, spoilt: &Tables) {
    let Difference::Cell { direction, source, destination, service, intended, found } = difference else { return };
    let (protocol, port) = match service {
        Services::Any => (6, 443),
        Services::Range(range) => (range.protocol, range.low),
    };
    let flow = Flow { source: source.addresses.first, destination: destination.addresses.first, protocol, port };
    let (before, after) = (whole.verdict(&flow, number(*direction)), spoilt.verdict(&flow, number(*direction)));
    if before.reason != reason::SCOPE {
        assert!(is_said(&before, intended), "{difference}: {before:?} intended");
        assert!(is_said(&after, found), "{difference}: {after:?} found");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Breaks if a word can change in the kernel, and with it an answer, and nobody hears of it.
    #[test]
    fn a_word_that_changes_an_answer_is_found(
        (slice, tables, flows) in enforced(),
        corruptions in prop::collection::vec(corruption(), 1..16),
    ) {
        for corruption in corruptions {
            let mut spoilt = tables.clone();
            if !corruption.apply(&mut spoilt) || spoilt == tables {
                continue;
            }
            let verification = check(&slice, &spoilt);
            let found = |flow: &Flow, at: u32| {
                verification.more > 0 || verification.differences.iter().any(|one| concerns(one, &slice, flow, at))
            };
            for flow in &flows {
                let back = Flow { source: flow.destination, destination: flow.source, ..*flow };
                for (flow, at) in [(flow, EGRESS), (flow, INGRESS), (&back, EGRESS), (&back, INGRESS)] {
                    let (before, after) = (tables.verdict(flow, at), spoilt.verdict(flow, at));
                    prop_assert!(
                        before == after || found(flow, at),
                        "{:?}: {} at {}: {:?}, was {:?}; {:?}", corruption, flow, at, after, before, verification
                    );
                }
                for address in [flow.source, flow.destination] {
                    prop_assert!(
                        meaning(tables.leaf(address)) == meaning(spoilt.leaf(address)) || found(flow, EGRESS),
                        "{:?}: {}; {:?}", corruption, address, verification
                    );
                }
            }
            verification.differences.iter().for_each(|one| check_named(one, &tables, &spoilt));
        }
    }
}
