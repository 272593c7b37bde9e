//! A real NATS server on this machine, which a test can kill and start again.
//!
//! `nats-server` must be on the path (Debian: `nats-server`). `STATOR_SKIP_REAL=1`: tests that want one pass without
//! having tried.

use std::io::Read as _;
use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use crate::process::Group;
use crate::{ports, wait};

/// One server. Dropping it ends it.
pub struct NatsServer {
    port: u16,
    /// Lines of its configuration.
    settings: String,
    scheme: &'static str,
    folder: TempDir,
    /// Of JetStream, if it has that.
    _store: Option<TempDir>,
    running: Option<Group>,
}

impl NatsServer {
    /// Starts a server and waits until it answers; `None` if the tests with real servers are switched off.
    pub async fn start() -> Option<Self> {
        Self::start_with("").await
    }

    /// Starts a server whose configuration file has these lines too, such as `max_payload: 65536`.
    pub async fn start_with(settings: &str) -> Option<Self> {
        if std::env::var_os("STATOR_SKIP_REAL").is_some_and(|value| value == "1") {
            println!("skipped by STATOR_SKIP_REAL=1");
            return None;
        }
        let mut server = Self {
            port: ports::free_row(1),
            settings: settings.to_owned(),
            scheme: if settings.contains("tls") {
                "tls"
            } else {
                "nats"
            },
            folder: tempfile::tempdir().expect("a folder"),
            _store: None,
            running: None,
        };
        server.restart().await;
        Some(server)
    }

    /// Starts a server with JetStream, which keeps nothing over a restart.
    pub async fn start_with_jetstream() -> Option<Self> {
        // In this folder, also if others run beside it.
        let store = tempfile::tempdir().expect("a folder");
        let settings = format!("jetstream {{ store_dir: {:?} }}", store.path());
        let mut server = Self::start_with(&settings).await?;
        server._store = Some(store);
        Some(server)
    }

    /// Returns where clients reach it.
    pub fn url(&self) -> String {
        format!("{}://localhost:{}", self.scheme, self.port)
    }

    /// Returns the port that it listens on, on loopback.
    pub fn port(&self) -> u16 {
        self.port
    }

    /// Ends it at once, as when a machine is lost.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Starts it again at the same port.
    pub async fn restart(&mut self) {
        self.kill();
        let file = self.folder.path().join("nats.conf");
        std::fs::write(&file, &self.settings).expect("write the configuration");
        let mut command = Command::new("nats-server");
        command
            .arg("--config")
            .arg(&file)
            .args(["--addr", "127.0.0.1", "--port", &self.port.to_string()])
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        // `nats-server` that is missing fails here: a test that nobody runs proves nothing.
        self.running = Some(Group::spawn(&mut command));
        let address = SocketAddr::from(([127, 0, 0, 1], self.port));
        wait::until("nats-server greets", || greets(address)).await;
    }
}

/// A server says INFO to whoever connects.
fn greets(address: SocketAddr) -> bool {
    let Ok(mut stream) = TcpStream::connect(address) else {
        return false;
    };
    let mut word = [0; 4];
    stream
        .set_read_timeout(Some(Duration::from_secs(1)))
        .is_ok()
        && stream.read_exact(&mut word).is_ok()
        && word == *b"INFO"
}
