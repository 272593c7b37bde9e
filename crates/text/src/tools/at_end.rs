//! Streams whose calls are parsed at the end, because the parser crate's streaming of the format is not to be relied
//! on (`tool-parser` 1.10).
//!
//! Given pieces that end anywhere, it loses DeepSeek V3 arguments that come in one piece with their call, and the code
//! fences of plain text; GLM calls whose tags come in parts; the end of Kimi K2 arguments; all of Cohere's calls; and
//! in the Python format it mixes up positions of bytes and characters. Parsing complete answers, it does none of that. Text before the
//! first call streams all the same.

use crate::markers::Guard;

/// How the first call begins.
#[derive(Clone, Copy, Debug)]
pub(super) enum Opens {
    /// With this marker.
    Marker(&'static str),
    /// The answer is a list of calls or it has none (as vLLM decides for the Python format).
    WholeAnswer,
}

/// The state within one answer.
#[derive(Debug)]
pub(super) struct AtEnd {
    opens: Opens,
    guard: Guard,
    state: State,
}

#[derive(Debug)]
enum State {
    /// No call yet. `solid`: there was more than white space.
    Text { solid: bool },
    /// Everything from the first call on.
    Held(String),
}

impl AtEnd {
    pub(super) fn new(opens: Opens) -> Self {
        let markers = match opens {
            Opens::Marker(marker) => vec![marker],
            Opens::WholeAnswer => Vec::new(),
        };
        Self {
            opens,
            guard: Guard::new(markers),
            state: State::Text { solid: false },
        }
    }

    /// Returns the text that is certain to be no call.
    pub(super) fn push(&mut self, text: &str) -> String {
        let solid = match &mut self.state {
            State::Held(held) => {
                held.push_str(text);
                return String::new();
            }
            State::Text { solid } => solid,
        };
        let mut text = self.guard.push(text);
        let start = text.len() - text.trim_start().len();
        let open = match self.opens {
            Opens::Marker(marker) => text.find(marker),
            Opens::WholeAnswer if *solid => None,
            Opens::WholeAnswer => text[start..].starts_with(['[', '<']).then_some(start),
        };
        *solid |= start < text.len();
        if let Some(open) = open {
            let held = text.split_off(open) + &self.guard.finish();
            self.state = State::Held(held);
        }
        text
    }

    /// Returns the rest of the answer: calls, or text after all.
    pub(super) fn finish(&mut self) -> String {
        let rest = self.guard.finish();
        match std::mem::replace(&mut self.state, State::Text { solid: true }) {
            State::Held(held) => held + &rest,
            State::Text { .. } => rest,
        }
    }
}
