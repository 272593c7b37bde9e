//! The processor in process, on port 0, with workers that speak the real request plane and answer
//! as each test says.

#![allow(clippy::unwrap_used)]

mod access;
mod answers;
mod connections;
#[path = "../support/mod.rs"]
mod support;
mod tls;
mod workers;
