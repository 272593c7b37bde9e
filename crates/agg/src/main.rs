//! The aggregated worker: prefill and decode in one engine.
//!
//! This file puts the parts together. What the role does to a request is in the library; everything else is what all
//! workers share.

use std::process::ExitCode;

use stator_agg::Agg;
use stator_common::card::Role;

/// Tokens pass in small allocations; with the system's allocator they are a good part of a request's cost.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

// One thread carries some hundred thousand tokens per second, more than engines give; others would only
// be woken up for nothing.
#[tokio::main(flavor = "current_thread")]
async fn main() -> anyhow::Result<ExitCode> {
    stator_worker::run(Role::Agg, |_| Ok(Agg)).await
}
