//! Why a request was refused or broke off.
//!
//! [`Code`] alone maps to HTTP, gRPC and the OpenAI error body, and says whether another worker may
//! be tried. The numbers on the wire are `proto/stator/worker/v1`'s.

use crate::proto::worker;

/// Why a request was refused or broke off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// A field is missing, malformed or out of range. The client must change the request.
    InvalidRequest,
    /// The model (or another named thing) does not exist here.
    NotFound,
    /// The body or the prompt is larger than a configured limit.
    TooLarge,
    /// Everything that could serve the request is full. Trying later may help.
    Overloaded,
    /// Nothing that could serve the request is there (yet).
    Unavailable,
    /// The process finishes what runs and takes nothing new.
    Draining,
    /// The client went away or cancelled.
    Cancelled,
    /// The request's own deadline passed.
    DeadlineExceeded,
    /// The engine behind the worker died.
    EngineDead,
    /// The connection to the worker was lost.
    Disconnected,
    /// The peer speaks another protocol version or serves another model build.
    Incompatible,
    /// No or wrong credentials.
    Unauthenticated,
    /// A defect on our side.
    Internal,
    /// The KV that another engine computed could not be had: the prompt has to be computed again.
    HandoffFailed,
}

impl Code {
    /// Returns the HTTP status that a client sees.
    pub fn http_status(self) -> u16 {
        match self {
            Code::InvalidRequest => 400,
            Code::Unauthenticated => 401,
            Code::NotFound => 404,
            Code::TooLarge => 413,
            Code::Overloaded => 429,
            // nginx's "client closed request"; nobody is left to read it.
            Code::Cancelled => 499,
            Code::Internal => 500,
            Code::Incompatible => 502,
            Code::Unavailable
            | Code::Draining
            | Code::EngineDead
            | Code::Disconnected
            | Code::HandoffFailed => 503,
            Code::DeadlineExceeded => 504,
        }
    }

    /// Returns the status that a gRPC client sees.
    pub fn grpc_code(self) -> tonic::Code {
        match self {
            Code::InvalidRequest => tonic::Code::InvalidArgument,
            Code::Unauthenticated => tonic::Code::Unauthenticated,
            Code::NotFound => tonic::Code::NotFound,
            Code::TooLarge => tonic::Code::OutOfRange,
            Code::Overloaded => tonic::Code::ResourceExhausted,
            Code::Cancelled => tonic::Code::Cancelled,
            Code::Internal => tonic::Code::Internal,
            Code::Incompatible => tonic::Code::FailedPrecondition,
            // Clients of gRPC repeat these by themselves, as they should.
            Code::Unavailable | Code::Draining | Code::EngineDead | Code::Disconnected => {
                tonic::Code::Unavailable
            }
            Code::HandoffFailed => tonic::Code::Aborted,
            Code::DeadlineExceeded => tonic::Code::DeadlineExceeded,
        }
    }

    /// Returns what a gRPC status means that does not say its code in our words: it comes from something between
    /// the processor and the worker, or from the library.
    pub fn from_grpc(code: tonic::Code) -> Self {
        match code {
            tonic::Code::InvalidArgument | tonic::Code::AlreadyExists => Code::InvalidRequest,
            tonic::Code::Unauthenticated | tonic::Code::PermissionDenied => Code::Unauthenticated,
            tonic::Code::NotFound => Code::NotFound,
            tonic::Code::OutOfRange => Code::TooLarge,
            tonic::Code::ResourceExhausted => Code::Overloaded,
            tonic::Code::Cancelled => Code::Cancelled,
            tonic::Code::FailedPrecondition | tonic::Code::Unimplemented => Code::Incompatible,
            tonic::Code::Unavailable => Code::Unavailable,
            tonic::Code::Aborted => Code::HandoffFailed,
            tonic::Code::DeadlineExceeded => Code::DeadlineExceeded,
            tonic::Code::Ok
            | tonic::Code::Unknown
            | tonic::Code::Internal
            | tonic::Code::DataLoss => Code::Internal,
        }
    }

    /// Returns the `error.type` of the OpenAI error body.
    pub fn openai_type(self) -> &'static str {
        match self {
            Code::InvalidRequest | Code::TooLarge => "invalid_request_error",
            Code::Unauthenticated => "authentication_error",
            Code::NotFound => "not_found_error",
            Code::Overloaded => "rate_limit_error",
            Code::Unavailable
            | Code::Draining
            | Code::EngineDead
            | Code::Disconnected
            | Code::HandoffFailed => "service_unavailable_error",
            Code::DeadlineExceeded => "timeout_error",
            Code::Cancelled => "request_cancelled",
            Code::Incompatible | Code::Internal => "internal_error",
        }
    }

    /// Says whether the same request may succeed on another worker, or here later.
    pub fn is_retryable(self) -> bool {
        match self {
            Code::Overloaded
            | Code::Unavailable
            | Code::Draining
            | Code::EngineDead
            | Code::Disconnected
            | Code::HandoffFailed => true,
            Code::InvalidRequest
            | Code::NotFound
            | Code::TooLarge
            | Code::Cancelled
            | Code::DeadlineExceeded
            | Code::Incompatible
            | Code::Unauthenticated
            | Code::Internal => false,
        }
    }
}

impl From<Code> for worker::Code {
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidRequest => Self::InvalidRequest,
            Code::NotFound => Self::NotFound,
            Code::TooLarge => Self::TooLarge,
            Code::Overloaded => Self::Overloaded,
            Code::Unavailable => Self::Unavailable,
            Code::Draining => Self::Draining,
            Code::Cancelled => Self::Cancelled,
            Code::DeadlineExceeded => Self::DeadlineExceeded,
            Code::EngineDead => Self::EngineDead,
            Code::Disconnected => Self::Disconnected,
            Code::Incompatible => Self::Incompatible,
            Code::Unauthenticated => Self::Unauthenticated,
            Code::Internal => Self::Internal,
            Code::HandoffFailed => Self::HandoffFailed,
        }
    }
}

impl From<worker::Code> for Code {
    /// A code that this build does not know is a defect of one side: [`Code::Internal`].
    fn from(code: worker::Code) -> Self {
        match code {
            worker::Code::InvalidRequest => Self::InvalidRequest,
            worker::Code::NotFound => Self::NotFound,
            worker::Code::TooLarge => Self::TooLarge,
            worker::Code::Overloaded => Self::Overloaded,
            worker::Code::Unavailable => Self::Unavailable,
            worker::Code::Draining => Self::Draining,
            worker::Code::Cancelled => Self::Cancelled,
            worker::Code::DeadlineExceeded => Self::DeadlineExceeded,
            worker::Code::EngineDead => Self::EngineDead,
            worker::Code::Disconnected => Self::Disconnected,
            worker::Code::Incompatible => Self::Incompatible,
            worker::Code::Unauthenticated => Self::Unauthenticated,
            worker::Code::Internal | worker::Code::Unspecified => Self::Internal,
            worker::Code::HandoffFailed => Self::HandoffFailed,
        }
    }
}
