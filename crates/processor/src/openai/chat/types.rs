//! The request of `/v1/chat/completions`.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, IgnoredAny, MapAccess, Visitor};
use serde_json::{Value, json};

use crate::openai::request::{Int, Request, fields};

/// A chat completion request.
pub(crate) type ChatRequest = Request<ChatFields>;

fields! {
    /// What only a chat request may say.
    ChatFields {
        /// As sent: what a template makes of them is for the template to say.
        messages: Vec<Value>,
        logprobs: bool,
        top_logprobs: Int,
        max_completion_tokens: Int,
        tools: Vec<Tool>,
        tool_choice: ToolChoice,
        parallel_tool_calls: bool,
        reasoning_effort: String,
        include_reasoning: bool,
        add_generation_prompt: bool,
        continue_final_message: bool,
        documents: Vec<Value>,
        chat_template: String,
        chat_template_kwargs: serde_json::Map<String, Value>,
        return_prompt_text: bool,
    }
}

/// A tool that the model may call.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub(crate) struct Tool {
    pub(crate) r#type: Option<String>,
    pub(crate) function: Function,
}

impl Tool {
    /// Returns the tool as templates see it: all fields, in vLLM's order.
    pub(crate) fn for_template(&self) -> Value {
        let Function {
            name,
            description,
            parameters,
            strict,
        } = &self.function;
        let mut function =
            json!({"name": name, "description": description, "parameters": parameters});
        if let Some(strict) = strict {
            function["strict"] = (*strict).into();
        }
        json!({"type": "function", "function": function})
    }
}

/// A function as the model is told about it.
#[derive(Clone, Debug, PartialEq, serde::Deserialize)]
pub(crate) struct Function {
    pub(crate) name: String,
    pub(crate) description: Option<String>,
    pub(crate) parameters: Option<serde_json::Map<String, Value>>,
    pub(crate) strict: Option<bool>,
}

/// Which tools the model calls.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum ToolChoice {
    /// None.
    None,
    /// Those that it wants to.
    Auto,
    /// At least one.
    Required,
    /// This one.
    Named(String),
}

impl<'de> Deserialize<'de> for ToolChoice {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ChoiceVisitor;
        impl<'de> Visitor<'de> for ChoiceVisitor {
            type Value = ToolChoice;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(
                    "none, auto, required or {\"type\":\"function\",\"function\":{\"name\":..}}",
                )
            }

            fn visit_str<E: de::Error>(self, choice: &str) -> Result<ToolChoice, E> {
                match choice {
                    "none" => Ok(ToolChoice::None),
                    "auto" => Ok(ToolChoice::Auto),
                    "required" => Ok(ToolChoice::Required),
                    _ => Err(E::invalid_value(de::Unexpected::Str(choice), &self)),
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<ToolChoice, A::Error> {
                #[derive(serde::Deserialize)]
                struct Named {
                    name: String,
                }
                let mut function: Option<Named> = None;
                while let Some(name) = map.next_key::<String>()? {
                    match name.as_str() {
                        "function" => function = Some(map.next_value()?),
                        _ => drop(map.next_value::<IgnoredAny>()?),
                    }
                }
                let named = function.ok_or_else(|| de::Error::missing_field("function"))?;
                Ok(ToolChoice::Named(named.name))
            }
        }
        deserializer.deserialize_any(ChoiceVisitor)
    }
}
