//! Ports of loopback that were free a moment ago, for what cannot be told to take any.
//!
//! They come from below the range out of which systems serve "any port", so that no listener or connection of
//! another test takes one between the asking and the binding.

use std::net::TcpListener;
use std::sync::atomic::{AtomicU32, Ordering};

/// The ports that are given out; Linux hands out those from 32768 on by itself.
const FIRST: u16 = 10_240;
const COUNT: u16 = 20_000;

/// Returns a port that nobody listens on.
pub fn free() -> u16 {
    free_row(1)
}

/// Returns the first of `count` ports in a row that nobody listens on. No port is given out twice by one process.
pub fn free_row(count: u16) -> u16 {
    static GIVEN: AtomicU32 = AtomicU32::new(0);
    // Test programs that run side by side begin at different places.
    let start = std::process::id().wrapping_mul(331);
    loop {
        let given = GIVEN.fetch_add(u32::from(count), Ordering::Relaxed);
        let offset = start.wrapping_add(given) % u32::from(COUNT);
        let port = FIRST + u16::try_from(offset).expect("less than COUNT");
        if (0..count).all(|n| TcpListener::bind(("127.0.0.1", port + n)).is_ok()) {
            return port;
        }
    }
}
