//! What every request passes, whatever it wants: its id, its key, its count.
//!
//! One hyper service around axum's router instead of a stack of layers, each of which would box a
//! future and a body per request.

use std::convert::Infallible;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use axum::response::IntoResponse;
use bytes::Bytes;
use http::{HeaderName, HeaderValue, Request, Response, Version};
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;
use pin_project_lite::pin_project;
use rand::Rng;
use tower_service::Service as _;
use tracing::debug;

use super::connection::{Activity, Busy};
use super::routes::Route;
use crate::App;

const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
/// A longer id, or one with other characters than visible ASCII, is replaced: it goes into logs.
const MAX_ID: usize = 128;

/// The request's id: the client's `x-request-id`, or a new one. Every handler finds it among the
/// request's extensions, and every answer carries it.
#[derive(Clone, Debug)]
pub struct RequestId(HeaderValue);

impl RequestId {
    fn of<B>(request: &Request<B>) -> Self {
        let given = request.headers().get(REQUEST_ID).filter(|id| {
            !id.is_empty() && id.len() <= MAX_ID && id.as_bytes().iter().all(u8::is_ascii_graphic)
        });
        Self(given.cloned().unwrap_or_else(|| {
            let id = format!("{:032x}", rand::rng().random::<u128>());
            HeaderValue::from_maybe_shared(Bytes::from(id)).expect("hex digits make a header value")
        }))
    }

    /// Returns the id as text.
    pub fn as_str(&self) -> &str {
        self.0
            .to_str()
            .expect("only visible ASCII is taken as an id")
    }
}

/// Answers the requests of one connection.
pub(super) struct Front {
    app: Arc<App>,
    router: axum::Router,
    activity: Arc<Activity>,
}

impl Front {
    pub(super) fn new(app: Arc<App>, router: axum::Router, activity: Arc<Activity>) -> Self {
        Self {
            app,
            router,
            activity,
        }
    }
}

impl hyper::service::Service<Request<Incoming>> for Front {
    type Response = Response<Tracked>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Infallible>> + Send>>;

    fn call(&self, mut request: Request<Incoming>) -> Self::Future {
        let busy = self.activity.begin(request.version() == Version::HTTP_2);
        let id = RequestId::of(&request);
        request.extensions_mut().insert(id.clone());
        let route = Route::of(request.uri().path());
        let app = Arc::clone(&self.app);
        let admitted = app.keys.admit(route, request.headers());
        let mut router = self.router.clone();
        Box::pin(async move {
            let mut response = match admitted {
                Ok(()) => match router.call(request).await {
                    Ok(response) => response,
                    Err(never) => match never {},
                },
                Err(error) => error.into_response(),
            };
            debug!(
                request = id.as_str(),
                ?route,
                status = response.status().as_u16(),
                "answered"
            );
            response.headers_mut().insert(REQUEST_ID, id.0);
            app.http.count(route, response.status());
            Ok(response.map(|inner| Tracked { inner, _busy: busy }))
        })
    }
}

pin_project! {
    /// A body whose end is the end of the request.
    pub(super) struct Tracked {
        #[pin]
        inner: axum::body::Body,
        _busy: Busy,
    }
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = axum::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, axum::Error>>> {
        self.project().inner.poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.inner.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.inner.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn id(given: &str) -> RequestId {
        RequestId::of(
            &Request::builder()
                .header(REQUEST_ID, given)
                .body(())
                .unwrap(),
        )
    }

    #[test]
    fn a_clients_id_is_kept_if_it_can_stand_in_a_log() {
        assert_eq!(id("abc-1").as_str(), "abc-1");
        for bad in ["", "a b", "a\tb", &"x".repeat(MAX_ID + 1)] {
            let made = id(bad);
            assert_eq!(made.as_str().len(), 32, "{bad}");
            assert_ne!(made.as_str(), id(bad).as_str());
        }
    }
}
