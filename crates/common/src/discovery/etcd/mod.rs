//! Discovery through etcd, for clusters.
//!
//! One key per worker, `<prefix>/workers/<namespace>/<worker id>`, which holds its card as JSON and belongs to a lease of
//! [`TTL`]. A worker that dies is gone when its lease is over; one that leaves takes its lease back. A lease that
//! was lost (etcd was away for too long, or somebody revoked it) is replaced by a new one: the process lives on.
//!
//! Watchers read everything once and then follow the changes from that revision on. After an interruption, or where
//! etcd has compacted what they missed, they read everything again; workers that are missing then get
//! [`TTL`] to come back before they count as gone, since they were cut off as well. While etcd is away nothing
//! changes: requests go on with the workers that are known.
//!
//! Processors have a key each below `<prefix>/processors/`, under a lease of the same kind.
//!
//! What it does not do: it keeps nothing else in etcd, and takes no part in any decision.

mod client;
mod keep;
mod watch;

use std::{fs, io, path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;

use client::{Access, Client, Tls};

use super::{Discovery, DiscoveryError, Peer, Registration, WATCH_BUFFER, Watch};
use crate::{Card, card::is_name, causes::causes, settings::EtcdSettings};

/// A worker that did not renew its lease for this long is gone. As with the folder of the file discovery.
pub const TTL: Duration = Duration::from_secs(10);

/// A question that has not been answered by then will not be.
const ANSWER_WITHIN: Duration = Duration::from_secs(5);

/// Where keys begin if nobody says otherwise.
const PREFIX: &str = "/stator";

/// Where etcd listens if nobody says otherwise.
const ENDPOINT: &str = "http://localhost:2379";

/// Why etcd cannot be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum EtcdConfigError {
    /// A file cannot be read.
    #[error("read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// One without the other cannot be used.
    #[error("etcd_cert_path and etcd_key_path go together: give both or neither")]
    HalfIdentity,
    /// One without the other cannot be used.
    #[error(
        "etcd_username and a password (etcd_password_file or ETCD_AUTH_PASSWORD) go together: give both or neither"
    )]
    HalfUser,
    /// A server cannot be dialled at this address, or not with these certificates.
    #[error("etcd at '{url}': {reason}")]
    Endpoint {
        /// The address.
        url: String,
        /// Why.
        reason: String,
    },
}

/// An etcd cluster as the place of discovery. Clones are the same place.
#[derive(Clone)]
pub struct Etcd {
    place: Arc<Place>,
}

struct Place {
    names: Vec<String>,
    access: Access,
    /// What the keys of workers begin with, the last slash included.
    prefix: String,
    /// What those of processors do.
    peers: String,
    /// Asked for processors every few seconds; absent after a failure.
    asked: tokio::sync::Mutex<Option<Client>>,
}

impl Etcd {
    /// Uses the cluster that the settings name. Nothing is dialled yet.
    ///
    /// # Errors
    /// [`EtcdConfigError`].
    pub fn new(settings: &EtcdSettings) -> Result<Self, EtcdConfigError> {
        let user = match (&settings.username, &settings.password) {
            (Some(name), Some(password)) => Some((name.clone(), password.clone())),
            (None, None) => None,
            _ => return Err(EtcdConfigError::HalfUser),
        };
        let mut names = settings.endpoints.clone();
        if names.is_empty() {
            names.push(ENDPOINT.to_owned());
        }
        let tls = tls(settings)?;
        let endpoints = names.iter_mut().map(|name| {
            if !name.contains("://") {
                name.insert_str(0, "http://");
            }
            client::endpoint(name, &tls, ANSWER_WITHIN).map_err(|error| EtcdConfigError::Endpoint {
                url: name.clone(),
                reason: causes(&error),
            })
        });
        let endpoints = endpoints.collect::<Result<_, _>>()?;
        let prefix = settings.prefix.as_deref().unwrap_or(PREFIX);
        Ok(Self {
            place: Arc::new(Place {
                names,
                access: Access { endpoints, user },
                prefix: format!("{}/workers/", prefix.trim_end_matches('/')),
                peers: format!("{}/processors/", prefix.trim_end_matches('/')),
                asked: tokio::sync::Mutex::default(),
            }),
        })
    }
}

impl Place {
    fn key(&self, card: &Card) -> String {
        format!("{}{}/{}", self.prefix, card.endpoint.namespace, card.worker)
    }

    fn error(&self, reason: &Status) -> DiscoveryError {
        DiscoveryError::Etcd {
            endpoints: self.names.join(", "),
            reason: why(reason),
        }
    }
}

/// Says why a call failed, with the causes that tonic keeps below "transport error".
fn why(status: &Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => format!("{}: {}", status.message(), causes(source)),
        None => status.message().to_owned(),
    }
}

#[async_trait]
impl Discovery for Etcd {
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError> {
        for name in [&card.endpoint.namespace, &card.worker.0] {
            if !is_name(name) {
                return Err(DiscoveryError::Name(name.clone()));
            }
        }
        self.keep(self.place.key(&card), serde_json::to_vec(&card)?)
            .await
    }

    async fn watch(&self) -> Result<Watch, DiscoveryError> {
        let (sender, events) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(watch::follow(self.place.clone(), sender));
        Ok(Watch { events })
    }

    async fn join(&self, peer: Peer) -> Result<Registration, DiscoveryError> {
        let key = format!("{}{}", self.place.peers, peer.name);
        self.keep(key, serde_json::to_vec(&peer)?).await
    }

    async fn peers(&self) -> Result<Vec<Peer>, DiscoveryError> {
        let mut asked = self.place.asked.lock().await;
        let pairs = timeout(ANSWER_WITHIN, async {
            let client = match asked.take() {
                Some(client) => client,
                None => Client::connect(&self.place.access).await?,
            };
            let (pairs, _) = client.below(&self.place.peers).await?;
            *asked = Some(client);
            Ok(pairs)
        });
        let pairs = pairs
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")))
            .map_err(|error| self.place.error(&error))?;
        // What cannot be read is of a processor of another kind.
        let read = pairs
            .iter()
            .filter_map(|pair| serde_json::from_slice(&pair.value).ok());
        Ok(read.collect())
    }

    fn name(&self) -> String {
        format!("etcd at {}", self.place.names.join(", "))
    }
}

impl Etcd {
    /// Keeps a key until what is returned is dropped.
    async fn keep(&self, key: String, value: Vec<u8>) -> Result<Registration, DiscoveryError> {
        let entry = keep::Entry {
            place: self.place.clone(),
            key,
            card: value,
        };
        let leased = timeout(ANSWER_WITHIN * 2, entry.put())
            .await
            .unwrap_or_else(|_| Err(Status::deadline_exceeded("no answer")))
            .map_err(|error| self.place.error(&error))?;
        let stop = CancellationToken::new();
        let leave = stop.clone().drop_guard();
        tokio::spawn(entry.keep(leased, stop));
        Ok(Registration::new(leave))
    }
}

fn tls(settings: &EtcdSettings) -> Result<Tls, EtcdConfigError> {
    let read = |path: &PathBuf| {
        fs::read(path).map_err(|source| EtcdConfigError::Read {
            path: path.clone(),
            source,
        })
    };
    let identity = match (&settings.cert_path, &settings.key_path) {
        (Some(certificate), Some(key)) => Some((read(certificate)?, read(key)?)),
        (None, None) => None,
        _ => return Err(EtcdConfigError::HalfIdentity),
    };
    Ok(Tls {
        authority: settings.ca_path.as_ref().map(read).transpose()?,
        identity,
    })
}
