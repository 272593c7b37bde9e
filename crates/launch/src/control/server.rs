//! The launcher's side.

use std::fs;
use std::io;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::timeout;

use super::{Reply, Request, socket};

/// A request names a few numbers.
const LONGEST: u64 = 64 << 10;
/// Whoever connects speaks at once.
const PATIENCE: Duration = Duration::from_secs(5);
/// Replies that a slow reader may have outstanding; further ones are lost.
const OUTSTANDING: usize = 256;

/// Takes requests of other commands.
pub(crate) struct Control {
    listener: UnixListener,
    connections: JoinSet<()>,
    asked: (mpsc::Sender<Asked>, mpsc::Receiver<Asked>),
}

/// A request and where its replies go.
pub(crate) struct Asked {
    pub(crate) request: Request,
    pub(crate) replies: Replies,
}

/// Where replies to a request go. Nobody need read them.
#[derive(Clone, Debug)]
pub(crate) struct Replies(mpsc::Sender<Reply>);

impl Replies {
    /// Returns some that nobody reads.
    #[cfg(test)]
    pub(crate) fn to_nobody() -> Self {
        Self(mpsc::channel(1).0)
    }

    pub(crate) fn say(&self, text: &str) {
        self.send(Reply::Said(text.to_owned()));
    }

    /// Ends the replies.
    pub(crate) fn end(&self, outcome: Result<(), String>) {
        self.send(match outcome {
            Ok(()) => Reply::Done,
            Err(reason) => Reply::Refused(reason),
        });
    }

    fn send(&self, reply: Reply) {
        // One that has left, or does not read, must not hold up the topology.
        let _ = self.0.try_send(reply);
    }
}

impl Control {
    /// Listens in a topology's folder, in place of a launcher that is gone.
    ///
    /// # Errors
    /// Those of the operating system, one for a path that is too long for a socket.
    pub(crate) fn listen(dir: &Path) -> Result<Control> {
        let path = socket(dir);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error.into()),
            Ok(()) | Err(_) => {}
        }
        let listener = UnixListener::bind(&path).with_context(|| {
            format!(
                "listen on {} (a shorter --state-dir may help)",
                path.display()
            )
        })?;
        Ok(Control {
            listener,
            connections: JoinSet::new(),
            asked: mpsc::channel(16),
        })
    }

    /// Waits for the next request. Cancel safe.
    pub(crate) async fn next(&mut self) -> Asked {
        loop {
            tokio::select! {
                asked = self.asked.1.recv() => {
                    return asked.expect("this holds a sender itself");
                }
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) => {
                        self.connections.spawn(serve(stream, self.asked.0.clone()));
                    }
                    // Too many open files; whoever waits is accepted later.
                    Err(_) => tokio::time::sleep(Duration::from_millis(100)).await,
                },
                Some(_) = self.connections.join_next() => {}
            }
        }
    }

    /// Stops listening and waits, a moment, until replies have left.
    pub(crate) async fn close(mut self, dir: &Path) {
        drop(self.listener);
        let _ = fs::remove_file(socket(dir));
        drop(self.asked);
        let written = async { while self.connections.join_next().await.is_some() {} };
        let _ = timeout(Duration::from_secs(1), written).await;
    }
}

/// Reads a request and writes its replies, as long as there is somebody to make them.
async fn serve(stream: UnixStream, asked: mpsc::Sender<Asked>) {
    let (reader, mut writer) = stream.into_split();
    let mut line = String::new();
    let mut reader = BufReader::new(reader.take(LONGEST));
    if !matches!(
        timeout(PATIENCE, reader.read_line(&mut line)).await,
        Ok(Ok(1..))
    ) {
        return;
    }
    let (sender, mut replies) = mpsc::channel(OUTSTANDING);
    match serde_json::from_str(&line) {
        Ok(request) => {
            let replies = Replies(sender);
            if asked.send(Asked { request, replies }).await.is_err() {
                return;
            }
        }
        Err(error) => Replies(sender).end(Err(format!("not understood: {error}"))),
    }
    while let Some(reply) = replies.recv().await {
        let mut line = serde_json::to_vec(&reply).expect("replies are plain data");
        line.push(b'\n');
        if writer.write_all(&line).await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::control::connect;

    #[tokio::test]
    async fn a_request_arrives_and_its_replies_come_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let mut control = Control::listen(dir.path()).unwrap();
        let request = Request::Down { now: true };
        let answer = async {
            let asked = control.next().await;
            asked.replies.say("first");
            asked.replies.end(Err("no".into()));
            asked.request
        };
        let ask = async {
            let mut connection = connect(dir.path(), &request).await.unwrap();
            let mut replies = Vec::new();
            while let Some(reply) = connection.next().await.unwrap() {
                replies.push(reply);
            }
            replies
        };
        let (asked, replies) = tokio::join!(answer, ask);
        assert_eq!(asked, request);
        assert_eq!(
            replies,
            [Reply::Said("first".into()), Reply::Refused("no".into())]
        );
    }

    #[tokio::test]
    async fn what_is_no_request_is_refused_and_the_next_one_is_taken() {
        let dir = tempfile::tempdir().unwrap();
        let mut control = Control::listen(dir.path()).unwrap();
        let talk = async {
            let mut stream = UnixStream::connect(socket(dir.path())).await.unwrap();
            stream.write_all(b"{\"dance\":{}}\n").await.unwrap();
            let mut text = String::new();
            stream.read_to_string(&mut text).await.unwrap();
            assert!(text.contains("not understood"), "{text}");
            let _ = connect(dir.path(), &Request::Down { now: false })
                .await
                .unwrap();
        };
        let (asked, ()) = tokio::join!(control.next(), talk);
        assert_eq!(asked.request, Request::Down { now: false });
    }

    #[tokio::test]
    async fn a_socket_of_a_launcher_that_is_gone_is_replaced() {
        let dir = tempfile::tempdir().unwrap();
        drop(Control::listen(dir.path()).unwrap());
        assert!(socket(dir.path()).exists());
        Control::listen(dir.path()).unwrap();
    }
}
