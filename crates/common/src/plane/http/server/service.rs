//! The gRPC service: from a call to a request of the worker's handler.

use std::{pin::Pin, sync::Arc, time::Duration};

use ahash::AHashMap;
use futures::Stream;
use parking_lot::Mutex;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status, async_trait, metadata::MetadataMap};
use tracing::{info, warn};

use super::{
    Session,
    calls::{Deltas, Watching},
};
use crate::{
    BlobHash, Code,
    drain::Drain,
    plane::{
        http::{
            SESSION_KEY, STREAM_KEY, VERSION, VERSION_KEY, WORKER_KEY, pipe::Peer, status::refusal,
        },
        server::{Connection, Handler, ServerConfig},
        tcp::frame::BLOB_CHUNK,
    },
    proto::worker::{
        BlobPart, BlobRequest, CancelRequest, CancelResponse, GenerateRequest, News, WatchRequest,
        worker_server,
    },
};

/// What all calls share.
pub(super) struct Shared {
    pub(super) config: ServerConfig,
    pub(super) handler: Arc<dyn Handler>,
    pub(super) drain: Drain,
    pub(super) stop: CancellationToken,
    /// By the ids of their connections.
    pub(super) sessions: Mutex<AHashMap<u64, Entry>>,
    /// The session of those who have none, from the first of them on.
    pub(super) strangers: Mutex<Option<Entry>>,
}

/// A session and the connection that stands for it.
pub(super) type Entry = (Arc<Session>, Arc<Connection>);

impl Shared {
    /// Says whether a call may pass, before anything of its message is read.
    pub(super) fn admit(&self, metadata: &MetadataMap) -> Result<(), Status> {
        let text = |key| metadata.get(key).and_then(|value| value.to_str().ok());
        if let Some(version) = text(VERSION_KEY) {
            let major = version
                .split('.')
                .next()
                .and_then(|major| major.parse().ok());
            if major != Some(VERSION.0) {
                let (major, minor) = VERSION;
                let message = format!(
                    "the worker speaks version {major}.{minor} of the http plane, the processor {version}: the first numbers must be equal"
                );
                return Err(refusal(Code::Incompatible, message));
            }
        }
        let token = metadata
            .get("authorization")
            .and_then(|value| value.as_bytes().strip_prefix(b"Bearer "));
        self.config
            .admit(
                token.unwrap_or_default(),
                text(WORKER_KEY).unwrap_or_default(),
            )
            .map_err(|(code, message)| refusal(code, message))
    }

    /// Forgets a session.
    pub(super) fn ended(&self, id: u64) {
        self.sessions.lock().remove(&id);
    }

    /// Ends everything.
    pub(super) fn end_all(&self) {
        let sessions = std::mem::take(&mut *self.sessions.lock());
        let strangers = self.strangers.lock().take();
        for (session, _) in sessions.into_values().chain(strangers) {
            session.end();
        }
    }

    fn session(&self, metadata: &MetadataMap) -> Result<Entry, Status> {
        match number::<u64>(metadata, SESSION_KEY)? {
            Some(id) => self.sessions.lock().get(&id).cloned(),
            None if self.stop.is_cancelled() => None,
            None => Some(self.strangers()),
        }
        .ok_or_else(|| refusal(Code::Disconnected, "the session is over"))
    }

    fn strangers(&self) -> Entry {
        let mut strangers = self.strangers.lock();
        // One that ended, since too much waited in it, is followed by another.
        strangers.take_if(|(session, _)| session.closed().is_cancelled());
        strangers
            .get_or_insert_with(|| self.begin("gRPC clients".to_owned(), false))
            .clone()
    }

    fn begin(&self, peer: String, watched: bool) -> Entry {
        let handler = self.handler.clone();
        Session::begin(peer, watched, self.config.max_backlog, handler)
    }
}

/// The service of one listener.
pub(super) struct Service(pub(super) Arc<Shared>);

type Answers<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[async_trait]
impl worker_server::Worker for Service {
    type GenerateStream = Deltas;
    type BlobStream = Answers<BlobPart>;
    type WatchStream = Answers<News>;

    async fn generate(
        &self,
        request: Request<GenerateRequest>,
    ) -> Result<Response<Deltas>, Status> {
        let Self(shared) = self;
        let deadline = deadline(request.metadata())?;
        let number = number::<u32>(request.metadata(), STREAM_KEY)?;
        let (session, connection) = shared.session(request.metadata())?;
        let opened = session.open(number).ok_or_else(|| {
            refusal(
                Code::Disconnected,
                "the session is over, or the stream is not new",
            )
        })?;
        let mut request = request.into_inner();
        if let Some(deadline) = deadline {
            let deadline = u64::try_from(deadline.as_millis()).unwrap_or(u64::MAX);
            let own = request.deadline_ms.unwrap_or(u64::MAX);
            request.deadline_ms = Some(own.min(deadline));
        }
        let stream = opened.0;
        let mut deltas = Deltas::new(session, connection.clone(), opened);
        shared.handler.submit(&connection, stream, request);
        match deltas.refused() {
            Some(refusal) => Err(refusal),
            None => Ok(Response::new(deltas)),
        }
    }

    async fn blob(
        &self,
        request: Request<BlobRequest>,
    ) -> Result<Response<Self::BlobStream>, Status> {
        let hash = BlobHash(request.into_inner().hash);
        let Some(mut rest) = self.0.handler.blob(&hash) else {
            warn!(%hash, "asked for a blob that is not here");
            return Err(refusal(Code::NotFound, format!("there is no blob {hash}")));
        };
        let parts = std::iter::from_fn(move || {
            let bytes = rest.split_to(rest.len().min(BLOB_CHUNK));
            (!bytes.is_empty()).then_some(Ok(BlobPart { bytes }))
        });
        Ok(Response::new(Box::pin(futures::stream::iter(parts))))
    }

    async fn watch(
        &self,
        request: Request<WatchRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let Self(shared) = self;
        let peer = request.extensions().get::<Peer>();
        let peer = peer.map_or_else(String::new, |peer| peer.name.clone());
        info!(
            peer,
            software = request.get_ref().software,
            "processor connected"
        );
        let entry = shared.begin(peer, true);
        // Nobody else can guess it, and so speak in its name.
        let id = rand::random();
        shared.sessions.lock().insert(id, entry.clone());
        let watching = Watching::new(shared.clone(), id, entry, shared.config.beat_every);
        if shared.stop.is_cancelled() {
            // The server closed meanwhile: dropping it ends the session.
            return Err(refusal(Code::Disconnected, "the worker closes"));
        }
        Ok(Response::new(Box::pin(watching.into_stream())))
    }

    async fn cancel(
        &self,
        request: Request<CancelRequest>,
    ) -> Result<Response<CancelResponse>, Status> {
        let CancelRequest { session, stream } = request.into_inner();
        let session = self.0.sessions.lock().get(&session).cloned();
        if let Some((session, _)) = session {
            session.give_up(stream);
        }
        Ok(Response::new(CancelResponse {}))
    }
}

fn number<T: std::str::FromStr>(metadata: &MetadataMap, key: &str) -> Result<Option<T>, Status> {
    let Some(value) = metadata.get(key) else {
        return Ok(None);
    };
    let parsed = value.to_str().ok().and_then(|text| text.parse().ok());
    parsed
        .map(Some)
        .ok_or_else(|| refusal(Code::InvalidRequest, format!("{key} is no number")))
}

/// Reads gRPC's own deadline: up to eight digits and a unit.
fn deadline(metadata: &MetadataMap) -> Result<Option<Duration>, Status> {
    let Some(value) = metadata.get("grpc-timeout") else {
        return Ok(None);
    };
    let parse = |text: &str| {
        let (digits, unit) = text.split_at_checked(text.len().checked_sub(1)?)?;
        if digits.len() > 8 {
            return None;
        }
        let amount: u64 = digits.parse().ok()?;
        Some(match unit {
            "H" => Duration::from_secs(amount * 3600),
            "M" => Duration::from_secs(amount * 60),
            "S" => Duration::from_secs(amount),
            "m" => Duration::from_millis(amount),
            "u" => Duration::from_micros(amount),
            "n" => Duration::from_nanos(amount),
            _ => return None,
        })
    };
    let parsed = value.to_str().ok().and_then(parse);
    parsed
        .map(Some)
        .ok_or_else(|| refusal(Code::InvalidRequest, "grpc-timeout cannot be read"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn deadlines_of_grpc_are_read_in_every_unit() {
        let read = |text: &str| {
            let mut metadata = MetadataMap::new();
            metadata.insert("grpc-timeout", text.parse().unwrap());
            deadline(&metadata)
        };
        assert_eq!(read("2H").unwrap(), Some(Duration::from_secs(7200)));
        assert_eq!(
            read("99999999m").unwrap(),
            Some(Duration::from_millis(99_999_999))
        );
        assert_eq!(read("100u").unwrap(), Some(Duration::from_micros(100)));
        for wrong in ["", "5", "m", "123456789m", "-1S", "5 S"] {
            assert_eq!(
                read(wrong).unwrap_err().code(),
                tonic::Code::InvalidArgument
            );
        }
        assert_eq!(deadline(&MetadataMap::new()).unwrap(), None);
    }
}
