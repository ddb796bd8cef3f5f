//! What is wrong with the imports inside one crate.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::import::{File, Import};

/// The layers of a crate, lowest first: modules at its root. None needs a later one, by whatever way.
const LAYERS: [(&str, &[&str]); 3] = [
    ("policy", &["object", "network", "matrix", "slice"]),
    ("controller", &["store", "state", "change", "follow", "grpc"]),
    ("node", &["kernel", "enforce"]),
];

/// Files as nodes, imports as arrows.
struct Graph<'a> {
    from: BTreeMap<&'a File, Vec<&'a Import>>,
}

pub(super) fn findings(name: &str, imports: &[Import]) -> Vec<String> {
    let graph = Graph::new(imports);
    let mut findings = climbs(name, &graph);
    findings.extend(circles(name, imports, &graph));
    findings
}

/// Each way from a layer to a later one.
fn climbs(name: &str, graph: &Graph<'_>) -> Vec<String> {
    let Some((_, layers)) = LAYERS.iter().find(|(known, _)| *known == name) else {
        return Vec::new();
    };
    let height = |file: &File| layers.iter().position(|layer| *layer == file.layer());
    let mut findings = Vec::new();
    for &file in graph.from.keys() {
        let Some(own) = height(file) else {
            continue;
        };
        // A way through another layer is reported for that layer.
        let goes_on = |file: &File| height(file).is_none();
        for way in graph.ways(file, goes_on) {
            let Some(top) = way.last().filter(|last| height(&last.to).is_some_and(|top| top > own)) else {
                continue;
            };
            findings.push(format!("`{name}`: `{}` is below `{}`: {}", file.layer(), top.to.layer(), shown(&way)));
        }
    }
    findings
}

/// For each import between folders, the shortest circle that it is part of, if any.
fn circles(name: &str, imports: &[Import], graph: &Graph<'_>) -> Vec<String> {
    let mut told = BTreeSet::new();
    let mut circles: Vec<Vec<&Import>> = Vec::new();
    for import in imports.iter().filter(|import| import.from.folder != import.to.folder) {
        let ends = |way: &Vec<&Import>| way.last().is_some_and(|last| last.to == import.from);
        let Some(back) = graph.ways(&import.to, |_| true).into_iter().find(ends) else {
            continue;
        };
        let circle = [vec![import], back].concat();
        // The same circle is found from each import between folders in it.
        let files: BTreeSet<&File> = circle.iter().map(|import| &import.from).collect();
        if told.insert(files) {
            circles.push(circle);
        }
    }
    circles.sort_by_key(Vec::len);
    circles
        .iter()
        .map(|circle| format!("`{name}`: files of different folders in a circle: {}", shown(circle)))
        .collect()
}

fn shown(way: &[&Import]) -> String {
    way.iter().map(|import| format!("\n    {import}")).collect()
}

impl<'a> Graph<'a> {
    fn new(imports: &'a [Import]) -> Self {
        let mut from: BTreeMap<&File, Vec<&Import>> = BTreeMap::new();
        for import in imports {
            from.entry(&import.from).or_default().push(import);
        }
        Self { from }
    }

    /// The shortest way to each file that can be reached from one, going on only behind files for which `goes_on`.
    fn ways(&self, start: &File, goes_on: impl Fn(&File) -> bool) -> Vec<Vec<&'a Import>> {
        let mut ways: Vec<Vec<&Import>> = Vec::new();
        let mut reached: BTreeSet<&File> = BTreeSet::new();
        let mut waiting: VecDeque<Vec<&Import>> = VecDeque::from([Vec::new()]);
        while let Some(way) = waiting.pop_front() {
            let end = way.last().map_or(start, |last| &last.to);
            let stops = !way.is_empty() && !goes_on(end);
            for import in self.from.get(end).into_iter().flatten().filter(|_| !stops) {
                if reached.insert(&import.to) {
                    waiting.push_back([way.clone(), vec![*import]].concat());
                }
            }
            if !way.is_empty() {
                ways.push(way);
            }
        }
        ways
    }
}

#[cfg(test)]
mod tests {
    use super::super::module::tests::imports;
    use super::*;

    fn check(name: &str, files: &[(&str, &str)], expected: &[&[&str]]) {
        let imports = imports(&format!("judge-{name}"), files);
        let found = findings(name.split('-').next().unwrap(), &imports);
        assert_eq!(found.len(), expected.len(), "{name}: {found:#?}");
        for (found, parts) in found.iter().zip(expected) {
            for part in *parts {
                assert!(found.contains(part), "{name}: no `{part}` in {found}");
            }
        }
    }

    #[test]
    fn files_of_different_folders_do_not_import_each_other() {
        check(
            "pair",
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a/mod.rs", "mod x;"),
                ("a/x.rs", "pub struct X;\nuse crate::b::B;"),
                ("b.rs", "use crate::a::x::X;\npub struct B;"),
            ],
            &[&["circle", "`a/x.rs` -> `b.rs` (2: `crate::b::B`)", "`b.rs` -> `a/x.rs` (1: `crate::a::x::X`)"]],
        );
    }

    #[test]
    fn a_longer_circle_is_told_once_and_whole() {
        check(
            "three",
            &[
                ("lib.rs", "mod a; mod b; mod c;"),
                ("a/mod.rs", "mod x; pub use x::X;"),
                ("a/x.rs", "use crate::b::B; pub struct X;"),
                ("b/mod.rs", "mod y; pub use y::B;"),
                ("b/y.rs", "use crate::c::C; pub struct B;"),
                ("c.rs", "use crate::a::X; pub struct C;"),
            ],
            &[&["`a/x.rs` -> ", "`b/y.rs` -> ", "`c.rs` -> "]],
        );
    }

    #[test]
    fn files_of_one_folder_and_tests_may_import_each_other() {
        check(
            "one",
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a.rs", "mod x; use x::X; pub struct A;"),
                ("a/x.rs", "use super::A; pub struct X;"),
                ("b.rs", "pub struct B; #[cfg(test)] mod tests { use crate::a::A; }"),
            ],
            &[],
        );
        check(
            "tests",
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a/mod.rs", "pub struct A; use crate::b::B;"),
                ("b/mod.rs", "pub struct B; #[cfg(test)] use crate::a::A;"),
            ],
            &[],
        );
    }

    #[test]
    fn a_layer_needs_no_later_one_even_by_way_of_others() {
        let check = |name: &str, object: &str, expected: &[&[&str]]| {
            let files = [
                ("lib.rs", "mod limit; mod object; mod slice;"),
                ("limit.rs", "use crate::slice::S; pub struct L;"),
                ("object/mod.rs", object),
                ("slice/mod.rs", "pub struct S;"),
            ];
            check(name, &files, expected);
        };
        check("policy-clean", "pub struct O;", &[]);
        check("policy-direct", "use crate::slice::S;", &[&["`object` is below `slice`", "`object/mod.rs` -> "]]);
        check("policy-through", "use crate::limit::L;", &[&["`object/mod.rs` -> ", "`limit.rs` -> "]]);
        check("other-through", "use crate::limit::L;", &[]);
    }

    #[test]
    fn an_arrow_down_the_layers_is_fine() {
        let files = [
            ("lib.rs", "mod enforce; mod kernel;"),
            ("enforce.rs", "use crate::kernel::K;"),
            ("kernel.rs", "pub struct K;"),
        ];
        check("node-down", &files, &[]);
        let files = [
            ("lib.rs", "mod enforce; mod kernel;"),
            ("enforce.rs", "pub struct E;"),
            ("kernel.rs", "use crate::enforce::E;"),
        ];
        check("node-up", &files, &[&["`kernel` is below `enforce`"]]);
    }
}
