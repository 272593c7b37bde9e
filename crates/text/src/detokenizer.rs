//! Text from a stream of tokens, as it grows.
//!
//! What comes out is what tokenizers' `DecodeStream` gives, and so what vLLM's
//! `FastIncrementalDetokenizer` streams (`v1/engine/detokenizer.py`): text is held back while it ends in U+FFFD,
//! because the next token may complete the character. For byte-level tokenizers that comes down to
//! appending bytes and looking at the seam; the others go through the library's own step, which decodes
//! a window of tokens twice per token.
//!
//! One difference is on purpose: where the prompt ends inside a character, `DecodeStream` gives the whole prompt out
//! again once the character is complete. Here only that character comes out.

use tokenizers::DecodeStreamError;

use crate::tokenizer::{Tokenizer, TokenizerError};
use crate::vocab::Piece;

/// Tokens of the prompt that prime a decoder that looks at its surroundings. Decoders look back one
/// token, and over a run of byte tokens, at most 4 per character; the rest is margin.
const PRIMING_TOKENS: usize = 32;

/// How tokens become text.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DetokenizeOptions {
    /// Leave special tokens (`<|im_end|>`) out.
    pub skip_special_tokens: bool,
    /// Keep the spaces that a decoder puts between added tokens. Matters only where special tokens are kept.
    pub spaces_between_special_tokens: bool,
}

impl Default for DetokenizeOptions {
    fn default() -> Self {
        Self {
            skip_special_tokens: true,
            spaces_between_special_tokens: true,
        }
    }
}

/// Turns the tokens of one stream into text, piece by piece.
#[derive(Debug)]
pub struct Detokenizer {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Of two added tokens in a row, write the second as it is named. `None`: decode it like any other.
    raw_added: Option<RawAdded>,
    state: State,
}

#[derive(Debug, Default)]
struct RawAdded {
    last_was_added: bool,
}

#[derive(Debug)]
enum State {
    Bytes(Seam),
    Library(Window),
}

impl Detokenizer {
    pub(crate) fn new(tokenizer: Tokenizer, prompt: &[u32], options: DetokenizeOptions) -> Self {
        let skip_special = options.skip_special_tokens;
        let raw_added =
            (!skip_special && !options.spaces_between_special_tokens).then(RawAdded::default);
        let state = match tokenizer.vocab() {
            Some(_) => State::Bytes(Seam::after(&tokenizer, prompt, skip_special)),
            None => State::Library(Window::after(&tokenizer, prompt, skip_special)),
        };
        Self {
            tokenizer,
            skip_special,
            raw_added,
            state,
        }
    }

    /// Appends to `out` the text that `tokens` complete. Never part of a character.
    ///
    /// Text that ends inside a character (or in U+FFFD) is held until a later token decides it; at the end of
    /// a stream it is dropped, as vLLM does.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`], by decoders other than byte-level ones.
    pub fn push(&mut self, tokens: &[u32], out: &mut String) -> Result<(), TokenizerError> {
        tokens
            .iter()
            .try_for_each(|token| self.push_one(*token, out))
    }

    /// Appends the text that one token completes.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`], by decoders other than byte-level ones.
    #[inline]
    pub fn push_one(&mut self, token: u32, out: &mut String) -> Result<(), TokenizerError> {
        let start = out.len();
        match &mut self.state {
            State::Bytes(seam) => {
                let piece = self
                    .tokenizer
                    .vocab()
                    .and_then(|vocab| vocab.piece(token, self.skip_special));
                match piece {
                    Some(Piece::Text(text)) if seam.is_clean() => out.push_str(text),
                    Some(piece) => seam.push(piece.as_bytes(), out),
                    None => {}
                }
            }
            State::Library(window) => {
                window.step(&self.tokenizer, token, self.skip_special, out)?;
            }
        }
        if let Some(raw) = &mut self.raw_added {
            let added = self
                .tokenizer
                .hf()
                .get_added_vocabulary()
                .get_added_tokens_decoder();
            let content = added.get(&token).map(|token| token.content.as_str());
            if let (Some(content), true) = (content, raw.last_was_added) {
                out.truncate(start);
                out.push_str(content);
            }
            raw.last_was_added = content.is_some();
        }
        Ok(())
    }
}

/// Bytes on their way to text, decoded as `String::from_utf8_lossy` would decode all of them at once.
#[derive(Debug, Default)]
struct Seam {
    /// Decoded, but held because it ends in U+FFFD or is followed by `tail`.
    held: String,
    /// The start of a character: 0 to 3 bytes.
    tail: [u8; 3],
    tail_len: u8,
}

impl Seam {
    /// Starts after a prompt, which may end inside a character.
    fn after(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Self {
        let Some(vocab) = tokenizer.vocab() else {
            return Self::default();
        };
        let mut last = [0_u8; 3];
        let mut known = 0;
        for token in prompt.iter().rev() {
            let piece = vocab
                .piece(*token, skip_special)
                .map_or(&[][..], Piece::as_bytes);
            for byte in piece.iter().rev().take(3 - known) {
                known += 1;
                last[3 - known] = *byte;
            }
            if known == 3 {
                break;
            }
        }
        let mut seam = Self::default();
        for len in (1..=known).rev() {
            if is_start_of_character(&last[3 - len..]) {
                seam.set_tail(&last[3 - len..]);
                break;
            }
        }
        seam
    }

    #[inline]
    fn is_clean(&self) -> bool {
        self.tail_len == 0 && self.held.is_empty()
    }

    fn push(&mut self, bytes: &[u8], out: &mut String) {
        if bytes.is_empty() {
            return;
        }
        let tail_len = usize::from(std::mem::take(&mut self.tail_len));
        if tail_len == 0 {
            self.decode(bytes);
        } else {
            // The character that the tail begins may need up to 3 bytes of this token.
            let mut joined = Vec::with_capacity(tail_len + bytes.len());
            joined.extend_from_slice(&self.tail[..tail_len]);
            joined.extend_from_slice(bytes);
            self.decode(&joined);
        }
        if self.tail_len == 0 && !self.held.ends_with(char::REPLACEMENT_CHARACTER) {
            out.push_str(&self.held);
            self.held.clear();
        }
    }

    fn decode(&mut self, bytes: &[u8]) {
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            self.held.push_str(chunk.valid());
            let invalid = chunk.invalid();
            if chunks.peek().is_none() && is_start_of_character(invalid) {
                self.set_tail(invalid);
            } else if !invalid.is_empty() {
                self.held.push(char::REPLACEMENT_CHARACTER);
            }
        }
    }

    fn set_tail(&mut self, bytes: &[u8]) {
        self.tail[..bytes.len()].copy_from_slice(bytes);
        self.tail_len = bytes.len() as u8;
    }
}

/// Says whether more bytes could make one character of these.
fn is_start_of_character(bytes: &[u8]) -> bool {
    match std::str::from_utf8(bytes) {
        Ok(_) => false,
        Err(error) => error.valid_up_to() == 0 && error.error_len().is_none(),
    }
}

/// The state of tokenizers' `DecodeStream`, kept here because the library's own borrows its tokenizer.
#[derive(Debug, Default)]
struct Window {
    ids: Vec<u32>,
    prefix: String,
    prefix_index: usize,
}

impl Window {
    fn after(tokenizer: &Tokenizer, prompt: &[u32], skip_special: bool) -> Self {
        let ids = prompt[prompt.len().saturating_sub(PRIMING_TOKENS)..].to_vec();
        // A prompt that ends inside a character: what is before it is the prefix.
        for len in (ids.len().saturating_sub(4)..=ids.len()).rev() {
            match tokenizer.hf().decode(&ids[..len], skip_special) {
                Ok(prefix) if !prefix.ends_with(char::REPLACEMENT_CHARACTER) => {
                    return Self {
                        ids,
                        prefix,
                        prefix_index: len,
                    };
                }
                _ => {}
            }
        }
        Self::default()
    }

    fn step(
        &mut self,
        tokenizer: &Tokenizer,
        token: u32,
        skip_special: bool,
        out: &mut String,
    ) -> Result<(), TokenizerError> {
        for attempt in 0..2 {
            let result = tokenizers::step_decode_stream(
                tokenizer.hf(),
                vec![token],
                skip_special,
                &mut self.ids,
                &mut self.prefix,
                &mut self.prefix_index,
            );
            match result {
                Ok(text) => {
                    out.extend(text);
                    return Ok(());
                }
                // vLLM starts over from this token (vllm-project/vllm#17448).
                Err(error) if attempt == 0 && error.is::<DecodeStreamError>() => {
                    *self = Self::default();
                }
                Err(error) => {
                    return Err(TokenizerError::Decode {
                        reason: error.to_string(),
                    });
                }
            }
        }
        Ok(())
    }
}
