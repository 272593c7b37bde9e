//! The side of the commands that ask.

use std::io;
use std::path::Path;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::UnixStream;
use tokio::net::unix::OwnedReadHalf;

use super::{Reply, Request, socket};

/// A request that was made.
pub(crate) struct Connection {
    replies: Lines<BufReader<OwnedReadHalf>>,
}

/// Asks the launcher of the topology with this folder.
///
/// # Errors
/// Those of the operating system: there is no launcher, or it does not listen.
pub(crate) async fn connect(dir: &Path, request: &Request) -> io::Result<Connection> {
    let stream = UnixStream::connect(socket(dir)).await?;
    let (reader, mut writer) = stream.into_split();
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    writer.write_all(&line).await?;
    Ok(Connection {
        replies: BufReader::new(reader).lines(),
    })
}

impl Connection {
    /// Returns the next reply; `None` after the last one. Cancel safe.
    pub(crate) async fn next(&mut self) -> Result<Option<Reply>> {
        let line = self
            .replies
            .next_line()
            .await
            .context("hear the launcher")?;
        let reply = line.map(|line| serde_json::from_str(&line));
        reply.transpose().context("understand the launcher")
    }
}
