//! Chat templates: messages in, prompt text out, as Hugging Face transformers and vLLM render them.
//!
//! Templates are Jinja; the engine is minijinja with Python's methods, set up as transformers sets up jinja2
//! (`utils/chat_template_utils.py`, 5.19). What is done to messages before the template sees them is vLLM's
//! (`renderers/chat_utils.py`, `renderers/hf.py`, 0.32).
//!
//! A template may come from a client. It can neither read nor reach anything but its variables; its
//! instructions, its recursion and its output are bounded. Strings that it builds in memory are not, so who
//! serves strangers should refuse their templates, as vLLM does unless told otherwise.

mod clock;
mod content_format;
mod environment;
mod messages;
mod python_methods;
mod tojson;

use std::collections::BTreeMap;

use minijinja::Environment;
use serde_json::{Map, Value};
use stator_common::code::Code;

pub use clock::LocalTime;
pub use content_format::ContentFormat;

use crate::files::{ModelFiles, SpecialTokens, object};
use crate::tokenizer::LoadError;

/// What the last message's text is marked with, to find where to cut. transformers' own word, so that
/// nothing changes for templates that treat some texts in a special way.
const CONTINUE_TAG: &str = "CONTINUE_FINAL_MESSAGE_TAG ";

/// The name under which an environment holds its only template.
const NAME: &str = "chat";

/// A compiled chat template.
#[derive(Debug)]
pub struct ChatTemplate {
    environment: Environment<'static>,
    special: Map<String, Value>,
    format: ContentFormat,
    /// The template mentions the role `developer`; otherwise such messages become `system` messages.
    knows_developer: bool,
    mentions_content: bool,
}

/// What a chat template renders.
#[derive(Clone, Copy, Debug)]
pub struct Conversation<'a> {
    /// Messages as in the OpenAI chat API: objects with `role` and `content`. At least one.
    pub messages: &'a [Value],
    /// Tool definitions as in the OpenAI chat API.
    pub tools: Option<&'a [Value]>,
    /// Documents for retrieval-augmented templates: objects with `title` and `text`.
    pub documents: Option<&'a [Value]>,
    /// End with the header of an assistant message.
    pub add_generation_prompt: bool,
    /// Leave the last message open, so that the model goes on with it.
    pub continue_final_message: bool,
    /// The request's `chat_template_kwargs`: more variables (`enable_thinking`).
    pub kwargs: Option<&'a Map<String, Value>>,
    /// How contents are given to the template; `None`: as the template expects them.
    pub content_format: Option<ContentFormat>,
    /// What `strftime_now` shows.
    pub now: LocalTime,
}

/// Why a prompt could not be rendered.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// The model has no chat template.
    #[error("the model has no chat template, and the request names none")]
    Missing,
    /// The model has several templates and none of them is the default.
    #[error("the model has no default chat template; it has {available:?}")]
    NoDefault {
        /// Their names.
        available: Vec<String>,
    },
    /// The template is not valid Jinja.
    #[error("the chat template does not parse: {reason}")]
    Syntax {
        /// What the parser says.
        reason: String,
    },
    /// A message, or something else in the conversation, is not what a template can take.
    #[error("{field}: {reason}")]
    Invalid {
        /// The request's field at fault (`messages[2].content`).
        field: String,
        /// What is wrong with it.
        reason: String,
    },
    /// The template refused the conversation by `raise_exception`.
    #[error("{message}")]
    Raised {
        /// The template's words.
        message: String,
    },
    /// The template took more steps, or gave more text, than any conversation needs.
    #[error("the chat template exceeds the limit of {limit}")]
    Limit {
        /// The limit, in words.
        limit: &'static str,
    },
    /// The template failed in another way: it used an undefined value, say.
    #[error("the chat template failed: {reason}")]
    Failed {
        /// What the engine says.
        reason: String,
    },
}

impl TemplateError {
    /// Returns the code that a client sees. As with vLLM, a template that cannot render a request makes it
    /// an invalid one.
    pub fn code(&self) -> Code {
        match self {
            Self::Missing
            | Self::NoDefault { .. }
            | Self::Syntax { .. }
            | Self::Invalid { .. }
            | Self::Raised { .. }
            | Self::Limit { .. }
            | Self::Failed { .. } => Code::InvalidRequest,
        }
    }

    pub(crate) fn invalid(field: impl Into<String>, reason: impl Into<String>) -> Self {
        Self::Invalid {
            field: field.into(),
            reason: reason.into(),
        }
    }
}

impl ChatTemplate {
    /// Compiles a template. Takes a fraction of a millisecond.
    ///
    /// - `special`: whose names become variables of the template (`bos_token`).
    ///
    /// # Errors
    /// [`TemplateError::Syntax`].
    pub fn compile(source: &str, special: &SpecialTokens) -> Result<Self, TemplateError> {
        let source = environment::without_generation_tags(source);
        let format = content_format::detect(&source);
        let environment = environment::with_template(NAME, source.clone()).map_err(|error| {
            TemplateError::Syntax {
                reason: environment::describe(&error),
            }
        })?;
        Ok(Self {
            environment,
            special: special
                .by_name
                .iter()
                .map(|(name, text)| (name.clone(), Value::from(text.as_str())))
                .collect(),
            format,
            knows_developer: source.contains("\"developer\"") || source.contains("'developer'"),
            mentions_content: source.contains("content"),
        })
    }

    /// Returns how the template expects the contents of messages.
    pub fn content_format(&self) -> ContentFormat {
        self.format
    }

    /// Renders a conversation.
    ///
    /// # Errors
    /// [`TemplateError`]: the conversation is at fault, or the template.
    pub fn render(&self, conversation: &Conversation<'_>) -> Result<String, TemplateError> {
        if conversation.messages.is_empty() {
            return Err(TemplateError::invalid(
                "messages",
                "at least one message is needed",
            ));
        }
        if conversation.continue_final_message && conversation.add_generation_prompt {
            return Err(TemplateError::invalid(
                "continue_final_message",
                "it cannot be combined with add_generation_prompt",
            ));
        }
        let format = conversation.content_format.unwrap_or(self.format);
        let mut messages = messages::prepare(conversation.messages, format)?;
        if !self.knows_developer
            && messages
                .iter()
                .any(|message| message["role"] == "developer")
        {
            messages = messages::developer_as_system(messages);
        }
        let final_text = match conversation.continue_final_message {
            true => Some(self.mark_final_message(&mut messages)?),
            false => None,
        };

        let mut variables = self.special.clone();
        for (name, value) in conversation.kwargs.into_iter().flatten() {
            if matches!(name.as_str(), "chat_template" | "tokenize" | "messages") {
                return Err(TemplateError::invalid(
                    format!("chat_template_kwargs.{name}"),
                    "this name is not open to requests",
                ));
            }
            variables.insert(name.clone(), value.clone());
        }
        variables.insert("messages".to_owned(), Value::Array(messages));
        for (name, list) in [
            ("tools", conversation.tools),
            ("documents", conversation.documents),
        ] {
            match list {
                Some(list) => _ = variables.insert(name.to_owned(), list.into()),
                None => _ = variables.entry(name).or_insert(Value::Null),
            }
        }
        variables.insert(
            "add_generation_prompt".to_owned(),
            conversation.add_generation_prompt.into(),
        );

        let text = environment::render(&self.environment, NAME, variables, conversation.now)?;
        match final_text {
            Some(final_text) => cut_at_tag(text, &final_text),
            None => Ok(text),
        }
    }

    /// Puts the tag at the end of the last message's text, which is returned.
    fn mark_final_message(&self, messages: &mut [Value]) -> Result<String, TemplateError> {
        let refuse = |reason: &str| TemplateError::invalid("continue_final_message", reason);
        if !self.mentions_content {
            return Err(refuse(
                "the chat template does not use the content of messages",
            ));
        }
        let content = messages
            .last_mut()
            .and_then(|message| message.get_mut("content"));
        let text = match content {
            Some(Value::String(text)) => text,
            Some(Value::Array(parts)) => parts
                .iter_mut()
                .rev()
                .find_map(|part| match part.get_mut("text") {
                    Some(Value::String(text)) => Some(text),
                    _ => None,
                })
                .ok_or_else(|| refuse("the final message has no text to continue"))?,
            _ => return Err(refuse("the final message has no content to continue")),
        };
        let original = text.clone();
        text.push_str(CONTINUE_TAG);
        Ok(original)
    }
}

/// Cuts a rendered prompt where the tag is. If the template trimmed the tag's space, it trimmed the
/// message, and what it puts after messages may have been trimmed as well.
fn cut_at_tag(mut text: String, final_text: &str) -> Result<String, TemplateError> {
    let at = text
        .rfind(CONTINUE_TAG.trim_end())
        .filter(|_| text.contains(final_text.trim()));
    let Some(at) = at else {
        return Err(TemplateError::invalid(
            "continue_final_message",
            "the chat template does not show the final message as it is",
        ));
    };
    let spaced = text[at..].starts_with(CONTINUE_TAG);
    text.truncate(at);
    if !spaced {
        text.truncate(text.trim_end().len());
    }
    Ok(text)
}

/// The templates of a model, by name.
#[derive(Debug, Default)]
pub struct ChatTemplates {
    by_name: BTreeMap<String, ChatTemplate>,
}

/// Why a model's templates could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadTemplateError {
    /// A file cannot be read as what it should be.
    #[error(transparent)]
    File(#[from] LoadError),
    /// `chat_template.jinja` is not UTF-8.
    #[error("chat_template.jinja is not UTF-8")]
    Encoding,
    /// A template does not compile.
    #[error("chat template {name}: {error}")]
    Template {
        /// Its name; `default` if it has none.
        name: String,
        /// What is wrong with it.
        error: TemplateError,
    },
}

impl LoadTemplateError {
    /// Returns the code that a client sees.
    pub fn code(&self) -> Code {
        match self {
            Self::File(error) => error.code(),
            Self::Encoding | Self::Template { .. } => Code::Internal,
        }
    }
}

impl ChatTemplates {
    /// Compiles a model's templates: `chat_template.jinja` if there is one, otherwise what
    /// `tokenizer_config.json` says, which may be one template or a list of named ones.
    ///
    /// # Errors
    /// [`LoadTemplateError`].
    pub fn from_files(
        files: &ModelFiles<'_>,
        special: &SpecialTokens,
    ) -> Result<Self, LoadTemplateError> {
        let mut sources = BTreeMap::new();
        if let Some(bytes) = files.chat_template {
            let source = std::str::from_utf8(bytes).map_err(|_| LoadTemplateError::Encoding)?;
            sources.insert("default".to_owned(), source.to_owned());
        } else if let Some(bytes) = files.tokenizer_config {
            match object(bytes, "tokenizer_config.json")?.get("chat_template") {
                Some(Value::String(source)) => {
                    _ = sources.insert("default".to_owned(), source.clone());
                }
                Some(Value::Array(list)) => sources.extend(list.iter().filter_map(|entry| {
                    let field = |name: &str| entry.get(name)?.as_str().map(str::to_owned);
                    Some((field("name")?, field("template")?))
                })),
                _ => {}
            }
        }
        let mut by_name = BTreeMap::new();
        for (name, source) in sources {
            match ChatTemplate::compile(&source, special) {
                Ok(template) => _ = by_name.insert(name, template),
                Err(error) => return Err(LoadTemplateError::Template { name, error }),
            }
        }
        Ok(Self { by_name })
    }

    /// Returns the template for a request: `tool_use` if there is one and tools are given, else `default`.
    ///
    /// # Errors
    /// [`TemplateError::Missing`], [`TemplateError::NoDefault`].
    pub fn select(&self, tools: bool) -> Result<&ChatTemplate, TemplateError> {
        let for_tools = self.by_name.get("tool_use").filter(|_| tools);
        for_tools
            .or_else(|| self.by_name.get("default"))
            .ok_or_else(|| match self.by_name.keys().cloned().collect::<Vec<_>>() {
                names if names.is_empty() => TemplateError::Missing,
                available => TemplateError::NoDefault { available },
            })
    }

    /// Returns a template by its name; what a request calls `chat_template` may be such a name.
    pub fn named(&self, name: &str) -> Option<&ChatTemplate> {
        self.by_name.get(name)
    }
}
