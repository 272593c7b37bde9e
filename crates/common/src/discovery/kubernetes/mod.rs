//! Discovery through the pods of a Kubernetes cluster.
//!
//! A worker writes its card into an annotation of the pod that it runs in (`stator.dev/card.<worker id>`), beside a label
//! that says that there are some (`stator.dev/worker`), and takes it back when it leaves. Whoever looks for
//! workers lists and watches the pods with that label. Nothing else is kept in the cluster.
//!
//! Processors find each other in the same way (`stator.dev/processor`, `stator.dev/processor.<name>`): one watch of their
//! pods goes on from the first question on.
//!
//! There is no lease, and so nothing is written while nothing happens: Kubernetes watches over containers already. A card
//! names its container by the id that the kubelet gives to each life of it, and counts while that life runs and
//! is ready (`pod`). A container that ends shows within a second or two, sooner than a lease that renews every
//! few seconds would lapse. What the kubelet cannot see (a process that dies in a container that lives on, a node that is
//! cut off) shows in the processor's own connection to the worker, and the card of such a process is removed by the
//! next worker of the same container.
//!
//! While the API server is away nothing changes: requests go on with the workers that are known. A card that somebody
//! removed is written again by its worker, which watches its own pod.
//!
//! What it does not do: it creates no objects, needs no custom resources, and takes no part in any decision.

mod access;
mod keep;
mod pod;
mod rehearse;
mod watch;

use std::{path::PathBuf, sync::Arc, time::Duration};

use async_trait::async_trait;
use kube::{Api, api::ListParams, config::KubeconfigError};
use tokio::{
    sync::{OnceCell, mpsc, watch as latest},
    time::timeout,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::warn;

use access::why;
use pod::{Pod, Record};

use super::{Discovery, DiscoveryError, Peer, Registration, WATCH_BUFFER, Watch};
use crate::{Card, card::is_name, settings::KubernetesSettings};

/// A question that has not been answered by then will not be.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);

/// A process's pod must show the process's container by then: the kubelet tells of it a second or two after its start.
const REGISTER_WITHIN: Duration = Duration::from_secs(60);

/// Why Kubernetes cannot be used as configured.
#[derive(Debug, thiserror::Error)]
pub enum KubernetesConfigError {
    /// The file that was named cannot be used.
    #[error("kubernetes_config {path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: Box<KubeconfigError>,
    },
    /// Nothing says where the cluster is.
    #[error(
        "where is Kubernetes? In a pod, let it have its service account's token \
         (automountServiceAccountToken): {cluster}. Elsewhere, name a file as for kubectl with \
         --kubernetes-config: {file}"
    )]
    Nowhere {
        /// Why there is no service account.
        cluster: String,
        /// Why there is no file.
        file: String,
    },
    /// The cluster cannot be dialled with these certificates.
    #[error("kubernetes at {url}: {reason}")]
    Client {
        /// Of the API server.
        url: String,
        /// Why.
        reason: String,
    },
}

/// The pods of one namespace as the place of discovery. Clones are the same place.
#[derive(Clone)]
pub struct Kubernetes {
    place: Arc<Place>,
    /// Follows processors from the first question on.
    processors: Arc<OnceCell<Processors>>,
}

/// The processors that are there, as they are followed.
struct Processors {
    /// Absent until they were listed once.
    known: latest::Receiver<Option<Vec<Peer>>>,
    _following: AbortOnDropHandle<()>,
}

struct Place {
    /// Of the API server.
    url: String,
    namespace: String,
    pods: Api<Pod>,
    settings: KubernetesSettings,
}

impl Kubernetes {
    /// Uses the cluster that the settings name. Nothing is dialled yet.
    ///
    /// # Errors
    /// [`KubernetesConfigError`].
    pub async fn new(settings: &KubernetesSettings) -> Result<Self, KubernetesConfigError> {
        let access = access::open(settings).await?;
        Ok(Self {
            place: Arc::new(Place {
                pods: pod::api(access.client, &access.namespace),
                url: access.url,
                namespace: access.namespace,
                settings: settings.clone(),
            }),
            processors: Arc::default(),
        })
    }

    /// Writes a record to this process's pod and keeps it there.
    async fn keep<T: Record>(&self, record: T) -> Result<Registration, DiscoveryError> {
        let mut keeper = keep::Keeper::new(self.place.clone(), record)?;
        let written = timeout(REGISTER_WITHIN, keeper.begin()).await;
        written
            .unwrap_or_else(|_| Err(keeper.last_trouble()))
            .map_err(|reason| self.place.error(reason))?;
        let stop = CancellationToken::new();
        let leave = stop.clone().drop_guard();
        tokio::spawn(keeper.keep(stop));
        Ok(Registration::new(leave))
    }

    /// Lists pods that hold records, and begins to watch them: what is refused now will be refused later, the rest is tried
    /// again for ever.
    async fn look<T: Record>(&self) -> Result<(), DiscoveryError> {
        let one = ListParams::default().labels(T::LABEL).limit(1);
        let looked = access::look(&self.place.pods, &one);
        match timeout(ANSWER_WITHIN, looked).await {
            Ok(Err((error, verb))) if access::is_refusal(&error) => {
                Err(self.place.error(why(&error, verb)))
            }
            _ => Ok(()),
        }
    }
}

impl Place {
    fn error(&self, reason: impl std::fmt::Display) -> DiscoveryError {
        DiscoveryError::Kubernetes {
            place: format!("namespace {} at {}", self.namespace, self.url),
            reason: reason.to_string(),
        }
    }

    /// Returns the name of the pod that this process runs in.
    fn own_pod<T: Record>(&self) -> Result<&str, DiscoveryError> {
        self.settings.pod.as_deref().ok_or_else(|| {
            self.error(format_args!(
                "a {} writes to its own pod and is not told which that is: give POD_NAME by the \
                 downward API (fieldRef metadata.name), or --kubernetes-pod",
                T::KIND
            ))
        })
    }
}

#[async_trait]
impl Discovery for Kubernetes {
    async fn register(&self, card: Card) -> Result<Registration, DiscoveryError> {
        if !is_name(&card.endpoint.namespace) {
            return Err(DiscoveryError::Name(card.endpoint.namespace));
        }
        self.keep(card).await
    }

    async fn check_register(&self) -> Result<(), DiscoveryError> {
        let pod = self.place.own_pod::<Card>()?;
        let checked = timeout(ANSWER_WITHIN, rehearse::rehearse(&self.place, pod)).await;
        match checked {
            Ok(Err(keep::Trouble::Refused(reason))) => Err(self.place.error(reason)),
            Ok(Err(trouble)) => {
                warn!(%trouble, "kubernetes cannot be asked yet whether this worker may register");
                Ok(())
            }
            Err(_) => {
                warn!("kubernetes did not say yet whether this worker may register");
                Ok(())
            }
            Ok(Ok(())) => Ok(()),
        }
    }

    async fn watch(&self) -> Result<Watch, DiscoveryError> {
        self.look::<Card>().await?;
        let (sender, events) = mpsc::channel(WATCH_BUFFER);
        tokio::spawn(watch::workers(self.place.clone(), sender));
        Ok(Watch { events })
    }

    async fn join(&self, peer: Peer) -> Result<Registration, DiscoveryError> {
        self.keep(peer).await
    }

    async fn peers(&self) -> Result<Vec<Peer>, DiscoveryError> {
        let follow = async || {
            self.look::<Peer>().await?;
            let (sender, known) = latest::channel(None);
            let following = watch::processors(self.place.pods.clone(), sender);
            Ok::<_, DiscoveryError>(Processors {
                known,
                _following: AbortOnDropHandle::new(tokio::spawn(following)),
            })
        };
        let processors = self.processors.get_or_try_init(follow).await?;
        let mut known = processors.known.clone();
        let there = timeout(ANSWER_WITHIN, known.wait_for(Option::is_some)).await;
        match there {
            Ok(Ok(there)) => Ok(there.clone().unwrap_or_default()),
            _ => Err(self.place.error("processors were not listed yet")),
        }
    }

    fn name(&self) -> String {
        format!(
            "kubernetes pods of namespace {} at {}",
            self.place.namespace, self.place.url
        )
    }
}
