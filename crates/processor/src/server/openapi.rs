//! `GET /openapi.json`: the description of the API.
//!
//! The document lies beside this file, written by hand: what a field means is more than its type. Tests hold
//! its paths against the routes, and its request fields against those that are read.

use std::sync::LazyLock;

use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use http::header;
use serde_json::Value;

/// The document with the version of this build.
static DOCUMENT: LazyLock<Bytes> = LazyLock::new(|| {
    let mut document: Value =
        serde_json::from_str(include_str!("openapi.json")).expect("the document is JSON");
    document["info"]["version"] = env!("CARGO_PKG_VERSION").into();
    document.to_string().into()
});

/// Returns the document.
pub(super) async fn document() -> Response {
    let headers = [(header::CONTENT_TYPE, "application/json")];
    (headers, DOCUMENT.clone()).into_response()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::super::routes::Route;
    use super::*;
    use crate::openai::request_fields;

    fn served() -> Value {
        serde_json::from_slice(&DOCUMENT).unwrap()
    }

    fn names(properties: &Value) -> BTreeSet<&str> {
        properties
            .as_object()
            .unwrap()
            .keys()
            .map(String::as_str)
            .collect()
    }

    #[test]
    fn every_route_is_described_and_no_other() {
        let document = served();
        let described = names(&document["paths"]);
        let routes = Route::ALL.iter().map(|route| route.pattern());
        assert_eq!(described, routes.collect());
        assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
    }

    #[test]
    fn every_field_of_a_request_is_described_and_no_other() {
        let document = served();
        let schemas = &document["components"]["schemas"];
        for (schema, fields) in request_fields() {
            let own = &schemas[schema]["allOf"][1]["properties"];
            let properties = if own.is_null() {
                &schemas[schema]["properties"]
            } else {
                own
            };
            assert_eq!(
                names(properties),
                fields.iter().copied().collect(),
                "{schema}"
            );
        }
    }

    #[test]
    fn every_reference_leads_somewhere() {
        fn check(document: &Value, part: &Value) {
            match part {
                Value::Object(fields) => {
                    if let Some(Value::String(target)) = fields.get("$ref") {
                        let pointer = target.strip_prefix('#').unwrap();
                        assert!(document.pointer(pointer).is_some(), "{target}");
                    }
                    fields.values().for_each(|value| check(document, value));
                }
                Value::Array(values) => values.iter().for_each(|value| check(document, value)),
                _ => {}
            }
        }
        let document = served();
        check(&document, &document);
    }
}
