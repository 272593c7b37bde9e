//! What is done to messages before a template sees them, as vLLM does it (`renderers/chat_utils.py`).
//!
//! Contents become a string or a list of parts, whichever the template expects; arguments of tool calls
//! become objects; fields that no template knows are left out.

use serde_json::{Map, Value};

use super::{ContentFormat, TemplateError};

/// Fields of content parts that the API defines; a template gets the others (`cache_control`) along with a text.
/// vLLM: `_KNOWN_CONTENT_PART_FIELDS`.
const PART_FIELDS: [&str; 18] = [
    "audio_embeds",
    "audio_url",
    "closed",
    "data",
    "file",
    "image_embeds",
    "image_pil",
    "image_url",
    "input_audio",
    "name",
    "prompt_cache_breakpoint",
    "refusal",
    "text",
    "thinking",
    "type",
    "uuid",
    "video_embeds",
    "video_url",
];

/// Returns the messages as a template should see them.
pub(super) fn prepare(
    messages: &[Value],
    format: ContentFormat,
) -> Result<Vec<Value>, TemplateError> {
    messages
        .iter()
        .enumerate()
        .map(|(index, message)| {
            message_for_template(message, format, &format!("messages[{index}]")).map(Value::Object)
        })
        .collect()
}

fn message_for_template(
    message: &Value,
    format: ContentFormat,
    field: &str,
) -> Result<Map<String, Value>, TemplateError> {
    let Value::Object(message) = message else {
        return Err(TemplateError::invalid(field, "a message is an object"));
    };
    let Some(role) = message.get("role").and_then(Value::as_str) else {
        return Err(TemplateError::invalid(
            format!("{field}.role"),
            "a message has a role",
        ));
    };
    let mut content =
        content_for_template(message.get("content"), format, &format!("{field}.content"))?;
    if role == "tool" {
        content = joined_if_text(content);
    }
    let mut out = Map::new();
    out.insert("role".to_owned(), role.into());
    out.insert("content".to_owned(), content);

    if role == "assistant" {
        if let Some(calls) = message.get("tool_calls").and_then(Value::as_array)
            && !calls.is_empty()
        {
            let calls = tool_calls(calls, &format!("{field}.tool_calls"))?;
            out.insert("tool_calls".to_owned(), calls);
        }
        let reasoning = ["reasoning", "reasoning_content"]
            .iter()
            .find_map(|name| message.get(*name).filter(|value| !value.is_null()));
        if let Some(reasoning) = reasoning {
            out.insert("reasoning".to_owned(), reasoning.clone());
            out.insert("reasoning_content".to_owned(), reasoning.clone());
        }
    }
    if role == "tool"
        && let Some(id) = message.get("tool_call_id")
    {
        out.insert("tool_call_id".to_owned(), id.clone());
    }
    for name in ["name", "task"] {
        if let Some(Value::String(value)) = message.get(name) {
            out.insert(name.to_owned(), value.as_str().into());
        }
    }
    if role == "developer" {
        out.insert(
            "tools".to_owned(),
            message.get("tools").cloned().unwrap_or(Value::Null),
        );
    }
    Ok(out)
}

fn content_for_template(
    content: Option<&Value>,
    format: ContentFormat,
    field: &str,
) -> Result<Value, TemplateError> {
    let parts = match content {
        None | Some(Value::Null) => &[][..],
        Some(text @ Value::String(_)) => std::slice::from_ref(text),
        Some(Value::Array(parts)) => parts,
        Some(_) => {
            return Err(TemplateError::invalid(
                field,
                "content is a string or a list of parts",
            ));
        }
    };
    let mut texts = Vec::new();
    let mut dicts = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        let Some(part) = Part::parse(part, &format!("{field}[{index}]"))? else {
            continue;
        };
        match format {
            ContentFormat::String => texts.push(part.text),
            ContentFormat::Parts => dicts.push(part.into_dict()),
        }
    }
    Ok(match format {
        ContentFormat::String => texts.join("\n").into(),
        ContentFormat::Parts => Value::Array(dicts),
    })
}

/// A content part that is text, or stands for some.
struct Part<'a> {
    text: &'a str,
    /// The part names a tool that the template may expand.
    is_tool_reference: bool,
    extra: Vec<(&'a String, &'a Value)>,
}

impl<'a> Part<'a> {
    /// Reads a part; `None` if it is empty.
    fn parse(part: &'a Value, field: &str) -> Result<Option<Self>, TemplateError> {
        let dict = match part {
            Value::String(text) => {
                return Ok(Some(Self {
                    text,
                    is_tool_reference: false,
                    extra: Vec::new(),
                }));
            }
            Value::Object(dict) => dict,
            _ => {
                return Err(TemplateError::invalid(
                    field,
                    "a part is a string or an object",
                ));
            }
        };
        let Some(kind) = dict.get("type").and_then(Value::as_str) else {
            return Err(TemplateError::invalid(
                format!("{field}.type"),
                "a part has a type",
            ));
        };
        let (key, is_tool_reference) = match kind {
            "text" | "input_text" | "output_text" => ("text", false),
            "refusal" => ("refusal", false),
            "thinking" => ("thinking", false),
            "tool_reference" => ("name", true),
            _ => {
                let reason = format!("parts of type {kind:?} are not supported by this model");
                return Err(TemplateError::invalid(format!("{field}.type"), reason));
            }
        };
        let text = match dict.get(key) {
            Some(Value::String(text)) => text,
            None | Some(Value::Null) => return Ok(None),
            Some(_) => {
                return Err(TemplateError::invalid(
                    format!("{field}.{key}"),
                    "it is a string",
                ));
            }
        };
        let extra = match is_tool_reference {
            true => Vec::new(),
            false => dict
                .iter()
                .filter(|(name, _)| !PART_FIELDS.contains(&name.as_str()))
                .collect(),
        };
        Ok(Some(Self {
            text,
            is_tool_reference,
            extra,
        }))
    }

    fn into_dict(self) -> Value {
        let (kind, key) = match self.is_tool_reference {
            true => ("tool_reference", "name"),
            false => ("text", "text"),
        };
        let mut dict = Map::new();
        dict.insert("type".to_owned(), kind.into());
        dict.insert(key.to_owned(), self.text.into());
        dict.extend(
            self.extra
                .into_iter()
                .map(|(name, value)| (name.clone(), value.clone())),
        );
        Value::Object(dict)
    }
}

/// Joins a list that holds nothing but text: most templates take no list as a tool's answer.
fn joined_if_text(content: Value) -> Value {
    let Value::Array(parts) = &content else {
        return content;
    };
    if parts.iter().any(|part| part["type"] != "text") {
        return content;
    }
    let texts: Vec<&str> = parts
        .iter()
        .filter_map(|part| part["text"].as_str())
        .collect();
    texts.join("\n").into()
}

/// Turns the arguments of tool calls, which the API writes as JSON text, into objects. Text that is no JSON
/// object becomes an empty one: it is history, and refusing it would end the conversation for good.
fn tool_calls(calls: &[Value], field: &str) -> Result<Value, TemplateError> {
    let mut calls = calls.to_vec();
    for (index, call) in calls.iter_mut().enumerate() {
        let refuse = |reason: &str| TemplateError::invalid(format!("{field}[{index}]"), reason);
        let is_function = call.get("type").is_none_or(|kind| kind == "function");
        let function = call.get_mut("function").and_then(Value::as_object_mut);
        let (Some(function), true) = (function, is_function) else {
            return Err(refuse("a tool call is an object of type \"function\""));
        };
        let arguments = match function.get("arguments") {
            Some(Value::String(text)) => serde_json::from_str(text).unwrap_or(Value::Null),
            Some(value) => value.clone(),
            None => Value::Null,
        };
        let arguments = if arguments.is_object() {
            arguments
        } else {
            Map::new().into()
        };
        function.insert("arguments".to_owned(), arguments);
    }
    Ok(Value::Array(calls))
}

/// Makes `developer` messages `system` messages, and then all system messages one, in front: templates
/// that know only `system` mostly allow it nowhere else.
pub(super) fn developer_as_system(messages: Vec<Value>) -> Vec<Value> {
    let mut messages = messages;
    for message in messages
        .iter_mut()
        .filter(|message| message["role"] == "developer")
    {
        if let Value::Object(message) = message {
            message.insert("role".to_owned(), "system".into());
            message.shift_remove("tools");
        }
    }
    let is_system = |message: &Value| message["role"] == "system";
    if !messages.iter().skip(1).any(is_system) {
        return messages;
    }
    let (system, others): (Vec<Value>, Vec<Value>) = messages.into_iter().partition(is_system);
    let texts: Vec<String> = system
        .iter()
        .map(|message| text_of(&message["content"]))
        .filter(|t| !t.is_empty())
        .collect();
    let mut merged = Map::new();
    merged.insert("role".to_owned(), "system".into());
    merged.insert("content".to_owned(), texts.join("\n\n").into());
    std::iter::once(Value::Object(merged))
        .chain(others)
        .collect()
}

fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(parts) => {
            let texts: Vec<&str> = parts
                .iter()
                .filter_map(|part| part["text"].as_str())
                .collect();
            texts.join("\n")
        }
        _ => String::new(),
    }
}
