//! A flat table from token id to what the token says, built once per tokenizer.
//!
//! Byte-level tokenizers write each byte of a text as one printable character; decoding is a table
//! look-up per token and one UTF-8 check at the seams. The tokenizers crate does this with several
//! allocations per token, which is most of the cost of a streamed token.

use tokenizers::Tokenizer as HfTokenizer;

/// More ids than any vocabulary has; a larger one is a broken file.
const MAX_IDS: u32 = 16 << 20;

/// What each token says, as bytes. Only for tokenizers whose decoder is byte-level.
#[derive(Debug)]
pub(crate) struct Vocab {
    entries: Vec<Entry>,
    /// The texts of tokens that are whole characters.
    text: String,
    /// The bytes of tokens that are not.
    raw: Vec<u8>,
}

#[derive(Clone, Copy, Debug, Default)]
struct Entry {
    start: u32,
    len: u32,
    is_text: bool,
    special: bool,
}

/// One token's content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// Whole characters, the last of which is not U+FFFD; never empty.
    Text(&'a str),
    /// Any bytes, possibly none.
    Bytes(&'a [u8]),
}

impl<'a> Piece<'a> {
    pub(crate) fn as_bytes(self) -> &'a [u8] {
        match self {
            Piece::Text(text) => text.as_bytes(),
            Piece::Bytes(bytes) => bytes,
        }
    }
}

impl Vocab {
    /// Builds the table. `None` if the vocabulary is larger than any real one.
    pub(crate) fn byte_level(tokenizer: &HfTokenizer, max_id: u32) -> Option<Self> {
        if max_id >= MAX_IDS {
            return None;
        }
        let added = tokenizer.get_added_vocabulary();
        let bytes_of = byte_alphabet();
        let mut vocab = Self {
            entries: Vec::new(),
            text: String::new(),
            raw: Vec::new(),
        };
        let mut bytes = Vec::new();
        for id in 0..=max_id {
            let Some(token) = token_string(tokenizer, id) else {
                vocab.entries.push(Entry::default());
                continue;
            };
            bytes.clear();
            // A token with a character outside the alphabet stands for itself.
            let known = token.chars().all(|c| match bytes_of.get(c as usize) {
                Some(Some(byte)) => {
                    bytes.push(*byte);
                    true
                }
                _ => false,
            });
            if !known {
                bytes.clear();
                bytes.extend_from_slice(token.as_bytes());
            }
            vocab.push(&bytes, added.is_special_token(&token));
        }
        Some(vocab)
    }

    fn push(&mut self, bytes: &[u8], special: bool) {
        let len = bytes.len() as u32;
        let entry = match std::str::from_utf8(bytes) {
            Ok(text) if !text.is_empty() && !text.ends_with(char::REPLACEMENT_CHARACTER) => {
                let start = self.text.len() as u32;
                self.text.push_str(text);
                Entry {
                    start,
                    len,
                    is_text: true,
                    special,
                }
            }
            _ => {
                let start = self.raw.len() as u32;
                self.raw.extend_from_slice(bytes);
                Entry {
                    start,
                    len,
                    is_text: false,
                    special,
                }
            }
        };
        self.entries.push(entry);
    }

    /// Returns what a token says; `None` for an id without a token, and for a special token when those
    /// are skipped.
    #[inline]
    pub(crate) fn piece(&self, id: u32, skip_special: bool) -> Option<Piece<'_>> {
        let entry = *self.entries.get(id as usize)?;
        if entry.special && skip_special {
            return None;
        }
        let range = entry.start as usize..(entry.start + entry.len) as usize;
        Some(if entry.is_text {
            Piece::Text(&self.text[range])
        } else {
            Piece::Bytes(&self.raw[range])
        })
    }
}

/// Returns the string under which the decoder sees a token.
pub(crate) fn token_string(tokenizer: &HfTokenizer, id: u32) -> Option<String> {
    use tokenizers::Model;
    tokenizer
        .get_added_vocabulary()
        .simple_id_to_token(id)
        .or_else(|| tokenizer.get_model().id_to_token(id))
}

/// Returns, by code point, the byte that a character of the GPT-2 alphabet stands for.
///
/// Printable Latin-1 stands for itself; the other 68 bytes follow from U+0100 in order
/// (openai/gpt-2, `encoder.py::bytes_to_unicode`).
fn byte_alphabet() -> Vec<Option<u8>> {
    let mut table = vec![None; 256 + 68];
    let mut next = 256;
    for byte in 0..=255_u8 {
        if matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF) {
            table[usize::from(byte)] = Some(byte);
        } else {
            table[next] = Some(byte);
            next += 1;
        }
    }
    table
}
