//! The modules of one crate, the files that they lie in, and what a path means in one of them.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use super::import::{File, Import};
use super::source::{self, Declared, Named, Source, Use};

/// A path through so many `use` items is a circle of them.
const MOST_HOPS: usize = 16;

/// A crate's modules; the first is its root.
#[derive(Debug)]
pub(super) struct Tree {
    modules: Vec<Module>,
    files: Vec<File>,
}

#[derive(Debug)]
struct Module {
    /// From the root of the crate.
    path: Vec<String>,
    file: usize,
    parent: Option<usize>,
    children: BTreeMap<String, usize>,
    source: Source,
}

/// Where the children of a module are looked for, and where the module itself is put.
struct Place<'a> {
    path: Vec<String>,
    parent: Option<usize>,
    file: usize,
    folder: &'a Path,
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Meaning {
    Module(usize),
    /// Something that this module declares.
    Item(usize),
}

impl Meaning {
    fn module(self) -> usize {
        match self {
            Self::Module(module) | Self::Item(module) => module,
        }
    }
}

impl Tree {
    /// Reads the crate whose root is this file. Files are named from `root` on.
    pub(super) fn read(file: &Path, root: &Path) -> Result<Self> {
        let mut tree = Self { modules: Vec::new(), files: Vec::new() };
        let folder = file.parent().context("a file without a folder")?;
        tree.read_file(file, folder, root, Vec::new(), None)?;
        Ok(tree)
    }

    fn read_file(
        &mut self,
        file: &Path,
        folder: &Path,
        root: &Path,
        path: Vec<String>,
        parent: Option<usize>,
    ) -> Result<usize> {
        let text = fs::read_to_string(file).with_context(|| format!("failed to read `{}`", file.display()))?;
        let source = source::parse(&text).with_context(|| format!("failed to read `{}`", file.display()))?;
        let shown = |path: &Path| path.strip_prefix(root).unwrap_or(path).to_owned();
        // `a.rs` with children in `a/` belongs to that folder, as `a/mod.rs` does.
        let has_folder = source.modules.iter().any(|declared| declared.inline.is_none());
        let room = if has_folder { folder } else { file.parent().unwrap_or(folder) };
        self.files.push(File { path: shown(file), folder: shown(room), module: path.clone() });
        let place = Place { path, parent, file: self.files.len() - 1, folder };
        self.add(source, place, root)
    }

    fn add(&mut self, mut source: Source, place: Place<'_>, root: &Path) -> Result<usize> {
        let declared = std::mem::take(&mut source.modules);
        let Place { path, parent, file, folder } = place;
        let index = self.modules.len();
        self.modules.push(Module { path: path.clone(), file, parent, children: BTreeMap::new(), source });
        for Declared { name, path: attribute, inline } in declared {
            let below = [path.clone(), vec![name.clone()]].concat();
            let inner = folder.join(&name);
            let child = match inline {
                Some(source) => {
                    self.add(source, Place { path: below, parent: Some(index), file, folder: &inner }, root)?
                }
                None => {
                    let (file, inner) = self.find(file, folder, &name, attribute.as_deref(), root)?;
                    self.read_file(&file, &inner, root, below, Some(index))?
                }
            };
            self.modules[index].children.insert(name, child);
        }
        Ok(index)
    }

    /// The file of a module, and the folder of its children.
    fn find(
        &self,
        file: usize,
        folder: &Path,
        name: &str,
        attribute: Option<&str>,
        root: &Path,
    ) -> Result<(PathBuf, PathBuf)> {
        if let Some(attribute) = attribute {
            let declaring = root.join(&self.files[file].path);
            let file = declaring.parent().unwrap_or(folder).join(attribute);
            let inner = file.parent().unwrap_or(folder).to_owned();
            return Ok((file, inner));
        }
        let inner = folder.join(name);
        for file in [folder.join(format!("{name}.rs")), inner.join("mod.rs")] {
            if file.is_file() {
                return Ok((file, inner));
            }
        }
        bail!(
            "`{}` declares `mod {name}`, whose file is not in `{}`",
            self.files[file].path.display(),
            folder.display()
        )
    }

    /// Which file imports from which other one, and how.
    pub(super) fn imports(&self) -> Vec<Import> {
        let mut imports: BTreeMap<(usize, usize), BTreeMap<String, usize>> = BTreeMap::new();
        for (index, module) in self.modules.iter().enumerate() {
            let uses = module.source.uses.iter().filter(|one| self.is_import(index, one));
            let uses = uses.filter_map(|one| Some((&one.path, self.used(index, one)?)));
            let paths = module.source.paths.iter();
            let paths = paths.filter_map(|path| Some((path, self.named(index, path)?)));
            for (Named { segments, line }, target) in uses.chain(paths) {
                let between = (module.file, self.modules[target].file);
                if between.0 != between.1 {
                    imports.entry(between).or_default().entry(segments.join("::")).or_insert(*line);
                }
            }
        }
        let import = |((from, to), paths): ((usize, usize), BTreeMap<String, usize>)| {
            let mut paths: Vec<(usize, String)> = paths.into_iter().map(|(path, line)| (line, path)).collect();
            paths.sort();
            Import { from: self.files[from].clone(), to: self.files[to].clone(), paths }
        };
        imports.into_iter().map(import).collect()
    }

    /// A module that re-exports a name of its own children does not import it, unless it uses the name too.
    fn is_import(&self, module: usize, one: &Use) -> bool {
        let below = self.meaning(module, &one.path.segments, 0).is_some_and(|meaning| {
            let target = &self.modules[meaning.module()].path;
            target.starts_with(&self.modules[module].path)
        });
        let words = &self.modules[module].source.words;
        !(one.exported && below) || one.name.as_ref().is_some_and(|name| words.contains(name))
    }

    /// The module that a `use` needs. A module's own name needs nothing until something in it is named; a function may
    /// have the same name and come with it.
    fn used(&self, module: usize, one: &Use) -> Option<usize> {
        match self.meaning(module, &one.path.segments, 0)? {
            Meaning::Module(target) if one.name.is_some() => {
                let (name, parent) = (one.path.segments.last()?, self.modules[target].parent?);
                let source = &self.modules[parent].source;
                let function = source.uses.iter().find(|other| other.exported && other.name.as_ref() == Some(name));
                match function {
                    Some(function) => self.meaning(parent, &function.path.segments, 1).map(Meaning::module),
                    None => source.declared.contains(name).then_some(parent),
                }
            }
            meaning => Some(meaning.module()),
        }
    }

    /// The module that a path in the code needs, unless the `use` of its first name says so already.
    fn named(&self, module: usize, path: &Named) -> Option<usize> {
        let first = self.meaning(module, &path.segments[..1], 0)?;
        let meaning = self.meaning(module, &path.segments, 0)?;
        matches!(first, Meaning::Module(_)).then_some(meaning.module())
    }

    /// What a path means in a module; `None` if it leads out of the crate or cannot be followed.
    fn meaning(&self, module: usize, segments: &[String], hops: usize) -> Option<Meaning> {
        if hops > MOST_HOPS {
            return None;
        }
        let (first, rest) = segments.split_first()?;
        let start = match first.as_str() {
            "crate" => Meaning::Module(0),
            "self" => Meaning::Module(module),
            "super" => Meaning::Module(self.modules[module].parent?),
            name => self.binding(module, name, hops)?,
        };
        rest.iter().try_fold(start, |meaning, segment| match meaning {
            Meaning::Module(module) if segment == "super" => self.modules[module].parent.map(Meaning::Module),
            Meaning::Module(module) => Some(self.member(module, segment, hops)),
            // A variant, an associated function.
            item => Some(item),
        })
    }

    /// What a name is bound to in a module, other than by its own items.
    fn binding(&self, module: usize, name: &str, hops: usize) -> Option<Meaning> {
        let Module { children, source, .. } = &self.modules[module];
        if let Some(child) = children.get(name) {
            return Some(Meaning::Module(*child));
        }
        // `use name::..` names another crate, not itself.
        let named = |one: &&Use| one.name.as_deref() == Some(name) && one.path.segments[0] != name;
        let target = source.uses.iter().find(named)?;
        self.meaning(module, &target.path.segments, hops + 1)
    }

    /// What a module calls by a name.
    fn member(&self, module: usize, name: &str, hops: usize) -> Meaning {
        let source = &self.modules[module].source;
        if let Some(meaning) = self.binding(module, name, hops) {
            return meaning;
        }
        let own = Meaning::Item(module);
        if source.declared.contains(name) || hops > MOST_HOPS {
            return own;
        }
        let globs = source.uses.iter().filter(|one| one.name.is_none());
        let through = |one: &Use| match self.meaning(module, &one.path.segments, hops + 1)? {
            Meaning::Module(target) if self.modules[target].source.declared.contains(name) => {
                Some(Meaning::Item(target))
            }
            Meaning::Module(target) => self.binding(target, name, hops + 1),
            Meaning::Item(_) => None,
        };
        globs.filter_map(through).next().unwrap_or(own)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Writes a crate and says which file imports which, as `from:line path -> to`.
    pub(in crate::check::arrows) fn imports(name: &str, files: &[(&str, &str)]) -> Vec<Import> {
        let root = std::env::temp_dir().join(format!("rampart-arrows-{name}-{}", std::process::id()));
        for (path, text) in files {
            let path = root.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let tree = Tree::read(&root.join(files[0].0), &root).unwrap();
        fs::remove_dir_all(&root).unwrap();
        tree.imports()
    }

    fn check(name: &str, files: &[(&str, &str)], expected: &[&str]) {
        let found: Vec<String> = imports(name, files).iter().map(Import::to_string).collect();
        assert_eq!(found, expected, "{name}");
    }

    #[test]
    fn a_name_is_followed_to_where_it_is_declared() {
        check(
            "followed",
            &[
                ("lib.rs", "mod a; mod b; pub use a::deep::Deep;"),
                ("a/mod.rs", "pub mod deep;\npub use deep::Deep as Renamed;"),
                ("a/deep.rs", "pub struct Deep;"),
                ("b.rs", "use crate::Deep;\nuse crate::a::{self, Renamed};\nfn f() { a::deep::g() }"),
            ],
            &["`b.rs` -> `a/deep.rs` (1: `crate::Deep`, 2: `crate::a::Renamed`, 3: `a::deep::g`)"],
        );
    }

    #[test]
    fn handing_a_name_on_is_an_import_only_where_it_is_used() {
        let a = |text: &str| format!("mod b;\npub use b::B;\n{text}");
        let check = |name: &str, a: &str, expected: &[&str]| {
            check(name, &[("lib.rs", "mod a;"), ("a/mod.rs", a), ("a/b.rs", "pub struct B;")], expected);
        };
        check("handed", &a(""), &[]);
        check("used", &a("fn f(_: B) {}"), &["`a/mod.rs` -> `a/b.rs` (2: `b::B`)"]);
    }

    #[test]
    fn a_module_needs_nothing_until_something_in_it_is_named() {
        let check = |name: &str, b: &str, expected: &[&str]| {
            check(name, &[("lib.rs", "mod a; mod b;"), ("a.rs", "pub fn f() {}"), ("b.rs", b)], expected);
        };
        check("unused", "use crate::a;", &[]);
        check("named", "use crate::a;\nfn f() { a::f() }", &["`b.rs` -> `a.rs` (2: `a::f`)"]);
        check("alone", "use crate::a;\nfn f(a: u8) -> u8 { a }", &[]);
        check("glob", "use crate::a::*;", &["`b.rs` -> `a.rs` (1: `crate::a`)"]);
    }

    #[test]
    fn a_function_with_its_modules_name_comes_with_it() {
        check(
            "namesake",
            &[
                ("lib.rs", "mod a; mod b;"),
                ("a/mod.rs", "pub mod f; pub use f::f;"),
                ("a/f.rs", "pub fn f() {}"),
                ("b.rs", "use crate::a::f;\nfn g() { f() }"),
            ],
            &["`b.rs` -> `a/f.rs` (1: `crate::a::f`)"],
        );
    }

    #[test]
    fn a_module_may_say_where_its_file_is() {
        check(
            "elsewhere",
            &[
                ("lib.rs", "mod a;"),
                ("a.rs", "#[path = \"elsewhere/b.rs\"] mod b; fn f() { b::g() }"),
                ("elsewhere/b.rs", "pub fn g() {}"),
            ],
            &["`a.rs` -> `elsewhere/b.rs` (1: `b::g`)"],
        );
    }

    #[test]
    fn inline_modules_lie_in_the_file_of_their_parent() {
        check(
            "inline",
            &[
                ("lib.rs", "mod a { pub mod b { use super::super::c::C; } } mod c;"),
                ("c.rs", "use crate::a::b::f;\npub struct C;"),
            ],
            &["`lib.rs` -> `c.rs` (1: `super::super::c::C`)", "`c.rs` -> `lib.rs` (1: `crate::a::b::f`)"],
        );
    }
}
