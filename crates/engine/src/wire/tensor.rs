//! Reads the numpy arrays and torch tensors that log-probabilities come in:
//! `[dtype, shape, data]`, where data is inline (an extension) or the number of a frame.

use bytes::Bytes;

use super::{
    layout::LogprobsSlot,
    read::{Reader, TensorError, WireError},
};
use crate::output::Logprobs;

/// A tensor in place.
struct Tensor<'a> {
    kind: Kind,
    rows: usize,
    data: &'a [u8],
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    F16,
    Bf16,
    F32,
    F64,
    U8,
    I32,
    I64,
    U32,
    U64,
}

impl Kind {
    /// Reads numpy's `dtype.str` (`<f4`) or torch's name (`bfloat16`).
    fn parse(name: &str) -> Option<Self> {
        Some(match name {
            "<f2" | "float16" => Self::F16,
            "bfloat16" => Self::Bf16,
            "<f4" | "float32" => Self::F32,
            "<f8" | "float64" => Self::F64,
            "|u1" | "uint8" => Self::U8,
            "<i4" | "int32" => Self::I32,
            "<i8" | "int64" => Self::I64,
            "<u4" | "uint32" => Self::U32,
            "<u8" | "uint64" => Self::U64,
            _ => return None,
        })
    }

    fn size(self) -> usize {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::Bf16 => 2,
            Self::F32 | Self::I32 | Self::U32 => 4,
            Self::F64 | Self::I64 | Self::U64 => 8,
        }
    }
}

impl<'a> Tensor<'a> {
    fn read(reader: &mut Reader<'a>, frames: &'a [Bytes]) -> Result<Self, WireError> {
        let fields = reader.array()?;
        if fields < 3 {
            return Err(WireError::Missing {
                message: "tensor",
                field: "data",
            });
        }
        let name = reader.str("dtype")?;
        let kind = Kind::parse(name).ok_or_else(|| TensorError::Dtype(name.to_owned()))?;
        let mut elements = 1usize;
        let mut rows = 1;
        for dimension in 0..reader.array()? {
            let size = reader.u32()? as usize;
            elements = elements.saturating_mul(size);
            if dimension == 0 {
                rows = size;
            }
        }
        let data = Self::data(reader, frames)?;
        for _ in 3..fields {
            reader.skip()?;
        }
        if elements.checked_mul(kind.size()) != Some(data.len()) {
            return Err(TensorError::Size {
                bytes: data.len(),
                elements,
                size: kind.size(),
            }
            .into());
        }
        Ok(Self { kind, rows, data })
    }

    fn data(reader: &mut Reader<'a>, frames: &'a [Bytes]) -> Result<&'a [u8], WireError> {
        use rmp::Marker as M;
        match reader.peek()? {
            M::FixPos(_) | M::U8 | M::U16 | M::U32 | M::U64 => {
                let index: u64 = reader.number("a frame's number")?;
                let frame = usize::try_from(index).ok().and_then(|i| frames.get(i));
                let frame = frame.ok_or(TensorError::NoFrame {
                    index,
                    frames: frames.len(),
                })?;
                Ok(frame)
            }
            M::FixMap(_) | M::Map16 | M::Map32 => Err(TensorError::OutOfBand.into()),
            _ => reader.blob(),
        }
    }

    /// Token ids and ranks; what is not a `u32` (padding is -1) becomes `u32::MAX`.
    fn integers(&self) -> Result<Vec<u32>, WireError> {
        fn all<const N: usize, T: TryInto<u32>>(data: &[u8], from: fn([u8; N]) -> T) -> Vec<u32> {
            let (values, _) = data.as_chunks::<N>();
            let values = values.iter().map(|value| from(*value));
            values
                .map(|value| value.try_into().unwrap_or(u32::MAX))
                .collect()
        }
        Ok(match self.kind {
            Kind::U8 => all(self.data, u8::from_le_bytes),
            Kind::I32 => all(self.data, i32::from_le_bytes),
            Kind::U32 => all(self.data, u32::from_le_bytes),
            Kind::I64 => all(self.data, i64::from_le_bytes),
            Kind::U64 => all(self.data, u64::from_le_bytes),
            kind @ (Kind::F16 | Kind::Bf16 | Kind::F32 | Kind::F64) => {
                return Err(TensorError::Dtype(format!("{kind:?}")).into());
            }
        })
    }

    fn floats(&self) -> Result<Vec<f32>, WireError> {
        fn all<const N: usize>(data: &[u8], from: fn([u8; N]) -> f32) -> Vec<f32> {
            let (values, _) = data.as_chunks::<N>();
            values.iter().map(|value| from(*value)).collect()
        }
        Ok(match self.kind {
            Kind::F32 => all(self.data, f32::from_le_bytes),
            Kind::F64 => all(self.data, |value| f64::from_le_bytes(value) as f32),
            Kind::F16 => all(self.data, |value| half_to_f32(u16::from_le_bytes(value))),
            Kind::Bf16 => all(self.data, |value| {
                f32::from_bits(u32::from(u16::from_le_bytes(value)) << 16)
            }),
            kind @ (Kind::U8 | Kind::I32 | Kind::I64 | Kind::U32 | Kind::U64) => {
                return Err(TensorError::Dtype(format!("{kind:?}")).into());
            }
        })
    }
}

/// IEEE 754 binary16 to binary32, exact.
fn half_to_f32(half: u16) -> f32 {
    let sign = if half & 0x8000 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from(half >> 10 & 0x1f);
    let mantissa = f32::from(half & 0x3ff);
    match (exponent, half & 0x3ff) {
        (0, _) => sign * mantissa * 2f32.powi(-24),
        (0x1f, 0) => sign * f32::INFINITY,
        (0x1f, _) => f32::NAN,
        _ => sign * (1024.0 + mantissa) * 2f32.powi(exponent - 25),
    }
}

/// Reads `LogprobsLists` (numpy) or `LogprobsTensors` (torch), by the positions in `slots`.
pub(super) fn logprobs<'a>(
    reader: &mut Reader<'a>,
    frames: &'a [Bytes],
    slots: &[LogprobsSlot],
) -> Result<Logprobs, WireError> {
    let (mut tokens, mut values, mut ranks) = (None, None, None);
    for position in 0..reader.array()? {
        match slots.get(position).unwrap_or(&LogprobsSlot::Skip) {
            LogprobsSlot::Tokens => tokens = Some(Tensor::read(reader, frames)?),
            LogprobsSlot::Values => values = Some(Tensor::read(reader, frames)?),
            LogprobsSlot::Ranks => ranks = Some(Tensor::read(reader, frames)?),
            LogprobsSlot::Skip => drop(reader.skip()?),
        }
    }
    let missing = |field| WireError::Missing {
        message: "logprobs",
        field,
    };
    let tokens = tokens.ok_or(missing("logprob_token_ids"))?;
    let rows = tokens.rows;
    let tokens = tokens.integers()?;
    let values = values.ok_or(missing("logprobs"))?.floats()?;
    let ranks = ranks.ok_or(missing("ranks"))?.integers()?;
    let width = tokens.len().checked_div(rows).unwrap_or(0);
    let agree = ranks.len() == rows && values.len() == tokens.len() && (rows == 0 || width > 0);
    if !agree {
        return Err(TensorError::Shapes.into());
    }
    Ok(Logprobs {
        width,
        tokens,
        values,
        ranks,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_precision_converts_exactly() {
        for (half, value) in [
            (0x3c00, 1.0),
            (0xc000, -2.0),
            (0x0001, 2f32.powi(-24)),
            (0x7bff, 65504.0),
            (0xfc00, f32::NEG_INFINITY),
            (0x3555, 0.333_251_95),
        ] {
            assert_eq!(half_to_f32(half), value, "{half:#x}");
        }
        assert!(half_to_f32(0x7e00).is_nan());
    }
}
