//! Who asks the API server, how long for, and what its refusals mean.

use std::time::Duration;

use futures::{StreamExt, stream::BoxStream};
use kube::{
    Api, Client, Config, Error,
    api::{ListParams, ObjectList, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    runtime::watcher,
};
use tokio::time::Instant;
use tracing::{info, warn};

use super::{ANSWER_WITHIN, KubernetesConfigError, pod::Pod};
use crate::{causes::causes, discovery::again::Again, settings::KubernetesSettings};

/// A watch is ended by the server after this and goes on from where it was. A server that is gone without a word would
/// leave it open for ever, so this and the five seconds that `kube` adds are how long nothing is noticed.
const WATCH_FOR: Duration = Duration::from_secs(60);

/// A failure this long after the one before is another interruption.
const ANOTHER_AFTER: Duration = Duration::from_secs(60);

/// A cluster, and the namespace of it that is meant.
pub(super) struct Access {
    pub(super) client: Client,
    pub(super) namespace: String,
    pub(super) url: String,
}

/// Finds the cluster: in the file that is named, by the service account of this pod, or where kubectl finds it.
pub(super) async fn open(settings: &KubernetesSettings) -> Result<Access, KubernetesConfigError> {
    let mut config = match &settings.config {
        Some(path) => {
            let file = |source: kube::config::KubeconfigError| KubernetesConfigError::File {
                path: path.clone(),
                source: Box::new(source),
            };
            let read = Kubeconfig::read_from(path).map_err(file)?;
            Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
                .await
                .map_err(file)?
        }
        None => match Config::incluster() {
            Ok(config) => config,
            Err(cluster) => Config::from_kubeconfig(&KubeConfigOptions::default())
                .await
                .map_err(|file| KubernetesConfigError::Nowhere {
                    cluster: cluster.to_string(),
                    file: file.to_string(),
                })?,
        },
    };
    config.connect_timeout = Some(ANSWER_WITHIN);
    config.read_timeout = Some(WATCH_FOR + ANSWER_WITHIN);
    config.reset_reader_on_write = true;
    let namespace = settings.namespace.clone();
    let namespace = namespace.unwrap_or_else(|| config.default_namespace.clone());
    let url = config.cluster_url.to_string();
    let client = Client::try_from(config).map_err(|error| KubernetesConfigError::Client {
        url: url.clone(),
        reason: why(&error, Verb::List),
    })?;
    Ok(Access {
        client,
        namespace,
        url,
    })
}

/// What happens to some pods, from a list of them on; goes on after errors.
pub(super) type Changes = BoxStream<'static, watcher::Result<watcher::Event<Pod>>>;

/// Follows pods: by label or by name.
pub(super) fn changes(pods: &Api<Pod>, which: watcher::Config) -> Changes {
    let which = which.timeout(u32::try_from(WATCH_FOR.as_secs()).unwrap_or(u32::MAX));
    watcher(pods.clone(), which).boxed()
}

/// Lists some pods and begins to watch them, to see whether that is allowed; the error comes with what is not.
pub(super) async fn look(
    pods: &Api<Pod>,
    which: &ListParams,
) -> Result<ObjectList<Pod>, (Error, Verb)> {
    let found = pods
        .list(which)
        .await
        .map_err(|error| (error, Verb::List))?;
    let version = found.metadata.resource_version.clone().unwrap_or_default();
    let watch = WatchParams {
        label_selector: which.label_selector.clone(),
        field_selector: which.field_selector.clone(),
        timeout: Some(1),
        ..WatchParams::default()
    };
    let watching = pods.watch(&watch, &version).await;
    drop(watching.map_err(|error| (error, Verb::Watch))?);
    Ok(found)
}

/// What is done with pods, in the words of roles.
#[derive(Clone, Copy, Debug)]
pub(super) enum Verb {
    List,
    Watch,
    Patch,
}

impl Verb {
    fn as_str(self) -> &'static str {
        match self {
            Self::List => "list",
            Self::Watch => "watch",
            Self::Patch => "patch",
        }
    }
}

/// Says whether asking again will not help until somebody changes something.
pub(super) fn is_refusal(error: &Error) -> bool {
    matches!(error, Error::Api(status) if matches!(status.code, 400 | 401 | 403 | 404 | 422))
}

/// Says why a call failed, and what to do about it where that is known.
pub(super) fn why(error: &Error, verb: Verb) -> String {
    match error {
        Error::Api(status) if status.code == 403 => format!(
            "{}; give its role the verb '{}' on pods (docs/kubernetes.md has the roles)",
            status.message,
            verb.as_str()
        ),
        Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => causes(other),
    }
}

/// Says why a watch failed.
pub(super) fn why_watch(error: &watcher::Error) -> String {
    match error {
        watcher::Error::InitialListFailed(error) => why(error, Verb::List),
        watcher::Error::WatchStartFailed(error) | watcher::Error::WatchFailed(error) => {
            why(error, Verb::Watch)
        }
        watcher::Error::WatchError(status) => format!("{} ({})", status.message, status.code),
        watcher::Error::NoResourceVersion => error.to_string(),
    }
}

/// Says whether what was seen last is too long ago to go on from, which happens and is no failure. `kube` lists anew if
/// it is told so by a watch, and asks the same again if the watch was not even begun.
pub(super) fn is_expired(error: &watcher::Error) -> bool {
    match error {
        watcher::Error::WatchError(status) => status.code == 410,
        watcher::Error::WatchStartFailed(Error::Api(status)) => status.code == 410,
        _ => false,
    }
}

/// Keeps the log to a line for each interruption, and the tries apart.
pub(super) struct Interruption {
    what: &'static str,
    again: Again,
    last: Option<Instant>,
}

impl Interruption {
    /// - `what`: goes on meanwhile, for the log.
    pub(super) fn new(what: &'static str) -> Self {
        Self {
            what,
            again: Again::new(),
            last: None,
        }
    }

    /// Notes that the server answers.
    pub(super) fn over(&mut self) {
        if self.last.take().is_some() {
            info!("kubernetes is back");
        }
        self.again = Again::new();
    }

    /// Notes a failure.
    pub(super) fn failed(&mut self, reason: &str) {
        let another = self.last.is_none_or(|last| last.elapsed() > ANOTHER_AFTER);
        self.last = Some(Instant::now());
        if another {
            self.again = Again::new();
            warn!(reason, "kubernetes is away: {}", self.what);
        }
    }

    /// Waits before the next try. Cancel safe.
    pub(super) async fn pause(&mut self) {
        self.again.pause().await;
    }
}
