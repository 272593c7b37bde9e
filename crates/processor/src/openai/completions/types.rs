//! The request of `/v1/completions`.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, SeqAccess, Visitor};

use crate::openai::request::{Int, Request, fields};

/// A completion request.
pub(crate) type CompletionRequest = Request<CompletionFields>;

fields! {
    /// What only a completion request may say.
    CompletionFields {
        prompt: Prompts,
        logprobs: Int,
        suffix: String,
    }
}

/// One or several prompts, all of one kind.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Prompts {
    Text(String),
    Texts(Vec<String>),
    Tokens(Vec<Int>),
    TokenLists(Vec<Vec<Int>>),
}

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct PromptsVisitor;
        impl<'de> Visitor<'de> for PromptsVisitor {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "a string, a list of strings, token ids, or a list of lists of token ids",
                )
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Prompts, E> {
                Ok(Prompts::Text(text))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                let mut prompts = match seq.next_element()? {
                    None => return Ok(Prompts::Texts(Vec::new())),
                    Some(Element::Text(text)) => Prompts::Texts(vec![text]),
                    Some(Element::Token(token)) => Prompts::Tokens(vec![token]),
                    Some(Element::Tokens(tokens)) => Prompts::TokenLists(vec![tokens]),
                };
                while let Some(element) = seq.next_element()? {
                    match (&mut prompts, element) {
                        (Prompts::Texts(texts), Element::Text(text)) => texts.push(text),
                        (Prompts::Tokens(tokens), Element::Token(token)) => tokens.push(token),
                        (Prompts::TokenLists(lists), Element::Tokens(tokens)) => lists.push(tokens),
                        _ => return Err(de::Error::custom("the list mixes strings and token ids")),
                    }
                }
                Ok(prompts)
            }
        }
        deserializer.deserialize_any(PromptsVisitor)
    }
}

/// One element of a list of prompts.
enum Element {
    Text(String),
    Token(Int),
    Tokens(Vec<Int>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ElementVisitor;
        impl<'de> Visitor<'de> for ElementVisitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a token id or a list of token ids")
            }

            fn visit_i64<E: de::Error>(self, token: i64) -> Result<Element, E> {
                Ok(Element::Token(Int(token)))
            }

            fn visit_u64<E: de::Error>(self, token: u64) -> Result<Element, E> {
                // Token ids are far below; a larger one is refused by range later.
                Ok(Element::Token(
                    Int(i64::try_from(token).unwrap_or(i64::MAX)),
                ))
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Element, A::Error> {
                let mut tokens = Vec::with_capacity(seq.size_hint().unwrap_or(64));
                while let Some(token) = seq.next_element()? {
                    tokens.push(token);
                }
                Ok(Element::Tokens(tokens))
            }
        }
        deserializer.deserialize_any(ElementVisitor)
    }
}
