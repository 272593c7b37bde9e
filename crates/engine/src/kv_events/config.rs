//! `--kv-events-config`: where an engine publishes, as it was given or as we have it.

use std::net::IpAddr;

use serde_json::{Map, Value, json};

use super::Endpoints;
use crate::{
    flags::{self, Given},
    wire::KvEvents,
};

/// vLLM's flag, without its dashes.
const FLAG: &str = "kv-events-config";

/// A word that vLLM looks for in an endpoint: one with it gets `_dpN` at its end for rank N, files too, for which
/// there is no other rule (`offset_endpoint_port`).
const RANKED: &str = "inproc";

/// Why an engine's `--kv-events-config` cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("--kv-events-config is not a JSON object: {0}")]
pub struct ConfigError(#[from] serde_json::Error);

/// vLLM's `--kv-events-config`, one JSON object.
#[derive(Clone, Debug, PartialEq)]
pub struct Publisher(Map<String, Value>);

impl Publisher {
    /// Publishes into files of a folder of this machine.
    pub fn in_files(folder: &str) -> Self {
        Self::at(
            &format!("ipc://{folder}/{RANKED}.kv"),
            &format!("ipc://{folder}/{RANKED}.kv-again"),
        )
    }

    /// Publishes on ports.
    ///
    /// - `host`: `None`: whoever reaches this machine may listen; else a loopback address of IPv4. vLLM
    ///   connects to an endpoint without a wildcard instead of binding it, and takes two colons for one.
    /// - `port`, `replay_port`: those of rank 0; vLLM adds its rank to both.
    pub fn on_ports(host: Option<std::net::Ipv4Addr>, port: u16, replay_port: u16) -> Self {
        let place = |port: u16| match host {
            Some(host) => format!("tcp://::ffff:{host}:{port}"),
            None => format!("tcp://*:{port}"),
        };
        Self::at(&place(port), &place(replay_port))
    }

    fn at(endpoint: &str, replay: &str) -> Self {
        let config = json!({
            "enable_kv_cache_events": true,
            "publisher": "zmq",
            "endpoint": endpoint,
            "replay_endpoint": replay,
        });
        match config {
            Value::Object(config) => Self(config),
            _ => unreachable!("an object was written"),
        }
    }

    /// Reads it from vLLM's arguments; `None` where they do not have it.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn given(args: &[String]) -> Result<Option<Self>, ConfigError> {
        Ok(Given::read(args).object(FLAG)?.map(Self))
    }

    /// Says whether an engine publishes with it, in a way that can be heard.
    pub fn publishes(&self) -> bool {
        let on = self
            .0
            .get("enable_kv_cache_events")
            .and_then(Value::as_bool);
        // vLLM's default with events switched on.
        let how = self.0.get("publisher").and_then(Value::as_str);
        on == Some(true) && how.unwrap_or("zmq") == "zmq"
    }

    /// Says whether the engine waits for whoever listens. One that is given a place without a wildcard looks for
    /// somebody who listens there instead.
    pub fn binds(&self) -> bool {
        let endpoint = self.endpoint();
        endpoint.contains('*') || endpoint.contains("::") || endpoint.starts_with("ipc:")
    }

    fn endpoint(&self) -> &str {
        // vLLM's default (config/kv_events.py).
        let given = self.0.get("endpoint").and_then(Value::as_str);
        given.unwrap_or("tcp://*:5557")
    }

    /// Returns where an engine with it is heard.
    ///
    /// - `resolved`: what its ready response said; wins.
    /// - `rank`: that the engine itself knows.
    /// - `host`: under which its machine is reached.
    pub fn endpoints(&self, resolved: Option<&KvEvents>, rank: u32, host: &str) -> Endpoints {
        let own = |name: &str| self.0.get(name).and_then(Value::as_str);
        let resolved = resolved.filter(|resolved| resolved.endpoint.is_some());
        let (events, replay) = match resolved {
            Some(resolved) => (
                resolved.endpoint.clone().unwrap_or_default(),
                resolved.replay_endpoint.clone(),
            ),
            None => (
                offset(self.endpoint(), rank),
                own("replay_endpoint").map(|endpoint| offset(endpoint, rank)),
            ),
        };
        let topic = own("topic").unwrap_or_default();
        Endpoints {
            events: reached(&events, host),
            replay: replay.map(|replay| reached(&replay, host)),
            topic: topic.to_owned(),
        }
    }

    /// Returns where an engine is heard that says in its ready response where it publishes.
    ///
    /// - `host`: under which its machine is reached.
    pub fn resolved(events: &KvEvents, host: &str) -> Option<Endpoints> {
        let endpoint = events.endpoint.as_ref().filter(|_| events.enabled)?;
        let replay = events.replay_endpoint.as_ref();
        Some(Endpoints {
            events: reached(endpoint, host),
            replay: replay.map(|replay| reached(replay, host)),
            topic: events.topic.clone(),
        })
    }

    /// Puts this into vLLM's arguments, in place of what is there.
    #[must_use]
    pub fn put_into(&self, args: &[String]) -> Vec<String> {
        let mut args = flags::without(args, FLAG);
        args.extend([
            format!("--{FLAG}"),
            Value::Object(self.0.clone()).to_string(),
        ]);
        args
    }
}

/// Returns an endpoint as vLLM changes it for a rank (`offset_endpoint_port`, 0.23 to 0.33).
pub fn offset(endpoint: &str, rank: u32) -> String {
    if rank == 0 {
        return endpoint.to_owned();
    }
    if endpoint.contains(RANKED) {
        return format!("{endpoint}_dp{rank}");
    }
    let port = endpoint
        .rsplit_once(':')
        .and_then(|(place, port)| Some((place, port.parse::<u32>().ok()?)));
    match port {
        Some((place, port)) if port > 0 => format!("{place}:{}", port + rank),
        _ => endpoint.to_owned(),
    }
}

/// Returns an endpoint as it can be connected to.
fn reached(endpoint: &str, host: &str) -> String {
    let Some((place, port)) = endpoint
        .strip_prefix("tcp://")
        .and_then(|place| place.rsplit_once(':'))
    else {
        return endpoint.to_owned();
    };
    let plain = place.trim_start_matches('[').trim_end_matches(']');
    let host = match plain.parse::<IpAddr>() {
        _ if plain == "*" => host.to_owned(),
        Ok(address) if address.is_unspecified() => host.to_owned(),
        Ok(address) => address.to_canonical().to_string(),
        Err(_) => place.to_owned(),
    };
    if host.contains(':') && !host.starts_with('[') {
        format!("tcp://[{host}]:{port}")
    } else {
        format!("tcp://{host}:{port}")
    }
}

#[cfg(test)]
mod tests {
    use std::net::Ipv4Addr;

    use super::*;

    #[test]
    fn what_is_published_on_loopback_is_bound_and_heard_there() {
        let publisher = Publisher::on_ports(Some(Ipv4Addr::LOCALHOST), 7000, 7010);
        assert!(publisher.binds() && publisher.publishes());
        let heard = publisher.endpoints(None, 2, "10.0.0.1");
        assert_eq!(heard.events, "tcp://127.0.0.1:7002");
        assert_eq!(heard.replay.unwrap(), "tcp://127.0.0.1:7012");
        let open = Publisher::on_ports(None, 7000, 7010);
        assert_eq!(
            open.endpoints(None, 0, "fd00::1").events,
            "tcp://[fd00::1]:7000"
        );
    }

    #[test]
    fn files_have_a_name_for_each_rank() {
        let publisher = Publisher::in_files("/run/x");
        let heard = |rank| publisher.endpoints(None, rank, "h").events;
        assert!(publisher.binds());
        assert_eq!(heard(0), "ipc:///run/x/inproc.kv");
        assert_eq!(heard(1), "ipc:///run/x/inproc.kv_dp1");
    }

    #[test]
    fn what_was_given_counts_and_the_ready_response_more() {
        let line = [
            "--kv-events-config".to_owned(),
            r#"{"enable_kv_cache_events":true,"endpoint":"tcp://*:0","topic":"t"}"#.to_owned(),
        ];
        let publisher = Publisher::given(&line).unwrap().unwrap();
        assert!(publisher.publishes());
        let ready = KvEvents {
            endpoint: Some("tcp://10.0.0.2:4".to_owned()),
            ..KvEvents::default()
        };
        let heard = publisher.endpoints(Some(&ready), 1, "h");
        assert_eq!(
            (&heard.events[..], heard.replay, &heard.topic[..]),
            ("tcp://10.0.0.2:4", None, "t")
        );
        let off = ["--kv-events-config.publisher=null".to_owned()];
        assert!(!Publisher::given(&off).unwrap().unwrap().publishes());
        let dials = ["--kv-events-config.endpoint=tcp://h:1".to_owned()];
        assert!(!Publisher::given(&dials).unwrap().unwrap().binds());
    }
}
