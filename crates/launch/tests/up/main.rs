//! `stator` on simulated engines, as a person uses it: the built binaries, signals, and what is printed.
//!
//! Cargo builds the launcher for this test, but not what the launcher starts: that must lie beside it
//! (`cargo build --workspace --bins`, which `make test` does first).

mod disagg;
mod doctor;
mod launcher;
mod nats;
mod scale;
mod start;
mod worker;
