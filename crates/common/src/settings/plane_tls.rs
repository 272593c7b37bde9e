//! The certificates of the request plane, for every role alike.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::tls::{Files, Named};

/// The flag of a certificate.
const CERT: &str = "--request-plane-tls-cert";
/// The flag of its key.
const KEY: &str = "--request-plane-tls-key";
/// The flag of what the other side's certificate is checked with.
const CA: &str = "--request-plane-tls-ca";

/// The certificates of the request plane; the table `[request_plane_tls]` of a configuration file. The files are read
/// again when they change.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct RequestPlaneTls {
    /// Certificate (PEM) to show to the other side of the request plane; goes with the key. With it, a worker
    /// speaks TLS only.
    #[arg(
        id = "request_plane_tls_cert",
        long = "request-plane-tls-cert",
        value_name = "FILE",
        help_heading = "Request plane"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert: Option<PathBuf>,

    /// Key (PEM) of that certificate.
    #[arg(
        id = "request_plane_tls_key",
        long = "request-plane-tls-key",
        value_name = "FILE",
        help_heading = "Request plane"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<PathBuf>,

    /// Certificates (PEM) that the other side's must be signed by: a processor needs them for workers that speak
    /// TLS; with them, a worker takes requests from processors with a certificate only.
    #[arg(
        id = "request_plane_tls_ca",
        long = "request-plane-tls-ca",
        value_name = "FILE",
        help_heading = "Request plane"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca: Option<PathBuf>,
}

impl RequestPlaneTls {
    /// Says whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Returns the files, each with the flag that names it.
    pub fn files(&self) -> Files {
        let named = |flag, path: &Option<PathBuf>| {
            path.as_deref().map(|path: &Path| Named::new(flag, path))
        };
        Files {
            certificate: named(CERT, &self.cert),
            key: named(KEY, &self.key),
            authority: named(CA, &self.ca),
        }
    }
}
