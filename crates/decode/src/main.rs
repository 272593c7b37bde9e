//! The decode worker: continues prompts that a prefill worker computed.
//!
//! This file puts the parts together. What the role does to a request is in the library; everything else is what all
//! workers share.

use std::process::ExitCode;

use anyhow::Context;
use stator_common::card::Role;
use stator_decode::Decode;

/// Tokens pass in small allocations; with the system's allocator they are a good part of a request's cost.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

// One thread carries some hundred thousand tokens per second, more than engines give; others would only
// be woken up for nothing.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    stator_worker::run(Role::Decode, |handoff| {
        let handoff = handoff.context("a decode worker without a connector")?;
        Ok(Decode::new(handoff))
    })
    .await
}
