//! What strangers may keep open: the services that ask for no token, health and reflection, are called by whoever reaches
//! the port.
//!
//! So the calls of a connection are counted, and the streams of all; whoever says nothing loses its call, and questions are
//! short. A question that is answered at once, `Health/Check`, is not counted with the streams: no stranger's streams keep a
//! probe out. A peer that answers pings and never reads what it asked for is bounded by the counts alone.

use std::{
    convert::Infallible,
    future::{Future, ready},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::Frame;
use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep, sleep},
};
use tonic::{Status, body::Body, server::NamedService};
use tower::Service;

use crate::{
    Code,
    plane::http::{
        pipe::{Peer, TOKENLESS_CALLS},
        status::refusal,
    },
};

/// Bytes of a question, at most: names of services and of messages.
pub(super) const LONGEST_QUESTION: usize = 4 << 10;

/// Streams of all connections that are open at once, a few KiB each.
const STREAMS: usize = 256;

/// Who calls says something at least this often, until it has said all.
const ASK_WITHIN: Duration = Duration::from_secs(30);

/// A stream that has nothing to say for so long is ended. Who still listens calls again.
const IDLE: Duration = Duration::from_secs(600);

/// The call that is no stream.
const CHECK: &str = "/grpc.health.v1.Health/Check";

/// Returns what bounds the streams of one listener.
pub(super) fn streams() -> Arc<Semaphore> {
    Arc::new(Semaphore::new(STREAMS))
}

/// A service whose calls are bounded.
#[derive(Clone)]
pub(super) struct Tokenless<S> {
    inner: S,
    streams: Arc<Semaphore>,
}

/// What an open call holds.
type Held = Arc<[Option<OwnedSemaphorePermit>; 2]>;

impl<S> Tokenless<S> {
    /// - `streams`: of the listener, shared by its services.
    pub(super) fn new(inner: S, streams: &Arc<Semaphore>) -> Self {
        Self {
            inner,
            streams: streams.clone(),
        }
    }

    fn admit(&self, request: &Request<Body>) -> Result<Held, Status> {
        let peer = request.extensions().get::<Peer>();
        let of_connection = peer.map(|peer| {
            take(
                &peer.tokenless,
                "connection's calls without a token",
                TOKENLESS_CALLS,
            )
        });
        let is_stream = request.uri().path() != CHECK;
        let of_all =
            is_stream.then(|| take(&self.streams, "worker's streams without a token", STREAMS));
        Ok(Arc::new([of_connection.transpose()?, of_all.transpose()?]))
    }
}

fn take(of: &Arc<Semaphore>, what: &str, most: usize) -> Result<OwnedSemaphorePermit, Status> {
    let permit = of.clone().try_acquire_owned();
    permit.map_err(|_| {
        let message = format!("{most} of this {what} are open, which is the limit");
        refusal(Code::Overloaded, message)
    })
}

impl<S: NamedService> NamedService for Tokenless<S> {
    const NAME: &'static str = S::NAME;
}

impl<S> Service<Request<Body>> for Tokenless<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let held = match self.admit(&request) {
            Ok(held) => held,
            Err(status) => return Box::pin(ready(Ok(status.into_http()))),
        };
        let asked = request.map(|body| Bounded::new(body, ASK_WITHIN, Way::In, &held).boxed());
        let answered = self.inner.call(asked);
        Box::pin(async move {
            let response = answered.await?;
            Ok(response.map(|body| Bounded::new(body, IDLE, Way::Out, &held).boxed()))
        })
    }
}

/// Which way a body goes.
#[derive(Clone, Copy)]
enum Way {
    In,
    Out,
}

/// A body that ends when it says nothing for too long, and counts for as long as it is there.
struct Bounded {
    body: Body,
    idle: Duration,
    way: Way,
    silent: Pin<Box<Sleep>>,
    _held: Held,
}

impl Bounded {
    fn new(body: Body, idle: Duration, way: Way, held: &Held) -> Self {
        Self {
            body,
            idle,
            way,
            silent: Box::pin(sleep(idle)),
            _held: held.clone(),
        }
    }

    fn boxed(self) -> Body {
        Body::new(self)
    }
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        if let Poll::Ready(frame) = Pin::new(&mut this.body).poll_frame(cx) {
            this.silent.as_mut().reset(Instant::now() + this.idle);
            return Poll::Ready(frame);
        }
        if this.silent.as_mut().poll(cx).is_pending() {
            return Poll::Pending;
        }
        this.body = Body::empty();
        let over = Status::unavailable(format!(
            "nothing was said for {} s: call again",
            this.idle.as_secs()
        ));
        Poll::Ready(Some(match this.way {
            Way::In => Err(over),
            Way::Out => {
                let mut trailers = HeaderMap::new();
                over.add_header(&mut trailers)?;
                Ok(Frame::trailers(trailers))
            }
        }))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use http_body::Body as _;
    use tokio::sync::mpsc;

    use super::*;

    /// A body whose frames a test sends.
    struct Sent(mpsc::UnboundedReceiver<Bytes>);

    impl http_body::Body for Sent {
        type Data = Bytes;
        type Error = Infallible;

        fn poll_frame(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
        ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
            self.0
                .poll_recv(cx)
                .map(|sent| Some(Ok(Frame::data(sent?))))
        }
    }

    async fn frame(body: &mut Body) -> Option<Result<Frame<Bytes>, Status>> {
        std::future::poll_fn(|cx| Pin::new(&mut *body).poll_frame(cx)).await
    }

    /// Returns a body, what it says next, and what it holds.
    fn bounded(way: Way) -> (mpsc::UnboundedSender<Bytes>, Body, Arc<Semaphore>) {
        let (sender, sent) = mpsc::unbounded_channel();
        let all = Arc::new(Semaphore::new(1));
        let held: Held = Arc::new([None, Some(take(&all, "", 1).unwrap())]);
        let idle = Duration::from_secs(10);
        let body = Bounded::new(Body::new(Sent(sent)), idle, way, &held).boxed();
        (sender, body, all)
    }

    #[tokio::test(start_paused = true)]
    async fn an_answer_ends_with_a_status_when_nothing_was_said_for_too_long() {
        let (sender, mut body, held) = bounded(Way::Out);
        let began = Instant::now();
        for _ in 0..3 {
            tokio::time::advance(Duration::from_secs(9)).await;
            sender.send(Bytes::from_static(b"news")).unwrap();
            let data = frame(&mut body).await.unwrap().unwrap();
            assert_eq!(data.into_data().unwrap(), "news");
        }
        let last = frame(&mut body).await.unwrap().unwrap();
        assert_eq!(began.elapsed(), Duration::from_secs(37));
        let status = Status::from_header_map(last.trailers_ref().unwrap()).unwrap();
        assert_eq!(status.code(), tonic::Code::Unavailable);
        assert!(frame(&mut body).await.is_none());
        assert_eq!(held.available_permits(), 0);
        drop(body);
        assert_eq!(held.available_permits(), 1);
    }

    #[tokio::test(start_paused = true)]
    async fn a_question_that_is_never_finished_fails() {
        let (_sender, mut body, _) = bounded(Way::In);
        let error = frame(&mut body).await.unwrap().unwrap_err();
        assert_eq!(error.code(), tonic::Code::Unavailable);
    }
}
