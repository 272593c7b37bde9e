//! Text in, tokens out, and back: pure functions and state machines, no I/O, no clock, no tokio.
