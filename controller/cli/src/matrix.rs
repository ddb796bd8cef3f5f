//! The compiled matrix, cidr by cidr.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use comfy_table::presets;
use policy::{Action, Cell, CidrId, CidrName, Matrix, Network, Reason, Revision, ServiceRange, Verdict};
use serde::Serialize;

use crate::cidr::in_order;
use crate::output;

/// More columns than this are no table that anybody can read: pairs are listed instead.
const COLUMNS_MAX: usize = 10;

/// Nothing is allowed.
const NOTHING: &str = ".";

/// What each cidr may open to each.
#[derive(Debug, Serialize)]
pub(crate) struct Table {
    network: String,
    revision: u64,
    default: String,
    /// In the order of their addresses.
    from: Vec<String>,
    to: Vec<String>,
    /// Pairs that are absent deny everything, because no rule speaks of them.
    pairs: Vec<Pair>,
}

/// One ordered pair of cidrs: of their own addresses, not of their descendants'.
#[derive(Debug, Serialize)]
struct Pair {
    from: String,
    to: String,
    /// Every address of the one has the same cell with every address of the other.
    uniform: bool,
    /// The distinct cells of their addresses.
    cells: Vec<CellText>,
    #[serde(skip)]
    summary: String,
}

#[derive(Debug, Serialize)]
struct CellText {
    /// Services with a verdict of their own.
    services: Vec<ServiceText>,
    /// The verdict of all others.
    otherwise: VerdictText,
}

#[derive(Debug, Serialize)]
struct ServiceText {
    service: String,
    #[serde(flatten)]
    verdict: VerdictText,
}

/// A verdict with its rule's name.
#[derive(Debug, Serialize)]
pub(crate) struct VerdictText {
    verdict: String,
    reason: String,
    rule: Option<String>,
}

impl VerdictText {
    pub(crate) fn of(network: &Network, verdict: &Verdict) -> Self {
        let Verdict { action, reason, rule } = verdict;
        let name = rule.map(|id| network.rules().get(&id).map_or_else(|| id.to_string(), |rule| rule.name.to_string()));
        Self { verdict: action.to_string(), reason: reason.to_string(), rule: name }
    }

    pub(crate) fn is_denied(&self) -> bool {
        self.verdict == Action::Deny.to_string()
    }
}

impl fmt::Display for VerdictText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.rule {
            Some(rule) => write!(f, "{} ({} {rule})", self.verdict, self.reason),
            None => write!(f, "{} ({})", self.verdict, self.reason),
        }
    }
}

impl Table {
    /// Of the cidrs named; all where none is.
    pub(crate) fn of(
        network: &Network,
        matrix: &Matrix,
        revision: Revision,
        from: &[CidrName],
        to: &[CidrName],
    ) -> Self {
        let named = |names: &[CidrName]| -> Vec<(CidrId, String)> {
            in_order(network, network.cidrs().keys().copied())
                .into_iter()
                .filter(|cidr| names.is_empty() || names.contains(&cidr.name))
                .map(|cidr| (cidr.id, cidr.name.to_string()))
                .collect()
        };
        let (from, to) = (named(from), named(to));
        let pairs = from
            .iter()
            .flat_map(|source| to.iter().map(move |destination| (source, destination)))
            .filter_map(|(source, destination)| Pair::of(network, matrix, source, destination))
            .collect();
        let names = |cidrs: Vec<(CidrId, String)>| cidrs.into_iter().map(|(_, name)| name).collect();
        Self {
            network: network.name().to_string(),
            revision: revision.0,
            default: network.default().to_string(),
            from: names(from),
            to: names(to),
            pairs,
        }
    }

    pub(crate) fn text(&self) -> String {
        let title = format!("{}  revision {}  default {}", self.network, self.revision, self.default);
        if self.from.is_empty() || self.to.is_empty() {
            return format!("{title}\n\nthere are no cidrs");
        }
        let table = if self.to.len() <= COLUMNS_MAX { self.grid() } else { self.list() };
        format!("{title}\n\n{table}\n\n{}", self.legend())
    }

    fn grid(&self) -> String {
        let mut table = comfy_table::Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(std::iter::once("from \\ to").chain(self.to.iter().map(String::as_str)));
        let summaries: BTreeMap<_, _> =
            self.pairs.iter().map(|pair| ((&pair.from, &pair.to), pair.summary.as_str())).collect();
        for from in &self.from {
            let summary = |to| summaries.get(&(from, to)).copied().unwrap_or(NOTHING);
            let cells = self.to.iter().map(|to| summary(to).replace(' ', "\n"));
            table.add_row(std::iter::once(from.clone()).chain(cells));
        }
        table.to_string()
    }

    fn list(&self) -> String {
        let rows = self.pairs.iter().filter(|pair| pair.summary != NOTHING);
        output::table(
            &["FROM", "TO", "SERVICES"],
            rows.map(|pair| vec![pair.from.clone(), pair.to.clone(), pair.summary.clone()]),
        )
    }

    /// What the marks that occur mean.
    fn legend(&self) -> String {
        let marks = [
            (NOTHING, "nothing may be opened"),
            ("any", "every service, by a rule"),
            ("lineage", "every service, as the default lets relatives reach each other"),
            ("but", "the services before it, except those after it"),
            ("*", "for some addresses only: `meshctl policy explain` tells for two of them"),
        ];
        let occurs = |mark: &str| match mark {
            NOTHING => {
                self.pairs.iter().filter(|pair| pair.summary != NOTHING).count() < self.from.len() * self.to.len()
            }
            mark => self.pairs.iter().any(|pair| pair.summary.split(' ').any(|word| word == mark)),
        };
        let lines: Vec<String> = marks
            .iter()
            .filter(|(mark, _)| occurs(mark))
            .map(|(mark, meaning)| format!("{mark:<7}  {meaning}"))
            .collect();
        lines.join("\n")
    }
}

impl Pair {
    /// None if everything is denied because no rule speaks of it.
    fn of(network: &Network, matrix: &Matrix, from: &(CidrId, String), to: &(CidrId, String)) -> Option<Self> {
        let destinations = matrix.classes_of(to.0);
        let cells: BTreeSet<Cell> = matrix
            .classes_of(from.0)
            .into_iter()
            .flat_map(|source| destinations.iter().map(move |destination| (source.clone(), destination)))
            .map(|(source, destination)| matrix.cell(&source, destination))
            .collect();
        if cells.iter().all(Cell::is_closed) {
            return None;
        }
        Some(Self {
            from: from.1.clone(),
            to: to.1.clone(),
            uniform: cells.len() == 1,
            summary: summary(&cells),
            cells: cells.iter().map(|cell| CellText::of(network, cell)).collect(),
        })
    }
}

impl CellText {
    fn of(network: &Network, cell: &Cell) -> Self {
        let Cell { otherwise, entries } = cell;
        Self {
            services: entries
                .iter()
                .map(|entry| ServiceText {
                    service: entry.range.to_string(),
                    verdict: VerdictText::of(network, &entry.verdict),
                })
                .collect(),
            otherwise: VerdictText::of(network, otherwise),
        }
    }
}

/// The services that are allowed between some addresses, with a mark where not between all.
fn summary(cells: &BTreeSet<Cell>) -> String {
    let texts: BTreeSet<String> = cells.iter().map(allowed).collect();
    let mut words: Vec<String> = Vec::new();
    match texts.iter().find(|text| text.starts_with("any") || text.starts_with("lineage")) {
        // One of them allows everything but what it names, which is more than the others do.
        Some(text) => words.push(text.clone()),
        None => {
            let ranges = cells.iter().flat_map(|cell| ranges(cell, Action::Allow)).collect();
            words.extend(compact(ranges));
        }
    }
    if words.is_empty() {
        return NOTHING.to_owned();
    }
    if texts.len() > 1 {
        words.push("*".to_owned());
    }
    words.join(" ")
}

/// What one cell allows.
fn allowed(cell: &Cell) -> String {
    if cell.otherwise.action == Action::Deny {
        let words = compact(ranges(cell, Action::Allow));
        return if words.is_empty() { NOTHING.to_owned() } else { words.join(" ") };
    }
    let everything = if cell.otherwise.reason == Reason::Lineage { "lineage" } else { "any" };
    let but = compact(ranges(cell, Action::Deny));
    if but.is_empty() { everything.to_owned() } else { format!("{everything} but {}", but.join(" ")) }
}

fn ranges(cell: &Cell, action: Action) -> Vec<ServiceRange> {
    cell.entries.iter().filter(|entry| entry.verdict.action == action).map(|entry| entry.range).collect()
}

/// One word per protocol: `tcp/80,443-445`.
fn compact(mut ranges: Vec<ServiceRange>) -> Vec<String> {
    ranges.sort_by_key(|range| (range.protocol, range.low, range.high));
    let mut merged: Vec<ServiceRange> = Vec::new();
    for range in ranges {
        match merged.last_mut() {
            Some(last) if last.protocol == range.protocol && u32::from(range.low) <= u32::from(last.high) + 1 => {
                last.high = last.high.max(range.high);
            }
            _ => merged.push(range),
        }
    }
    let mut words: Vec<String> = Vec::new();
    let mut protocol = None;
    for range in merged {
        let text = range.to_string();
        match (words.last_mut(), text.rsplit_once('/')) {
            (Some(word), Some((_, ports))) if protocol == Some(range.protocol) => {
                word.push(',');
                word.push_str(ports);
            }
            _ => words.push(text),
        }
        protocol = Some(range.protocol);
    }
    words
}

#[cfg(test)]
mod tests {
    use insta::assert_snapshot;

    use policy::{CellEntry, RuleId};

    use super::*;
    use crate::fixture::{self, name};

    fn table(from: &[&str], to: &[&str]) -> Table {
        let network = fixture::network();
        let matrix = Matrix::compile(&network).expect("a matrix");
        let names = |texts: &[&str]| texts.iter().map(|text| name(text)).collect::<Vec<_>>();
        Table::of(&network, &matrix, Revision(18), &names(from), &names(to))
    }

    #[test]
    fn a_matrix_shows_who_may_open_what() {
        let of = ["web", "app", "db"];
        assert_snapshot!(table(&of, &of).text(), @r"
        corp  revision 18  default deny

        ┌───────────┬─────┬────────────┬──────────┐
        │ from \ to ┆ web ┆ app        ┆ db       │
        ╞═══════════╪═════╪════════════╪══════════╡
        │ web       ┆ .   ┆ icmp/8     ┆ .        │
        │           ┆     ┆ tcp/8080   ┆          │
        │           ┆     ┆ icmpv6/128 ┆          │
        │           ┆     ┆ *          ┆          │
        │ app       ┆ .   ┆ .          ┆ tcp/5432 │
        │ db        ┆ .   ┆ .          ┆ .        │
        └───────────┴─────┴────────────┴──────────┘

        .        nothing may be opened
        *        for some addresses only: `meshctl policy explain` tells for two of them
        ");
    }

    #[test]
    fn programs_get_every_verdict_with_its_rule() {
        assert_snapshot!("policy-show-json", output::json(&table(&["web", "app"], &["app", "db"])));
        let json = serde_json::to_value(table(&[], &["db"])).expect("JSON");
        assert_eq!(json["pairs"].as_array().map(Vec::len), Some(1));
        let pair = &json["pairs"][0];
        assert_eq!((&pair["from"], &pair["uniform"]), (&"app".into(), &true.into()));
        assert_eq!(
            pair["cells"][0],
            serde_json::json!({
                "services": [{ "service": "tcp/5432", "verdict": "allow", "reason": "rule", "rule": "app-to-db" }],
                "otherwise": { "verdict": "deny", "reason": "no-rule", "rule": null },
            })
        );
    }

    #[test]
    fn services_are_one_word_per_protocol() {
        let range = |protocol, low, high| ServiceRange { protocol, low, high };
        let check = |ranges: &[ServiceRange], expected: &[&str]| assert_eq!(compact(ranges.to_vec()), expected);
        check(&[], &[]);
        check(&[range(6, 443, 443), range(6, 80, 80), range(17, 53, 53)], &["tcp/80,443", "udp/53"]);
        check(&[range(6, 80, 89), range(6, 90, 99), range(6, 85, 95)], &["tcp/80-99"]);
        check(&[range(47, 0, u16::MAX), range(50, 0, u16::MAX)], &["proto/47", "proto/50"]);
        check(&[range(1, 0, 255), range(6, 0, u16::MAX)], &["icmp", "tcp"]);
    }

    #[test]
    fn everything_but_something_says_so() {
        let deny = Verdict::of_rule(Action::Deny, RuleId(1));
        let entry = CellEntry { range: ServiceRange { protocol: 6, low: 22, high: 22 }, verdict: deny };
        let lineage = Cell { otherwise: Verdict::LINEAGE, entries: vec![entry] };
        assert_eq!(summary(&BTreeSet::from([lineage.clone()])), "lineage but tcp/22");
        assert_eq!(summary(&BTreeSet::from([lineage, Cell::CLOSED])), "lineage but tcp/22 *");
        let any = Cell::uniform(Verdict::of_rule(Action::Allow, RuleId(2)));
        assert_eq!(summary(&BTreeSet::from([any])), "any");
        assert_eq!(summary(&BTreeSet::from([Cell::uniform(deny)])), NOTHING);
    }
}
