//! The KV connector: who may fetch which prompt's KV, how long it is kept, and how it is asked for.
//!
//! It behaves like NIXL's pull (v1 connector, vLLM 0.32) and moves no bytes: what is fetched is the
//! state after the tokens, so that KV of another prompt gives wrong tokens here, too. The side
//! channel speaks JSON lines, `{"op": "beat" | "pull" | "free", "engine": .., "request": ..}`.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::oneshot;
use tokio::time::Instant;
use tracing::{debug, info};

use crate::config::Connector;
use crate::model::Chain;
use crate::scheduler::KvHandle;
use crate::wire::msgpack::Value;

/// How often a decode engine says that it still wants what it waits for, and how much longer that
/// keeps it (nixl/base_scheduler.py).
const HEARTBEAT: Duration = Duration::from_secs(5);
const HEARTBEAT_EXTENDS: Duration = Duration::from_secs(20);

#[derive(Debug)]
struct Lease {
    chain: Chain,
    tokens: usize,
    until: Instant,
}

/// KV that waits to be fetched, by request id.
#[derive(Clone, Debug, Default)]
struct Leases(Arc<Mutex<HashMap<String, Lease>>>);

impl Leases {
    fn with<T>(&self, f: impl FnOnce(&mut HashMap<String, Lease>) -> T) -> T {
        f(&mut self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

#[derive(Debug, Serialize, Deserialize)]
struct Ask {
    op: Op,
    engine: String,
    request: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Op {
    /// Keep it a little longer.
    Beat,
    /// Hand it over.
    Pull,
    /// It is not wanted any more.
    Free,
}

#[derive(Debug, Serialize, Deserialize)]
struct Answer {
    ok: bool,
    chain: u64,
    tokens: usize,
}

/// Why KV cannot be fetched.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    #[error("transfer parameters lack {0}")]
    Missing(&'static str),
    #[error("side channel: {0}")]
    Io(#[from] std::io::Error),
    #[error("side channel: {0}")]
    Json(#[from] serde_json::Error),
    #[error("unknown or expired")]
    Unknown,
}

/// The producing side of the connector.
#[derive(Debug)]
pub struct Side {
    config: Connector,
    leases: Leases,
}

impl Side {
    /// Binds the side channel. `released` is told the ids whose blocks are not needed any more.
    ///
    /// # Errors
    /// Where the port is taken.
    pub async fn bind(
        mut config: Connector,
        released: impl Fn(String) + Clone + Send + 'static,
    ) -> std::io::Result<Self> {
        let listener = TcpListener::bind((config.host.as_str(), config.port)).await?;
        config.port = listener.local_addr()?.port();
        let leases = Leases::default();
        let side = Self {
            config: config.clone(),
            leases: leases.clone(),
        };
        tokio::spawn(expire(leases.clone(), released.clone()));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let (leases, released) = (leases.clone(), released.clone());
                let engine = config.engine_id.clone();
                tokio::spawn(async move {
                    if let Err(error) = answer(stream, &engine, &leases, released).await {
                        debug!(%error, "side channel");
                    }
                });
            }
        });
        Ok(side)
    }

    /// Keeps KV for another engine and says how that engine asks for it: the parameters that a
    /// prefill engine answers with (nixl/pull_scheduler.py, `request_finished`).
    #[must_use]
    pub fn produce(&self, id: &str, handle: &KvHandle) -> Value {
        let lease = Lease {
            chain: handle.chain,
            tokens: handle.tokens,
            until: Instant::now() + self.config.lease,
        };
        self.leases
            .with(|leases| leases.insert(id.to_owned(), lease));
        let expiry = crate::engine::wall() + self.config.lease.as_secs_f64();
        Value::map([
            ("do_remote_prefill", Value::Bool(true)),
            ("do_remote_decode", Value::Bool(false)),
            ("remote_block_ids", vec![handle.blocks.clone()].into()),
            ("remote_engine_id", self.config.engine_id.as_str().into()),
            ("remote_request_id", id.into()),
            ("remote_host", self.config.host.as_str().into()),
            ("remote_port", u32::from(self.config.port).into()),
            ("tp_size", Value::Int(1)),
            ("dcp_size", Value::Int(1)),
            ("pp_size", Value::Int(1)),
            ("remote_num_tokens", handle.tokens.into()),
            ("remote_blocks_expiry_time", Value::Float(expiry)),
            ("remote_registration_generation", Value::Int(0)),
            ("transfer_mode", "pull".into()),
            ("remote_prefill_cached_tokens", handle.cached.into()),
        ])
    }
}

/// Takes leases back once they are over.
async fn expire(leases: Leases, released: impl Fn(String)) {
    loop {
        // Leases last seconds; a late end of a fraction of one does no harm.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let now = Instant::now();
        let over: Vec<String> = leases.with(|leases| {
            let over = leases.iter().filter(|(_, lease)| lease.until <= now);
            over.map(|(id, _)| id.clone()).collect()
        });
        for id in over {
            info!(id, "nobody fetched the KV in time");
            leases.with(|leases| leases.remove(&id));
            released(id);
        }
    }
}

async fn answer(
    stream: TcpStream,
    engine: &str,
    leases: &Leases,
    released: impl Fn(String),
) -> Result<(), FetchError> {
    stream.set_nodelay(true)?;
    let (read, mut write) = stream.into_split();
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await? {
        let ask: Ask = serde_json::from_str(&line)?;
        let lease = leases.with(|leases| {
            if ask.engine != engine {
                return None;
            }
            if ask.op == Op::Beat {
                let lease = leases.get_mut(&ask.request)?;
                lease.until = lease.until.max(Instant::now() + HEARTBEAT_EXTENDS);
                return Some((lease.chain, lease.tokens));
            }
            let lease = leases.remove(&ask.request)?;
            Some((lease.chain, lease.tokens))
        });
        let (chain, tokens) = lease.unwrap_or((Chain(0), 0));
        let answer = Answer {
            ok: lease.is_some(),
            chain: chain.0,
            tokens,
        };
        let mut text = serde_json::to_vec(&answer)?;
        text.push(b'\n');
        write.write_all(&text).await?;
        if answer.ok && ask.op != Op::Beat {
            released(ask.request);
        }
    }
    Ok(())
}

/// The consuming side: fetches one prompt's KV when told to, and keeps it wanted until then.
///
/// `start` fires when there are blocks to fetch into; if its sender is dropped, the KV is freed. The result is
/// the state after the fetched tokens and their number.
pub async fn fetch(
    params: Value,
    start: oneshot::Receiver<()>,
    failure_delay: Duration,
) -> Option<Result<(Chain, usize), FetchError>> {
    let mut start = start;
    let wanted = loop {
        tokio::select! {
            started = &mut start => break started.is_ok(),
            () = tokio::time::sleep(HEARTBEAT) => {
                if let Err(error) = ask(&params, Op::Beat).await {
                    debug!(%error, "heartbeat");
                }
            }
        }
    };
    if !wanted {
        if let Err(error) = ask(&params, Op::Free).await {
            debug!(%error, "free remote blocks");
        }
        return None;
    }
    let result = ask(&params, Op::Pull).await;
    if result.is_err() {
        tokio::time::sleep(failure_delay).await;
    }
    Some(result)
}

async fn ask(params: &Value, op: Op) -> Result<(Chain, usize), FetchError> {
    let text = |key| {
        let value = params.get(key).and_then(Value::as_str);
        value.map(str::to_owned).ok_or(FetchError::Missing(key))
    };
    let ask = Ask {
        op,
        engine: text("remote_engine_id")?,
        request: text("remote_request_id")?,
    };
    let host = text("remote_host")?;
    let port = params.get("remote_port").and_then(Value::as_u64);
    let port = port.and_then(|port| u16::try_from(port).ok());
    let port = port.ok_or(FetchError::Missing("remote_port"))?;
    let mut stream = TcpStream::connect((host.as_str(), port)).await?;
    stream.set_nodelay(true)?;
    let mut line = serde_json::to_vec(&ask)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    let mut reply = String::new();
    BufReader::new(stream).read_line(&mut reply).await?;
    let answer: Answer = serde_json::from_str(&reply)?;
    if answer.ok {
        Ok((Chain(answer.chain), answer.tokens))
    } else {
        Err(FetchError::Unknown)
    }
}
