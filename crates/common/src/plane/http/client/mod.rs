//! The processor's end of the http plane: a channel to a worker, the watch that says how the worker is, and a task per
//! request that reads what comes of it.

mod link;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use http::Uri;
use hyper_util::rt::TokioIo;
use tokio::time;
use tokio_util::sync::CancellationToken;
use tonic::{
    Streaming,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};
use tower::service_fn;
use tracing::info;

use super::{
    CONNECTION_WINDOW, STREAM_WINDOW, VERSION, VERSION_KEY, WORKER_KEY, answer_within, pipe::Pipe,
    status,
};
use crate::{
    Code,
    causes::causes,
    plane::{
        SOFTWARE,
        client::{self, ClientConfig, Ended, Reach, Told},
        net::Dial,
        tcp::frame::MAX_FRAME,
    },
    proto::worker::{News, WatchRequest, news, worker_client::WorkerClient},
};
use link::{Access, Link};

/// Cancelled calls that are kept in mind, and for how long: what a worker still sends for one that is forgotten
/// would end the connection. The library's own 50 are few where all clients of a processor leave at once.
const MAX_RESET: usize = 1 << 16;
const RESET_FOR: Duration = Duration::from_secs(10);

/// The way to a worker by gRPC.
pub(in crate::plane) struct Grpc {
    /// The worker's address, for logs and errors.
    pub(in crate::plane) address: String,
    /// What is dialled: `host:port`.
    pub(in crate::plane) place: String,
    /// `http` or `https`.
    pub(in crate::plane) scheme: &'static str,
    pub(in crate::plane) dial: Arc<dyn Dial>,
    pub(in crate::plane) config: ClientConfig,
}

impl Grpc {
    /// Opens the connection. It is cut when the token is cancelled, whoever still holds the channel.
    async fn channel(&self, cut: CancellationToken) -> Result<Channel, Ended> {
        let uri = |scheme: &str| format!("{scheme}://{}", self.place).parse::<Uri>();
        // TLS is below: the library must not look for its own.
        let (below, origin) = uri("http")
            .and_then(|below| Ok((below, uri(self.scheme)?)))
            .map_err(|error| Ended::Lost(error.to_string()))?;
        let ping_every = self.config.ping_every;
        let endpoint = Endpoint::from(below)
            .origin(origin)
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .http2_max_concurrent_reset_streams(MAX_RESET)
            .http2_reset_stream_duration(RESET_FOR)
            .http2_keep_alive_interval(ping_every)
            .keep_alive_timeout(answer_within(ping_every, self.config.dead_after))
            .keep_alive_while_idle(true);
        let (dial, place) = (self.dial.clone(), self.place.clone());
        // A channel dials again by itself, but a connection that was lost ends its session.
        let once = Arc::new(parking_lot::Mutex::new(Some(cut)));
        let connector = service_fn(move |_: Uri| {
            let (dial, place, cut) = (dial.clone(), place.clone(), once.lock().take());
            async move {
                let cut = cut.ok_or(std::io::ErrorKind::ConnectionAborted)?;
                let io = dial.dial(&place).await?;
                Ok::<_, std::io::Error>(TokioIo::new(Pipe::new(io, place, cut)))
            }
        });
        let connected = endpoint.connect_with_connector(connector).await;
        connected.map_err(|error| Ended::Lost(causes(&error)))
    }

    fn access(&self) -> Result<Access, Ended> {
        let ascii = |text: String, what: &str| {
            text.parse::<MetadataValue<Ascii>>()
                .map_err(|_| Ended::Refused {
                    code: Code::InvalidRequest,
                    message: format!("{what} has characters that HTTP cannot carry"),
                })
        };
        let (major, minor) = VERSION;
        let mut fields = vec![(
            VERSION_KEY,
            ascii(format!("{major}.{minor}"), "the version")?,
        )];
        if let Some(worker) = &self.config.worker {
            fields.push((WORKER_KEY, ascii(worker.0.clone(), "the worker's id")?));
        }
        if let Some(token) = &self.config.token {
            let mut value = ascii(format!("Bearer {token}"), "the plane's token")?;
            value.set_sensitive(true);
            fields.push(("authorization", value));
        }
        Ok(Access { fields })
    }
}

#[async_trait]
impl Reach for Grpc {
    async fn greet(&self) -> Result<Box<dyn client::Session>, Ended> {
        let access = self.access()?;
        let cut = CancellationToken::new();
        let guard = cut.clone().drop_guard();
        let channel = self.channel(cut.clone()).await?;
        let mut client = WorkerClient::new(channel)
            .max_decoding_message_size(MAX_FRAME)
            .max_encoding_message_size(MAX_FRAME);
        let software = SOFTWARE.to_owned();
        let watch = client
            .watch(access.request(WatchRequest { software }))
            .await;
        let mut watch = watch.map_err(|status| refused(&status))?.into_inner();
        let first = watch.message().await.map_err(|status| refused(&status))?;
        let Some(news::News::Welcome(welcome)) = first.and_then(|first| first.news) else {
            return Err(Ended::Lost(
                "the peer does not speak this protocol".to_owned(),
            ));
        };
        if welcome.major != VERSION.0 {
            return Err(Ended::Refused {
                code: Code::Incompatible,
                message: format!(
                    "the processor speaks version {}.{} of the http plane, the worker {}.{}: the first numbers must be equal",
                    VERSION.0, VERSION.1, welcome.major, welcome.minor
                ),
            });
        }
        info!(worker = %self.address, id = welcome.worker, software = welcome.software, "connected");
        let link = Link::new(self, client, access, welcome.session, guard.disarm());
        Ok(Box::new(Session {
            link: Arc::new(link),
            watch,
            config: self.config.clone(),
        }))
    }
}

/// A session that the worker welcomed.
struct Session {
    link: Arc<Link>,
    watch: Streaming<News>,
    config: ClientConfig,
}

#[async_trait]
impl client::Session for Session {
    fn link(&self) -> Arc<dyn client::Link> {
        self.link.clone()
    }

    async fn read(mut self: Box<Self>, told: &Told) -> Ended {
        let dead_after = self.config.dead_after;
        loop {
            let news = match time::timeout(dead_after, self.watch.message()).await {
                Err(_) => {
                    return Ended::Lost(format!("not heard of for {} s", dead_after.as_secs()));
                }
                Ok(Err(status)) => return Ended::Lost(why(&status)),
                Ok(Ok(None)) => return Ended::Lost("closed by the peer".to_owned()),
                Ok(Ok(Some(news))) => news.news,
            };
            match news {
                Some(news::News::Load(load)) => told.load(load),
                Some(news::News::Draining(_)) => told.draining(),
                Some(news::News::Late(delta)) => self.link.unread(delta),
                Some(news::News::Welcome(_)) => {
                    return Ended::Lost("a second welcome".to_owned());
                }
                // Absent: news that a newer worker has.
                Some(news::News::Heartbeat(_)) | None => {}
            }
        }
    }
}

/// Returns what a worker that did not welcome this processor has against it.
fn refused(answer: &tonic::Status) -> Ended {
    match status::read(answer) {
        Some(error) => match Code::from(error.code()) {
            // It closes, and may come back.
            Code::Disconnected => Ended::Lost(error.message),
            code => Ended::Refused {
                code,
                message: error.message,
            },
        },
        None => Ended::Lost(why(answer)),
    }
}

/// Says why a call failed, with the causes that the library keeps below "transport error".
fn why(status: &tonic::Status) -> String {
    match std::error::Error::source(status) {
        Some(source) => causes(source),
        None => format!("{:?}: {}", status.code(), status.message()),
    }
}
