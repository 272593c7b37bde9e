//! A stream's text, ended by stop strings.
//!
//! The rules are vLLM's (`v1/engine/detokenizer.py`, `BaseIncrementalDetokenizer`):
//! - a stop string may begin and end anywhere, across tokens; of several that end in the same new tokens, the
//!   one that is complete first wins, then the one listed first;
//! - while stop strings are cut off, the last `longest - 1` characters are held back, since they may begin one;
//! - a stop string counts only if it ends after the first `min_tokens` tokens;
//! - a token that made the engine stop is text only if stop strings are to be included;
//! - tokens after the one that completes the stop string are dropped, and not counted.
//!
//! Unlike vLLM, no more text is kept than may still be needed.

use stator_common::code::Code;

use crate::detokenizer::Detokenizer;
use crate::tokenizer::TokenizerError;

/// Where to stop.
#[derive(Clone, Debug, Default)]
pub struct StopStrings {
    strings: Vec<String>,
    include: bool,
    min_tokens: usize,
    /// One less than the characters of the longest string.
    reach: usize,
}

/// A stop string is empty, so every text would contain it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("stop string {index} is empty")]
pub struct BadStopString {
    /// Its place in the list.
    pub index: usize,
}

impl BadStopString {
    /// Returns the code that a client sees.
    pub fn code(&self) -> Code {
        Code::InvalidRequest
    }
}

impl StopStrings {
    /// Returns the rule for one stream.
    ///
    /// - `include`: keep the stop string in the text.
    /// - `min_tokens`: tokens before whose end no stop string counts.
    ///
    /// # Errors
    /// [`BadStopString`].
    pub fn new(
        strings: Vec<String>,
        include: bool,
        min_tokens: usize,
    ) -> Result<Self, BadStopString> {
        if let Some(index) = strings.iter().position(String::is_empty) {
            return Err(BadStopString { index });
        }
        let longest = strings.iter().map(|s| s.chars().count()).max().unwrap_or(1);
        Ok(Self {
            strings,
            include,
            min_tokens,
            reach: longest - 1,
        })
    }

    /// Returns a stop string by the index that [`Pushed::stop`] names.
    pub fn get(&self, index: usize) -> Option<&str> {
        self.strings.get(index).map(String::as_str)
    }
}

/// Whether the engine ended the stream with these tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// More may come.
    Not,
    /// The last token is an end-of-sequence or stop token.
    StopToken,
    /// For any other reason (length, abort).
    Other,
}

/// What became of pushed tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pushed {
    /// The stop string that ended the text, by its place in the list. The engine must be told to stop, unless it
    /// has.
    pub stop: Option<usize>,
    /// How many of the tokens belong to the answer: all, unless a stop string ended it earlier.
    pub kept_tokens: usize,
}

/// One stream's text: detokenized, and ended by stop strings.
#[derive(Debug)]
pub struct OutputText {
    detokenizer: Detokenizer,
    stop: StopStrings,
    tokens: usize,
    /// The end of the text, as far as it is held back or may be the start of a stop string.
    text: String,
    /// Bytes of `text` that were given out.
    given: usize,
    /// Ends of the tokens of the current push in `text`.
    ends: Vec<usize>,
}

impl OutputText {
    /// Returns the text of a stream that has no tokens yet.
    pub fn new(detokenizer: Detokenizer, stop: StopStrings) -> Self {
        Self {
            detokenizer,
            stop,
            tokens: 0,
            text: String::new(),
            given: 0,
            ends: Vec::new(),
        }
    }

    /// Takes the tokens of an engine step and appends to `out` the text that is certain now.
    ///
    /// With an [`End`] or a stop string that is all of the rest.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`], by decoders other than byte-level ones.
    pub fn push(
        &mut self,
        tokens: &[u32],
        end: End,
        out: &mut String,
    ) -> Result<Pushed, TokenizerError> {
        let text_tokens = match tokens.split_last() {
            Some((_, rest)) if end == End::StopToken && !self.stop.include => rest,
            _ => tokens,
        };
        let all = Pushed {
            stop: None,
            kept_tokens: tokens.len(),
        };
        if self.stop.strings.is_empty() {
            self.tokens += tokens.len();
            self.detokenizer.push(text_tokens, out)?;
            return Ok(all);
        }

        self.ends.clear();
        self.ends.push(self.text.len());
        for token in text_tokens {
            self.detokenizer.push_one(*token, &mut self.text)?;
            self.ends.push(self.text.len());
        }
        if text_tokens.len() < tokens.len() {
            self.ends.push(self.text.len());
        }
        let before = self.tokens;
        self.tokens += tokens.len();

        let found = match !tokens.is_empty() && self.tokens > self.stop.min_tokens {
            true => self.find(self.ends[self.stop.min_tokens.saturating_sub(before)]),
            false => None,
        };
        let Some(found) = found else {
            self.give(end != End::Not, out);
            return Ok(all);
        };
        // Tokens whose text ends before the stop string does are needed, and the one that completes it.
        let kept_tokens = 1 + self.ends[1..].partition_point(|end| *end < found.end);
        self.tokens -= tokens.len() - kept_tokens.min(tokens.len());
        self.text.truncate(if self.stop.include {
            found.end
        } else {
            found.start
        });
        self.give(true, out);
        Ok(Pushed {
            stop: Some(found.index),
            kept_tokens: kept_tokens.min(tokens.len()),
        })
    }

    /// Returns how many tokens the answer has so far.
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// Returns the stop strings.
    pub fn stop_strings(&self) -> &StopStrings {
        &self.stop
    }

    /// Finds the stop string that is complete first, among those that end after `new_from`.
    fn find(&self, new_from: usize) -> Option<Found> {
        if new_from == self.text.len() {
            return None;
        }
        let mut best: Option<Found> = None;
        for (index, stop) in self.stop.strings.iter().enumerate() {
            let from = back(&self.text, new_from, stop.chars().count() - 1);
            let Some(at) = self.text[from..].find(stop.as_str()) else {
                continue;
            };
            let start = from + at;
            let end = start + stop.len();
            if best.as_ref().is_none_or(|best| end < best.end) {
                best = Some(Found { index, start, end });
            }
        }
        best
    }

    /// Appends what is certain, and forgets what is no longer needed.
    fn give(&mut self, finished: bool, out: &mut String) {
        let held = if finished || self.stop.include {
            0
        } else {
            self.stop.reach
        };
        let certain = back(&self.text, self.text.len(), held);
        if self.given < certain {
            out.push_str(&self.text[self.given..certain]);
            self.given = certain;
        }
        let needed = back(&self.text, self.text.len(), self.stop.reach).min(self.given);
        self.text.drain(..needed);
        self.given -= needed;
    }
}

#[derive(Debug)]
struct Found {
    index: usize,
    start: usize,
    end: usize,
}

/// Returns the byte index `chars` characters before byte index `from`, or 0.
fn back(text: &str, from: usize, chars: usize) -> usize {
    match chars.checked_sub(1) {
        None => from,
        Some(nth) => text[..from]
            .char_indices()
            .nth_back(nth)
            .map_or(0, |(index, _)| index),
    }
}
