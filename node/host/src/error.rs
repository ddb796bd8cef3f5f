//! Errors as people read them.

/// An error with its causes, in one line.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        text.push_str(&format!(": {error}"));
        source = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Cause {
        text: &'static str,
        #[source]
        source: Option<Box<Cause>>,
    }

    #[test]
    fn every_cause_is_named_once_and_in_order() {
        let inner = Cause { text: "no space", source: None };
        let outer = Cause { text: "failed to write", source: Some(Box::new(inner)) };
        assert_eq!(chain(&outer), "failed to write: no space");
    }
}
