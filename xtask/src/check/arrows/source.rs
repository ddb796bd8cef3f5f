//! What the text of one module says: the modules that it declares, what it imports, and the paths that it names. Code
//! under `#[cfg(test)]` is left out.

use std::collections::BTreeSet;
use std::iter::Peekable;

use anyhow::{Context, Result};
use proc_macro2::token_stream::IntoIter;
use proc_macro2::{Delimiter, Group, Ident, TokenStream, TokenTree};

/// One module, as its text has it.
#[derive(Debug, Default)]
pub(super) struct Source {
    /// The names of items that stand at the top of the module.
    pub(super) declared: BTreeSet<String>,
    pub(super) modules: Vec<Declared>,
    pub(super) uses: Vec<Use>,
    pub(super) paths: Vec<Named>,
    /// Every name that stands by itself or at the beginning of a path, but in a `use`.
    pub(super) words: BTreeSet<String>,
}

/// `mod name;` or `mod name { .. }`.
#[derive(Debug)]
pub(super) struct Declared {
    pub(super) name: String,
    /// Of the attribute `#[path = ".."]`.
    pub(super) path: Option<String>,
    /// What stands between the braces, if it has them.
    pub(super) inline: Option<Source>,
}

/// One name that a `use` brings into the module.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Use {
    pub(super) path: Named,
    /// What it is called here; `None` for a glob.
    pub(super) name: Option<String>,
    /// Others can import it from here.
    pub(super) exported: bool,
}

/// A path and the line where it stands.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Named {
    pub(super) segments: Vec<String>,
    pub(super) line: usize,
}

type Tokens = Peekable<IntoIter>;

/// What stands ahead of an item.
#[derive(Debug, Default)]
struct Ahead {
    test: bool,
    path: Option<String>,
    exported: bool,
}

pub(super) fn parse(text: &str) -> Result<Source> {
    let stream: TokenStream = text.parse().ok().context("it is not Rust: a bracket or a quote is not closed")?;
    let mut source = Source::default();
    source.read(stream, true);
    Ok(source)
}

impl Source {
    /// Reads the items at the top of a module, or what is between two brackets.
    fn read(&mut self, stream: TokenStream, top: bool) {
        let mut tokens = stream.into_iter().peekable();
        let mut ahead = Ahead::default();
        while let Some(token) = tokens.next() {
            match token {
                TokenTree::Punct(punct) if punct.as_char() == '#' => {
                    if let Some(attribute) = attribute(&mut tokens) {
                        self.read(attribute.stream(), false);
                        ahead.note(&attribute);
                    }
                }
                TokenTree::Ident(word) if ahead.test => {
                    skip_item(&word, &mut tokens);
                    ahead = Ahead::default();
                }
                TokenTree::Ident(word) if word == "pub" => {
                    ahead.exported = true;
                    tokens.next_if(|next| is_group(next, Delimiter::Parenthesis));
                }
                TokenTree::Ident(word) => self.word(&word, &mut tokens, std::mem::take(&mut ahead), top),
                TokenTree::Group(group) => {
                    ahead = Ahead::default();
                    self.read(group.stream(), false);
                }
                TokenTree::Punct(_) | TokenTree::Literal(_) => ahead = Ahead::default(),
            }
        }
    }

    fn word(&mut self, word: &Ident, tokens: &mut Tokens, ahead: Ahead, top: bool) {
        match word.to_string().as_str() {
            // `use<>` bounds a lifetime.
            "use" if !tokens.peek().is_some_and(|next| is_punct(next, '<')) => self.read_use(tokens, ahead.exported),
            "mod" => self.read_module(tokens, ahead.path),
            "fn" | "struct" | "enum" | "union" | "trait" | "type" | "const" | "static" | "macro_rules" if top => {
                tokens.next_if(|next| is_punct(next, '!'));
                if let Some(TokenTree::Ident(name)) = tokens.peek() {
                    self.declared.insert(name.to_string());
                }
            }
            _ => {
                let named = Named { segments: segments(word, tokens), line: word.span().start().line };
                self.words.insert(named.segments[0].clone());
                if named.segments.len() > 1 {
                    self.paths.push(named);
                }
            }
        }
    }

    fn read_module(&mut self, tokens: &mut Tokens, path: Option<String>) {
        let Some(TokenTree::Ident(name)) = tokens.next() else {
            return;
        };
        let inline = match tokens.next() {
            Some(TokenTree::Group(group)) => {
                let mut source = Self::default();
                source.read(group.stream(), true);
                Some(source)
            }
            _ => None,
        };
        self.modules.push(Declared { name: name.to_string(), path, inline });
    }

    fn read_use(&mut self, tokens: &mut Tokens, exported: bool) {
        let tree = tokens.by_ref().take_while(|token| !is_punct(token, ';'));
        self.read_tree(tree.collect(), &[], exported);
    }

    /// Reads `a::{b, c::*, self as d}` behind the segments `before`.
    fn read_tree(&mut self, tree: Vec<TokenTree>, before: &[String], exported: bool) {
        for branch in tree.split(|token| is_punct(token, ',')).filter(|branch| !branch.is_empty()) {
            let line = branch[0].span().start().line;
            let mut segments = before.to_vec();
            let mut name = None;
            let mut glob = false;
            let mut tokens = branch.iter();
            while let Some(token) = tokens.next() {
                match token {
                    TokenTree::Ident(word) if word == "as" => name = tokens.next().map(ToString::to_string),
                    TokenTree::Ident(word) => segments.push(word.to_string()),
                    TokenTree::Punct(punct) if punct.as_char() == '*' => glob = true,
                    TokenTree::Group(group) => {
                        self.read_tree(group.stream().into_iter().collect(), &segments, exported);
                        segments.clear();
                    }
                    TokenTree::Punct(_) | TokenTree::Literal(_) => {}
                }
            }
            if segments.len() > 1 && segments.last().is_some_and(|last| last == "self") {
                segments.pop();
            }
            let Some(last) = segments.last() else {
                continue;
            };
            let name = if glob { None } else { name.or_else(|| Some(last.clone())) };
            self.uses.push(Use { path: Named { segments, line }, name, exported });
        }
    }
}

impl Ahead {
    fn note(&mut self, attribute: &Group) {
        let tokens: Vec<TokenTree> = attribute.stream().into_iter().collect();
        match tokens.as_slice() {
            [TokenTree::Ident(word), TokenTree::Group(group)] if word == "cfg" => self.test |= is_test(group),
            [TokenTree::Ident(word), TokenTree::Punct(_), TokenTree::Literal(path)] if word == "path" => {
                self.path = Some(path.to_string().trim_matches('"').to_owned());
            }
            _ => {}
        }
    }
}

/// `(test)`, or `(all(..))` with `test` among them.
fn is_test(predicate: &Group) -> bool {
    let tokens: Vec<TokenTree> = predicate.stream().into_iter().collect();
    match tokens.as_slice() {
        [TokenTree::Ident(word), TokenTree::Group(all)] if word == "all" => {
            all.stream().into_iter().any(|token| matches!(token, TokenTree::Ident(word) if word == "test"))
        }
        [TokenTree::Ident(word)] => word == "test",
        _ => false,
    }
}

/// The brackets behind `#` or `#!`.
fn attribute(tokens: &mut Tokens) -> Option<Group> {
    tokens.next_if(|next| is_punct(next, '!'));
    match tokens.next_if(|next| is_group(next, Delimiter::Bracket)) {
        Some(TokenTree::Group(group)) => Some(group),
        _ => None,
    }
}

/// Passes over the rest of an item, a field or a statement that begins with `word`.
fn skip_item(word: &Ident, tokens: &mut Tokens) {
    let mut word = word.to_string();
    if word == "pub" {
        tokens.next_if(|next| is_group(next, Delimiter::Parenthesis));
        word = tokens.peek().map(ToString::to_string).unwrap_or_default();
    }
    let (at_brace, at_comma) = match word.as_str() {
        "use" | "const" | "static" | "type" | "let" => (false, false),
        "fn" | "impl" | "struct" | "enum" | "union" | "trait" | "mod" | "unsafe" | "async" | "macro_rules" => {
            (true, false)
        }
        _ => (true, true),
    };
    let ends = |token: &TokenTree| {
        is_punct(token, ';') || at_comma && is_punct(token, ',') || at_brace && is_group(token, Delimiter::Brace)
    };
    tokens.find(ends);
}

/// A path from its first word on.
fn segments(first: &Ident, tokens: &mut Tokens) -> Vec<String> {
    let mut segments = vec![first.to_string()];
    loop {
        let mut ahead = tokens.clone();
        let mut colon = || ahead.next_if(|next| is_punct(next, ':')).is_some();
        let colons = colon() && colon();
        let Some(TokenTree::Ident(word)) = ahead.next().filter(|_| colons) else {
            return segments;
        };
        segments.push(word.to_string());
        *tokens = ahead;
    }
}

fn is_punct(token: &TokenTree, character: char) -> bool {
    matches!(token, TokenTree::Punct(punct) if punct.as_char() == character)
}

fn is_group(token: &TokenTree, delimiter: Delimiter) -> bool {
    matches!(token, TokenTree::Group(group) if group.delimiter() == delimiter)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn uses(text: &str) -> Vec<(String, Option<String>, bool)> {
        let source = parse(text).unwrap();
        source.uses.into_iter().map(|one| (one.path.segments.join("::"), one.name, one.exported)).collect()
    }

    #[test]
    fn a_use_is_one_name_or_several() {
        let check = |text: &str, expected: &[(&str, Option<&str>)]| {
            let found: Vec<_> = uses(text).into_iter().map(|(path, name, _)| (path, name)).collect();
            let expected: Vec<_> =
                expected.iter().map(|(path, name)| ((*path).to_owned(), name.map(str::to_owned))).collect();
            assert_eq!(found, expected, "{text}");
        };
        check("use crate::a::B;", &[("crate::a::B", Some("B"))]);
        check(
            "use crate::a::{self, B, c::*};",
            &[("crate::a", Some("a")), ("crate::a::B", Some("B")), ("crate::a::c", None)],
        );
        check(
            "use super::{a::{B as C, D}, e};",
            &[("super::a::B", Some("C")), ("super::a::D", Some("D")), ("super::e", Some("e"))],
        );
        check("fn f() { use crate::a; }", &[("crate::a", Some("a"))]);
        check("fn f() -> impl Iterator + use<> { use a::b; g() }", &[("a::b", Some("b"))]);
        check("use ::std::fmt;", &[("std::fmt", Some("fmt"))]);
    }

    #[test]
    fn who_else_can_import_a_name_is_known() {
        let found = uses("pub use a::B; pub(crate) use c::D; use e::F;");
        assert_eq!(found.iter().map(|(.., exported)| *exported).collect::<Vec<_>>(), [true, true, false]);
    }

    #[test]
    fn what_is_compiled_for_tests_only_is_left_out() {
        let text = "#[cfg(test)] mod tests { use crate::a::B; } #[cfg(test)] use crate::c::{D, E}; \
                    #[cfg(all(test, unix))] pub(crate) fn f() { crate::g::h() } #[cfg(test)] mod fixture; \
                    struct S { #[cfg(test)] x: crate::i::J, y: crate::k::L } \
                    #[cfg(any(test, unix))] use crate::m::N;";
        let source = parse(text).unwrap();
        assert!(source.modules.is_empty());
        assert_eq!(source.uses.iter().map(|one| one.path.segments.join("::")).collect::<Vec<_>>(), ["crate::m::N"]);
        assert_eq!(source.paths.iter().map(|path| path.segments.join("::")).collect::<Vec<_>>(), ["crate::k::L"]);
    }

    #[test]
    fn paths_in_code_and_macros_are_found_and_comments_are_not() {
        let text = "//! crate::a::b\nfn f() {\n    // crate::c::d\n    assert!(crate::e::f(\"crate::g::h\"));\n}\n";
        let source = parse(text).unwrap();
        assert_eq!(source.paths, [Named { segments: ["crate", "e", "f"].map(str::to_owned).to_vec(), line: 4 }]);
        assert!(source.declared.contains("f"));
    }

    #[test]
    fn modules_are_told_with_their_path() {
        let source = parse("mod a; #[path = \"x/b.rs\"] mod b; pub mod c { mod d; }").unwrap();
        let told: Vec<_> = source.modules.iter().map(|one| (one.name.as_str(), one.path.as_deref())).collect();
        assert_eq!(told, [("a", None), ("b", Some("x/b.rs")), ("c", None)]);
        assert_eq!(source.modules[2].inline.as_ref().unwrap().modules[0].name, "d");
    }
}
