//! Selectors: which addresses a rule speaks of.

use std::fmt;
use std::str::FromStr;

use ipnet::IpNet;
use thiserror::Error;

use crate::object::id::{CidrId, CidrName, GroupId, GroupName, NameError, NodeId, NodeName};
use crate::object::prefix::{PrefixError, parse_prefix};

/// A set of addresses, by id.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Selector {
    /// Every cidr.
    Any,
    /// A cidr with its descendants.
    Cidr(CidrId),
    /// A node's own addresses.
    Node(NodeId),
    Group(GroupId),
    /// May span or miss cidrs.
    Prefix(IpNet),
}

/// A selector as its author writes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum SelectorSpec {
    Any,
    Cidr(CidrName),
    Node(NodeName),
    Group(GroupName),
    Prefix(IpNet),
}

/// A member of a group as its author writes it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum MemberSpec {
    Node(NodeName),
    Cidr(CidrName),
}

/// Text that is no selector, or no member.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum SelectorError {
    #[error(
        "`{0}` is not a selector; write `cidr:NAME`, `node:NAME`, `group:NAME`, `any` or a prefix like `10.42.1.0/24`{1}"
    )]
    Syntax(String, Hint),
    #[error("`{0}` is not a member of a group; write `node:NAME` or `cidr:NAME`{1}")]
    Member(String, Hint),
    #[error(transparent)]
    Name(#[from] NameError),
    #[error(transparent)]
    Prefix(#[from] PrefixError),
}

/// The word that was probably meant, if any.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Hint(Option<String>);

impl fmt::Display for Hint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.0 {
            Some(word) => write!(f, "; did you mean `{word}`?"),
            None => Ok(()),
        }
    }
}

impl Hint {
    /// The nearest of the words, if it is near enough to be meant.
    pub(crate) fn nearest<'a>(text: &str, words: impl IntoIterator<Item = &'a str>) -> Self {
        let distances = words.into_iter().map(|word| (strsim::damerau_levenshtein(text, word), word));
        let nearest = distances.min().filter(|&(distance, _)| distance <= 1 + text.chars().count() / 4);
        Self(nearest.map(|(_, word)| word.to_owned()))
    }
}

impl FromStr for SelectorSpec {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        if text == "any" {
            return Ok(Self::Any);
        }
        let Some((kind, rest)) = text.split_once(':') else {
            return match text.contains(['/', '.']) {
                true => Ok(Self::Prefix(parse_prefix(text)?)),
                false => Err(SelectorError::Syntax(text.to_owned(), Hint::nearest(text, ["any"]))),
            };
        };
        Ok(match kind {
            "cidr" => Self::Cidr(rest.parse()?),
            "node" => Self::Node(rest.parse()?),
            "group" => Self::Group(rest.parse()?),
            // An IPv6 prefix has colons of its own.
            _ if kind.chars().all(|c| c.is_ascii_hexdigit()) => Self::Prefix(parse_prefix(text)?),
            _ => return Err(SelectorError::Syntax(text.to_owned(), hint(kind, rest, &["cidr", "node", "group"]))),
        })
    }
}

impl fmt::Display for SelectorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Any => f.write_str("any"),
            Self::Cidr(name) => write!(f, "cidr:{name}"),
            Self::Node(name) => write!(f, "node:{name}"),
            Self::Group(name) => write!(f, "group:{name}"),
            Self::Prefix(prefix) => write!(f, "{prefix}"),
        }
    }
}

impl FromStr for MemberSpec {
    type Err = SelectorError;

    fn from_str(text: &str) -> Result<Self, SelectorError> {
        let (kind, rest) = text.split_once(':').unwrap_or((text, ""));
        Ok(match kind {
            "node" => Self::Node(rest.parse()?),
            "cidr" => Self::Cidr(rest.parse()?),
            _ => return Err(SelectorError::Member(text.to_owned(), hint(kind, rest, &["node", "cidr"]))),
        })
    }
}

impl fmt::Display for MemberSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node(name) => write!(f, "node:{name}"),
            Self::Cidr(name) => write!(f, "cidr:{name}"),
        }
    }
}

/// The selector with its kind corrected.
fn hint(kind: &str, rest: &str, kinds: &[&str]) -> Hint {
    Hint(Hint::nearest(kind, kinds.iter().copied()).0.map(|kind| format!("{kind}:{rest}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn selectors_print_as_they_are_written() {
        for text in ["any", "cidr:web", "node:db1", "group:dba", "10.0.0.0/8", "fd42::/48", "::/0", "cidr:fd42"] {
            assert_eq!(text.parse::<SelectorSpec>().unwrap().to_string(), text);
        }
        for text in ["node:db1", "cidr:web"] {
            assert_eq!(text.parse::<MemberSpec>().unwrap().to_string(), text);
        }
    }

    #[test]
    fn a_refused_selector_says_what_was_meant() {
        let check = |text: &str, expected: &str| {
            let error = text.parse::<SelectorSpec>().unwrap_err().to_string();
            assert!(error.contains(expected), "{text}: {error}");
        };
        check("cdir:web", "did you mean `cidr:web`?");
        check("web", "write `cidr:NAME`");
        check("ayn", "did you mean `any`?");
        check("", "write `cidr:NAME`");
        check("cidr:Web", "`W` is not allowed");
        check("cidr:", "it is empty");
        check("10.0.0.1/8", "write `10.0.0.0/8`");
        check("10.0.0.1", "write `10.0.0.1/32`");
        check("fd42::1/48", "write `fd42::/48`");
        let error = "group:a".parse::<MemberSpec>().unwrap_err().to_string();
        assert!(error.contains("write `node:NAME` or `cidr:NAME`"), "{error}");
    }
}
