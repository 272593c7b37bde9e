//! An error with its causes, on one line: libraries keep what a person needs to know below "transport error".

use std::error::Error;

/// Returns an error's text, and those of its causes that it does not hold already.
pub(crate) fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let more = cause.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        source = cause.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Told {
        text: &'static str,
        source: Option<Box<Told>>,
    }

    #[test]
    fn every_cause_is_told_once() {
        let texts = ["refused", "connect: refused", "transport error"];
        let error = texts
            .into_iter()
            .fold(None, |source, text| Some(Box::new(Told { text, source })));
        let told = causes(&*error.unwrap());
        assert_eq!(told, "transport error: connect: refused");
    }
}
