//! Reasoning between two markers, which a tool call ends as well.
//!
//! As vLLM 0.32's parser engine reads it (`parser/*.py`, `parser/engine/adapters.py`). A complete answer is read by
//! the engine to its end; a stream only until the reasoning is over, and what follows is passed on as it is. So
//! the two differ where a marker comes again in the answer.

use super::Reasoned;
use crate::markers::Guard;

/// One family's markers and habits.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    pub(super) start: &'static str,
    pub(super) end: &'static str,
    /// What begins a tool call: the reasoning is over, and this is part of the answer.
    pub(super) calls: &'static [&'static str],
    /// In a complete answer, the start marker begins reasoning again.
    pub(super) reopens: bool,
    /// White space at the end of the reasoning is dropped.
    pub(super) strips: bool,
}

/// The state within one answer.
#[derive(Debug)]
pub(super) struct Marked {
    rules: Rules,
    thinking: bool,
    guard: Guard,
    /// White space that ends the reasoning, unless more follows.
    space: String,
}

/// What a marker means.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Marker {
    Start,
    End,
    Call,
}

impl Marked {
    /// - `thinking`: the answer begins inside the reasoning.
    pub(super) fn new(rules: Rules, thinking: bool) -> Self {
        let markers = [rules.start, rules.end].into_iter();
        Self {
            rules,
            thinking,
            guard: Guard::new(markers.chain(rules.calls.iter().copied()).collect()),
            space: String::new(),
        }
    }

    pub(super) fn is_thinking(&self) -> bool {
        self.thinking
    }

    /// Takes the next piece of a stream.
    pub(super) fn push(&mut self, text: &str) -> Reasoned {
        let mut out = Reasoned::default();
        if self.thinking {
            let text = self.guard.push(text);
            let answer = self.think(&text, &mut out);
            out.text.push_str(answer);
        } else {
            out.text.push_str(text);
        }
        if !self.thinking {
            // What is held began no marker that matters any more.
            out.text.push_str(&self.guard.finish());
        }
        out
    }

    /// Ends a stream: what was held as the start of a marker is none.
    pub(super) fn finish(&mut self) -> Reasoned {
        let held = self.guard.finish();
        let mut out = Reasoned::default();
        self.add(&held, &mut out);
        out
    }

    /// Takes a complete answer apart.
    pub(super) fn whole(mut self, mut text: &str) -> Reasoned {
        let mut out = Reasoned::default();
        let again: &[Marker] = match self.rules.reopens {
            true => &[Marker::Start, Marker::End],
            false => &[Marker::End],
        };
        loop {
            if self.thinking {
                text = self.think(text, &mut out);
            }
            let Some((marker, at, length)) = self.next(text, again) else {
                out.text.push_str(if self.thinking { "" } else { text });
                return out;
            };
            out.text.push_str(&text[..at]);
            text = &text[at + length..];
            self.thinking = marker == Marker::Start;
        }
    }

    /// Reads reasoning, and returns what follows it.
    fn think<'a>(&mut self, mut text: &'a str, out: &mut Reasoned) -> &'a str {
        let all = [Marker::Start, Marker::End, Marker::Call];
        while let Some((marker, at, length)) = self.next(text, &all) {
            self.add(&text[..at], out);
            text = &text[at..];
            if marker != Marker::Call {
                text = &text[length..];
            }
            if marker != Marker::Start {
                self.thinking = false;
                self.space.clear();
                return text;
            }
        }
        self.add(text, out);
        ""
    }

    /// Returns the first marker of these kinds, where it is and its length.
    fn next(&self, text: &str, kinds: &[Marker]) -> Option<(Marker, usize, usize)> {
        let Rules {
            start, end, calls, ..
        } = self.rules;
        let markers = [(Marker::Start, start), (Marker::End, end)].into_iter();
        let markers = markers.chain(calls.iter().map(|call| (Marker::Call, *call)));
        markers
            .filter(|(kind, _)| kinds.contains(kind))
            .filter_map(|(kind, marker)| Some((kind, text.find(marker)?, marker.len())))
            .min_by_key(|(_, at, _)| *at)
    }

    /// Adds to the reasoning.
    fn add(&mut self, text: &str, out: &mut Reasoned) {
        if !self.rules.strips {
            out.reasoning.push_str(text);
            return;
        }
        let solid = text.trim_end().len();
        if solid > 0 {
            out.reasoning.push_str(&std::mem::take(&mut self.space));
            out.reasoning.push_str(&text[..solid]);
        }
        self.space.push_str(&text[solid..]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RULES: Rules = Rules {
        start: "<think>",
        end: "</think>",
        calls: &["<tool_call>"],
        reopens: false,
        strips: false,
    };

    fn whole(rules: Rules, text: &str) -> (String, String) {
        let Reasoned { reasoning, text } = Marked::new(rules, true).whole(text);
        (reasoning, text)
    }

    fn stream(rules: Rules, text: &str) -> (String, String) {
        let mut marked = Marked::new(rules, true);
        let mut pieces: Vec<Reasoned> = text
            .chars()
            .map(|c| marked.push(c.encode_utf8(&mut [0; 4])))
            .collect();
        pieces.push(marked.finish());
        let reasoning = pieces.iter().map(|piece| piece.reasoning.as_str());
        let text = pieces.iter().map(|piece| piece.text.as_str());
        (reasoning.collect(), text.collect())
    }

    fn pair(reasoning: &str, text: &str) -> (String, String) {
        (reasoning.to_owned(), text.to_owned())
    }

    #[test]
    fn a_call_ends_the_reasoning_and_stays() {
        for read in [whole, stream] {
            let answer = "hm\n<tool_call>{}</tool_call>";
            assert_eq!(
                read(RULES, answer),
                pair("hm\n", "<tool_call>{}</tool_call>")
            );
            let strips = Rules {
                strips: true,
                ..RULES
            };
            assert_eq!(
                read(strips, answer),
                pair("hm", "<tool_call>{}</tool_call>")
            );
            assert_eq!(read(strips, "<think> a\n\nb \n"), pair(" a\n\nb", ""));
            assert_eq!(read(RULES, "a <tool"), pair("a <tool", ""));
        }
    }

    #[test]
    fn markers_in_the_answer_count_only_in_a_whole_one() {
        let answer = "a</think>b</think>c<think>d</think>e";
        assert_eq!(whole(RULES, answer), pair("a", "bc<think>de"));
        let reopens = Rules {
            reopens: true,
            ..RULES
        };
        assert_eq!(whole(reopens, answer), pair("ad", "bce"));
        assert_eq!(
            stream(reopens, answer),
            pair("a", "b</think>c<think>d</think>e")
        );
    }
}
