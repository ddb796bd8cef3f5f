//! Why a verdict is what it is, in words.

use std::fmt;

use crate::network::Network;
use crate::verdict::{Flow, Verdict};

/// The verdict of one flow with what led to it; `Display` gives the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Explanation {
    pub verdict: Verdict,
    lines: Vec<(&'static str, String)>,
}

/// Explains what the policy says of a flow.
pub fn explain(_network: &Network, _flow: &Flow) -> Explanation {
    unreachable!("written below")
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (label, text) in &self.lines {
            writeln!(f, "{label:<12} {text}")?;
        }
        Ok(())
    }
}
