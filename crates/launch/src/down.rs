//! `stator down`: drains a running topology from another terminal.

use std::time::Duration;

use anyhow::Result;
use stator_common::process::start_of;

use crate::cli::Down;
use crate::control::Request;
use crate::scale;

/// Between two looks at whether the launcher is gone; it has nothing left to do by then.
const PAUSE: Duration = Duration::from_millis(20);

/// Asks for the end, and waits for it.
///
/// # Errors
/// When no such topology runs, or its end was not a clean one.
pub(crate) async fn run(args: &Down) -> Result<()> {
    let request = Request::Down { now: args.now };
    let (topology, mut connection) = scale::ask(&args.which, &request).await?;
    println!("draining {}", topology.name);
    let outcome = scale::hear(&mut connection).await;
    while topology.launcher_started.is_some()
        && start_of(topology.launcher_pid) == topology.launcher_started
    {
        tokio::time::sleep(PAUSE).await;
    }
    // One that was told to hurry has no clean end.
    if args.now { Ok(()) } else { outcome }
}
