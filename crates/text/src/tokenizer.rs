//! The tokenizer: a Hugging Face `tokenizer.json` with what its configuration adds, behind a cache.

use std::sync::Arc;

use stator_common::code::Code;
use tokenizers::Tokenizer as HfTokenizer;

use crate::detokenizer::{DetokenizeOptions, Detokenizer};
use crate::encoder::{Encoder, NotFaster};
use crate::files::{Additions, ModelFiles, SpecialTokens, generation_eos_ids};
use crate::load::{Frame, add_tokens, frame, is_byte_level, space_marker};
use crate::segments::{Remembered, Segment, SegmentCache, Segmenter};
use crate::vocab::{Piece, Vocab, token_string};

/// Bytes from which looking for remembered segments is cheaper than encoding fast.
const WORTH_CUTTING: usize = 16 << 10;

/// Turns text into token ids and back. Cheap to clone; clones share the cache.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    encoder: Encoder,
    special: SpecialTokens,
    max_id: u32,
    vocab_size: usize,
    /// Present if the decoder is byte-level.
    vocab: Option<Vocab>,
    /// The character that stands for a leading space, where single tokens lose it in decoding.
    space_marker: Option<char>,
    segments: Option<Segments>,
}

#[derive(Debug)]
struct Segments {
    segmenter: Segmenter,
    remembered: Remembered,
    /// The ids that `add_special_tokens` puts around any text; `None` if they are not the same for all.
    frame: Option<Frame>,
}

/// Why a tokenizer could not be made of a model's files.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A file is not the JSON that it should be.
    #[error("{file}: {reason}")]
    Json {
        /// The file's name.
        file: &'static str,
        /// What the parser says.
        reason: String,
    },
    /// A field has a value that makes no sense.
    #[error("{file}: {field} is not valid")]
    Field {
        /// The file's name.
        file: &'static str,
        /// The field's path.
        field: String,
    },
    /// A token of the configuration cannot be added.
    #[error("add the tokens of tokenizer_config.json: {reason}")]
    Add {
        /// What the tokenizer says.
        reason: String,
    },
}

impl LoadError {
    /// Returns the code that a client sees: none of this is its fault.
    pub fn code(&self) -> Code {
        match self {
            Self::Json { .. } | Self::Field { .. } | Self::Add { .. } => Code::Internal,
        }
    }
}

/// Why a text could not be tokenized, or tokens not be decoded.
#[derive(Debug, thiserror::Error)]
pub enum TokenizerError {
    /// The tokenizer's own pipeline failed.
    #[error("tokenize: {reason}")]
    Encode {
        /// What the tokenizer says.
        reason: String,
    },
    /// The tokenizer's decoder failed.
    #[error("detokenize: {reason}")]
    Decode {
        /// What the tokenizer says.
        reason: String,
    },
}

impl TokenizerError {
    /// Returns the code that a client sees. What fails is a text that this tokenizer cannot express (an
    /// unknown word without an `unk` token, say).
    pub fn code(&self) -> Code {
        match self {
            Self::Encode { .. } => Code::InvalidRequest,
            Self::Decode { .. } => Code::Internal,
        }
    }
}

impl Tokenizer {
    /// Makes a tokenizer of a model's files.
    ///
    /// Takes up to a second for a large vocabulary.
    ///
    /// # Errors
    /// [`LoadError`] if a file is malformed.
    pub fn from_files(files: &ModelFiles<'_>, cache: SegmentCache) -> Result<Self, LoadError> {
        let mut tokenizer =
            HfTokenizer::from_bytes(files.tokenizer_json).map_err(|error| LoadError::Json {
                file: "tokenizer.json",
                reason: error.to_string(),
            })?;
        // Limits in the file are a training set-up; transformers switches them off per call, too.
        tokenizer
            .with_truncation(None)
            .map_err(|error| LoadError::Add {
                reason: error.to_string(),
            })?
            .with_padding(None);
        let additions = Additions::parse(files)?;
        add_tokens(&mut tokenizer, &additions)?;

        let id = |name: &str| {
            let token = &additions.named.iter().find(|(known, _)| known == name)?.1;
            tokenizer.token_to_id(&token.content)
        };
        let special = SpecialTokens {
            bos_id: id("bos_token"),
            eos_id: id("eos_token"),
            pad_id: id("pad_token"),
            generation_eos_ids: generation_eos_ids(files)?,
            by_name: additions
                .named
                .into_iter()
                .map(|(name, token)| (name, token.content))
                .collect(),
        };
        let max_id = tokenizer.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab = match is_byte_level(tokenizer.get_decoder()) {
            true => Vocab::byte_level(&tokenizer, max_id),
            false => None,
        };
        let segments = match cache.bytes {
            0 => None,
            _ => Segmenter::new(&tokenizer).map(|segmenter| Segments {
                segmenter,
                remembered: Remembered::new(cache),
                frame: frame(&tokenizer),
            }),
        };
        Ok(Self {
            inner: Arc::new(Inner {
                special,
                max_id,
                vocab_size: tokenizer.get_vocab_size(true),
                vocab,
                space_marker: tokenizer.get_pre_tokenizer().and_then(space_marker),
                segments,
                encoder: Encoder::new(tokenizer),
            }),
        })
    }

    /// Returns the token ids of `text`.
    ///
    /// - `add_special_tokens`: put around the text what the model's post-processor does (`<s>`), as for a plain
    ///   completion; a rendered chat template has it already.
    ///
    /// Costs about a microsecond per new token, and far less for segments seen before or after
    /// [`Self::speed_up`]; a long prompt belongs off the async threads.
    ///
    /// # Errors
    /// [`TokenizerError::Encode`].
    pub fn encode(&self, text: &str, add_special_tokens: bool) -> Result<Vec<u32>, TokenizerError> {
        if text.len() < WORTH_CUTTING
            && let Some(ids) = self.inner.encoder.encode_fast(text, add_special_tokens)
        {
            return Ok(ids);
        }
        let Some(segments) = &self.inner.segments else {
            return self.inner.encoder.encode(text, add_special_tokens);
        };
        let frame = match (&segments.frame, add_special_tokens) {
            (_, false) => None,
            (Some(frame), true) => Some(frame),
            (None, true) => return self.inner.encoder.encode(text, true),
        };
        let cut = segments.segmenter.cut(text);
        let mut ids = Vec::with_capacity(text.len() / 3 + 8);
        ids.extend(frame.iter().flat_map(|frame| &frame.before));
        self.encode_segments(&segments.remembered, &cut, &mut ids)?;
        ids.extend(frame.iter().flat_map(|frame| &frame.after));
        Ok(ids)
    }

    /// Puts a faster implementation in use, for this and all clones, once it is loaded and has shown that it
    /// answers alike. Texts are encoded meanwhile.
    ///
    /// Takes up to seconds of computing for a large vocabulary: a thread of its own should call it.
    ///
    /// # Errors
    /// [`NotFaster`]; all is as before.
    pub fn speed_up(&self) -> Result<(), NotFaster> {
        self.inner.encoder.speed_up()
    }

    fn encode_segments(
        &self,
        remembered: &Remembered,
        cut: &[Segment<'_>],
        ids: &mut Vec<u32>,
    ) -> Result<(), TokenizerError> {
        let keys: Vec<u128> = cut
            .iter()
            .filter_map(|segment| match segment {
                Segment::Text(text) => Some(remembered.key(text)),
                Segment::Token(_) => None,
            })
            .collect();
        let mut known = keys.iter().zip(remembered.get(&keys));
        let mut new = Vec::new();
        for segment in cut {
            let text = match segment {
                Segment::Token(id) => {
                    ids.push(*id);
                    continue;
                }
                Segment::Text(text) => text,
            };
            match known.next() {
                Some((_, Some(segment))) => ids.extend_from_slice(&segment),
                Some((key, None)) => {
                    let segment: Arc<[u32]> = self.inner.encoder.encode(text, false)?.into();
                    ids.extend_from_slice(&segment);
                    new.push((*key, segment));
                }
                None => ids.extend(self.inner.encoder.encode(text, false)?),
            }
        }
        if !new.is_empty() {
            remembered.put(new);
        }
        Ok(())
    }

    /// Returns the text of `tokens`, invalid UTF-8 replaced by U+FFFD. Ids that name no token are left out.
    ///
    /// # Errors
    /// [`TokenizerError::Decode`], by decoders other than byte-level ones.
    pub fn decode(
        &self,
        tokens: &[u32],
        skip_special_tokens: bool,
    ) -> Result<String, TokenizerError> {
        let Some(vocab) = &self.inner.vocab else {
            return self
                .hf()
                .decode(tokens, skip_special_tokens)
                .map_err(|error| TokenizerError::Decode {
                    reason: error.to_string(),
                });
        };
        let mut bytes = Vec::with_capacity(tokens.len() * 4);
        for token in tokens {
            bytes.extend_from_slice(
                vocab
                    .piece(*token, skip_special_tokens)
                    .map_or(&[], Piece::as_bytes),
            );
        }
        Ok(match String::from_utf8(bytes) {
            Ok(text) => text,
            Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        })
    }

    /// Returns the text of one token on its own, a leading space kept; empty for an id without a token.
    /// Part of a character comes out as U+FFFD; [`LogprobTexts`](crate::LogprobTexts) knows better.
    pub fn token_text(&self, token: u32) -> String {
        // vLLM: tokenizers/detokenizer_utils.py::convert_ids_list_to_tokens.
        let text = self.decode(&[token], false).unwrap_or_default();
        let Some(marker) = self.inner.space_marker else {
            return text;
        };
        let raw = self.token_name(token).unwrap_or_default();
        let markers = raw.chars().take_while(|c| *c == marker).count();
        let spaces = text.chars().take_while(|c| *c == ' ').count();
        match markers.checked_sub(spaces) {
            None | Some(0) => text,
            Some(missing) => " ".repeat(missing) + &text,
        }
    }

    /// Returns the bytes of one token where the tokenizer is byte-level, else those of its text.
    pub fn token_bytes(&self, token: u32) -> Vec<u8> {
        match &self.inner.vocab {
            Some(vocab) => vocab
                .piece(token, false)
                .map_or_else(Vec::new, |piece| piece.as_bytes().to_vec()),
            None => self.token_text(token).into_bytes(),
        }
    }

    /// Returns the token as the vocabulary writes it (`Ġthe`).
    pub fn token_name(&self, token: u32) -> Option<String> {
        token_string(self.hf(), token)
    }

    /// Returns the id of a token as the vocabulary writes it.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.hf().token_to_id(name)
    }

    /// Returns the number of tokens, added ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.vocab_size
    }

    /// Returns the largest id; with gaps in the vocabulary it is more than [`Self::vocab_size`] - 1.
    pub fn max_id(&self) -> u32 {
        self.inner.max_id
    }

    /// Returns the special tokens by name and the ones that end a generation.
    pub fn special(&self) -> &SpecialTokens {
        &self.inner.special
    }

    /// Says whether a token is special: left out where `skip_special_tokens` is asked for.
    pub fn is_special(&self, token: u32) -> bool {
        let added = self.hf().get_added_vocabulary();
        added
            .simple_id_to_token(token)
            .is_some_and(|name| added.is_special_token(&name))
    }

    /// Says whether repeated segments are remembered, or every text is encoded whole because cutting would
    /// not be exact.
    pub fn remembers_segments(&self) -> bool {
        self.inner.segments.is_some()
    }

    /// Returns a detokenizer for the text that follows `prompt`.
    pub fn detokenizer(&self, prompt: &[u32], options: DetokenizeOptions) -> Detokenizer {
        Detokenizer::new(self.clone(), prompt, options)
    }

    pub(crate) fn vocab(&self) -> Option<&Vocab> {
        self.inner.vocab.as_ref()
    }

    pub(crate) fn hf(&self) -> &HfTokenizer {
        self.inner.encoder.hf()
    }
}
