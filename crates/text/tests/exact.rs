//! What must hold for any text and any tokens, checked on random ones.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod support;

use std::collections::HashMap;
use std::sync::{Arc, LazyLock, Mutex};

use proptest::prelude::*;
use stator_text::{DetokenizeOptions, End, OutputText, StopStrings, Tokenizer};
use support::{bytes, cases, tokenizer};

/// Text with added tokens, their beginnings, and white space around them.
fn texts() -> impl Strategy<Value = String> {
    let piece = prop_oneof![
        3 => "[a-zäß' .0-9]{0,12}",
        1 => any::<String>(),
        1 => "[ \n\t]{0,4}",
        3 => prop::sample::select(vec![
            "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|im|>", "<think>", "</think>", "<s>", "</s>", "<unk>",
            "<|im_", "<|im_start", "größe", "gro\u{308}ße", "<", "<|", "system\n", "▁",
        ]).prop_map(str::to_owned),
    ];
    prop::collection::vec(piece, 0..12).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(cases(200))]

    #[test]
    fn remembering_segments_changes_no_token(texts in prop::collection::vec(texts(), 1..6)) {
        for model in ["byte_level", "sentencepiece"] {
            let plain = tokenizer_once(model, 0);
            // Room for a few segments only, so that some are forgotten.
            let remembering = tokenizer_once(model, 2_000);
            for text in texts.iter().chain(&texts) {
                for special in [false, true] {
                    prop_assert_eq!(
                        remembering.encode(text, special).unwrap(),
                        plain.encode(text, special).unwrap(),
                        "{} {:?}", model, text
                    );
                }
            }
        }
    }

    #[test]
    fn streamed_text_is_that_of_the_librarys_stream(
        tokens in prop::collection::vec(0_u32..440, 0..60),
        skip_special_tokens in any::<bool>(),
    ) {
        for model in ["byte_level", "sentencepiece", "metaspace"] {
            let ours = tokenizer_once(model, 0);
            let theirs = library(model);
            let mut detokenizer = ours.detokenizer(
                &[],
                DetokenizeOptions { skip_special_tokens, spaces_between_special_tokens: true },
            );
            let mut stream = theirs.decode_stream(skip_special_tokens);
            for token in &tokens {
                let mut text = String::new();
                detokenizer.push_one(*token, &mut text).unwrap();
                let Ok(wanted) = stream.step(*token) else { break };
                prop_assert_eq!(text, wanted.unwrap_or_default(), "{} {:?}", model, &tokens);
            }
        }
    }

    #[test]
    fn a_stream_may_end_its_steps_anywhere(
        tokens in prop::collection::vec(0_u32..300, 1..40),
        cuts in prop::collection::vec(1_usize..6, 40),
        stops in prop::collection::vec("[a-e ]{1,3}", 0..3),
        include in any::<bool>(),
        min_tokens in 0_usize..6,
    ) {
        let tokenizer = tokenizer_once("byte_level", 0);
        let run = |sizes: &mut dyn Iterator<Item = usize>| {
            let stop = StopStrings::new(stops.clone(), include, min_tokens).unwrap();
            let mut output = OutputText::new(tokenizer.detokenizer(&[], DetokenizeOptions::default()), stop);
            let (mut text, mut rest, mut kept) = (String::new(), &tokens[..], 0);
            while !rest.is_empty() {
                let (step, next) = rest.split_at(sizes.next().unwrap_or(1).min(rest.len()));
                rest = next;
                let end = if rest.is_empty() { End::Other } else { End::Not };
                let pushed = output.push(step, end, &mut text).unwrap();
                kept += pushed.kept_tokens;
                if pushed.stop.is_some() {
                    return (text, pushed.stop, kept);
                }
            }
            (text, None, kept)
        };
        let one_by_one = run(&mut std::iter::repeat(1));
        // All at once and one by one agree on the text unless several strings complete with the same token.
        prop_assert_eq!(run(&mut cuts.iter().copied()), one_by_one.clone());
        prop_assert_eq!(run(&mut std::iter::once(usize::MAX)), one_by_one);
    }
}

/// Loading takes milliseconds; one of each is enough.
fn tokenizer_once(model: &'static str, cache_bytes: usize) -> Tokenizer {
    static LOADED: LazyLock<Mutex<HashMap<(&str, usize), Tokenizer>>> =
        LazyLock::new(Mutex::default);
    LOADED
        .lock()
        .unwrap()
        .entry((model, cache_bytes))
        .or_insert_with(|| tokenizer(model, cache_bytes))
        .clone()
}

fn library(model: &'static str) -> Arc<tokenizers::Tokenizer> {
    static LOADED: LazyLock<Mutex<HashMap<&str, Arc<tokenizers::Tokenizer>>>> =
        LazyLock::new(Mutex::default);
    Arc::clone(
        LOADED
            .lock()
            .unwrap()
            .entry(model)
            .or_insert_with(|| Arc::new(load_library(model))),
    )
}

fn load_library(model: &str) -> tokenizers::Tokenizer {
    let mut tokenizer =
        tokenizers::Tokenizer::from_bytes(bytes(&format!("{model}/tokenizer.json"))).unwrap();
    // What the configuration of the byte-level model adds.
    if model == "byte_level" {
        let added =
            ["<|image|>", "<|vision|>"].map(|text| tokenizers::AddedToken::from(text, true));
        tokenizer.add_tokens(added).unwrap();
    }
    tokenizer
}

#[test]
fn a_prompt_that_ends_inside_a_character_is_not_repeated() {
    let smile = "😀".as_bytes();
    for model in ["byte_level", "sentencepiece"] {
        let tokenizer = tokenizer_once(model, 0);
        let of_byte = |byte: &u8| match model {
            "byte_level" => (0..256)
                .find(|id| tokenizer.token_bytes(*id) == [*byte])
                .unwrap(),
            _ => tokenizer.token_id(&format!("<0x{byte:02X}>")).unwrap(),
        };
        let parts: Vec<u32> = smile.iter().map(of_byte).collect();
        for cut in 0..parts.len() {
            let mut prompt = tokenizer
                .encode("hello there, this is a longer prompt than needed", false)
                .unwrap();
            prompt.extend(&parts[..cut]);
            let mut detokenizer = tokenizer.detokenizer(&prompt, DetokenizeOptions::default());
            let mut text = String::new();
            detokenizer.push(&parts[cut..], &mut text).unwrap();
            assert_eq!(text, "😀", "{model} after {cut} bytes");
        }
    }
}

#[test]
fn broken_bytes_are_held_until_a_character_follows() {
    let tokenizer = tokenizer_once("byte_level", 0);
    let of_byte = |byte: u8| {
        (0..256)
            .find(|id| tokenizer.token_bytes(*id) == [byte])
            .unwrap()
    };
    let mut detokenizer = tokenizer.detokenizer(&[], DetokenizeOptions::default());
    let mut text = String::new();
    detokenizer
        .push(&[of_byte(0xff), of_byte(0xe2), of_byte(0x82)], &mut text)
        .unwrap();
    assert_eq!(text, "");
    detokenizer.push(&[of_byte(b'x')], &mut text).unwrap();
    assert_eq!(text, "\u{fffd}\u{fffd}x");
}

#[test]
fn a_stop_string_that_begins_in_held_text_never_shows() {
    let tokenizer = tokenizer_once("byte_level", 0);
    let stop = StopStrings::new(vec!["STOP".to_owned()], false, 0).unwrap();
    let mut output = OutputText::new(
        tokenizer.detokenizer(&[], DetokenizeOptions::default()),
        stop,
    );
    let mut text = String::new();
    for piece in ["some text S", "T", "O"] {
        let tokens = tokenizer.encode(piece, false).unwrap();
        let pushed = output.push(&tokens, End::Not, &mut text).unwrap();
        assert_eq!((pushed.stop, pushed.kept_tokens), (None, tokens.len()));
        assert!(!text.contains('S'), "{text}");
    }
    let tokens = tokenizer.encode("P and more", false).unwrap();
    let pushed = output.push(&tokens, End::Not, &mut text).unwrap();
    assert_eq!((pushed.stop, text.as_str()), (Some(0), "some text "));
    assert_eq!(
        pushed.kept_tokens, 1,
        "tokens after the stop string are dropped"
    );
    assert!(StopStrings::new(vec![String::new()], false, 0).is_err());
}
