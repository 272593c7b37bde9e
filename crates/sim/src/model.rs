//! The model that is no model: the next token is a hash of all tokens before it.
//!
//! So any two engines with the same vocabulary continue the same tokens in the same way, which
//! is what lets a test check the content of an answer that several engines worked on. Tokens
//! that mean something to a tokenizer's user (end of sequence, padding, chat markers) are never
//! chosen unless asked for.

use crate::request::Sampling;

/// State after some tokens: their hash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Chain(pub u64);

impl Chain {
    /// The state after one more token.
    #[must_use]
    pub fn extend(self, token: u32) -> Self {
        let x = (self.0.rotate_left(5) ^ u64::from(token)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        Self(x ^ (x >> 29))
    }

    /// The state after more tokens.
    #[must_use]
    pub fn extend_all(self, tokens: &[u32]) -> Self {
        tokens
            .iter()
            .fold(self, |chain, &token| chain.extend(token))
    }
}

/// What a simulated model knows about its vocabulary.
#[derive(Clone, Debug)]
pub struct Model {
    /// Tokens are chosen below this.
    pub choices: u32,
    /// Tokens that are not chosen by themselves, sorted.
    pub special: Vec<u32>,
    /// One in so many tokens is EOS, where the request names one; 0: none.
    pub eos_one_in: u32,
}

/// Log-probabilities of one position.
#[derive(Clone, Debug, PartialEq)]
pub struct Logprobs {
    /// The token at the position, then the most likely ones (which it may be among).
    pub tokens: Vec<u32>,
    pub logprobs: Vec<f32>,
    /// Rank of the token at the position, from 1.
    pub rank: u64,
}

impl Model {
    /// The state before the first token. Adapters answer differently, salts do not.
    #[must_use]
    pub fn start(&self, lora: Option<&str>) -> Chain {
        lora.unwrap_or("")
            .bytes()
            .fold(Chain(0x5741_544f_525f_3031), |chain, byte| {
                chain.extend(u32::from(byte))
            })
    }

    /// Chooses the next token.
    ///
    /// - `chain`: state after all tokens before it;
    /// - `output`: tokens generated so far, for `min_tokens`, scripts and bad words.
    #[must_use]
    pub fn next(&self, chain: Chain, sampling: &Sampling, output: &[u32]) -> u32 {
        if let Some(script) = &sampling.script {
            return match (script.get(output.len()), sampling.eos) {
                (Some(&token), _) => token,
                (None, Some(eos)) => eos,
                (None, None) => self.choose(chain, sampling, output),
            };
        }
        let may_stop = output.len() >= sampling.min_tokens as usize;
        if let Some(eos) = sampling.eos
            && may_stop
            && self.eos_one_in > 0
            && mix(chain.0 ^ 0xe05).is_multiple_of(u64::from(self.eos_one_in))
        {
            return eos;
        }
        self.choose(chain, sampling, output)
    }

    fn choose(&self, chain: Chain, sampling: &Sampling, output: &[u32]) -> u32 {
        let seed = match sampling.seed {
            Some(seed) if !sampling.greedy => mix(seed ^ 0x5eed),
            _ => 0,
        };
        let random = mix(chain.0 ^ seed);
        let may_stop = output.len() >= sampling.min_tokens as usize;
        let banned = |token: u32| {
            (!may_stop && (sampling.stop_token_ids.contains(&token) || sampling.eos == Some(token)))
                || sampling
                    .logit_bias
                    .iter()
                    .any(|&(id, bias)| id == token && bias <= -50.0)
                || sampling.bad_words.iter().any(|word| {
                    word.split_last()
                        .is_some_and(|(&last, head)| last == token && output.ends_with(head))
                })
        };
        let forced = sampling
            .logit_bias
            .iter()
            .filter(|&&(id, bias)| bias >= 50.0 && !banned(id))
            .max_by(|a, b| a.1.total_cmp(&b.1));
        if let Some(&(token, _)) = forced {
            return token;
        }
        if !sampling.allowed.is_empty() {
            let count = sampling.allowed.len();
            let first = (random % count as u64) as usize;
            return (0..count)
                .map(|i| sampling.allowed[(first + i) % count])
                .find(|&token| !banned(token))
                .unwrap_or(sampling.allowed[first]);
        }
        let first = (random % u64::from(self.choices.max(1))) as u32;
        (0..self.choices)
            .map(|i| (first + i) % self.choices)
            .find(|&token| self.special.binary_search(&token).is_err() && !banned(token))
            .unwrap_or(first)
    }

    /// Log-probabilities at a position that holds `token`, reproducible like the tokens are.
    ///
    /// `top`: how many of the most likely; the whole vocabulary has `vocab` entries.
    #[must_use]
    pub fn logprobs(&self, chain: Chain, token: u32, top: usize, vocab: u32) -> Logprobs {
        let top = top.min(vocab as usize);
        let base = -0.05 - (mix(chain.0 ^ 0x109) % 1000) as f32 / 2000.0;
        let mut tokens = Vec::with_capacity(top + 1);
        let mut logprobs = Vec::with_capacity(top + 1);
        tokens.push(token);
        logprobs.push(base);
        // A stride that shares no factor with the vocabulary visits every token once.
        let mut stride = (mix(chain.0 ^ 0x57de) % u64::from(vocab.max(1))) as u32 | 1;
        while gcd(stride, vocab.max(1)) != 1 {
            stride += 1;
        }
        for i in 0..top {
            let other = (u64::from(token) + u64::from(stride) * i as u64) % u64::from(vocab);
            tokens.push(other as u32);
            logprobs.push(base - 0.25 * i as f32);
        }
        Logprobs {
            tokens,
            logprobs,
            rank: 1,
        }
    }
}

fn mix(x: u64) -> u64 {
    let x = (x ^ (x >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    let x = (x ^ (x >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    x ^ (x >> 33)
}

fn gcd(a: u32, b: u32) -> u32 {
    if b == 0 { a } else { gcd(b, a % b) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn model() -> Model {
        Model {
            choices: 100,
            special: vec![0, 1, 2],
            eos_one_in: 0,
        }
    }

    fn generate(model: &Model, prompt: &[u32], sampling: &Sampling, count: usize) -> Vec<u32> {
        let mut chain = model.start(None).extend_all(prompt);
        let mut output = Vec::new();
        for _ in 0..count {
            let token = model.next(chain, sampling, &output);
            output.push(token);
            chain = chain.extend(token);
        }
        output
    }

    #[test]
    fn a_continuation_from_the_middle_is_the_same_answer() {
        let (model, sampling) = (model(), Sampling::default());
        let all = generate(&model, &[5, 6, 7], &sampling, 20);
        let mut prompt = vec![5, 6, 7];
        prompt.extend(&all[..9]);
        assert_eq!(generate(&model, &prompt, &sampling, 11), all[9..]);
    }

    #[test]
    fn special_tokens_do_not_come_up_by_themselves() {
        let output = generate(&model(), &[5], &Sampling::default(), 2000);
        assert!(output.iter().all(|&token| (3..100).contains(&token)));
    }

    #[test]
    fn eos_comes_up_when_asked_for_and_not_before_min_tokens() {
        let model = Model {
            eos_one_in: 3,
            ..model()
        };
        let sampling = Sampling {
            eos: Some(2),
            min_tokens: 30,
            ..Sampling::default()
        };
        let output = generate(&model, &[5], &sampling, 200);
        assert!(!output[..30].contains(&2));
        assert!(output[30..].contains(&2));
    }

    #[test]
    fn seeds_differ_only_when_sampling_is_random() {
        let seeded = |seed, greedy| Sampling {
            seed: Some(seed),
            greedy,
            ..Sampling::default()
        };
        let output = |sampling| generate(&model(), &[5], &sampling, 20);
        assert_ne!(output(seeded(1, false)), output(seeded(2, false)));
        assert_eq!(output(seeded(1, true)), output(seeded(2, true)));
    }

    #[test]
    fn constraints_hold() {
        let allowed = Sampling {
            allowed: vec![11, 12],
            ..Sampling::default()
        };
        assert!(
            generate(&model(), &[5], &allowed, 50)
                .iter()
                .all(|token| [11, 12].contains(token))
        );
        let forced = Sampling {
            logit_bias: vec![(42, 100.0)],
            ..Sampling::default()
        };
        assert_eq!(generate(&model(), &[5], &forced, 3), [42, 42, 42]);
        let bad = Sampling {
            allowed: vec![11, 12],
            bad_words: vec![vec![11], vec![12, 12]],
            ..Sampling::default()
        };
        // 11 is banned, and 12 after 12; where nothing is left, something still comes.
        assert_eq!(generate(&model(), &[5], &bad, 1), [12]);
    }

    #[test]
    fn a_script_is_followed_and_ends_in_eos() {
        let sampling = Sampling {
            script: Some(vec![9, 8]),
            eos: Some(2),
            ..Sampling::default()
        };
        assert_eq!(generate(&model(), &[5], &sampling, 3), [9, 8, 2]);
    }

    #[test]
    fn the_whole_vocabulary_has_each_token_once() {
        let logprobs = model().logprobs(Chain(77), 13, 100, 100);
        let mut rest = logprobs.tokens[1..].to_vec();
        rest.sort_unstable();
        assert_eq!(rest, (0..100).collect::<Vec<_>>());
        assert!(logprobs.logprobs[1..].is_sorted_by(|a, b| a >= b));
    }
}
