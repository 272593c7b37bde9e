//! One session with a worker, as those see it who have requests for it.
//!
//! A task per request reads its call and leaves the deltas in the request's slot at once, whether or not
//! somebody reads them: what nobody takes would use up the window of the whole connection.

use std::sync::{
    Arc,
    atomic::{AtomicUsize, Ordering},
};

use ahash::AHashMap;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use tracing::warn;

use super::{Grpc, why};
use crate::{
    ids::BlobHash,
    plane::{
        PlaneError,
        client::{self, MAX_BLOB, Streams},
        delta,
        http::{SESSION_KEY, STREAM_KEY, status},
        stream::Slot,
    },
    proto::worker::{
        BlobRequest, CancelRequest, Delta, FinishReason, GenerateRequest, Leg,
        worker_client::WorkerClient,
    },
};

/// What every call shows.
#[derive(Clone)]
pub(super) struct Access {
    pub(super) fields: Vec<(&'static str, MetadataValue<Ascii>)>,
}

impl Access {
    pub(super) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        for (key, value) in &self.fields {
            request.metadata_mut().insert(*key, value.clone());
        }
        request
    }
}

/// One session, from its welcome to its end.
pub(super) struct Link {
    inner: Arc<Inner>,
}

struct Inner {
    /// Where the worker is, for errors.
    address: String,
    max_backlog: usize,
    client: WorkerClient<Channel>,
    access: Access,
    session: u64,
    streams: Streams,
    /// Told when a stream is cancelled.
    calls: Mutex<AHashMap<u32, oneshot::Sender<()>>>,
    /// Bytes of requests that the worker has not answered yet.
    queued: AtomicUsize,
    /// Cancelled when the session is over, and with it the connection.
    closed: CancellationToken,
}

impl client::Link for Link {
    fn in_flight(&self) -> usize {
        self.inner.streams.len()
    }

    fn submit(
        &self,
        request: &GenerateRequest,
        size: usize,
    ) -> Result<(Arc<Slot>, u32), PlaneError> {
        let inner = &self.inner;
        let queued = inner.queued.fetch_add(size, Ordering::Relaxed);
        let queue = Queued(inner.clone(), size);
        if queued + size > inner.max_backlog {
            return Err(PlaneError::Backlog {
                address: inner.address.clone(),
                queued,
                limit: inner.max_backlog,
            });
        }
        let slot = Arc::new(Slot::default());
        let stream = inner.streams.open(&slot)?;
        let (cancel, cancelled) = oneshot::channel();
        inner.calls.lock().insert(stream, cancel);
        let call = Call {
            inner: inner.clone(),
            stream,
            // Its last delta may say that KV is held.
            hands_on: request.leg() == Leg::Prefill,
        };
        tokio::spawn(call.run(request.clone(), queue, cancelled));
        Ok((slot, stream))
    }

    fn cancel(&self, stream: u32, slot: &Slot) {
        if self.inner.streams.forget(stream)
            && let Some(cancel) = self.inner.calls.lock().remove(&stream)
        {
            // A call that has ended needs no cancel.
            let _ = cancel.send(());
        }
        if let Some(delta) = slot.take() {
            self.inner.streams.unread(delta);
        }
    }

    fn ask_blob(&self, hash: &BlobHash) -> oneshot::Receiver<Option<Bytes>> {
        let (mut done, answer) = oneshot::channel();
        let (inner, hash) = (self.inner.clone(), hash.clone());
        tokio::spawn(async move {
            let blob = tokio::select! {
                () = inner.closed.cancelled() => return,
                () = done.closed() => return,
                blob = inner.blob(&hash) => blob,
            };
            match blob {
                // A caller that has gone needs no answer.
                Ok(blob) => drop(done.send(blob)),
                Err(reason) => warn!(worker = inner.address, %hash, reason, "fetch a blob"),
            }
        });
        answer
    }

    fn end(&self, error: &PlaneError) {
        self.inner.streams.end(error);
        self.inner.closed.cancel();
    }
}

impl Link {
    /// - `closed`: cuts the connection when it is cancelled.
    pub(super) fn new(
        way: &Grpc,
        client: WorkerClient<Channel>,
        access: Access,
        session: u64,
        closed: CancellationToken,
    ) -> Self {
        Self {
            inner: Arc::new(Inner {
                address: way.address.clone(),
                max_backlog: way.config.max_backlog,
                client,
                access,
                session,
                streams: Streams::new(way.config.unclaimed.clone()),
                calls: Mutex::default(),
                queued: AtomicUsize::new(0),
                closed,
            }),
        }
    }

    /// Hands on what must not be lost of a delta that nobody reads.
    pub(super) fn unread(&self, delta: Delta) {
        self.inner.streams.unread(delta);
    }
}

impl Inner {
    async fn blob(&self, hash: &BlobHash) -> Result<Option<Bytes>, String> {
        let hash = hash.0.clone();
        let mut client = self.client.clone();
        let answer = client.blob(self.access.request(BlobRequest { hash })).await;
        let mut parts = match answer {
            Ok(parts) => parts.into_inner(),
            Err(status) if status.code() == tonic::Code::NotFound => return Ok(None),
            Err(status) => return Err(why(&status)),
        };
        let mut bytes = BytesMut::new();
        while let Some(part) = parts.message().await.map_err(|status| why(&status))? {
            if bytes.len() + part.bytes.len() > MAX_BLOB {
                return Err(format!("it is larger than {MAX_BLOB} bytes"));
            }
            bytes.extend_from_slice(&part.bytes);
        }
        Ok(Some(bytes.freeze()))
    }
}

/// A request's bytes, until the worker has them.
struct Queued(Arc<Inner>, usize);

impl Drop for Queued {
    fn drop(&mut self) {
        self.0.queued.fetch_sub(self.1, Ordering::Relaxed);
    }
}

/// One request on its way.
struct Call {
    inner: Arc<Inner>,
    stream: u32,
    hands_on: bool,
}

impl Call {
    async fn run(self, request: GenerateRequest, queued: Queued, cancelled: oneshot::Receiver<()>) {
        let (dropped, told) = if self.hands_on {
            (None, Some(cancelled))
        } else {
            (Some(cancelled), None)
        };
        let inner = &self.inner;
        let done = tokio::select! {
            // The streams have been ended.
            () = inner.closed.cancelled() => return,
            // To drop the call is to cancel it.
            () = cancel(dropped) => return,
            done = self.carry(request, queued, told) => done,
        };
        if let Err(status) = done {
            let error = status::error_of(&status, |status| {
                format!(
                    "connection to the worker at {} lost: {}",
                    inner.address,
                    why(status)
                )
            });
            self.put(Delta {
                finish: FinishReason::Error.into(),
                error: Some(error),
                ..Delta::default()
            });
        }
        inner.calls.lock().remove(&self.stream);
    }

    /// Carries the request there and its deltas back.
    ///
    /// - `told`: tells that nobody reads them any more; then the worker is asked to end the call, and what was on its
    ///   way still arrives.
    async fn carry(
        &self,
        request: GenerateRequest,
        queued: Queued,
        told: Option<oneshot::Receiver<()>>,
    ) -> Result<(), Status> {
        let inner = &self.inner;
        let mut client = inner.client.clone();
        let mut request = inner.access.request(request);
        let metadata = request.metadata_mut();
        metadata.insert(SESSION_KEY, inner.session.into());
        metadata.insert(STREAM_KEY, self.stream.into());
        let mut deltas = client.generate(request).await?.into_inner();
        drop(queued);
        let mut told = std::pin::pin!(cancel(told));
        let mut given_up = false;
        loop {
            tokio::select! {
                biased;
                delta = deltas.message() => {
                    let Some(delta) = delta? else {
                        return Err(Status::internal("the call ended before its last delta"));
                    };
                    let last = delta::is_last(&delta);
                    if self.put(delta) || last {
                        return Ok(());
                    }
                }
                () = &mut told, if !given_up => {
                    given_up = true;
                    let (session, stream) = (inner.session, self.stream);
                    let cancel = inner.access.request(CancelRequest { session, stream });
                    client.cancel(cancel).await?;
                }
            }
        }
    }

    /// Leaves a delta for the reader. Says whether that was too much for it.
    fn put(&self, mut delta: Delta) -> bool {
        delta.stream = self.stream;
        !self.inner.streams.distribute(vec![delta]).is_empty()
    }
}

/// Waits for a cancel; without one to wait for, for ever.
async fn cancel(cancelled: Option<oneshot::Receiver<()>>) {
    match cancelled {
        // An error: the request has ended.
        Some(cancelled) => drop(cancelled.await),
        None => std::future::pending().await,
    }
}
