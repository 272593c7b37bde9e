//! How an error travels: as a gRPC status for everybody, with our own error beside it for processors.

use prost::Message;
use tonic::{Status, metadata::MetadataValue};

use super::ERROR_KEY;
use crate::{
    Code,
    plane::error,
    proto::worker::{self, Error},
};

/// Bytes of a message that are told: peers take 16 KiB of headers, in which it stands twice, encoded.
const MESSAGE: usize = 1 << 10;

/// Returns the status that an error ends a call with.
pub(super) fn of(error: &Error) -> Status {
    let code = Code::from(error.code());
    let mut error = error.clone();
    while error.message.len() > MESSAGE {
        error.message.pop();
    }
    let mut status = Status::new(code.grpc_code(), error.message.clone());
    let own = MetadataValue::from_bytes(&error.encode_to_vec());
    status.metadata_mut().insert_bin(ERROR_KEY, own);
    status
}

/// Returns the status of a refusal.
pub(super) fn refusal(code: Code, message: impl Into<String>) -> Status {
    of(&error(code, message))
}

/// Returns what a status says, if the worker said it.
pub(super) fn read(status: &Status) -> Option<Error> {
    let own = status.metadata().get_bin(ERROR_KEY)?.to_bytes().ok()?;
    Error::decode(own).ok()
}

/// Returns what a call ended with that did not end well.
///
/// - `lost`: what to say where no worker said anything: the connection was lost.
pub(super) fn error_of(status: &Status, lost: impl FnOnce(&Status) -> String) -> Error {
    if let Some(own) = read(status) {
        return own;
    }
    // A status from afar has no source: this one is the library's, about a connection.
    if std::error::Error::source(status).is_some() {
        return error(Code::Disconnected, lost(status));
    }
    worker::Error {
        code: worker::Code::from(Code::from_grpc(status.code())).into(),
        message: status.message().to_owned(),
        ..worker::Error::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_survives_as_it_was() {
        let error = Error {
            field: "max_tokens".to_owned(),
            untouched: true,
            ..error(Code::EngineDead, "it is gone")
        };
        let status = of(&error);
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert_eq!(status.message(), "it is gone");
        assert_eq!(read(&status), Some(error));
    }

    #[test]
    fn a_status_of_somebody_else_keeps_its_meaning() {
        let error = error_of(&Status::resource_exhausted("slowly"), |_| String::new());
        assert_eq!(error.code(), worker::Code::Overloaded);
        assert_eq!(error.message, "slowly");
    }
}
