//! TLS on the listener, with certificates that may be replaced while it runs.

use stator_common::tls::{Files, Named, Server, TlsError};

use crate::config::Config;

/// Reads certificate and key; absent if TLS is not configured.
pub(super) fn load(config: &Config) -> Result<Option<Server>, TlsError> {
    let (Some(certificate), Some(key)) = (&config.tls_cert_path, &config.tls_key_path) else {
        return Ok(None);
    };
    let files = Files {
        certificate: Some(Named::new("--tls-cert-path", certificate)),
        key: Some(Named::new("--tls-key-path", key)),
        authority: None,
    };
    Server::load(files, &["h2", "http/1.1"]).map(Some)
}
