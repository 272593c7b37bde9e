//! The faster encoder answers as `tokenizers` does, for the ways in which known models cut text into words.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod support;

use std::sync::LazyLock;

use proptest::prelude::*;
use serde_json::{Value, json};
use stator_text::{ModelFiles, NotFaster, SegmentCache, Tokenizer};
use support::{cases, json as golden, tokenizer};

/// Bytes from which a text is cut at its added tokens first; texts of both kinds are tried.
const LONG: usize = 20 << 10;

/// Pre-tokenizers of model families, as their `tokenizer.json` writes them.
fn pre_tokenizers() -> Vec<(&'static str, Value)> {
    let split = |regex: &str| json!({"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": false});
    let bytes = |use_regex: bool| json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex});
    let sequence = |splits: &[&str]| {
        let mut all: Vec<Value> = splits.iter().map(|regex| split(regex)).collect();
        all.push(bytes(false));
        json!({"type": "Sequence", "pretokenizers": all})
    };
    vec![
        ("gpt2", bytes(true)),
        (
            "llama3",
            sequence(&[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ]),
        ),
        (
            "qwen2",
            sequence(&[
                r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ]),
        ),
        (
            "o200k",
            sequence(&[
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ]),
        ),
        (
            "tekken",
            sequence(&[
                r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
            ]),
        ),
        (
            "deepseek_v3",
            sequence(&[
                r"\p{N}{1,3}",
                r"[一-龥぀-ゟ゠-ヿ]+",
                r##"[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"##,
            ]),
        ),
    ]
}

/// A tokenizer twice: as it is loaded, and with the faster encoder.
struct Pair {
    name: &'static str,
    exact: Tokenizer,
    faster: Tokenizer,
}

static PAIRS: LazyLock<Vec<Pair>> = LazyLock::new(|| {
    let mut pairs = Vec::new();
    for (name, pre_tokenizer) in pre_tokenizers() {
        for normalizer in [Value::Null, json!({"type": "NFC"})] {
            let mut file = golden("byte_level/tokenizer.json");
            file["pre_tokenizer"] = pre_tokenizer.clone();
            file["normalizer"] = normalizer;
            let file = serde_json::to_vec(&file).unwrap();
            let load = |bytes| {
                let files = ModelFiles {
                    tokenizer_json: &file,
                    ..ModelFiles::default()
                };
                Tokenizer::from_files(&files, SegmentCache { bytes, seed: 3 }).unwrap()
            };
            let (exact, faster) = (load(0), load(1 << 20));
            faster
                .speed_up()
                .unwrap_or_else(|error| panic!("{name}: {error}"));
            pairs.push(Pair {
                name,
                exact,
                faster,
            });
        }
    }
    pairs
});

/// Texts of words, numbers, marks and white space in all mixtures, with added tokens and their beginnings.
fn texts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        4 => "[a-zA-Zäßéñ']{1,9}",
        2 => "[ \t\n\r]{1,3}",
        2 => "[0-9]{1,7}",
        2 => r"[!-/:-@\[-`{-~]{1,4}",
        1 => "[一-龥ぁ-んァ-ヶ가-힣а-яА-Яא-תء-ي\u{300}-\u{310}]{1,6}",
        1 => any::<String>(),
        1 => prop::sample::select(vec![
            "<|im_start|>", "<|im_end|>", "<think>", "<s>", "<|im_", "größe", "gro\u{308}ße", "'ll", "'S", "\u{a0}",
            "\u{3000}", "\u{2028}", "\u{200d}", "👩\u{200d}🔬", "🇩🇪", "ǅ", "İ", "ſ", "ﬁ", "\u{1e9e}", "\u{0}",
        ]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(cases(300))]

    #[test]
    fn the_faster_encoder_changes_no_token(text in texts()) {
        for pair in &*PAIRS {
            for special in [false, true] {
                prop_assert_eq!(
                    pair.faster.encode(&text, special).unwrap(),
                    pair.exact.encode(&text, special).unwrap(),
                    "{} {:?}", pair.name, text
                );
            }
        }
    }
}

proptest! {
    #![proptest_config(cases(4))]

    #[test]
    fn nor_in_long_texts(texts in prop::collection::vec(texts(), 40), turns in 1_usize..30) {
        let turn = texts.concat();
        let text = format!("<|im_start|>{turn}<|im_end|>\n").repeat(turns + LONG / turn.len().max(1));
        for pair in &*PAIRS {
            prop_assert_eq!(
                pair.faster.encode(&text, true).unwrap(),
                pair.exact.encode(&text, true).unwrap(),
                "{} {:?}", pair.name, turn
            );
        }
    }
}

#[test]
fn a_tokenizer_that_the_faster_encoder_does_not_know_stays_as_it_is() {
    let tokenizer = tokenizer("metaspace", 0);
    let before = tokenizer.encode("hello world", true).unwrap();
    let refused = tokenizer.speed_up();
    assert!(
        matches!(refused, Err(NotFaster::Load { .. })),
        "{refused:?}"
    );
    assert_eq!(tokenizer.encode("hello world", true).unwrap(), before);
}
