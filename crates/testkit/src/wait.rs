//! When something holds: tests wait for states, never for times.

use std::time::Duration;

/// Between two looks at a state.
pub const PAUSE: Duration = Duration::from_millis(5);

/// Longest wait for anything that a real engine takes part in: on a busy two-core machine it needs a
/// minute to start.
pub const PATIENCE: Duration = Duration::from_secs(300);

/// Waits until something holds.
///
/// # Panics
/// With `what`, after [`PATIENCE`].
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let wait = async {
        while !holds() {
            tokio::time::sleep(PAUSE).await;
        }
    };
    let waited = tokio::time::timeout(PATIENCE, wait).await;
    waited.unwrap_or_else(|_| panic!("never: {what}"));
}
