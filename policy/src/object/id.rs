//! Ids, which the machines use, and names, which people use. A rename touches one object because everything else refers
//! to it by id.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use thiserror::Error;

/// Characters in the longest name: that of a DNS label, so that a node's name can be one.
pub const MAX_NAME: usize = 63;

/// Text that is no name.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[error(
    "`{text}` is not a name: {reason}; a name is 1 to 63 characters of a-z, 0-9, `.`, `_` and `-`, and begins and ends \
     with a letter or digit"
)]
pub struct NameError {
    text: String,
    reason: String,
}

macro_rules! ids {
    ($($(#[$doc:meta])* $name:ident($inner:ty);)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    )*};
}

ids! {
    /// Id of a cidr; never 0.
    CidrId(u32);
    /// Id of a node; never 0.
    NodeId(u32);
    /// Id of a group; never 0.
    GroupId(u32);
    /// Id of a rule; never 0.
    RuleId(u32);
    /// Id of a named service; never 0.
    ServiceId(u32);
    /// Id of a class of addresses; never 0. It follows from what the class is.
    ClassId(u64);
    /// A commit of the controller's store; 0: none.
    Revision(u64);
    /// A switch of one node's tables; 0: none yet.
    Generation(u64);
}

impl ClassId {
    /// The class of the node's own addresses, in its slice.
    pub const OWN: Self = Self(1 << 32);
    /// The class of its IPv6 address, where that is not the one of its IPv4 address.
    pub const OWN_V6: Self = Self(Self::OWN.0 + 1);

    /// Set in the ids of classes that are told apart within a cidr.
    pub(crate) const MARKED: u64 = 1 << 63;

    /// Whether it is the id of a class that is told apart within a cidr.
    pub const fn is_marked(self) -> bool {
        self.0 & Self::MARKED != 0
    }

    /// The id of a class that is told apart, from a number that somebody else gave it.
    pub const fn marked(number: u64) -> Self {
        Self(number | Self::MARKED)
    }

    /// The class of the addresses of a cidr that nothing tells apart.
    pub const fn of_cidr(cidr: CidrId) -> Self {
        Self(cidr.0 as u64)
    }

    /// The inverse of [`ClassId::of_cidr`].
    pub const fn cidr(self) -> Option<CidrId> {
        if self.0 < Self::OWN.0 { Some(CidrId(self.0 as u32)) } else { None }
    }

    /// Whether it is one of the classes of the node's own addresses.
    pub fn is_own(self) -> bool {
        self == Self::OWN || self == Self::OWN_V6
    }
}

macro_rules! names {
    ($($(#[$doc:meta])* $name:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(Arc<str>);

        impl $name {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;

            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name(text)?;
                Ok(Self(text.into()))
            }
        }

        impl AsRef<str> for $name {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }
    )*};
}

names! {
    /// Name of a network.
    NetworkName;
    /// Name of a cidr.
    CidrName;
    /// Name of a node.
    NodeName;
    /// Name of a group.
    GroupName;
    /// Name of a rule.
    RuleName;
    /// Name of a named service.
    ServiceName;
}

fn check_name(text: &str) -> Result<(), NameError> {
    let refuse = |reason: String| {
        let text = text.chars().take(2 * MAX_NAME).collect();
        Err(NameError { text, reason })
    };
    let ends = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit();
    let (Some(first), Some(last)) = (text.chars().next(), text.chars().next_back()) else {
        return refuse("it is empty".to_owned());
    };
    if let Some(c) = text.chars().find(|&c| !ends(c) && !matches!(c, '.' | '_' | '-')) {
        return refuse(format!("`{}` is not allowed", c.escape_debug()));
    }
    if text.len() > MAX_NAME {
        return refuse(format!("it has {} characters", text.len()));
    }
    for (word, c) in [("begins", first), ("ends", last)] {
        if !ends(c) {
            return refuse(format!("it {word} with `{c}`"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_labels() {
        let check = |text: &str, expected: bool| {
            assert_eq!(text.parse::<NodeName>().is_ok(), expected, "{text:?}");
        };
        for good in ["a", "0", "web-1", "db.eu_1", &"a".repeat(63)] {
            check(good, true);
        }
        for bad in ["", "-a", "a-", ".a", "a_", "Web", "a b", "a/b", "ä", &"a".repeat(64)] {
            check(bad, false);
        }
    }

    #[test]
    fn a_refused_name_says_why_and_what_is_allowed() {
        let error = "Web".parse::<CidrName>().unwrap_err().to_string();
        assert!(error.starts_with("`Web` is not a name: `W` is not allowed; a name is 1 to 63"), "{error}");
    }
}
