//! Whether what must be bound can be, by this worker and by its engines.

use std::net::{TcpListener, ToSocketAddrs};

use stator_common::card::Role;

use super::{Finding, Subject};
use crate::{launch, network};

pub(super) fn examine(subject: &Subject<'_>) -> Vec<Finding> {
    let config = subject.config;
    let mut findings = Vec::new();
    let other = |flag: &str| format!("end what listens there, or choose another {flag}");
    if subject.unbound {
        findings.push(bindable(
            "plane",
            &config.host,
            config.port,
            &other("--port"),
        ));
        if let Ok(port) = u16::try_from(config.system_port) {
            let remedy = other("--system-port");
            findings.push(bindable("system", &config.system_host, port, &remedy));
        }
        let attach = config.engine_attach.as_deref().map(launch::address);
        if let Some(Ok((host, port))) = attach {
            for rank in 0..config.data_parallel_size {
                let remedy = other("--engine-attach");
                let port = u16::try_from(u32::from(port) + rank);
                let port = port.unwrap_or(u16::MAX);
                findings.push(bindable("attach", &host, port, &remedy));
            }
        }
    }
    // A kept engine may hold its port already.
    if config.engine_keep || config.engine_attach.is_some() {
        return findings;
    }
    for port in subject.event_ports {
        let host = if subject.host.is_loopback() {
            "127.0.0.1"
        } else {
            "0.0.0.0"
        };
        let remedy = other("--kv-event-port");
        findings.push(bindable("KV events", host, *port, &remedy));
    }
    for side in subject.sides {
        let remedy = "set VLLM_NIXL_SIDE_CHANNEL_HOST to an address of this machine that the other engines reach, \
                      and VLLM_NIXL_SIDE_CHANNEL_PORT to a free port, or neither";
        findings.push(bindable("side channel", &side.host, side.port, remedy));
    }
    let reached = !subject.host.is_loopback() && subject.role != Role::Agg;
    let closed = subject.sides.iter().find(|side| {
        let addresses = (&side.host[..], side.port).to_socket_addrs();
        addresses.is_ok_and(|mut all| all.all(|address| address.ip().is_loopback()))
    });
    if let Some(side) = closed.filter(|_| reached) {
        findings.push(Finding::warning(
            "side channel",
            format!(
                "the worker is reached at {}, but its engines are found at {} only",
                subject.host, side.host
            ),
            "leave out VLLM_NIXL_SIDE_CHANNEL_HOST, or set it to an address that other machines reach",
        ));
    }
    findings
}

fn bindable(about: &'static str, host: &str, port: u16, remedy: &str) -> Finding {
    let place = network::join(host, port);
    let bound = network::resolve(host, port).and_then(TcpListener::bind);
    match bound {
        Ok(_) if port == 0 => Finding::fine(about, format!("a free port of {host} can be bound")),
        Ok(_) => Finding::fine(about, format!("{place} can be bound")),
        Err(error) => Finding::error(about, format!("{place} cannot be bound: {error}"), remedy),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preflight::Severity;

    #[test]
    fn a_port_that_is_taken_or_not_ours_is_an_error() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        assert_eq!(
            bindable("x", "127.0.0.1", port, "y").severity,
            Severity::Error
        );
        // Reserved for documentation (RFC 5737): no machine has it.
        let foreign = bindable("x", "192.0.2.1", 0, "y");
        assert_eq!(
            (foreign.severity, &foreign.remedy[..]),
            (Severity::Error, "y")
        );
        assert_eq!(bindable("x", "127.0.0.1", 0, "y").severity, Severity::Fine);
    }
}
