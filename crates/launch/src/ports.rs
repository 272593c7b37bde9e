//! Free ports on loopback for children that must be told theirs.

use std::io;
use std::net::TcpListener;

/// Returns `n` distinct ports that were free a moment ago.
///
/// All are held until the last is known, so they differ. Between this call and the child's bind
/// another process may take one; the child then fails at once and says so.
pub(crate) fn free(n: usize) -> io::Result<Vec<u16>> {
    let held = (0..n)
        .map(|_| TcpListener::bind(("127.0.0.1", 0)))
        .collect::<io::Result<Vec<_>>>()?;
    held.iter()
        .map(|l| l.local_addr().map(|a| a.port()))
        .collect()
}
