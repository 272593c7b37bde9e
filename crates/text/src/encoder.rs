//! From text to token ids, by the fastest implementation that answers as Hugging Face's does.
//!
//! `tokenizers` is the measure, and all that is needed to start with. `fastokens` computes the same some fifty
//! times faster, but takes seconds to load a large vocabulary, and does not know every kind of
//! tokenizer. So it is loaded beside the first ([`Encoder::speed_up`]), compared with it on texts made to find
//! differences, and used from then on; where it refuses the tokenizer or differs once, it is not used, and after a
//! panic not any more.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use tokenizers::{ModelWrapper, Tokenizer as HfTokenizer};

use crate::tokenizer::TokenizerError;

/// Ids of the vocabulary, evenly spread, whose texts are compared.
const SAMPLED_IDS: usize = 3000;

/// Added tokens that are compared each in several surroundings; models have some hundreds at most, nearly all
/// alike.
const COMPARED_ADDED: usize = 300;

/// What tokenizers treat differently: scripts, contractions, digits in rows, white space of all kinds at all places,
/// characters with several forms, marks that join, long runs.
const PROBES: &[&str] = &[
    "Hello, world! It's what we've said; they'll say I'D, WE'RE, don't 's 't 'll",
    "def f(x):\n    return {\"a\": [1, 22, 333, 4444, 55555], 'b': x ** 2}  # done\n\n\n\tend",
    "1234567890 1,234.56 0x1F 3.14e-10 ½ ٣٤ १२३ ➀ Ⅷ x² 12:34:56 2026-11-22T10:00:00Z",
    " a  b   c    d\t\te \n f\n\ng\r\nh\r i\u{a0}j\u{3000}k\u{2009}l\u{85}m\u{2028}n \n \n  ",
    "naïve café, straße, señor, déjà vu, Ελληνικά, Привет мир, שלום עולם, مرحبا بالعالم, हिन्दी भाषा",
    "你好，世界！机器学习 こんにちは、東京の天気 カタカナ 한국어 문장입니다 ภาษาไทย Tiếng Việt",
    "🙂🚀🎉 👩\u{200d}🔬 👍🏽 🇩🇪 e\u{301} é ﬁ ﬀ ǅ İi ß ẞ \u{fffd} \u{feff}x \u{200b} a\u{300}\u{316}b \u{1f469}\u{200d}\u{1f4bb}",
    "!!! ??? ... --- === *** ### ((())) [[[]]] {{{}}} <<<>>> //// \\\\\\ ||| &&& $$$ %%% @@@ ~~~ ``` \"\"\" ''' ::: ;;; ,,,",
    "https://example.org/a/b?c=d&e=f#g user@example.org C:\\dir\\file.txt snake_case camelCase SCREAMING_CASE kebab-case",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "                                                                                                             x",
    "\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\n\nx\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\t\u{0}\u{1}\u{7f}\u{9f}",
    "antidisestablishmentarianism pneumonoultramicroscopicsilicovolcanoconiosis Donaudampfschifffahrtsgesellschaft",
    "▁ ▁▁a Ġ Ċ <0x0A> <|im|> <|im_ <|im_start <s </s <unk [INST [/INST] <｜ <think",
    " leading",
    "trailing ",
    "",
    " ",
    "\n",
    "a",
    "é",
    "🙂",
    "'",
    "\u{301}",
];

/// Why the slower implementation stays.
#[derive(Debug, thiserror::Error)]
pub enum NotFaster {
    /// Its answers are random or it takes special tokens for text.
    #[error("the tokenizer's settings are not supported")]
    Settings,
    /// The faster implementation cannot be built.
    #[error("load it: {reason}")]
    Load {
        /// What it says.
        reason: String,
    },
    /// It answers differently.
    #[error("its tokens of {text:?} differ")]
    Differs {
        /// A text that shows it.
        text: String,
    },
}

/// Encodes text with one tokenizer.
#[derive(Debug)]
pub(crate) struct Encoder {
    exact: HfTokenizer,
    fast: OnceLock<Fast>,
}

impl Encoder {
    pub(crate) fn new(exact: HfTokenizer) -> Self {
        Self {
            exact,
            fast: OnceLock::new(),
        }
    }

    /// Returns the tokenizer behind it.
    pub(crate) fn hf(&self) -> &HfTokenizer {
        &self.exact
    }

    /// Returns the ids of a text.
    pub(crate) fn encode(
        &self,
        text: &str,
        add_special_tokens: bool,
    ) -> Result<Vec<u32>, TokenizerError> {
        match self.encode_fast(text, add_special_tokens) {
            Some(ids) => Ok(ids),
            None => encode(&self.exact, text, add_special_tokens),
        }
    }

    /// Returns the ids of a text if the faster implementation is in use.
    pub(crate) fn encode_fast(&self, text: &str, add_special_tokens: bool) -> Option<Vec<u32>> {
        self.fast.get()?.encode(text, add_special_tokens)
    }

    /// Loads the faster implementation and puts it in use if it answers alike.
    ///
    /// Takes up to seconds for a large vocabulary; texts are encoded meanwhile.
    pub(crate) fn speed_up(&self) -> Result<(), NotFaster> {
        if self.fast.get().is_some() {
            return Ok(());
        }
        let random =
            matches!(self.exact.get_model(), ModelWrapper::BPE(bpe) if bpe.dropout.is_some());
        if random || self.exact.get_encode_special_tokens() {
            return Err(NotFaster::Settings);
        }
        let fast = Fast::load(&self.exact)?;
        self.compare(&fast)?;
        // Somebody else may have been sooner; theirs is as good.
        let _ = self.fast.set(fast);
        Ok(())
    }

    fn compare(&self, fast: &Fast) -> Result<(), NotFaster> {
        let alike = |text: &str| {
            [false, true].into_iter().all(|special| {
                let exact = encode(&self.exact, text, special).ok();
                exact.is_some() && exact == fast.encode(text, special)
            })
        };
        let check = |text: &str| match alike(text) {
            true => Ok(()),
            false => Err(NotFaster::Differs {
                text: text.to_owned(),
            }),
        };
        for probe in PROBES {
            check(probe)?;
        }
        check(&PROBES.concat())?;
        check(&PROBES.join("\n"))?;
        self.added_tokens().try_for_each(|token| {
            check(&token)?;
            check(&format!(
                "x{token}{token}y {token} Z\n{token}\n {}",
                &token[..token.len() / 2]
            ))
        })?;
        let sample = self.sampled_texts();
        // As single words and as one text without seams.
        sample.chunks(50).try_for_each(|words| {
            check(&words.join(" "))?;
            check(&words.concat())
        })
    }

    fn added_tokens(&self) -> impl Iterator<Item = String> {
        let added = self.exact.get_added_vocabulary().get_added_tokens_decoder();
        let mut contents: Vec<_> = added
            .values()
            // Cut in the middle by the caller, so the middle must be a seam.
            .filter(|token| token.content.is_char_boundary(token.content.len() / 2))
            .map(|token| token.content.clone())
            .collect();
        contents.sort_unstable();
        contents.into_iter().take(COMPARED_ADDED)
    }

    fn sampled_texts(&self) -> Vec<String> {
        let size = self.exact.get_vocab_size(true);
        (0..size)
            .step_by(size.div_ceil(SAMPLED_IDS).max(1))
            .filter_map(|id| self.exact.decode(&[id as u32], false).ok())
            .collect()
    }
}

/// Encodes with `tokenizers`.
pub(crate) fn encode(
    tokenizer: &HfTokenizer,
    text: &str,
    add_special_tokens: bool,
) -> Result<Vec<u32>, TokenizerError> {
    // `encode_fast` leaves out the offsets that nobody reads.
    let encoding = tokenizer
        .encode_fast(text, add_special_tokens)
        .map_err(|error| TokenizerError::Encode {
            reason: error.to_string(),
        })?;
    Ok(encoding.get_ids().to_vec())
}

struct Fast {
    tokenizer: fastokens::Tokenizer,
    /// A text made it panic: what it keeps between texts may be half written.
    broken: AtomicBool,
}

impl std::fmt::Debug for Fast {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Fast")
            .field("broken", &self.broken)
            .finish_non_exhaustive()
    }
}

impl Fast {
    /// Loads what `exact` is now: with tokens that were added to its file's.
    fn load(exact: &HfTokenizer) -> Result<Self, NotFaster> {
        let failed = |reason: String| NotFaster::Load { reason };
        let json = exact.to_string(false).map_err(|e| failed(e.to_string()))?;
        let json = serde_json::from_str(&json).map_err(|e| failed(e.to_string()))?;
        let tokenizer = unwinding(|| fastokens::Tokenizer::from_json(json))
            .ok_or_else(|| failed("it panicked".to_owned()))?
            .map_err(|e| failed(e.to_string()))?;
        Ok(Self {
            tokenizer,
            broken: AtomicBool::new(false),
        })
    }

    /// Returns `None` where it fails, with whatever reason.
    fn encode(&self, text: &str, add_special_tokens: bool) -> Option<Vec<u32>> {
        if self.broken.load(Ordering::Relaxed) {
            return None;
        }
        let encoded = unwinding(|| {
            self.tokenizer
                .encode_with_special_tokens(text, add_special_tokens)
        });
        if encoded.is_none() {
            self.broken.store(true, Ordering::Relaxed);
        }
        encoded?.ok()
    }
}

/// Returns `None` if it panicked.
fn unwinding<T>(work: impl FnOnce() -> T) -> Option<T> {
    catch_unwind(AssertUnwindSafe(work)).ok()
}
