//! The tables in words: what a cell says for every service, and where two tables differ.

use std::collections::BTreeMap;
use std::fmt::Debug;

use ebpf_common::packet::highest_port;
use ebpf_common::table::Decision;
use policy::ServiceRange;

use super::{Rows, Tables};

/// What one pair of classes gets.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TableCell {
    /// The decision of services in none of the entries.
    pub otherwise: Decision,
    /// Sorted, disjoint, merged, and none like `otherwise`.
    pub entries: Vec<(ServiceRange, Decision)>,
    /// An allowed flow is recorded.
    pub record: bool,
}

impl Tables {
    /// A cell in full. `direction` is `EGRESS` (own class is the source's) or `INGRESS` (the destination's). `None`: the
    /// classes are not there, or the tables are corrupt.
    pub fn cell(&self, direction: u32, own: u32, other: u32) -> Option<TableCell> {
        let at = |protocol, port| self.decision(direction, own, other, protocol, port);
        // A reserved protocol that services rarely name; where one does, the entries are the others.
        let (otherwise, record) = at(255, 0)?;
        let mut entries: Vec<(ServiceRange, Decision)> = Vec::new();
        for protocol in 0..=u8::MAX {
            let last = highest_port(protocol);
            for port in 0..=last {
                let (decision, _) = at(protocol, port)?;
                if decision == otherwise {
                    continue;
                }
                match entries.last_mut() {
                    Some((range, same))
                        if *same == decision
                            && range.protocol == protocol
                            && range.high.checked_add(1) == Some(port) =>
                    {
                        range.high = port;
                    }
                    _ => entries.push((ServiceRange { protocol, low: port, high: port }, decision)),
                }
            }
            if let (0, Some((range, _))) = (last, entries.last_mut())
                && range.protocol == protocol
            {
                range.high = u16::MAX;
            }
        }
        Some(TableCell { otherwise, entries, record })
    }

    /// The classes of the addresses of a cidr, by its id.
    pub fn classes_of(&self, cidr: u32) -> Vec<u32> {
        let mut classes: Vec<u32> =
            self.leaves.iter().filter(|leaf| leaf.cidr == cidr && leaf.class != 0).map(|leaf| leaf.class).collect();
        classes.sort_unstable();
        classes.dedup();
        classes
    }

    /// Where `seen` (read back) is not what these tables (intended) are: at most a few lines for each table. Generations
    /// and counter slots' owners are not compared.
    pub fn differences(&self, seen: &Tables) -> Vec<String> {
        let mut differences = Vec::new();
        let header = |tables: &Tables| ebpf_common::table::Header { generation: 0, ..tables.header };
        if header(self) != header(seen) {
            differences.push(format!(
                "HEADER: revision {}, {} own of {} classes in the kernel; revision {}, {} of {} intended; or other roots",
                seen.header.revision, seen.header.own, seen.header.classes,
                self.header.revision, self.header.own, self.header.classes,
            ));
        }
        compare(&mut differences, "BLOCKS", &self.blocks, &seen.blocks);
        compare(&mut differences, "PATHS", &self.paths, &seen.paths);
        compare(&mut differences, "LEAVES", &self.leaves, &seen.leaves);
        compare(&mut differences, "MATRIX", &self.matrix, &seen.matrix);
        compare(&mut differences, "PAGES", &self.pages, &seen.pages);
        compare(&mut differences, "PORTS", &self.ports, &seen.ports);
        compare(&mut differences, "DECISIONS", &self.decisions, &seen.decisions);
        differences
    }
}

/// Lines for each table before the rest is only counted.
const LINES: usize = 4;

fn compare<T: PartialEq + Debug>(differences: &mut Vec<String>, table: &str, intended: &Rows<T>, seen: &Rows<T>) {
    if intended.len() != seen.len() {
        differences.push(format!("{table}: {} entries in use in the kernel, {} intended", seen.len(), intended.len()));
    }
    let differing: BTreeMap<usize, (&T, &T)> =
        intended.iter().zip(seen.iter()).enumerate().filter(|(_, (a, b))| a != b).collect();
    for (index, (intended, seen)) in differing.iter().take(LINES) {
        differences.push(format!("{table}[{index}]: {} in the kernel, {} intended", short(seen), short(intended)));
    }
    if differing.len() > LINES {
        differences.push(format!("{table}: {} more entries differ", differing.len() - LINES));
    }
}

/// Blocks and pages are long.
fn short(value: &impl Debug) -> String {
    let mut text = format!("{value:?}");
    if text.len() > 80 {
        text.truncate(text.char_indices().take_while(|(at, _)| *at <= 77).last().map_or(0, |(at, _)| at));
        text.push_str("...");
    }
    text
}
