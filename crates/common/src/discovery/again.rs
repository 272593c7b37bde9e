//! Pauses between tries to reach a place that many processes lose at once.

use std::time::Duration;

/// The first pause; each is twice as long as the one before, up to [`MOST`].
const FIRST: Duration = Duration::from_millis(100);

/// After a restart etcd gives every lease its full time once more; all must be renewed within it.
const MOST: Duration = Duration::from_secs(3);

/// Pauses between tries, each twice as long as the one before.
pub(super) struct Again(Duration);

impl Again {
    pub(super) fn new() -> Self {
        Self(FIRST)
    }

    /// Says whether there was a pause already.
    pub(super) fn has_paused(&self) -> bool {
        self.0 != FIRST
    }

    /// Waits. Cancel safe.
    pub(super) async fn pause(&mut self) {
        let wait = self.0;
        self.0 = (wait * 2).min(MOST);
        // Those who lost the place at once must not come back at once.
        tokio::time::sleep(wait.mul_f64(rand::random_range(0.5..1.0))).await;
    }
}
