//! Says at start-up what is open to whom and how to close it.

use std::net::SocketAddr;

use tracing::{info, warn};

use crate::config::Config;

/// Writes the line to the log: as a warning if somebody outside may ask without a key.
pub(super) fn announce(config: &Config, addr: SocketAddr, system: Option<SocketAddr>) {
    let line = describe(config, addr, system);
    let system_is_open = system.is_some_and(|system| !system.ip().is_loopback());
    if (addr.ip().is_loopback() || !config.api_key.is_empty()) && !system_is_open {
        info!("{line}");
    } else {
        warn!("{line}");
    }
}

fn describe(config: &Config, addr: SocketAddr, system: Option<SocketAddr>) -> String {
    let (scheme, tls) = match config.tls_cert_path {
        Some(_) => ("https", "TLS"),
        None => (
            "http",
            "plain text (--tls-cert-path and --tls-key-path turn TLS on)",
        ),
    };
    let whom = whom(addr, "--http-host");
    let key = match (config.api_key.len(), config.metrics_auth) {
        (0, _) => "NO key is asked for (--api-key or --api-key-file asks for one)".to_owned(),
        (1, true) => "a key is asked for, except at /health and /live".to_owned(),
        (n, true) => format!("one of {n} keys is asked for, except at /health and /live"),
        (1, false) => "a key is asked for, except at /health, /live, /metrics and /workers \
                       (--metrics-auth true closes the last two)"
            .to_owned(),
        (n, false) => format!(
            "one of {n} keys is asked for, except at /health, /live, /metrics and /workers \
             (--metrics-auth true closes the last two)"
        ),
    };
    let mut line = format!("listening on {scheme}://{addr}, open to {whom}; {key}; {tls}");
    if let Some(system) = system {
        let whom = self::whom(system, "--system-host");
        line += &format!(
            "; system routes on http://{system}, open to {whom}, without key (--system-port -1 closes them)"
        );
    }
    line
}

fn whom(addr: SocketAddr, flag: &str) -> String {
    if addr.ip().is_loopback() {
        format!("this machine only ({flag} opens it to others)")
    } else if addr.ip().is_unspecified() {
        format!("EVERYBODY who reaches this machine ({flag} 127.0.0.1 closes it)")
    } else {
        format!("everybody who reaches this address ({flag} 127.0.0.1 closes it)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_names_what_is_open_and_how_to_close_it() {
        let open = describe(&Config::default(), "0.0.0.0:8000".parse().unwrap(), None);
        for part in [
            "http://0.0.0.0:8000",
            "EVERYBODY",
            "NO key",
            "--api-key",
            "--tls-cert-path",
        ] {
            assert!(open.contains(part), "{part}: {open}");
        }
        let config = Config {
            api_key: vec!["k".into(), "l".into()],
            tls_cert_path: Some("c".into()),
            tls_key_path: Some("k".into()),
            ..Config::default()
        };
        let closed = describe(&config, "127.0.0.1:1".parse().unwrap(), None);
        assert_eq!(
            closed,
            "listening on https://127.0.0.1:1, open to this machine only (--http-host opens it to \
             others); one of 2 keys is asked for, except at /health and /live; TLS"
        );
    }
}
