//! How the NATS server is reached, for every role alike.
//!
//! Each field has a flag and a variable; secrets have a file and a variable, never a flag of their own.

use std::{
    ffi::OsString,
    path::{Path, PathBuf},
};

use async_nats::ServerAddr;
use serde::{Deserialize, Serialize};

use super::{Secret, SecretError, secret};

/// Where a server is looked for if none is named, as Dynamo (1.6) does.
const SERVER: &str = "nats://localhost:4222";

/// The variables that hold a secret where no file is named. Dynamo's (1.6).
const PASSWORD: &str = "NATS_AUTH_PASSWORD";
const TOKEN: &str = "NATS_AUTH_TOKEN";
const NKEY: &str = "NATS_AUTH_NKEY";

/// How the NATS server is reached; the table `[nats]` of a configuration file.
#[derive(Clone, Debug, Default, PartialEq, Eq, clap::Args, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct NatsSettings {
    /// Addresses of the NATS server or cluster, separated by commas: nats://host:port, or tls://host:port
    /// [default: nats://localhost:4222].
    #[arg(
        id = "nats_server",
        long = "nats-server",
        value_name = "URLS",
        value_delimiter = ',',
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub server: Vec<String>,

    /// Name to log in to NATS with.
    #[arg(
        id = "nats_username",
        long = "nats-username",
        value_name = "NAME",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub username: Option<String>,

    /// File with the password for NATS. The variable NATS_AUTH_PASSWORD may hold the password itself.
    #[arg(
        id = "nats_password_file",
        long = "nats-password-file",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub password_file: Option<PathBuf>,

    /// The password, from that file or variable.
    #[arg(skip)]
    #[serde(skip)]
    pub password: Option<Secret>,

    /// File with the token for NATS. The variable NATS_AUTH_TOKEN may hold the token itself.
    #[arg(
        id = "nats_token_file",
        long = "nats-token-file",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_file: Option<PathBuf>,

    /// The token, from that file or variable.
    #[arg(skip)]
    #[serde(skip)]
    pub token: Option<Secret>,

    /// File with the seed of the NKey to log in to NATS with. The variable NATS_AUTH_NKEY may hold the seed itself.
    #[arg(
        id = "nats_nkey_file",
        long = "nats-nkey-file",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub nkey_file: Option<PathBuf>,

    /// The seed, from that file or variable.
    #[arg(skip)]
    #[serde(skip)]
    pub nkey: Option<Secret>,

    /// File of credentials (JWT and seed) to log in to NATS with.
    #[arg(
        id = "nats_credentials_file",
        long = "nats-credentials-file",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_file: Option<PathBuf>,

    /// Certificates (PEM) that the NATS server's own is checked with [default: those of the system].
    #[arg(
        id = "nats_tls_ca_cert_path",
        long = "nats-tls-ca-cert-path",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_ca_cert_path: Option<PathBuf>,

    /// Certificate (PEM) to show to the NATS server; goes with the key.
    #[arg(
        id = "nats_tls_client_cert_path",
        long = "nats-tls-client-cert-path",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_client_cert_path: Option<PathBuf>,

    /// Key (PEM) of that certificate.
    #[arg(
        id = "nats_tls_client_key_path",
        long = "nats-tls-client-key-path",
        value_name = "FILE",
        help_heading = "NATS"
    )]
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tls_client_key_path: Option<PathBuf>,

    /// Why they cannot be used.
    #[arg(skip)]
    #[serde(skip)]
    pub fault: Option<String>,
}

/// What of it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NatsSettingsError {
    #[error(transparent)]
    Secret(#[from] SecretError),
    #[error("--nats-server '{0}': expected nats://host:port or tls://host:port")]
    Server(String),
    #[error(
        "--nats-server: leave the name and password out of the address; name them with --nats-username and \
         --nats-password-file (NATS_AUTH_USERNAME, NATS_AUTH_PASSWORD)"
    )]
    PasswordInServer,
    #[error(
        "--nats-username and a password (--nats-password-file or NATS_AUTH_PASSWORD) go together: give both or neither"
    )]
    HalfLogin,
    #[error(
        "--nats-tls-client-cert-path and --nats-tls-client-key-path go together: give both or neither"
    )]
    HalfCertificate,
    #[error("more than one way to log in to NATS: {0}; give one")]
    Logins(String),
    #[error("--{flag} {}: {source}", .path.display())]
    File {
        flag: &'static str,
        path: PathBuf,
        source: std::io::Error,
    },
}

impl NatsSettings {
    /// Says whether nothing is set.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }

    /// Reads the secrets from their files or variables, and looks whether all of it goes together.
    ///
    /// # Errors
    /// [`NatsSettingsError`].
    pub fn complete(
        &mut self,
        environment: impl Fn(&str) -> Option<String>,
    ) -> Result<(), NatsSettingsError> {
        self.password = secret::read(self.password_file.as_deref(), PASSWORD, &environment)?;
        self.token = secret::read(self.token_file.as_deref(), TOKEN, &environment)?;
        self.nkey = secret::read(self.nkey_file.as_deref(), NKEY, &environment)?;
        self.check()
    }

    /// Like [`NatsSettings::complete`], for who may never need a server: what is wrong is said when one is to be
    /// connected to.
    pub fn complete_if_used(&mut self, environment: impl Fn(&str) -> Option<String>) {
        self.fault = self
            .complete(environment)
            .err()
            .map(|error| error.to_string());
    }

    /// Returns the flags that say the same on another command line. Secrets are not among them, only their files.
    pub fn flags(&self) -> Vec<(&'static str, OsString)> {
        let server = (!self.server.is_empty()).then(|| self.server.join(",").into());
        let name = self.username.as_ref().map(OsString::from);
        let path = |path: &Option<PathBuf>| path.clone().map(PathBuf::into_os_string);
        let flags = [
            ("--nats-server", server),
            ("--nats-username", name),
            ("--nats-password-file", path(&self.password_file)),
            ("--nats-token-file", path(&self.token_file)),
            ("--nats-nkey-file", path(&self.nkey_file)),
            ("--nats-credentials-file", path(&self.credentials_file)),
            ("--nats-tls-ca-cert-path", path(&self.tls_ca_cert_path)),
            (
                "--nats-tls-client-cert-path",
                path(&self.tls_client_cert_path),
            ),
            (
                "--nats-tls-client-key-path",
                path(&self.tls_client_key_path),
            ),
        ];
        let given = flags.into_iter();
        given
            .filter_map(|(flag, value)| Some((flag, value?)))
            .collect()
    }

    /// Returns the addresses of the server, at least one.
    pub fn servers(&self) -> Vec<String> {
        match self.server.as_slice() {
            [] => vec![SERVER.to_owned()],
            servers => servers.to_vec(),
        }
    }

    /// Says whether the server is talked to over TLS only.
    pub fn is_encrypted(&self) -> bool {
        let certificates = [
            &self.tls_ca_cert_path,
            &self.tls_client_cert_path,
            &self.tls_client_key_path,
        ];
        certificates.iter().any(|path| path.is_some())
            || self
                .servers()
                .iter()
                .any(|server| server.starts_with("tls://"))
    }

    /// Says whether who reaches the server must log in, or the server is reached from this machine alone.
    pub fn is_closed(&self) -> bool {
        let logs_in = !self.logins().is_empty() || self.tls_client_cert_path.is_some();
        logs_in || self.servers().iter().all(|server| is_loopback(server))
    }

    fn logins(&self) -> Vec<&'static str> {
        let ways = [
            ("--nats-username", self.username.is_some()),
            (
                "a token (--nats-token-file or NATS_AUTH_TOKEN)",
                self.token.is_some(),
            ),
            (
                "an NKey (--nats-nkey-file or NATS_AUTH_NKEY)",
                self.nkey.is_some(),
            ),
            ("--nats-credentials-file", self.credentials_file.is_some()),
        ];
        let given = ways.into_iter().filter(|(_, given)| *given);
        given.map(|(way, _)| way).collect()
    }

    fn check(&self) -> Result<(), NatsSettingsError> {
        for server in &self.server {
            check_server(server)?;
        }
        if self.username.is_some() != self.password.is_some() {
            return Err(NatsSettingsError::HalfLogin);
        }
        if self.tls_client_cert_path.is_some() != self.tls_client_key_path.is_some() {
            return Err(NatsSettingsError::HalfCertificate);
        }
        let logins = self.logins();
        if logins.len() > 1 {
            return Err(NatsSettingsError::Logins(logins.join(", ")));
        }
        let files = [
            ("nats-credentials-file", &self.credentials_file),
            ("nats-tls-ca-cert-path", &self.tls_ca_cert_path),
            ("nats-tls-client-cert-path", &self.tls_client_cert_path),
            ("nats-tls-client-key-path", &self.tls_client_key_path),
        ];
        for (flag, path) in files {
            if let Some(path) = path {
                check_file(flag, path)?;
            }
        }
        Ok(())
    }
}

fn check_server(server: &str) -> Result<(), NatsSettingsError> {
    // Whatever it is, it may hold a password, and is not shown.
    if server.contains('@') {
        return Err(NatsSettingsError::PasswordInServer);
    }
    let wrong = || NatsSettingsError::Server(server.to_owned());
    let address: ServerAddr = server.parse().map_err(|_| wrong())?;
    let is_place = !address.host().is_empty() && matches!(address.scheme(), "nats" | "tls");
    let has_path = !matches!(address.into_inner().path(), "" | "/");
    if is_place && !has_path {
        Ok(())
    } else {
        Err(wrong())
    }
}

fn check_file(flag: &'static str, path: &Path) -> Result<(), NatsSettingsError> {
    std::fs::File::open(path)
        .map(drop)
        .map_err(|source| NatsSettingsError::File {
            flag,
            path: path.to_owned(),
            source,
        })
}

fn is_loopback(server: &str) -> bool {
    let place = server.split_once("://").map_or(server, |(_, place)| place);
    let host = match place.rsplit_once(':') {
        Some((host, port)) if port.parse::<u16>().is_ok() => host,
        _ => place,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let ip: Option<std::net::IpAddr> = host.parse().ok();
    host == "localhost" || ip.is_some_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn complete(
        mut settings: NatsSettings,
        variables: &[(&str, &str)],
    ) -> Result<NatsSettings, String> {
        let environment = |name: &str| {
            let found = variables.iter().find(|(key, _)| *key == name);
            found.map(|(_, value)| (*value).to_owned())
        };
        let done = settings.complete(environment);
        done.map(|()| settings).map_err(|error| error.to_string())
    }

    fn servers(text: &str) -> NatsSettings {
        NatsSettings {
            server: text.split(',').map(str::to_owned).collect(),
            ..NatsSettings::default()
        }
    }

    #[test]
    fn what_does_not_go_together_is_refused_without_telling_a_secret() {
        let named = NatsSettings {
            username: Some("u".to_owned()),
            ..NatsSettings::default()
        };
        assert!(complete(named.clone(), &[("NATS_AUTH_PASSWORD", "p4ss")]).is_ok());
        let half = complete(named.clone(), &[]).unwrap_err();
        assert!(half.contains("--nats-password-file"), "{half}");
        let both = [("NATS_AUTH_PASSWORD", "p4ss"), ("NATS_AUTH_TOKEN", "t0ken")];
        let two = complete(named, &both).unwrap_err();
        assert!(
            two.contains("--nats-token-file") && !two.contains("t0ken"),
            "{two}"
        );
        let inside = complete(servers("nats://u:p4ss@h:1"), &[]).unwrap_err();
        assert!(!inside.contains("p4ss"), "{inside}");
        let missing = NatsSettings {
            tls_ca_cert_path: Some("/nowhere".into()),
            ..NatsSettings::default()
        };
        let missing = complete(missing, &[]).unwrap_err();
        assert!(
            missing.contains("--nats-tls-ca-cert-path /nowhere"),
            "{missing}"
        );
    }

    #[test]
    fn who_may_not_need_a_server_hears_what_is_wrong_when_one_is_used() {
        let mut settings = NatsSettings {
            username: Some("u".to_owned()),
            ..NatsSettings::default()
        };
        settings.complete_if_used(|_| None);
        assert!(
            settings
                .fault
                .as_ref()
                .is_some_and(|fault| fault.contains("--nats-password-file"))
        );
        settings.complete_if_used(|name| (name == PASSWORD).then(|| "p4ss".to_owned()));
        assert_eq!(settings.fault, None);
    }

    #[test]
    fn an_address_is_one_of_nats() {
        for text in [
            "nats://h:1",
            "tls://h",
            "h:1",
            "10.0.0.1",
            "nats://[::1]:4222",
            "a:1,b:2",
        ] {
            assert!(complete(servers(text), &[]).is_ok(), "{text}");
        }
        for text in ["http://h:1", "nats://", "nats://h:x", "nats://h/path", ""] {
            assert!(complete(servers(text), &[]).is_err(), "{text}");
        }
    }

    #[test]
    fn a_server_that_others_reach_is_closed_only_by_a_login() {
        assert!(NatsSettings::default().is_closed());
        assert!(servers("nats://127.0.0.1:4222,[::1]:1").is_closed());
        assert!(!servers("nats://localhost:1,nats.prod:4222").is_closed());
        let token = complete(servers("nats.prod"), &[("NATS_AUTH_TOKEN", "t0ken")]).unwrap();
        assert!(token.is_closed());
        assert!(!format!("{token:?}").contains("t0ken"));
    }
}
