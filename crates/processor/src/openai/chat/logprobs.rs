//! The `logprobs` object of chat completions: one entry per token.

use bytes::BytesMut;
use stator_common::proto::worker::TokenLogprobs;
use stator_text::LogprobTexts;

use crate::openai::json;
use crate::openai::logprobs::{Candidate, candidates, name};

/// Writes the object.
///
/// - `count`: candidates shown per token; -1: all.
/// - `as_ids`: tokens are called by id instead of text.
pub(super) fn write(
    out: &mut BytesMut,
    texts: &mut LogprobTexts,
    positions: &[TokenLogprobs],
    count: i64,
    as_ids: bool,
) {
    json::raw(out, "{\"content\":");
    json::list(out, positions, |out, position| {
        let candidates = candidates(texts, position);
        let Some(chosen) = candidates.first() else {
            return json::raw(out, "{}");
        };
        // The chosen token's bytes are those of its text, whatever it is called.
        write_candidate(out, chosen, as_ids, &chosen.text);
        json::raw(out, ",\"top_logprobs\":");
        let count = usize::try_from(count).unwrap_or(usize::MAX);
        json::list(out, candidates.iter().take(count), |out, candidate| {
            let name = name(candidate.token, &candidate.text, as_ids);
            write_candidate(out, candidate, as_ids, &name);
            json::raw(out, "}");
        });
        json::raw(out, "}");
    });
    json::raw(out, "}");
}

/// Writes an entry, left open.
fn write_candidate(out: &mut BytesMut, candidate: &Candidate, as_ids: bool, bytes_of: &str) {
    json::raw(out, "{\"token\":");
    json::string(out, &name(candidate.token, &candidate.text, as_ids));
    json::raw(out, ",\"logprob\":");
    json::float(out, candidate.logprob);
    json::raw(out, ",\"bytes\":");
    json::list(out, bytes_of.bytes(), json::number);
}
