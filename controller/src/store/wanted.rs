//! Whether an answer is still waited for.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::StoreError;

/// Is asked by what takes long, now and then; see [`Asked`].
#[derive(Clone, Debug, Default)]
pub struct Wanted(Arc<AtomicBool>);

/// The end of whoever waits: dropped, the answer is not wanted any more.
#[derive(Debug)]
pub struct Asked(Wanted);

impl Wanted {
    pub fn new() -> (Asked, Self) {
        let wanted = Self::default();
        (Asked(wanted.clone()), wanted)
    }

    /// To the end.
    pub fn always() -> Self {
        Self::default()
    }

    pub fn is_over(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    pub fn check(&self) -> Result<(), StoreError> {
        if self.is_over() { Err(StoreError::Unwanted) } else { Ok(()) }
    }
}

impl Drop for Asked {
    fn drop(&mut self) {
        self.0.0.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_wanted_until_nobody_waits() {
        let (asked, wanted) = Wanted::new();
        assert!(wanted.check().is_ok());
        drop(asked);
        assert!(matches!(wanted.check(), Err(StoreError::Unwanted)));
        assert!(!Wanted::always().is_over());
    }
}
