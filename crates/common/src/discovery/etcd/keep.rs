//! Keeps one worker's key: renews its lease, and replaces a lease that was lost.

use std::sync::Arc;

use tokio::time::{interval, timeout};
use tokio_util::sync::CancellationToken;
use tonic::Status;
use tracing::{info, warn};

use super::{ANSWER_WITHIN, Place, TTL, client::Client, why};
use crate::discovery::again::Again;

/// What one worker has in etcd.
pub(super) struct Entry {
    pub(super) place: Arc<Place>,
    pub(super) key: String,
    pub(super) card: Vec<u8>,
}

/// A lease that holds the key.
pub(super) struct Leased {
    client: Client,
    lease: i64,
}

/// Why a lease is not renewed any more.
#[derive(Debug, thiserror::Error)]
enum Lost {
    #[error("{}", why(.0))]
    Etcd(#[from] Status),
    #[error("no answer for {} s", ANSWER_WITHIN.as_secs())]
    Silent,
    #[error("it is over")]
    Over,
}

impl Entry {
    /// Writes the key under a new lease. A key that is there already goes over to it.
    pub(super) async fn put(&self) -> Result<Leased, Status> {
        let client = Client::connect(&self.place.access).await?;
        let lease = client.grant(TTL).await?;
        client.put(&self.key, &self.card, lease).await?;
        Ok(Leased { client, lease })
    }

    /// Keeps the key until `stop`, and takes it back then.
    pub(super) async fn keep(self, leased: Leased, stop: CancellationToken) {
        let mut leased = leased;
        loop {
            let lost = tokio::select! {
                lost = leased.renew() => lost,
                () = stop.cancelled() => return leased.end().await,
            };
            warn!(key = self.key, reason = %lost, "lost the lease in etcd: registering again");
            leased = tokio::select! {
                leased = self.put_again() => leased,
                // What is left of the old lease runs out by itself.
                () = stop.cancelled() => return,
            };
            info!(key = self.key, "registered in etcd again");
        }
    }

    async fn put_again(&self) -> Leased {
        let mut again = Again::new();
        loop {
            if let Ok(Ok(leased)) = timeout(ANSWER_WITHIN, self.put()).await {
                return leased;
            }
            again.pause().await;
        }
    }
}

impl Leased {
    /// Renews the lease for as long as that works; returns why it does not any more.
    async fn renew(&self) -> Lost {
        match self.renew_until_lost().await {
            Ok(never) => match never {},
            Err(lost) => lost,
        }
    }

    async fn renew_until_lost(&self) -> Result<std::convert::Infallible, Lost> {
        let ticks = futures::stream::unfold(interval(TTL / 3), async |mut interval| {
            interval.tick().await;
            Some(((), interval))
        });
        let mut answers = self.client.keep_alive(self.lease, ticks).await?;
        loop {
            let answer = timeout(TTL / 3 + ANSWER_WITHIN, answers.message());
            let answer = answer.await.map_err(|_| Lost::Silent)??;
            if answer.is_none_or(|answer| answer.ttl <= 0) {
                return Err(Lost::Over);
            }
        }
    }

    /// Takes the key back at once, if etcd can be asked.
    async fn end(self) {
        let revoked = timeout(ANSWER_WITHIN, self.client.revoke(self.lease)).await;
        if !matches!(revoked, Ok(Ok(_))) {
            warn!(
                "etcd cannot be told that this worker leaves: its key stays for {} s",
                TTL.as_secs()
            );
        }
    }
}
