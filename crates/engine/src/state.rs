//! What an engine is doing, as others may watch it.

use std::fmt;

/// What an engine is doing.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Not ready yet.
    Starting(Phase),
    /// Takes requests.
    Ready,
    /// Gone for good; [`crate::Engine::start`] makes a new one.
    Dead(DeadReason),
}

/// How far the start has come, as far as the engine's log tells.
#[derive(Clone, Debug, PartialEq)]
pub enum Phase {
    /// Looking for a kept engine and ending one that does not fit.
    Preparing,
    /// The process runs, and imports.
    Launching,
    /// The listener is open; an engine started elsewhere has not dialled in yet.
    AwaitingEngine,
    /// The engine dialled in and sets itself up.
    Initializing,
    /// Weights are being read.
    LoadingWeights {
        /// 0 to 100.
        percent: u8,
    },
    /// Kernels or graphs are being compiled or captured.
    Compiling,
    /// Memory is measured, the KV cache made, the model warmed up.
    WarmingUp,
    /// A kept engine is being adopted.
    Adopting,
}

impl fmt::Display for Phase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Phase::Preparing => f.write_str("preparing"),
            Phase::Launching => f.write_str("launching vLLM"),
            Phase::AwaitingEngine => f.write_str("waiting for an engine to dial in"),
            Phase::Initializing => f.write_str("initializing"),
            Phase::LoadingWeights { percent } => write!(f, "loading weights, {percent} %"),
            Phase::Compiling => f.write_str("compiling"),
            Phase::WarmingUp => f.write_str("warming up"),
            Phase::Adopting => f.write_str("adopting the running engine"),
        }
    }
}

/// Why an engine is dead.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DeadReason {
    /// The process ended.
    #[error("the engine's process ended ({status}){}", last_words(.log))]
    Exited {
        /// Exit code or signal, in words.
        status: String,
        /// The last line of its log that looks like a cause.
        log: Option<String>,
    },
    /// The engine itself said that it is dead (`ENGINE_CORE_DEAD`).
    #[error("the engine reported a fatal error{}", last_words(.log))]
    Reported {
        /// The last line of its log that looks like a cause.
        log: Option<String>,
    },
    /// Its connection broke and did not come back.
    #[error("the connection to the engine broke")]
    Unreachable,
    /// It runs, but answers nothing.
    #[error("the engine has not answered for {seconds} s")]
    Silent {
        /// Seconds since its last sign of life.
        seconds: u64,
    },
    /// The task that takes its outputs ended: a defect on our side.
    #[error("nobody takes the engine's outputs any more")]
    Unattended,
    /// We ended it.
    #[error("the engine was shut down")]
    ShutDown,
}

impl DeadReason {
    /// Adds what the engine's log says about it, where there is a place for that.
    pub(crate) fn with_log(self, log: Option<String>) -> Self {
        match self {
            Self::Exited { status, .. } => Self::Exited { status, log },
            Self::Reported { .. } => Self::Reported { log },
            other => other,
        }
    }
}

fn last_words(log: &Option<String>) -> String {
    log.as_ref()
        .map(|line| format!(": {line}"))
        .unwrap_or_default()
}
