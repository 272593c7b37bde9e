//! How the KV of a prompt goes from one engine to another, as vLLM's connectors want it asked for.
//!
//! [`TransferConfig`] is what an engine was started with; [`HandOff`] is the connector in it that hands KV
//! from a prefill engine to a decode engine, and writes and checks the `kv_transfer_params` of requests.
//! What a connector answers is never taken apart: its keys grow with every release. Only what an engine
//! would not survive the lack of is looked for.
//!
//! Sources: vLLM 0.32 and 0.33, `distributed/kv_transfer/kv_connector/v1/`: `nixl/pull_scheduler.py`,
//! `nixl/push_scheduler.py`, `nixl/metadata.py`, `mooncake/mooncake_connector.py`,
//! `lmcache_mp_connector.py`, `multi_connector.py`.

mod config;
mod params;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use stator_common::card::HandOffProtocol;

use crate::wire::{ParamsError, Writer};

pub use config::{ShortName, TransferConfig, TransferError};

use params::{Entries, Kind};

/// A connector that hands the KV of a prompt from one engine to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Connector {
    /// NIXL, the decode engine reads.
    Nixl,
    /// NIXL, the prefill engine writes.
    NixlPush,
    /// Mooncake.
    Mooncake,
    /// LMCache's server beside the engines; KV is found by its tokens.
    LmCacheMp,
}

impl Connector {
    /// Returns the connector of vLLM's name; `None` for one that hands nothing on.
    pub fn of_name(name: &str) -> Option<Self> {
        match name {
            // Two names of one class.
            "NixlConnector" | "NixlPullConnector" => Some(Self::Nixl),
            "NixlPushConnector" => Some(Self::NixlPush),
            "MooncakeConnector" => Some(Self::Mooncake),
            "LMCacheMPConnector" => Some(Self::LmCacheMp),
            _ => None,
        }
    }

    /// Returns vLLM's name, the same for engines that understand each other.
    pub fn name(self) -> &'static str {
        match self {
            Self::Nixl => "NixlConnector",
            Self::NixlPush => "NixlPushConnector",
            Self::Mooncake => "MooncakeConnector",
            Self::LmCacheMp => "LMCacheMPConnector",
        }
    }

    /// Returns who says where the KV is.
    pub fn protocol(self) -> HandOffProtocol {
        match self {
            Self::Nixl | Self::LmCacheMp => HandOffProtocol::ResponseCarried,
            Self::NixlPush | Self::Mooncake => HandOffProtocol::RouterAllocated,
        }
    }
}

/// How an engine hands KV on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HandOff {
    /// By what.
    pub connector: Connector,
    /// How long a prefill engine keeps KV that nobody fetches.
    pub lease: Duration,
}

/// Where a prefill engine is found.
#[derive(Debug, Clone, Copy)]
pub struct Peer<'a> {
    /// `engine_id` of its [`TransferConfig`].
    pub engine_id: &'a str,
    /// Host of its side channel.
    pub host: &'a str,
    /// Port of its side channel.
    pub port: u16,
    /// As NIXL counts it: at least the decode context parallel size.
    pub tensor_parallel_size: u32,
    pub pipeline_parallel_size: u32,
    pub decode_context_parallel_size: u32,
}

/// Says whether engines over so many devices, each, can hand KV over: one tensor-parallel size must divide the
/// other, whichever side is the wider (0.32, `kv_connector/utils.py`, `tp_ratio`).
pub fn widths_fit(one: u32, other: u32) -> bool {
    one > 0 && other > 0 && (one.is_multiple_of(other) || other.is_multiple_of(one))
}

/// Why the `kv_transfer_params` of a request would not do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum HandOffError {
    #[error("kv_transfer_params: {0}")]
    Params(#[from] ParamsError),
    #[error("kv_transfer_params lack `{key}`, {expected}")]
    Lacks {
        key: &'static str,
        expected: &'static str,
    },
    #[error("transfer_id is empty, and {0} knows a hand-off by it")]
    NoTransferId(&'static str),
}

impl HandOffError {
    /// Returns the field of the request at fault.
    pub fn field(&self) -> &'static str {
        match self {
            Self::Params(_) | Self::Lacks { .. } => "kv_transfer_params",
            Self::NoTransferId(_) => "transfer_id",
        }
    }
}

impl HandOff {
    /// Returns the parameters by which a prefill engine computes a prompt and keeps its KV for another engine.
    ///
    /// # Errors
    /// [`HandOffError::NoTransferId`].
    pub fn produce(&self, transfer_id: &str) -> Result<Bytes, HandOffError> {
        self.check_transfer_id(transfer_id)?;
        let mut writer = Writer::default();
        match self.connector {
            Connector::Nixl | Connector::NixlPush => {
                writer.map(6);
                remote_decode(&mut writer);
                for key in [
                    "remote_engine_id",
                    "remote_block_ids",
                    "remote_host",
                    "remote_port",
                ] {
                    writer.str(key);
                    writer.nil();
                }
            }
            Connector::Mooncake => {
                writer.map(3);
                remote_decode(&mut writer);
                writer.str("transfer_id");
                writer.str(transfer_id);
            }
            Connector::LmCacheMp => writer.map(0),
        }
        Ok(writer.bytes.into())
    }

    /// Checks the parameters by which a decode engine fetches KV, and adds the id that both sides know it
    /// by where the router gave it. What is there stays as it is, byte for byte.
    ///
    /// # Errors
    /// [`HandOffError`]: without these the engine would end, or wait for ever.
    pub fn fetch(&self, params: Bytes, transfer_id: &str) -> Result<Bytes, HandOffError> {
        const TEXT: (Kind, &str) = (Kind::Text, "a text");
        const NUMBER: (Kind, &str) = (Kind::Int, "a number");
        const TRUE: (Kind, &str) = (Kind::True, "true");
        let id_key = match self.connector {
            Connector::Nixl | Connector::LmCacheMp => None,
            Connector::NixlPush => Some("remote_request_id"),
            Connector::Mooncake => Some("transfer_id"),
        };
        let entries = Entries::read(&params)?;
        let added = match id_key.filter(|key| !entries.has(key, Kind::Text)) {
            Some(key) => {
                self.check_transfer_id(transfer_id)?;
                Some(entries.with_text(key, transfer_id))
            }
            None => None,
        };
        let needed: &[(&'static str, (Kind, &'static str))] = match self.connector {
            // remote_block_ids: an empty list trips an assertion that ends the engine.
            Connector::Nixl => &[
                ("do_remote_prefill", TRUE),
                ("remote_block_ids", (Kind::Filled, "a list of block ids")),
                ("remote_engine_id", TEXT),
                ("remote_request_id", TEXT),
                ("remote_host", TEXT),
                ("remote_port", NUMBER),
            ],
            Connector::NixlPush => &[
                ("do_remote_prefill", TRUE),
                ("remote_engine_id", TEXT),
                ("remote_host", TEXT),
                ("remote_port", NUMBER),
                ("tp_size", NUMBER),
            ],
            Connector::Mooncake => &[
                ("do_remote_prefill", TRUE),
                ("remote_engine_id", TEXT),
                ("remote_bootstrap_addr", TEXT),
            ],
            Connector::LmCacheMp => &[],
        };
        for (key, (kind, expected)) in needed {
            if !entries.has(key, *kind) {
                return Err(HandOffError::Lacks { key, expected });
            }
        }
        Ok(added.unwrap_or(params))
    }

    /// Says whether a prefill engine answers with parameters for the decode engine, so that an answer without
    /// them means that nothing was kept.
    pub fn answers(&self) -> bool {
        match self.connector {
            Connector::Nixl | Connector::NixlPush | Connector::LmCacheMp => true,
            Connector::Mooncake => false,
        }
    }

    /// Says whether KV is kept only where a prompt's one token was the last by number, not where it was an
    /// end of the text.
    pub fn needs_length_end(&self) -> bool {
        self.connector == Connector::Mooncake
    }

    /// Returns the prompt tokens that a decode engine may compute itself at the end of a prompt that it fetched:
    /// more is a hand-off that was not one.
    pub fn tail(&self) -> u32 {
        match self.connector {
            // Lookahead of draft models; they have up to eight layers.
            Connector::Nixl | Connector::NixlPush | Connector::Mooncake => 16,
            // LMCache's default chunk: it keeps whole ones.
            Connector::LmCacheMp => 256,
        }
    }

    /// Returns how long what these parameters say is kept from now on, if nobody fetches it.
    ///
    /// vLLM's prefill engines say nothing of it up to 0.33 (`remote_blocks_expiry_time` is nil), and where
    /// its decode engines do, it is by a clock of their own process. So only a wall-clock time within the
    /// configured lease counts, and everything else means the whole lease.
    pub fn lease_left(&self, params: &[u8]) -> Duration {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let expiry = Entries::read(params)
            .ok()
            .and_then(|entries| entries.number("remote_blocks_expiry_time"));
        expiry
            .map(|expiry| expiry - now.as_secs_f64())
            .and_then(|left| Duration::try_from_secs_f64(left).ok())
            .filter(|left| *left <= self.lease)
            .unwrap_or(self.lease)
    }

    /// Returns the parameters by which a decode engine finds a prefill engine before that has computed anything;
    /// `None` for connectors whose prefill engines say so themselves. [`HandOff::fetch`] completes them.
    pub fn peer(&self, peer: &Peer<'_>) -> Option<Bytes> {
        if self.connector.protocol() == HandOffProtocol::ResponseCarried {
            return None;
        }
        let mut writer = Writer::default();
        let nixl = self.connector == Connector::NixlPush;
        writer.map(if nixl { 8 } else { 4 });
        writer.str("do_remote_prefill");
        writer.bool(true);
        writer.str("do_remote_decode");
        writer.bool(false);
        writer.str("remote_engine_id");
        writer.str(peer.engine_id);
        if nixl {
            writer.str("remote_host");
            writer.str(peer.host);
            for (key, value) in [
                ("remote_port", u32::from(peer.port)),
                ("tp_size", peer.tensor_parallel_size),
                ("pp_size", peer.pipeline_parallel_size),
                ("dcp_size", peer.decode_context_parallel_size),
            ] {
                writer.str(key);
                writer.uint(u64::from(value));
            }
        } else {
            writer.str("remote_bootstrap_addr");
            let host = if peer.host.contains(':') {
                format!("[{}]", peer.host)
            } else {
                peer.host.to_owned()
            };
            writer.str(&format!("http://{host}:{}", peer.port));
        }
        Some(writer.bytes.into())
    }

    fn check_transfer_id(&self, transfer_id: &str) -> Result<(), HandOffError> {
        let by_router = self.connector.protocol() == HandOffProtocol::RouterAllocated;
        if by_router && transfer_id.is_empty() {
            return Err(HandOffError::NoTransferId(self.connector.name()));
        }
        Ok(())
    }
}

fn remote_decode(writer: &mut Writer) {
    writer.str("do_remote_decode");
    writer.bool(true);
    writer.str("do_remote_prefill");
    writer.bool(false);
}

#[cfg(test)]
mod tests;
