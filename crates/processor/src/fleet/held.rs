//! KV that a prefill engine keeps for somebody to fetch: used in time, or given back.
//!
//! [`Held`] is the processor's word for it. Whoever has one either takes the parameters out and sends them to a
//! decode worker, or drops it: then the KV is given back, through any decode worker, since the side that would
//! have fetched is the one that can say it will not. Without a decode worker the engine's lease ends it.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use stator_common::card::HandOffProtocol;
use stator_common::proto::worker::{FinishReason, GenerateRequest, Leg, Sampling};
use tokio::runtime::Handle;
use tokio::time::Instant;
use tracing::{debug, warn};

use crate::metrics::HandOffMetrics;
use crate::pool::{Ask, Failed, Pool};

/// Decode workers that are asked to give KV back, at most, before its lease is left to end it.
const RELEASE_ATTEMPTS: usize = 3;
/// What the way from here to the decode engine's scheduler may take out of a lease: from there on that
/// engine extends it by itself.
const WAY: Duration = Duration::from_secs(2);

/// KV that an engine keeps until it is fetched, or until the lease is over. Given back when dropped.
pub(super) struct Held {
    params: Option<Bytes>,
    until: Instant,
    releaser: Releaser,
}

impl Held {
    /// - `lease`: from now on.
    pub(super) fn new(params: Bytes, lease: Duration, releaser: Releaser) -> Self {
        let until = Instant::now() + lease.saturating_sub(WAY.min(lease / 4));
        Self::until(params, until, releaser)
    }

    /// - `until`: when it must not be fetched any more.
    pub(super) fn until(params: Bytes, until: Instant, releaser: Releaser) -> Self {
        Self {
            params: Some(params),
            until,
            releaser,
        }
    }

    /// Says whether a decode engine may still be sent to fetch it.
    pub(super) fn is_fresh(&self) -> bool {
        Instant::now() < self.until
    }

    /// Returns the parameters, when they must not be used any more, and what can give the KV back. From here on
    /// a decode worker answers for it.
    pub(super) fn take(mut self) -> (Bytes, Instant, Releaser) {
        let params = self.params.take().unwrap_or_default();
        (params, self.until, self.releaser.clone())
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        // Past its lease the engine has taken it back, and the parameters may mean other blocks by now.
        if let Some(params) = self.params.take()
            && self.is_fresh()
        {
            self.releaser.release(params);
        }
    }
}

/// Gives KV back.
#[derive(Clone)]
pub(super) struct Releaser {
    /// Absent where no decode engine can say that it will not fetch.
    decode: Option<Arc<Pool>>,
    metrics: HandOffMetrics,
}

impl Releaser {
    /// - `decode`: the workers that can be asked.
    pub(super) fn new(
        decode: &Arc<Pool>,
        protocol: HandOffProtocol,
        metrics: &HandOffMetrics,
    ) -> Self {
        Self {
            decode: match protocol {
                HandOffProtocol::ResponseCarried => Some(Arc::clone(decode)),
                // An engine that pushes hears only of fetches (NixlPushConnector, 0.32).
                HandOffProtocol::RouterAllocated => None,
            },
            metrics: metrics.clone(),
        }
    }

    /// Gives back what `params` stand for, in a task of its own.
    pub(super) fn release(&self, params: Bytes) {
        if params.is_empty() {
            return;
        }
        let Some(decode) = self.decode.clone() else {
            self.metrics.abandoned.increment(1);
            return;
        };
        // Absent only while the process ends.
        let Ok(runtime) = Handle::try_current() else {
            return;
        };
        let metrics = self.metrics.clone();
        runtime.spawn(ask(decode, metrics, params));
    }
}

/// Gives back what `params` stand for, through one of the decode workers.
async fn ask(decode: Arc<Pool>, metrics: HandOffMetrics, params: Bytes) {
    let request = GenerateRequest {
        request_id: "release".to_owned(),
        // Engines take no request without a prompt.
        prompt_tokens: Bytes::from_static(&[0; 4]),
        sampling: Some(Sampling {
            max_tokens: 1,
            ..Sampling::default()
        }),
        kv_transfer_params: params,
        leg: Leg::Release.into(),
        ..GenerateRequest::default()
    };
    let mut tried: Vec<Failed> = Vec::new();
    while tried.len() < RELEASE_ATTEMPTS {
        let Some(booked) = decode.choose(&Ask::new(&request, &tried)) else {
            break;
        };
        let worker = booked.worker().id().clone();
        let answer = match booked.send(&request) {
            Ok(mut attempt) => attempt.next().await,
            Err(_) => None,
        };
        if answer.is_some_and(|delta| delta.finish() == FinishReason::Abort) {
            debug!(%worker, "gave KV back");
            metrics.released.increment(1);
            return;
        }
        tried.push(Failed::worker(worker));
    }
    warn!(
        "no decode worker could give KV back: its prefill engine keeps it until the lease is over"
    );
    metrics.abandoned.increment(1);
}
