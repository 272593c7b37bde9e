//! The processor's end of the tcp plane: `task` greets and reads, `link` is what requests are written through by
//! whoever makes them.

mod link;
mod task;

pub(in crate::plane) use task::Frames;
