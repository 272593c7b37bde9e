//! `POST /tokenize` and `POST /detokenize`: what the model's tokenizer makes of a prompt, and back.

use std::sync::Arc;

use axum::extract::State;
use axum::routing::post;
use axum::{Json, Router};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::App;
use crate::models::Model;
use crate::openai::chat::{Rendering, render, types::Tool};
use crate::openai::prompt::{Prompt, Rules};
use crate::openai::{ApiError, common, request};
use crate::server::RequestBody;

/// Returns the routes.
pub(crate) fn routes() -> Router<Arc<App>> {
    Router::new()
        .route("/tokenize", post(tokenize))
        .route("/detokenize", post(detokenize))
}

/// A request to tokenize text, or a conversation.
#[derive(Debug, Deserialize)]
struct TokenizeRequest {
    model: Option<String>,
    prompt: Option<String>,
    messages: Option<Vec<Value>>,
    tools: Option<Vec<Tool>>,
    add_special_tokens: Option<bool>,
    add_generation_prompt: Option<bool>,
    continue_final_message: Option<bool>,
    chat_template: Option<String>,
    chat_template_kwargs: Option<Map<String, Value>>,
    return_token_strs: Option<bool>,
}

/// The tokens of a prompt.
#[derive(Debug, Serialize)]
struct Tokenized {
    count: usize,
    max_model_len: u32,
    tokens: Vec<u32>,
    token_strs: Option<Vec<String>>,
}

async fn tokenize(
    State(app): State<Arc<App>>,
    RequestBody(body): RequestBody,
) -> Result<Json<Tokenized>, ApiError> {
    let bytes = body.len();
    let request: TokenizeRequest = request::read(body, &app.long_work).await?;
    let model = common::model(&app, request.model.as_deref())?;
    let named = request.return_token_strs == Some(true);
    let prompt = prompt_of(request, bytes, &model, &app).await?;
    let name = |token: &u32| {
        model
            .assets
            .tokenizer
            .token_name(*token)
            .unwrap_or_default()
    };
    Ok(Json(Tokenized {
        count: prompt.tokens.len(),
        max_model_len: model.card.max_model_len,
        token_strs: named.then(|| prompt.tokens.iter().map(name).collect()),
        tokens: prompt.tokens,
    }))
}

async fn prompt_of(
    request: TokenizeRequest,
    bytes: usize,
    model: &Arc<Model>,
    app: &App,
) -> Result<Prompt, ApiError> {
    match (request.prompt, request.messages) {
        (Some(text), None) => {
            let rules = Rules::unlimited("prompt", request.add_special_tokens.unwrap_or(true));
            let model = Arc::clone(model);
            let work = move || rules.tokenize(&model.assets.tokenizer, text);
            app.long_work.run(bytes, work).await
        }
        (None, Some(messages)) => {
            let rules = Rules::unlimited("messages", request.add_special_tokens.unwrap_or(false));
            let tools = request.tools.as_ref();
            let rendering = Rendering {
                messages,
                tools: tools.map(|tools| tools.iter().map(Tool::for_template).collect()),
                documents: None,
                add_generation_prompt: request.add_generation_prompt,
                continue_final_message: request.continue_final_message == Some(true),
                kwargs: request.chat_template_kwargs,
                chat_template: request.chat_template,
            };
            render(model, rendering, rules, bytes, app).await
        }
        (None, None) => Err(ApiError::invalid("prompt", "prompt or messages is missing")),
        (Some(_), Some(_)) => Err(ApiError::invalid(
            "prompt",
            "prompt and messages cannot be used together",
        )),
    }
}

/// A request to turn tokens into text.
#[derive(Debug, Deserialize)]
struct DetokenizeRequest {
    model: Option<String>,
    tokens: Vec<u32>,
}

/// The text of tokens.
#[derive(Debug, Serialize)]
struct Detokenized {
    prompt: String,
}

async fn detokenize(
    State(app): State<Arc<App>>,
    RequestBody(body): RequestBody,
) -> Result<Json<Detokenized>, ApiError> {
    let bytes = body.len();
    let request: DetokenizeRequest = request::read(body, &app.long_work).await?;
    let model = common::model(&app, request.model.as_deref())?;
    let tokenizer = &model.assets.tokenizer;
    if let Some(token) = request
        .tokens
        .iter()
        .find(|&&token| token > tokenizer.max_id())
    {
        return Err(ApiError::invalid(
            "tokens",
            format!("token id {token} is out of vocabulary"),
        ));
    }
    let work = move || Ok(model.assets.tokenizer.decode(&request.tokens, false)?);
    let prompt = app.long_work.run(bytes, work).await?;
    Ok(Json(Detokenized { prompt }))
}
