//! What a role does to requests: the one thing in which worker roles differ.

use stator_common::{
    Code,
    proto::worker::{Delta, Error, GenerateRequest, Leg},
};

use crate::convert;

/// What a role does to requests. Its owner is the role's crate; the worker calls it.
pub trait Plan: Send + Sync + 'static {
    /// Judges a request, and makes of it what the engine shall do.
    ///
    /// - result: the leg that the request is. For [`Leg::Release`] the engine is only told to let go.
    ///
    /// # Errors
    /// The answer to a request that this role does not take.
    fn request(&self, request: &mut GenerateRequest) -> Result<Leg, Error>;

    /// Completes what goes out. Called for every output of the engine, under a lock.
    fn delta(&self, progress: &Progress, delta: &mut Delta) {
        let _ = (progress, delta);
    }

    /// Says whether an answer may be worth something to a processor that has given the request up: KV that
    /// is held for it must be released.
    fn outlives_cancel(&self) -> bool {
        false
    }
}

/// How far a request is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What of the request is done here.
    pub leg: Leg,
    /// Whether there was an output before this one.
    pub started: bool,
    /// Tokens of the prompt.
    pub prompt_tokens: u32,
}

impl Progress {
    /// Says whether another engine may still keep the KV of this request's prompt for this one.
    pub(crate) fn is_unfetched(&self) -> bool {
        self.leg == Leg::Decode && !self.started
    }

    /// Returns how many tokens of a prompt that another engine had computed were computed here again, beyond
    /// the last one, which always is; `None` where the engine says nothing of it.
    pub fn recomputed(&self, delta: &Delta) -> Option<u32> {
        let fetched = delta.cached_tokens?;
        let expected = self.prompt_tokens.saturating_sub(1);
        Some(expected.saturating_sub(fetched))
    }
}

/// Reads the leg of a request.
///
/// # Errors
/// The answer to a leg that this version does not know.
pub fn leg(request: &GenerateRequest) -> Result<Leg, Error> {
    Leg::try_from(request.leg).map_err(|_| {
        let message = format!("there is no leg {} in this version", request.leg);
        convert::error(Code::InvalidRequest, message, "leg")
    })
}

/// Returns the answer to a leg that is another role's.
///
/// - `why`: what this worker takes, and what is missing.
pub fn wrong_leg(leg: Leg, why: &str) -> Error {
    let name = leg.as_str_name();
    convert::error(Code::InvalidRequest, format!("{name}: {why}"), "leg")
}

/// Returns the answer to a request with a field at fault.
pub fn invalid(message: impl Into<String>, field: &str) -> Error {
    convert::error(Code::InvalidRequest, message, field)
}

/// Makes a delta the last one of a stream that broke off.
pub fn fail(delta: &mut Delta, code: Code, message: impl Into<String>) {
    *delta = convert::failed(delta.stream, convert::error(code, message, ""));
}
