//! `num-bigint` under the name `malachite-bigint`.
//!
//! The parsers of tool calls that are written as Python use `rustpython-parser`, which takes its integers from
//! `malachite-bigint`. That crate is under LGPL-3.0-only, which a statically linked program should not
//! carry. `rustpython-parser` works with `num-bigint` as well, but its user cannot say so from outside, and the two
//! crates have the same types; so the workspace puts this one in its place (`[patch.crates-io]`).

pub use num_bigint::{BigInt, ParseBigIntError, Sign, ToBigInt};
