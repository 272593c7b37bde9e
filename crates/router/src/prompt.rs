//! What a decision may ask about the request.
//!
//! A trait, so that a policy that looks at no tokens does not make its caller produce any. A
//! policy that scores by cached prefix reads the tokens, and with them the names that make equal tokens
//! different KV: the adapter and the cache salt.

/// A request, as far as routing is concerned.
pub trait Prompt {
    /// Returns the prompt's token ids, after the chat template. May compute them on the first call.
    fn tokens(&self) -> &[u32];

    /// Returns the name of the LoRA adapter; empty for the base model.
    fn lora(&self) -> &str {
        ""
    }

    /// Returns the salt that keeps tenants' caches apart; empty where caches are shared.
    fn cache_salt(&self) -> &str {
        ""
    }
}

/// A prompt whose tokens are known already.
#[derive(Clone, Copy, Debug)]
pub struct TokenPrompt<'a> {
    /// Token ids, after the chat template.
    pub tokens: &'a [u32],
    /// The LoRA adapter; empty: the base model.
    pub lora: &'a str,
    /// The cache salt; empty: shared.
    pub cache_salt: &'a str,
}

impl Prompt for TokenPrompt<'_> {
    fn tokens(&self) -> &[u32] {
        self.tokens
    }

    fn lora(&self) -> &str {
        self.lora
    }

    fn cache_salt(&self) -> &str {
        self.cache_salt
    }
}
