//! The engine's side of vLLM's wire: how requests are read and outputs written.
//!
//! Layouts are those of vLLM 0.27, 0.32 and 0.33 (v1/engine/__init__.py, v1/serial_utils.py).

pub mod events;
pub mod msgpack;
pub mod outputs;
pub mod ready;
pub mod requests;

use std::str::FromStr;

/// Whose layouts are spoken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WireVersion {
    V0_27,
    V0_32,
    #[default]
    V0_33,
}

impl WireVersion {
    /// What the ready response calls the version.
    #[must_use]
    pub fn vllm_version(self) -> &'static str {
        match self {
            Self::V0_27 => "0.27.0",
            Self::V0_32 => "0.32.0",
            Self::V0_33 => "0.33.0",
        }
    }

    /// Elements of an `EngineCoreOutput`.
    #[must_use]
    pub fn output_fields(self) -> usize {
        match self {
            Self::V0_27 => 14,
            Self::V0_32 => 18,
            Self::V0_33 => 19,
        }
    }

    /// Elements of an `EngineCoreOutputs`.
    #[must_use]
    pub fn outputs_fields(self) -> usize {
        match self {
            Self::V0_27 => 8,
            Self::V0_32 | Self::V0_33 => 9,
        }
    }
}

impl FromStr for WireVersion {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "0.27" => Ok(Self::V0_27),
            "0.32" => Ok(Self::V0_32),
            "0.33" => Ok(Self::V0_33),
            other => Err(format!(
                "unknown wire version {other}, known: 0.27 0.32 0.33"
            )),
        }
    }
}
