//! How requests reach workers and outputs come back.
//!
//! One plane so far: [`tcp`], a multiplexed duplex connection per processor-worker pair.

pub mod tcp;
