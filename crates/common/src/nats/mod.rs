//! The one connection of a process to NATS, which everything shares that travels by it.
//!
//! [`Nats`] is a handle that connects when it is first used: a processor needs no server before it meets a
//! worker that is reached by one. From then on the library connects again by itself, with all subscriptions. What
//! was under way when a connection was lost may be gone, and nobody says which part; so each connection is a
//! [`Life`], and whoever keeps count of messages gives up with it.
//!
//! Every subject begins with `stator.`, the inboxes too: an account that may publish and subscribe to
//! `stator.>` may do all that is needed; a line of prompts ([`tickets`](crate::tickets)) also needs to publish to
//! `$JS.API.>` and `$JS.ACK.>`.

mod events;
pub mod subject;

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_nats::{Client, ConnectErrorKind, ConnectOptions, connection::State};
use bytes::Bytes;
use futures::StreamExt;
use tokio::{sync::OnceCell, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{causes::causes, settings::NatsSettings};
use events::Lives;

/// How long a connection may take, greetings included.
const CONNECT: Duration = Duration::from_secs(3);

/// How often the server is asked whether it is there; twice without an answer, and the connection is over.
const PING_EVERY: Duration = Duration::from_secs(5);

/// The longest wait before the library tries again to connect.
const BACK_OFF_MOST: Duration = Duration::from_secs(1);

/// Below this a server is of no use: news of KV caches would not fit into a message.
const LEAST_PAYLOAD: usize = 32 << 10;

/// What the subjects begin with on which answers are waited for.
pub(crate) const INBOX: &str = "stator.inbox";

/// Messages that wait for one subscription that does not take them. Beyond, the library drops some. Its default; pipes
/// stay below by their window.
pub(crate) const SUBSCRIPTION: usize = 64 << 10;

/// Why NATS cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum NatsError {
    #[error("no NATS server at {servers}: {reason}; name it with --nats-server (NATS_SERVER)")]
    Unreachable { servers: String, reason: String },
    #[error(
        "the NATS server at {servers} refuses this login: give --nats-username and --nats-password-file, \
         --nats-token-file, --nats-nkey-file or --nats-credentials-file as the server asks"
    )]
    Login { servers: String },
    #[error(
        "no TLS with the NATS server at {servers}: {reason}; see --nats-tls-ca-cert-path, \
         --nats-tls-client-cert-path and --nats-tls-client-key-path"
    )]
    Tls { servers: String, reason: String },
    #[error("{0}")]
    Settings(String),
    #[error("--nats-credentials-file: {0}")]
    Credentials(std::io::Error),
    #[error(
        "the NATS server at {servers} allows messages of {allowed} bytes: its max_payload must be at least {LEAST_PAYLOAD}"
    )]
    Payload { servers: String, allowed: usize },
    #[error(
        "the NATS server at {servers} lets no message through: the login may publish and subscribe to 'stator.>', or it \
         is of no use"
    )]
    Silent { servers: String },
    #[error("the connection to the NATS server at {servers} is lost")]
    Lost { servers: String },
}

/// A process's link to NATS. Cheap to clone.
#[derive(Clone)]
pub struct Nats(Arc<Shared>);

struct Shared {
    settings: NatsSettings,
    /// What this process calls itself to the server.
    name: String,
    connection: OnceCell<Connection>,
    /// That there is no server was said already.
    complained: AtomicBool,
}

/// An open connection, which may be between two lives. Cheap to clone.
#[derive(Clone)]
pub struct Connection {
    client: Client,
    lives: Arc<Lives>,
    servers: Arc<str>,
}

/// The time from connecting to the server until that connection is lost.
pub type Life = CancellationToken;

impl Default for Nats {
    /// A link to where a server is by default.
    fn default() -> Self {
        Self::new(NatsSettings::default(), "stator")
    }
}

impl Nats {
    /// Prepares a link. Nothing is connected yet.
    ///
    /// - `settings`: complete ([`NatsSettings::complete`]).
    /// - `name`: of this process, as the server shows it.
    pub fn new(settings: NatsSettings, name: impl Into<String>) -> Self {
        Self(Arc::new(Shared {
            settings,
            name: name.into(),
            connection: OnceCell::new(),
            complained: AtomicBool::new(false),
        }))
    }

    /// Returns the connection, connecting if it is the first time. Once connected, it stays: a server that goes is
    /// waited for. Cancel safe. Must be called within a tokio runtime.
    ///
    /// # Errors
    /// [`NatsError`]. The first one is also logged as a warning.
    pub async fn connection(&self) -> Result<Connection, NatsError> {
        let connected = self.0.connection.get_or_try_init(|| self.connect()).await;
        if let Err(error) = &connected
            && !self.0.complained.swap(true, Ordering::Relaxed)
        {
            warn!(%error, "NATS cannot be used");
        }
        connected.cloned()
    }

    async fn connect(&self) -> Result<Connection, NatsError> {
        let settings = &self.0.settings;
        if let Some(fault) = &settings.fault {
            return Err(NatsError::Settings(fault.clone()));
        }
        let addresses = settings.servers();
        let servers: Arc<str> = addresses.join(",").into();
        let lives = Arc::new(Lives::default());
        let options = login(ConnectOptions::new(), settings).await?;
        let client = events::told(tls(options, settings), &lives, &servers)
            .name(&self.0.name)
            .connection_timeout(CONNECT)
            .ping_interval(PING_EVERY)
            .reconnect_delay_callback(back_off)
            .subscription_capacity(SUBSCRIPTION)
            .custom_inbox_prefix(INBOX)
            // Those of our own are made of valid parts; what comes from elsewhere is looked at where it is read.
            .skip_subject_validation(true)
            .connect(addresses)
            .await
            .map_err(|error| failed(&servers, &error))?;
        let told = client.server_info();
        let (allowed, version) = (told.max_payload, told.version);
        if allowed < LEAST_PAYLOAD {
            let servers = servers.to_string();
            return Err(NatsError::Payload { servers, allowed });
        }
        info!(%servers, version, max_payload = allowed, "connected to NATS");
        if !told.auth_required {
            warn!(%servers, "the NATS server asks nobody for a login: whoever reaches it can send requests and read answers");
        }
        Ok(Connection {
            client,
            lives,
            servers,
        })
    }
}

impl Connection {
    /// Returns the library's handle.
    pub(crate) fn client(&self) -> &Client {
        &self.client
    }

    /// Returns the present life. What is begun in it must end with it.
    ///
    /// # Errors
    /// [`NatsError::Lost`]: there is no connection right now; the library tries to get one.
    pub fn life(&self) -> Result<Life, NatsError> {
        let life = self.lives.present();
        match self.client.connection_state() {
            State::Connected if !life.is_cancelled() => Ok(life),
            _ => Err(self.lost()),
        }
    }

    /// Waits until the server has taken in what was sent before, such as a subscription. Nothing else says so: the
    /// library's flush ends at the socket.
    ///
    /// # Errors
    /// [`NatsError::Lost`] and [`NatsError::Silent`].
    pub(crate) async fn settle(&self) -> Result<(), NatsError> {
        let life = self.life()?;
        let echo = subject::fresh("echo");
        let echoed = async {
            let mut heard = self.client.subscribe(echo.clone()).await.ok()?;
            self.client.publish(echo, Bytes::new()).await.ok()?;
            heard.next().await
        };
        let echoed = timeout(CONNECT, life.run_until_cancelled(echoed)).await;
        let echoed = echoed.map_err(|_| NatsError::Silent {
            servers: self.servers.to_string(),
        })?;
        echoed.flatten().map(drop).ok_or_else(|| self.lost())
    }

    /// Returns the addresses of the server.
    pub fn servers(&self) -> &str {
        &self.servers
    }

    /// Returns the error that says that a life is over.
    pub(crate) fn lost(&self) -> NatsError {
        NatsError::Lost {
            servers: self.servers.to_string(),
        }
    }
}

async fn login(
    options: ConnectOptions,
    settings: &NatsSettings,
) -> Result<ConnectOptions, NatsError> {
    if let (Some(name), Some(password)) = (&settings.username, &settings.password) {
        return Ok(options.user_and_password(name.clone(), password.reveal().to_owned()));
    }
    if let Some(token) = &settings.token {
        return Ok(options.token(token.reveal().to_owned()));
    }
    if let Some(seed) = &settings.nkey {
        return Ok(options.nkey(seed.reveal().to_owned()));
    }
    match &settings.credentials_file {
        Some(path) => {
            let options = options.credentials_file(path).await;
            options.map_err(NatsError::Credentials)
        }
        None => Ok(options),
    }
}

fn tls(mut options: ConnectOptions, settings: &NatsSettings) -> ConnectOptions {
    // Else a server without TLS is talked to without, whatever was configured.
    options = options.require_tls(settings.is_encrypted());
    // Files are read at each connection: one that is exchanged counts from the next on.
    if let Some(path) = &settings.tls_ca_cert_path {
        options = options.add_root_certificates(path.clone());
    }
    match (
        &settings.tls_client_cert_path,
        &settings.tls_client_key_path,
    ) {
        (Some(cert), Some(key)) => options.add_client_certificate(cert.clone(), key.clone()),
        _ => options,
    }
}

fn back_off(attempts: usize) -> Duration {
    let doublings = u32::try_from(attempts).unwrap_or(u32::MAX).min(10);
    let wait = (Duration::from_millis(5) * 2_u32.pow(doublings)).min(BACK_OFF_MOST);
    // Many processes lose a server at once.
    wait.mul_f64(rand::random_range(0.5..1.5))
}

fn failed(servers: &str, error: &async_nats::ConnectError) -> NatsError {
    let servers = servers.to_owned();
    let reason = causes(error);
    match error.kind() {
        ConnectErrorKind::AuthorizationViolation | ConnectErrorKind::Authentication => {
            NatsError::Login { servers }
        }
        ConnectErrorKind::Tls => NatsError::Tls { servers, reason },
        // What rustls finds comes as an error of the socket.
        ConnectErrorKind::Io if reason.contains("certificate") || reason.contains("alert") => {
            NatsError::Tls { servers, reason }
        }
        ConnectErrorKind::ServerParse
        | ConnectErrorKind::Dns
        | ConnectErrorKind::TimedOut
        | ConnectErrorKind::Io
        | ConnectErrorKind::MaxReconnects => NatsError::Unreachable { servers, reason },
    }
}
