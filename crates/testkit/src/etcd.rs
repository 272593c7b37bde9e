//! A real etcd server on this machine, which a test can kill and start again.
//!
//! `etcd` must be on the path (Debian: `etcd-server`). `STATOR_SKIP_REAL=1`: tests that want one pass without
//! having tried.

use std::net::{SocketAddr, TcpStream};
use std::process::{Command, Stdio};

use serde_json::Value;
use tempfile::TempDir;

use crate::process::Group;
use crate::{http, ports, wait};

/// One server with a cluster of its own. Dropping it ends it.
pub struct Etcd {
    client: u16,
    peer: u16,
    /// Further arguments.
    arguments: Vec<String>,
    scheme: &'static str,
    data: TempDir,
    running: Option<Group>,
}

impl Etcd {
    /// Starts a server and waits until it answers; `None` if the tests with real servers are switched off.
    pub async fn start() -> Option<Self> {
        let mut etcd = Self::prepare("http", &[])?;
        etcd.run();
        etcd.wait_ready().await;
        Some(etcd)
    }

    /// Starts a server that speaks TLS, with `arguments` that say which. It is not waited for.
    pub fn start_tls(arguments: &[String]) -> Option<Self> {
        let mut etcd = Self::prepare("https", arguments)?;
        etcd.run();
        Some(etcd)
    }

    fn prepare(scheme: &'static str, arguments: &[String]) -> Option<Self> {
        if std::env::var_os("STATOR_SKIP_REAL").is_some_and(|value| value == "1") {
            println!("skipped by STATOR_SKIP_REAL=1");
            return None;
        }
        let client = ports::free_row(2);
        Some(Self {
            client,
            peer: client + 1,
            arguments: arguments.to_vec(),
            scheme,
            data: tempfile::tempdir().expect("a folder"),
            running: None,
        })
    }

    /// Returns where clients reach it.
    pub fn url(&self) -> String {
        format!("{}://localhost:{}", self.scheme, self.client)
    }

    /// Ends it at once, as when a machine is lost.
    pub fn kill(&mut self) {
        self.running = None;
    }

    /// Starts it again with what it had.
    pub async fn restart(&mut self) {
        self.kill();
        self.run();
        self.wait_ready().await;
    }

    /// Starts it again with nothing.
    pub async fn restart_empty(&mut self) {
        self.kill();
        self.data = tempfile::tempdir().expect("a folder");
        self.run();
        self.wait_ready().await;
    }

    /// Asks its JSON gateway.
    pub async fn ask(&self, path: &str, body: &Value) -> Value {
        let answer = http::send(self.address(), http::post(path, body.to_string())).await;
        assert_eq!(answer.status, 200, "{path}: {}", answer.text());
        answer.json()
    }

    fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.client))
    }

    fn run(&mut self) {
        let own = |port| format!("{}://127.0.0.1:{port}", self.scheme);
        let (client, peer) = (own(self.client), format!("http://127.0.0.1:{}", self.peer));
        let mut command = Command::new("etcd");
        command
            .arg("--data-dir")
            .arg(self.data.path())
            .args(["--listen-client-urls", &client])
            .args(["--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer])
            .args(["--initial-advertise-peer-urls", &peer])
            .args(["--initial-cluster", &format!("default={peer}")])
            // Disks of test machines are slow, and what is written need not last.
            .args(["--heartbeat-interval", "50", "--election-timeout", "500"])
            .args(["--logger", "zap", "--log-level", "error"])
            .args(&self.arguments)
            .stdout(Stdio::null());
        // `etcd` that is missing fails here: a test that nobody runs proves nothing.
        self.running = Some(Group::spawn(&mut command));
    }

    async fn wait_ready(&self) {
        let address = self.address();
        let listens = || TcpStream::connect(address).is_ok();
        wait::until("etcd listens", listens).await;
        http::until(address, "/health", |answer| {
            answer.status == 200 && answer.text().contains("true")
        })
        .await;
    }
}
