//! What `cargo xtask bench` measures. A bench reports: a target that is missed is printed as missed, and only a failure to
//! measure is a failure.

pub mod control;
pub mod datapath;
pub mod guard;
pub mod report;
pub mod scale;
pub mod statistics;

/// How much of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Effort {
    /// Everything, often enough to tell ratios apart.
    Full,
    /// Small and few: that it works, not how fast.
    Quick,
}

impl Effort {
    pub fn choose<T>(self, full: T, quick: T) -> T {
        match self {
            Self::Full => full,
            Self::Quick => quick,
        }
    }
}
