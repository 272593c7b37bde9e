//! How etcd is reached, for every role alike.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Secret, SecretError, secret};

/// The variable that holds the password where no file is named. Dynamo's (1.6).
const PASSWORD: &str = "ETCD_AUTH_PASSWORD";

/// How etcd is reached; the table `[etcd]` of a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EtcdSettings {
    /// Addresses of etcd, separated by commas [default: http://localhost:2379].
    #[arg(
        id = "etcd_endpoints",
        long = "etcd-endpoints",
        value_name = "URLS",
        value_delimiter = ',',
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub endpoints: Vec<String>,

    /// What the keys in etcd begin with [default: /stator].
    #[arg(
        id = "etcd_prefix",
        long = "etcd-prefix",
        value_name = "TEXT",
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub prefix: Option<String>,

    /// Name to log in to etcd with.
    #[arg(
        id = "etcd_username",
        long = "etcd-username",
        value_name = "NAME",
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,

    /// File with the password for etcd. The variable ETCD_AUTH_PASSWORD may hold the password itself.
    #[arg(
        id = "etcd_password_file",
        long = "etcd-password-file",
        value_name = "FILE",
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,

    /// The password, from that file or variable.
    #[arg(skip)]
    #[serde(skip)]
    pub password: Option<Secret>,

    /// Certificates (PEM) that etcd's own is checked with [default: those of the system].
    #[arg(
        id = "etcd_ca_path",
        long = "etcd-ca-path",
        value_name = "FILE",
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_path: Option<PathBuf>,

    /// Certificate (PEM) to show to etcd; goes with the key.
    #[arg(
        id = "etcd_cert_path",
        long = "etcd-cert-path",
        value_name = "FILE",
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cert_path: Option<PathBuf>,

    /// Key (PEM) of that certificate.
    #[arg(
        id = "etcd_key_path",
        long = "etcd-key-path",
        value_name = "FILE",
        help_heading = "etcd"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_path: Option<PathBuf>,
}

impl EtcdSettings {
    /// Says whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads the password from its file or variable.
    ///
    /// # Errors
    /// [`SecretError`].
    pub fn read_password(
        &mut self,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<(), SecretError> {
        self.password = secret::read(self.password_file.as_deref(), PASSWORD, environment)?;
        Ok(())
    }
}
