//! How many tokens a request took.

use bytes::BytesMut;

use super::json;

/// Tokens of one request, or of it so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Of all its prompts.
    pub(crate) prompt: usize,
    /// Of all its choices.
    pub(crate) completion: usize,
    /// Prompt tokens that came from a cache, as far as the engine said.
    pub(crate) cached: Option<u32>,
    /// Completion tokens that were thoughts; absent where no reasoning parser looks for them.
    pub(crate) reasoning: Option<usize>,
}

impl Usage {
    /// Appends the `usage` object.
    pub(crate) fn write(&self, out: &mut BytesMut) {
        json::raw(out, "{\"prompt_tokens\":");
        json::number(out, self.prompt);
        json::raw(out, ",\"total_tokens\":");
        json::number(out, self.prompt + self.completion);
        json::raw(out, ",\"completion_tokens\":");
        json::number(out, self.completion);
        json::raw(out, ",\"prompt_tokens_details\":");
        match self.cached {
            Some(cached) => {
                json::raw(out, "{\"cached_tokens\":");
                json::number(out, cached);
                json::raw(out, "}");
            }
            None => json::raw(out, "null"),
        }
        if let Some(reasoning) = self.reasoning {
            json::raw(out, ",\"completion_tokens_details\":{\"reasoning_tokens\":");
            json::number(out, reasoning);
            json::raw(out, "}");
        }
        json::raw(out, "}");
    }
}
