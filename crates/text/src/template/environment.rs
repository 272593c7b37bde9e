//! The Jinja environment of chat templates, and its limits.
//!
//! As in transformers' `_cached_compile_jinja_template`: `trim_blocks`, `lstrip_blocks`, loop controls,
//! `raise_exception`, `strftime_now`, its own `tojson`, and `{% generation %}`, which marks text for training and
//! means nothing here.

use std::fmt;
use std::io;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::Serde;
use minijinja::{Environment, Error, ErrorKind, Value as Jinja, context, escape_formatter};
use serde_json::{Map, Value};

use super::tojson::tojson;
use super::{LocalTime, TemplateError, python_methods};
use crate::python_json::python_float;

/// Instructions that one rendering may take. A conversation of a thousand messages takes about 100,000; this
/// many take around a second.
const FUEL: u64 = 10_000_000;

/// Bytes of text that one rendering may give: more than any context window holds.
const MAX_OUTPUT: usize = 64 << 20;

/// Returns an environment that holds one template.
pub(super) fn with_template(
    name: &'static str,
    source: String,
) -> Result<Environment<'static>, Error> {
    let mut environment = Environment::new();
    environment.set_syntax(syntax());
    environment.set_fuel(Some(FUEL));
    environment.set_auto_escape_callback(|_| minijinja::AutoEscape::None);
    environment.set_unknown_method_callback(python_methods::call);
    environment.set_formatter(|out, state, value| match f64::try_from(value.clone()) {
        Ok(number) if value.is_number() && !value.is_integer() && number.is_finite() => {
            Ok(out.write_str(&python_float(number))?)
        }
        _ => escape_formatter(out, state, value),
    });
    environment.add_filter("tojson", tojson);
    environment.add_function(
        "raise_exception",
        |message: &Jinja| -> Result<Jinja, Error> {
            let raised = Raised(message.to_string());
            Err(Error::new(ErrorKind::InvalidOperation, "raise_exception").with_source(raised))
        },
    );
    environment.add_template_owned(name, source)?;
    Ok(environment)
}

pub(super) fn syntax() -> SyntaxConfig {
    SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build()
        .expect("the default delimiters are valid")
}

/// Renders the template.
pub(super) fn render(
    environment: &Environment<'static>,
    name: &str,
    variables: Map<String, Value>,
    now: LocalTime,
) -> Result<String, TemplateError> {
    let clock = Jinja::from_function(move |format: String| now.strftime(&format));
    let variables = context! { strftime_now => clock, ..Jinja::from(Serde(variables)) };
    let mut output = Bounded::default();
    let rendered = environment.get_template(name).and_then(|template| {
        template
            .render_captured_to(variables, &mut output)
            .map(drop)
    });
    if output.is_full {
        return Err(TemplateError::Limit {
            limit: "64 MiB of text",
        });
    }
    rendered.map_err(|error| typed(&error))?;
    String::from_utf8(output.bytes).map_err(|_| TemplateError::Failed {
        reason: "the output is not UTF-8".to_owned(),
    })
}

fn typed(error: &Error) -> TemplateError {
    let mut source: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref::<Raised>() {
            return TemplateError::Raised {
                message: message.clone(),
            };
        }
        if cause
            .downcast_ref::<Error>()
            .is_some_and(|error| error.kind() == ErrorKind::OutOfFuel)
        {
            return TemplateError::Limit {
                limit: "10 million steps",
            };
        }
        source = cause.source();
    }
    TemplateError::Failed {
        reason: describe(error),
    }
}

/// Returns an error with its line, on one line.
pub(super) fn describe(error: &Error) -> String {
    match error.line() {
        Some(line) => format!("{} (line {line})", Brief(error)),
        None => Brief(error).to_string(),
    }
}

struct Brief<'a>(&'a Error);

impl fmt::Display for Brief<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0.detail() {
            Some(detail) => write!(f, "{}: {detail}", self.0.kind()),
            None => write!(f, "{}", self.0.kind()),
        }
    }
}

/// What a template said with `raise_exception`.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// A buffer that takes no more than [`MAX_OUTPUT`].
#[derive(Default)]
struct Bounded {
    bytes: Vec<u8>,
    is_full: bool,
}

impl io::Write for &mut Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.bytes.len() + bytes.len() > MAX_OUTPUT {
            self.is_full = true;
            return Err(io::Error::other("the output is too long"));
        }
        self.bytes.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Replaces `{% generation %}` and `{% endgeneration %}`, which minijinja does not know, by a block that
/// does nothing. Signs for whitespace control stay.
pub(super) fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let (before, tag) = rest.split_at(start + 2);
        out.push_str(before);
        rest = tag;
        let Some(end) = tag.find("%}") else { break };
        let inside = &tag[..end];
        let name = inside
            .trim_start_matches(['-', '+'])
            .trim_end_matches(['-', '+'])
            .trim();
        let block = match name {
            "generation" => "with",
            "endgeneration" => "endwith",
            _ => continue,
        };
        out.push_str(&inside.replace(name, &format!(" {block} ")));
        rest = &tag[end..];
    }
    out.push_str(rest);
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn generation_tags_become_blocks_without_effect() {
        let source = "a{%- generation -%} b {% endgeneration +%}{% if generation %}{{ '{%' }}";
        assert_eq!(
            without_generation_tags(source),
            "a{%-  with  -%} b {%  endwith  +%}{% if generation %}{{ '{%' }}"
        );
    }
}
