//! Addresses: which to bind, which to tell others, and who can reach them.

use std::{
    io,
    net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket},
};

/// Returns the address of `host` (an address or a name) and `port`.
///
/// # Errors
/// The name is not known.
pub(crate) fn resolve(host: &str, port: u16) -> io::Result<SocketAddr> {
    (host, port)
        .to_socket_addrs()?
        .next()
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, format!("'{host}' has no address")))
}

/// Returns the host under which others reach a listener.
///
/// # Errors
/// A wildcard address on a machine without a route.
pub(crate) fn advertised(bound: IpAddr) -> io::Result<IpAddr> {
    if !bound.is_unspecified() {
        return Ok(bound);
    }
    // Connecting a datagram socket sends nothing; it only asks which address a packet would leave
    // from. The targets are reserved for documentation (RFC 5737, RFC 3849).
    let (any, target) = match bound {
        IpAddr::V4(_) => ("0.0.0.0:0", "192.0.2.1:9"),
        IpAddr::V6(_) => ("[::]:0", "[2001:db8::1]:9"),
    };
    let socket = UdpSocket::bind(any)?;
    socket.connect(target)?;
    Ok(socket.local_addr()?.ip())
}

/// Says in words who can reach an address.
pub(crate) fn reach(address: IpAddr) -> &'static str {
    if address.is_loopback() {
        "this machine only"
    } else if address.is_unspecified() {
        "every network of this machine"
    } else {
        "the network"
    }
}

/// Writes `host:port`, an IPv6 host in brackets.
pub(crate) fn join(host: &str, port: u16) -> String {
    if host.contains(':') && !host.starts_with('[') {
        format!("[{host}]:{port}")
    } else {
        format!("{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_ipv6_host_is_written_in_brackets() {
        assert_eq!(join("::1", 7), "[::1]:7");
        assert_eq!(join("worker-0", 7), "worker-0:7");
    }
}
