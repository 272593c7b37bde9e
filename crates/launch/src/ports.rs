//! Which ports are free: the one that a person asked for, and those of children that must be told theirs.

use std::io;
use std::net::TcpListener;

use anyhow::{Context, Result, bail};

/// Fails when something listens at the address of the API already.
///
/// The processor binds it a moment later and says the same, but by then engines are being started.
pub(crate) fn check(host: &str, port: u16) -> Result<()> {
    match TcpListener::bind((host, port)) {
        Ok(_) => Ok(()),
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            bail!("{host}:{port} is taken; stop what listens there or give another --http-port")
        }
        Err(error) => Err(error).context(format!("listen on {host}:{port}")),
    }
}

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
