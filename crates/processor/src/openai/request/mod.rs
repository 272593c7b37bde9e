//! Reading a request's body: JSON to a typed request, with the field at fault when that fails.

mod fields;
mod json;
mod scalar;
mod shared;

pub(crate) use fields::{Own, Request, fields};
#[cfg(test)]
pub(crate) use json::parse;
pub(crate) use json::read;
pub(crate) use scalar::Int;
pub(crate) use shared::{ResponseFormat, Shared, Side};
