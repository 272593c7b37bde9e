//! What a tokenizer's files leave to be found out once it is loaded.

use tokenizers::{DecoderWrapper, PreTokenizerWrapper, Tokenizer as HfTokenizer};

use crate::encoder;
use crate::files::Additions;
use crate::tokenizer::LoadError;

/// The ids that `add_special_tokens` puts around any text.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Frame {
    pub(crate) before: Vec<u32>,
    pub(crate) after: Vec<u32>,
}

/// Adds what `tokenizer_config.json` says and `tokenizer.json` lacks, in transformers' order.
pub(crate) fn add_tokens(
    tokenizer: &mut HfTokenizer,
    additions: &Additions,
) -> Result<(), LoadError> {
    tokenizer.set_encode_special_tokens(additions.split_special_tokens);
    let known = tokenizer.get_added_tokens_decoder();
    let mut tokens: Vec<_> = additions
        .added
        .values()
        .filter(|token| !known.values().any(|k| k == *token))
        .cloned()
        .collect();
    for token in additions
        .named
        .iter()
        .map(|(_, token)| token)
        .chain(&additions.extra)
    {
        let content = &token.content;
        if !known
            .values()
            .chain(&tokens)
            .any(|known| known.content == *content)
        {
            tokens.push(token.clone());
        }
    }
    for token in &mut tokens {
        token.special |= additions
            .named
            .iter()
            .any(|(_, named)| named.content == token.content);
    }
    if !tokens.is_empty() {
        tokenizer
            .add_tokens(tokens)
            .map_err(|error| LoadError::Add {
                reason: error.to_string(),
            })?;
    }
    Ok(())
}

/// Says whether tokens decode to bytes one by one.
pub(crate) fn is_byte_level(decoder: Option<&DecoderWrapper>) -> bool {
    match decoder {
        Some(DecoderWrapper::ByteLevel(_)) => true,
        Some(DecoderWrapper::Sequence(sequence)) => {
            matches!(sequence.get_decoders(), [DecoderWrapper::ByteLevel(_)])
        }
        _ => false,
    }
}

/// Returns the character that stands for a leading space, where the pre-tokenizer writes one.
///
/// vLLM: tokenizers/detokenizer_utils.py::get_leading_space_marker.
pub(crate) fn space_marker(pre_tokenizer: &PreTokenizerWrapper) -> Option<char> {
    match pre_tokenizer {
        PreTokenizerWrapper::Metaspace(metaspace) => Some(metaspace.get_replacement()),
        PreTokenizerWrapper::Sequence(sequence) => {
            sequence.as_ref().iter().find_map(|inner| match inner {
                PreTokenizerWrapper::Metaspace(metaspace) => Some(metaspace.get_replacement()),
                _ => None,
            })
        }
        _ => None,
    }
}

/// Finds out what `add_special_tokens` puts around a text, by two texts that have nothing in common.
pub(crate) fn frame(tokenizer: &HfTokenizer) -> Option<Frame> {
    let probe = |text: &str| {
        let plain = encoder::encode(tokenizer, text, false).ok()?;
        let framed = encoder::encode(tokenizer, text, true).ok()?;
        let at = framed
            .windows(plain.len().max(1))
            .position(|window| window == plain)?;
        Some(Frame {
            before: framed[..at].to_vec(),
            after: framed[at + plain.len()..].to_vec(),
        })
    };
    let first = probe("The quick brown fox")?;
    (probe("0123, 4567")? == first).then_some(first)
}
