//! What it means that two deltas of one stream become one.

use crate::{
    Code,
    plane::error,
    proto::worker::{Delta, FinishReason, TokenLogprobs},
};

/// Appends `next` to `delta`: a reader of the result learns what a reader of both would have.
pub fn merge(delta: &mut Delta, next: Delta) {
    append(&mut delta.tokens, next.tokens);
    append(&mut delta.logprobs, next.logprobs);
    append(&mut delta.prompt_logprobs, next.prompt_logprobs);
    if next.finish != 0 {
        delta.finish = next.finish;
    }
    if next.stop_token_id.is_some() {
        delta.stop_token_id = next.stop_token_id;
    }
    if delta.cached_tokens.is_none() {
        delta.cached_tokens = next.cached_tokens;
    }
    if !next.kv_transfer_params.is_empty() {
        delta.kv_transfer_params = next.kv_transfer_params;
        delta.kv_lease_ms = next.kv_lease_ms;
    }
    if next.error.is_some() {
        delta.error = next.error;
    }
}

fn append<T>(to: &mut Vec<T>, mut from: Vec<T>) {
    if to.is_empty() {
        *to = from;
    } else {
        to.append(&mut from);
    }
}

/// Returns about how many bytes a delta holds in memory, to bound what is kept of it.
pub fn weight(delta: &Delta) -> usize {
    size_of::<Delta>()
        + 4 * delta.tokens.len()
        + positions(&delta.logprobs)
        + positions(&delta.prompt_logprobs)
        + delta.kv_transfer_params.len()
        + delta.error.as_ref().map_or(0, |error| error.message.len())
}

fn positions(logprobs: &[TokenLogprobs]) -> usize {
    logprobs
        .iter()
        .map(|position| size_of::<TokenLogprobs>() + 8 * position.tokens.len())
        .sum()
}

/// Returns the delta that ends a stream in an error.
pub fn failed(stream: u32, code: Code, message: impl Into<String>) -> Delta {
    Delta {
        stream,
        finish: FinishReason::Error.into(),
        error: Some(error(code, message)),
        ..Delta::default()
    }
}

/// Says whether a delta is its stream's last.
pub fn is_last(delta: &Delta) -> bool {
    delta.finish != FinishReason::Unspecified as i32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn delta(tokens: Vec<u32>, finish: FinishReason) -> Delta {
        Delta {
            stream: 1,
            logprobs: tokens
                .iter()
                .map(|&token| TokenLogprobs {
                    tokens: vec![token],
                    logprobs: vec![-1.0],
                    rank: 1,
                })
                .collect(),
            tokens,
            finish: finish.into(),
            ..Delta::default()
        }
    }

    proptest! {
        #[test]
        fn merging_keeps_every_token_in_order(steps in proptest::collection::vec(
            proptest::collection::vec(any::<u32>(), 0..4), 1..8)) {
            let mut merged = Delta { stream: 1, ..Delta::default() };
            for step in &steps {
                merge(&mut merged, delta(step.clone(), FinishReason::Unspecified));
            }
            merge(&mut merged, delta(vec![], FinishReason::Length));
            prop_assert_eq!(merged, delta(steps.concat(), FinishReason::Length));
        }
    }

    #[test]
    fn the_first_count_of_cached_tokens_stays() {
        let mut merged = Delta {
            cached_tokens: Some(32),
            ..Delta::default()
        };
        merge(
            &mut merged,
            Delta {
                cached_tokens: Some(0),
                ..Delta::default()
            },
        );
        assert_eq!(merged.cached_tokens, Some(32));
    }
}
