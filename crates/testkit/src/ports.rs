//! Ports of loopback that were free a moment ago, for what cannot be told to take any.

use std::net::TcpListener;

/// Returns a port that nobody listens on.
pub fn free() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    listener.local_addr().expect("a bound socket").port()
}

/// Returns the first of `count` ports in a row that nobody listens on.
pub fn free_row(count: u16) -> u16 {
    loop {
        let first = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = first.local_addr().expect("a bound socket").port();
        let rest = (1..count).all(|n| TcpListener::bind(("127.0.0.1", port + n)).is_ok());
        if rest {
            return port;
        }
    }
}
