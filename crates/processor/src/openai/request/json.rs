//! From bytes to a request, once; only a body that does not fit is read a second time, to name the field.

use bytes::Bytes;
use serde::de::DeserializeOwned;
use stator_common::Code;

use crate::openai::error::ApiError;
use crate::openai::prompt::LongWork;

/// Reads a JSON body, off the async threads if it is long.
///
/// # Errors
/// Those of [`parse`], and too much such work.
pub(crate) async fn read<T>(body: Bytes, work: &LongWork) -> Result<T, ApiError>
where
    T: DeserializeOwned + Send + 'static,
{
    work.run(body.len(), move || parse(&body)).await
}

/// Reads a JSON body.
///
/// # Errors
/// [`Code::InvalidRequest`], naming the field (`messages[0].content`) where the JSON as such is sound.
pub(crate) fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    // The plain reader is about twice as fast as the one that remembers the path.
    serde_json::from_slice(body).or_else(|_| locate(body))
}

fn locate<T: DeserializeOwned>(body: &[u8]) -> Result<T, ApiError> {
    let mut json = serde_json::Deserializer::from_slice(body);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let error = error.into_inner();
        if error.is_syntax() || error.is_eof() {
            return unsound(&error);
        }
        // serde_json appends " at line 1 column 17", which says little about a body of one line.
        let message = error.to_string();
        let message = message
            .rsplit_once(" at line ")
            .map_or(&*message, |(head, _)| head);
        match path.as_str() {
            "." => ApiError::new(Code::InvalidRequest, message),
            _ => ApiError::invalid(path.clone(), format!("{path}: {message}")),
        }
    })?;
    json.end().map_err(|error| unsound(&error))?;
    Ok(value)
}

fn unsound(error: &serde_json::Error) -> ApiError {
    ApiError::new(
        Code::InvalidRequest,
        format!("the body is not valid JSON: {error}"),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_follows_the_body_makes_it_unsound() {
        assert!(parse::<Vec<u32>>(b"[1, 2]\n").is_ok());
        let error = parse::<Vec<u32>>(b"[1, 2] trailing").unwrap_err();
        assert!(error.to_string().contains("not valid JSON"), "{error}");
    }
}
