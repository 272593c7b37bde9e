//! From a conversation to the tokens of a prompt.

use std::sync::Arc;
use std::time::SystemTime;

use serde_json::{Map, Value};
use stator_text::template::{ChatTemplate, Conversation, LocalTime, TemplateError};

use crate::App;
use crate::models::Model;
use crate::openai::error::ApiError;
use crate::openai::prompt::{Prompt, Rules};

/// What is rendered.
#[derive(Debug, Default)]
pub(crate) struct Rendering {
    pub(crate) messages: Vec<Value>,
    pub(crate) tools: Option<Vec<Value>>,
    pub(crate) documents: Option<Vec<Value>>,
    /// Absent: unless the last message is to be continued.
    pub(crate) add_generation_prompt: Option<bool>,
    pub(crate) continue_final_message: bool,
    pub(crate) kwargs: Option<Map<String, Value>>,
    /// A template, or the name of one of the model's, instead of the model's default.
    pub(crate) chat_template: Option<String>,
}

/// Renders a conversation and tokenizes the result, off the async threads if it is long.
///
/// - `bytes`: of the request, which tell how much work it is.
///
/// # Errors
/// The template refuses the conversation, or the prompt does not fit.
pub(crate) async fn render(
    model: &Arc<Model>,
    rendering: Rendering,
    rules: Rules,
    bytes: usize,
    app: &App,
) -> Result<Prompt, ApiError> {
    if rendering.chat_template.is_some() && !app.config.trust_request_chat_template {
        let message = "templates in requests are not accepted here (--trust-request-chat-template)";
        return Err(ApiError::invalid("chat_template", message));
    }
    let model = Arc::clone(model);
    app.long_work
        .run(bytes, move || {
            let text = rendering.text(&model)?;
            rules.tokenize(&model.assets.tokenizer, text)
        })
        .await
}

impl Rendering {
    fn text(&self, model: &Model) -> Result<String, ApiError> {
        let templates = &model.assets.chat_templates;
        let own;
        let template = match &self.chat_template {
            None => templates.select(self.tools.is_some())?,
            Some(template) => match templates.named(template) {
                Some(template) => template,
                None => {
                    own = ChatTemplate::compile(template, model.assets.tokenizer.special())?;
                    &own
                }
            },
        };
        let text = template.render(&Conversation {
            messages: &self.messages,
            tools: self.tools.as_deref(),
            documents: self.documents.as_deref(),
            add_generation_prompt: self
                .add_generation_prompt
                .unwrap_or(!self.continue_final_message),
            continue_final_message: self.continue_final_message,
            kwargs: self.kwargs.as_ref(),
            content_format: None,
            now: now(),
        })?;
        Ok(text)
    }
}

fn now() -> LocalTime {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
    LocalTime {
        unix_seconds: since.map_or(0, |since| since.as_secs() as i64),
        utc_offset_seconds: chrono::Local::now().offset().local_minus_utc(),
    }
}

impl From<TemplateError> for ApiError {
    fn from(error: TemplateError) -> Self {
        let failed = ApiError::new(error.code(), error.to_string());
        match error {
            TemplateError::Invalid { field, .. } => failed.with_param(field),
            TemplateError::Missing
            | TemplateError::NoDefault { .. }
            | TemplateError::Syntax { .. } => failed.with_param("chat_template"),
            TemplateError::Raised { .. }
            | TemplateError::Limit { .. }
            | TemplateError::Failed { .. } => failed.with_param("messages"),
        }
    }
}
