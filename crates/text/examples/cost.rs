//! Prints what text costs: `cargo run --release -p stator-text --example cost -- MODEL_FOLDER`.
//!
//! The folder holds a `tokenizer.json`. Figures are of one thread, the fastest of several rounds.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use stator_text::template::{ChatTemplate, Conversation, LocalTime};
use stator_text::{
    DetokenizeOptions, End, ModelFiles, OutputText, SegmentCache, StopStrings, Tokenizer,
};

const ROUNDS: usize = 7;

fn main() -> Result<()> {
    let folder = PathBuf::from(std::env::args().nth(1).context("name a model folder")?);
    let read = |name: &str| std::fs::read(folder.join(name));
    let json = read("tokenizer.json").context("read tokenizer.json")?;
    let config = read("tokenizer_config.json").ok();
    let files = ModelFiles {
        tokenizer_json: &json,
        tokenizer_config: config.as_deref(),
        ..Default::default()
    };
    let load = |bytes| Tokenizer::from_files(&files, SegmentCache { bytes, seed: 1 });
    let (plain, remembering) = (load(0)?, load(64 << 20)?);

    // 400 turns of about 150 tokens, with the markers of ChatML.
    let words =
        "The mill wheel turned (slowly, 42 times) while naïve swallows crossed the grey sky; ";
    let turn = |n: usize| format!("{n} {}", words.repeat(8));
    let messages: Vec<_> = (0..400)
        .map(|n| json!({"role": (["user", "assistant"][n % 2]), "content": turn(n)}))
        .collect();
    let template = ChatTemplate::compile(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
        plain.special(),
    )?;
    let conversation = Conversation {
        messages: &messages,
        tools: None,
        documents: None,
        add_generation_prompt: false,
        continue_final_message: false,
        kwargs: None,
        content_format: None,
        now: LocalTime::default(),
    };
    let prompt = template.render(&conversation)?;
    let tokens = plain.encode(&prompt, false)?;
    println!(
        "conversation: {} tokens, {} bytes",
        tokens.len(),
        prompt.len()
    );
    report("render the template", 1, || {
        Ok(template.render(&conversation)?)
    })?;
    report("encode whole", 1, || Ok(plain.encode(&prompt, false)?))?;
    remembering.encode(&prompt, false)?;
    report("encode, all turns seen before", 1, || {
        Ok(remembering.encode(&prompt, false)?)
    })?;
    let mut longer = prompt.clone();
    let mut n = 400;
    report("encode, one new turn", 1, || {
        longer.truncate(prompt.len());
        longer.push_str(&format!("<|im_start|>user\n{}<|im_end|>\n", turn(n)));
        n += 1;
        Ok(remembering.encode(&longer, false)?)
    })?;

    let mut text = String::with_capacity(prompt.len() * 2);
    report("detokenize, per token", tokens.len(), || {
        text.clear();
        let mut detokenizer = plain.detokenizer(&[], DetokenizeOptions::default());
        Ok(tokens
            .iter()
            .try_for_each(|token| detokenizer.push_one(*token, &mut text))?)
    })?;
    let stops = || StopStrings::new(vec!["\n\nHuman:".to_owned(), "###".to_owned()], false, 0);
    for (what, stop) in [
        ("no stop strings", StopStrings::default()),
        ("two stop strings", stops()?),
    ] {
        report(
            &format!("output text, {what}, per token"),
            tokens.len(),
            || {
                text.clear();
                let detokenizer = plain.detokenizer(&[], DetokenizeOptions::default());
                let mut output = OutputText::new(detokenizer, stop.clone());
                for token in &tokens {
                    output.push(&[*token], End::Not, &mut text)?;
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}

/// Runs the work several times and prints the fastest.
fn report<T>(what: &str, per: usize, mut work: impl FnMut() -> Result<T>) -> Result<()> {
    let mut best = Duration::MAX;
    for _ in 0..ROUNDS {
        let start = Instant::now();
        work()?;
        best = best.min(start.elapsed());
    }
    let nanos = best.as_nanos() as f64 / per as f64;
    if nanos < 10_000.0 {
        println!("{what}: {nanos:.1} ns");
    } else {
        println!("{what}: {:.3} ms", nanos / 1e6);
    }
    Ok(())
}
