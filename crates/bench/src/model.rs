//! A model folder for the processor and the simulated engine: a tokenizer, a template, no weights.

use std::path::Path;

use anyhow::Context as _;
use serde_json::json;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer, models::TrainerWrapper};

use crate::prompts::Prompts;

/// Size of the vocabulary. Large enough that most words are one or two tokens, as with real models.
const VOCABULARY: usize = 8192;

/// Longest prompt and answer together; beyond the 60k tokens of the longest measurement.
pub(crate) const MAX_MODEL_LEN: usize = 131_072;

/// Trains a byte-level BPE tokenizer and writes the folder.
pub(crate) fn make(folder: &Path) -> anyhow::Result<()> {
    let mut prompts = Prompts::new(1);
    let corpus: Vec<String> = (0..2000).map(|_| prompts.text(40)).collect();
    let mut tokenizer = Tokenizer::new(BPE::default());
    let bytes = ByteLevel::new(false, true, true);
    tokenizer.with_pre_tokenizer(Some(bytes));
    tokenizer.with_decoder(Some(bytes));
    let special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];
    let mut trainer: TrainerWrapper = BpeTrainerBuilder::new()
        .vocab_size(VOCABULARY)
        .show_progress(false)
        .special_tokens(special.map(|text| AddedToken::from(text, true)).to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .build()
        .into();
    tokenizer
        .train(&mut trainer, corpus.into_iter())
        .and_then(|tokenizer| tokenizer.save(folder.join("tokenizer.json"), false))
        .map_err(|error| anyhow::anyhow!(error))
        .context("make a tokenizer")?;
    let size = tokenizer.get_vocab_size(true);
    let template = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n\
        {% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}";
    let files = [
        (
            "config.json",
            json!({
                "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": size,
                "max_position_embeddings": MAX_MODEL_LEN, "eos_token_id": 2, "pad_token_id": 0,
            }),
        ),
        (
            "tokenizer_config.json",
            json!({
                "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>",
                "pad_token": "<|endoftext|>", "chat_template": template,
                "model_max_length": MAX_MODEL_LEN,
            }),
        ),
        (
            "generation_config.json",
            json!({"eos_token_id": 2, "pad_token_id": 0}),
        ),
    ];
    for (name, content) in files {
        std::fs::write(folder.join(name), content.to_string()).context("write the model folder")?;
    }
    Ok(())
}

/// How many tokens a word of the made-up language takes, with the tokenizer of a folder.
pub(crate) fn tokens_per_word(folder: &Path) -> anyhow::Result<f64> {
    const WORDS: usize = 5000;
    let text = Prompts::new(3).text(WORDS);
    let tokens = Tokenizer::from_file(folder.join("tokenizer.json"))
        .and_then(|tokenizer| tokenizer.encode_fast(text, false))
        .map_err(|error| anyhow::anyhow!(error))
        .context("tokenize")?;
    Ok(tokens.len() as f64 / WORDS as f64)
}
