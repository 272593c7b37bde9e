//! A server that does nothing but HTTP: it streams as many events as are asked for.
//!
//! It is what the processor would cost if it neither parsed, nor tokenized, nor routed, nor spoke to
//! workers.

use std::convert::Infallible;
use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio::time::Instant;

/// The server as a child process; it ends with its handle.
#[derive(Debug)]
pub(crate) struct Yardstick {
    child: Child,
    pub(crate) address: String,
}

impl Yardstick {
    /// Starts it.
    pub(crate) fn start(pace: Duration) -> anyhow::Result<Self> {
        let own = std::env::current_exe().context("find this program")?;
        let mut child = Command::new(own)
            .args(["yardstick", &pace.as_micros().to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .context("start the bare HTTP server")?;
        let stdout = child.stdout.take();
        let mut server = Self {
            child,
            address: String::new(),
        };
        let mut stdout = BufReader::new(stdout.context("read the bare HTTP server's address")?);
        stdout
            .read_line(&mut server.address)
            .context("read the bare HTTP server's address")?;
        server.address.truncate(server.address.trim_end().len());
        Ok(server)
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Yardstick {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// About what a completion's event looks like.
const EVENT: &[u8] = b"data: {\"id\":\"cmpl-0123456789abcdef\",\"object\":\"text_completion\",\
    \"created\":1700000000,\"model\":\"bench\",\"choices\":[{\"index\":0,\"text\":\" word\",\
    \"logprobs\":null,\"finish_reason\":null}]}\n\n";

/// Serves on a free port, which it prints, until it is killed. Events follow each other in `pace`; zero: at
/// once.
pub(crate) async fn serve(pace: Duration) -> anyhow::Result<()> {
    let start = Instant::now();
    let listener = TcpListener::bind("127.0.0.1:0").await.context("bind")?;
    println!("{}", listener.local_addr().context("bind")?);
    std::io::stdout().flush().context("say where")?;
    loop {
        let (stream, _) = listener.accept().await.context("accept")?;
        stream.set_nodelay(true).context("set no delay")?;
        tokio::spawn(hyper::server::conn::http1::Builder::new().serve_connection(
            TokioIo::new(stream),
            service_fn(move |request| answer(request, start, pace)),
        ));
    }
}

async fn answer(
    request: Request<Incoming>,
    start: Instant,
    pace: Duration,
) -> Result<
    Response<StreamBody<impl stream::Stream<Item = Result<Frame<Bytes>, Infallible>>>>,
    hyper::Error,
> {
    let body = request.into_body().collect().await?.to_bytes();
    let count = tokens(&body).unwrap_or(1);
    // One event at a time, as tokens come; all streams on the same beat, as from an engine.
    let events = stream::unfold(0, move |sent| async move {
        if pace.is_zero() {
            tokio::task::yield_now().await;
        } else {
            let beats = (start.elapsed().as_nanos() / pace.as_nanos()) as u32 + 1;
            tokio::time::sleep_until(start + pace * beats).await;
        }
        (sent < count).then(|| (Ok(Frame::data(Bytes::from_static(EVENT))), sent + 1))
    });
    Ok(Response::new(StreamBody::new(events)))
}

/// The `max_tokens` of a request, found without parsing it.
fn tokens(body: &[u8]) -> Option<usize> {
    let name = b"\"max_tokens\":";
    let at = body.windows(name.len()).position(|part| part == name)? + name.len();
    let digits = body[at..].iter().take_while(|byte| byte.is_ascii_digit());
    std::str::from_utf8(&digits.copied().collect::<Vec<_>>())
        .ok()?
        .parse()
        .ok()
}
