//! Tokens and text, compared with what transformers and vLLM answered.

#![allow(clippy::unwrap_used, reason = "helpers of tests panic like tests")]

mod support;

use serde_json::Value;
use stator_text::{DetokenizeOptions, End, LogprobTexts, OutputText, StopStrings};
use support::{MODELS, ids, json, tokenizer};

fn rows<'a>(tables: &'a Value, model: &str, table: &str) -> &'a Vec<Value> {
    tables[model][table].as_array().unwrap()
}

#[test]
fn texts_become_the_same_tokens_with_and_without_memory() {
    let tables = json("tokenizers.json");
    for model in MODELS {
        let remembering = tokenizer(model, 1 << 20);
        let plain = tokenizer(model, 0);
        // Only the one whose pieces depend on where they stand cannot remember.
        assert_eq!(remembering.remembers_segments(), model != "metaspace");
        for _ in 0..2 {
            for row in rows(&tables, model, "encodings") {
                let text = row["text"].as_str().unwrap();
                for tokenizer in [&plain, &remembering] {
                    assert_eq!(
                        tokenizer.encode(text, false).unwrap(),
                        ids(&row["ids"]),
                        "{text:?}"
                    );
                    assert_eq!(
                        tokenizer.encode(text, true).unwrap(),
                        ids(&row["framed"]),
                        "{text:?}"
                    );
                }
            }
        }
    }
}

#[test]
fn special_tokens_are_those_of_transformers() {
    let tables = json("tokenizers.json");
    for model in MODELS {
        let tokenizer = tokenizer(model, 0);
        let table = &tables[model];
        let special = tokenizer.special();
        let by_name: serde_json::Map<String, Value> = special
            .by_name
            .iter()
            .map(|(name, text)| (name.clone(), text.as_str().into()))
            .collect();
        assert_eq!(
            Value::Object(by_name),
            table["special_tokens_map"],
            "{model}"
        );
        let id = |name: &str| table[name].as_u64().map(|id| id as u32);
        assert_eq!(
            (special.bos_id, special.eos_id, special.pad_id),
            (id("bos"), id("eos"), id("pad")),
            "{model}"
        );
        assert_eq!(
            tokenizer.vocab_size() as u64,
            table["size"].as_u64().unwrap(),
            "{model}"
        );
    }
}

#[test]
fn tokens_become_the_same_text() {
    let tables = json("tokenizers.json");
    for model in MODELS {
        let tokenizer = tokenizer(model, 0);
        for row in rows(&tables, model, "decodings") {
            let tokens = ids(&row["ids"]);
            assert_eq!(
                tokenizer.decode(&tokens, false).unwrap(),
                row["text"],
                "{model} {tokens:?}"
            );
            assert_eq!(
                tokenizer.decode(&tokens, true).unwrap(),
                row["skipped"],
                "{model} {tokens:?}"
            );
        }
    }
}

#[test]
fn streams_give_vllms_text_step_by_step() {
    let tables = json("tokenizers.json");
    for model in MODELS {
        let tokenizer = tokenizer(model, 0);
        for (index, row) in rows(&tables, model, "streams").iter().enumerate() {
            let flag = |name: &str| row[name].as_bool().unwrap();
            let strings: Vec<String> = serde_json::from_value(row["stop"].clone()).unwrap();
            let min_tokens = row["min_tokens"].as_u64().unwrap() as usize;
            let stop =
                StopStrings::new(strings, flag("include_stop_str_in_output"), min_tokens).unwrap();
            let options = DetokenizeOptions {
                skip_special_tokens: flag("skip_special_tokens"),
                spaces_between_special_tokens: flag("spaces_between_special_tokens"),
            };
            let mut output =
                OutputText::new(tokenizer.detokenizer(&ids(&row["prompt"]), options), stop);
            let steps = row["steps"].as_array().unwrap();
            for (nth, step) in steps.iter().enumerate() {
                let ended = nth + 1 == steps.len() && step["stop"].is_null();
                let end = match (ended, row["end"].as_str()) {
                    (false, _) => End::Not,
                    (true, Some("stop_token")) => End::StopToken,
                    (true, _) => End::Other,
                };
                let mut text = String::new();
                let pushed = output.push(&ids(&step["tokens"]), end, &mut text).unwrap();
                let what = format!("{model} stream {index} step {nth}: {row}");
                assert_eq!(text, step["text"], "{what}");
                let stop = pushed.stop.and_then(|stop| output.stop_strings().get(stop));
                assert_eq!(stop, step["stop"].as_str(), "{what}");
                assert_eq!(
                    pushed.kept_tokens as u64,
                    step["kept"].as_u64().unwrap(),
                    "{what}"
                );
            }
        }
    }
}

#[test]
fn log_probability_tokens_have_vllms_text() {
    let tables = json("tokenizers.json");
    for model in MODELS {
        let tokenizer = tokenizer(model, 0);
        for row in rows(&tables, model, "logprobs") {
            let mut texts = LogprobTexts::new(tokenizer.clone());
            for position in row.as_array().unwrap() {
                let tokens = ids(&position["tokens"]);
                let wanted: Vec<String> =
                    serde_json::from_value(position["texts"].clone()).unwrap();
                assert_eq!(
                    texts.position(&tokens),
                    wanted,
                    "{model} {tokens:?} in {row}"
                );
            }
        }
    }
}
