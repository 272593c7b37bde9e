//! `stator scale`: asks a running topology for other numbers of workers.

use anyhow::{Context, Result, bail};

use crate::cli::{Scale, Which};
use crate::control::{self, Connection, Reply, Request};
use crate::state::{self, Topology};

/// Asks, and tells what is done until it is done.
///
/// # Errors
/// When no such topology runs, or it refuses.
pub(crate) async fn run(args: &Scale) -> Result<()> {
    let request = Request::Scale {
        counts: args.counts.clone(),
        wait: !args.no_wait,
    };
    let (_, mut connection) = ask(&args.which, &request).await?;
    hear(&mut connection).await
}

/// Asks the launcher of a topology.
///
/// # Errors
/// When no such topology runs, or its launcher does not listen.
pub(crate) async fn ask(which: &Which, request: &Request) -> Result<(Topology, Connection)> {
    let root = state::root(which.state_dir.as_deref()).context("open the state folder")?;
    let dir = root.join(&which.name);
    let Some(topology) = Topology::load(&dir) else {
        let names: Vec<String> = Topology::load_all(&root)
            .into_iter()
            .map(|topology| format!("{:?}", topology.name))
            .collect();
        match names.as_slice() {
            [] => bail!("nothing runs; start with: stator up MODEL"),
            names => bail!(
                "no topology named {:?} runs, but {}: say --name",
                which.name,
                names.join(", ")
            ),
        }
    };
    let connection = control::connect(&dir, request).await.with_context(|| {
        format!(
            "ask the launcher (pid {}); if it hangs, end it with: kill {0}",
            topology.launcher_pid
        )
    })?;
    Ok((topology, connection))
}

/// Prints replies until the last one.
///
/// # Errors
/// What was refused, and why; the launcher's end before it said so.
pub(crate) async fn hear(connection: &mut Connection) -> Result<()> {
    while let Some(reply) = connection.next().await? {
        match reply {
            Reply::Said(text) => println!("{text}"),
            Reply::Done => return Ok(()),
            Reply::Refused(reason) => bail!("{reason}"),
        }
    }
    bail!("the launcher ended before it was done")
}
