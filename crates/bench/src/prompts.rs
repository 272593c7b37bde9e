//! Texts to ask with: words that a tokenizer cuts up as it cuts up a language's.

use std::fmt::Write as _;

use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};

/// Makes words and texts, the same ones in every run.
#[derive(Debug)]
pub(crate) struct Prompts {
    random: StdRng,
    words: Vec<String>,
}

impl Prompts {
    /// A language of 4000 words of one to four syllables.
    pub(crate) fn new(seed: u64) -> Self {
        const ONSETS: [&str; 18] = [
            "b", "br", "c", "ch", "d", "f", "g", "gr", "h", "l", "m", "n", "p", "r", "s", "st",
            "t", "w",
        ];
        const RIMES: [&str; 14] = [
            "a", "an", "ar", "e", "en", "er", "i", "in", "ing", "o", "on", "or", "u", "ed",
        ];
        let mut random = StdRng::seed_from_u64(20);
        let mut words = Vec::with_capacity(4000);
        for _ in 0..4000 {
            let mut word = String::new();
            for _ in 0..random.random_range(1..=4) {
                word.push_str(ONSETS.choose(&mut random).unwrap_or(&"b"));
                word.push_str(RIMES.choose(&mut random).unwrap_or(&"a"));
            }
            words.push(word);
        }
        Self {
            random: StdRng::seed_from_u64(seed),
            words,
        }
    }

    /// A text of so many words.
    pub(crate) fn text(&mut self, words: usize) -> String {
        let mut text = String::with_capacity(words * 8);
        for index in 0..words {
            // Frequent words are frequent, as in any language.
            let place = self.random.random::<f64>().powi(3) * self.words.len() as f64;
            let separator = if index == 0 { "" } else { " " };
            let _ = write!(text, "{separator}{}", self.words[place as usize]);
        }
        text
    }
}
