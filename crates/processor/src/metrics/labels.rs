//! What requests are told apart by: the endpoint, and how it ended.

use stator_common::Code;

/// The generating routes, as labels.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Endpoint {
    /// `POST /v1/chat/completions`.
    Chat,
    /// `POST /v1/completions`.
    Completions,
}

impl Endpoint {
    pub(super) const ALL: [Self; 2] = [Self::Chat, Self::Completions];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Chat => "chat_completions",
            Self::Completions => "completions",
        }
    }
}

/// How a generating request ended, as a label.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// With a complete answer.
    Success,
    /// The request was at fault.
    Refused,
    /// There was no room for it.
    Overloaded,
    /// Nobody was there to serve it.
    Unavailable,
    /// The client went away.
    Cancelled,
    /// It took too long.
    Expired,
    /// A defect.
    Failed,
}

impl Outcome {
    pub(super) const ALL: [Self; 7] = [
        Self::Success,
        Self::Refused,
        Self::Overloaded,
        Self::Unavailable,
        Self::Cancelled,
        Self::Expired,
        Self::Failed,
    ];

    pub(super) fn label(self) -> &'static str {
        match self {
            Self::Success => "success",
            Self::Refused => "refused",
            Self::Overloaded => "overloaded",
            Self::Unavailable => "unavailable",
            Self::Cancelled => "cancelled",
            Self::Expired => "expired",
            Self::Failed => "failed",
        }
    }
}

impl From<Code> for Outcome {
    fn from(code: Code) -> Self {
        match code {
            Code::InvalidRequest | Code::NotFound | Code::TooLarge | Code::Unauthenticated => {
                Self::Refused
            }
            Code::Overloaded => Self::Overloaded,
            Code::Unavailable | Code::Draining | Code::EngineDead | Code::Disconnected => {
                Self::Unavailable
            }
            Code::Cancelled => Self::Cancelled,
            Code::DeadlineExceeded => Self::Expired,
            Code::Incompatible | Code::Internal | Code::HandoffFailed => Self::Failed,
        }
    }
}
