//! A streamed answer as the body of an HTTP response.
//!
//! The body is polled by the connection itself. Each poll writes an event per piece that is ready, all
//! into one buffer, so that what arrived together leaves in one write.

use std::convert::Infallible;
use std::future::poll_fn;
use std::pin::Pin;
use std::task::{Context, Poll};

use axum::body::Body;
use axum::http::{HeaderValue, header};
use axum::response::{IntoResponse, Response};
use bytes::{Bytes, BytesMut};
use http_body::Frame;

use super::{Generation, Piece};
use crate::metrics::{Observation, Outcome};
use crate::openai::{ApiError, json};

/// Bytes after which a chunk is sent although more pieces are ready.
const CHUNK: usize = 64 << 10;
/// Bytes of the buffer that events are written into: some fifteen events, used again once they were sent.
const BUFFER: usize = 4 << 10;

/// How an endpoint writes its events.
pub(crate) trait Format: Send + Unpin + 'static {
    /// Writes what comes before the first piece.
    fn begin(&mut self, out: &mut BytesMut);
    /// Writes a piece.
    fn piece(&mut self, choice: usize, text: &str, piece: Piece, out: &mut BytesMut);
    /// Writes what comes after the last piece of all choices.
    fn end(&mut self, out: &mut BytesMut);
}

/// Waits for the first piece and returns the response that streams them all.
///
/// Until the first piece a failure is an HTTP status; after it, an event.
///
/// # Errors
/// A choice failed before any piece came.
pub(crate) async fn sse(
    mut generation: Generation,
    format: impl Format,
    observation: Observation,
) -> Result<Response, ApiError> {
    let mut text = String::new();
    let first = poll_fn(|cx| generation.poll_piece(cx, &mut text)).await;
    let mut body = Events {
        generation,
        format,
        observation,
        text,
        out: BytesMut::with_capacity(BUFFER),
        ended: false,
    };
    body.format.begin(&mut body.out);
    match first {
        Some(Ok((choice, piece))) => body.write(choice, piece),
        Some(Err(error)) => {
            body.observation.end(Outcome::from(error.code()));
            return Err(error);
        }
        None => body.finish(),
    }
    let headers = [
        (
            header::CONTENT_TYPE,
            HeaderValue::from_static("text/event-stream; charset=utf-8"),
        ),
        (header::CACHE_CONTROL, HeaderValue::from_static("no-cache")),
        // nginx would otherwise collect the answer before it passes it on.
        (
            header::HeaderName::from_static("x-accel-buffering"),
            HeaderValue::from_static("no"),
        ),
    ];
    Ok((headers, Body::new(body)).into_response())
}

struct Events<F> {
    generation: Generation,
    format: F,
    observation: Observation,
    /// Of the latest piece.
    text: String,
    out: BytesMut,
    ended: bool,
}

impl<F: Format> Events<F> {
    fn write(&mut self, choice: usize, piece: Piece) {
        self.observation.tokens(piece.tokens.len());
        if let Some(cached) = piece.cached {
            self.observation.cached(cached);
        }
        self.format.piece(choice, &self.text, piece, &mut self.out);
    }

    fn finish(&mut self) {
        self.format.end(&mut self.out);
        self.observation.end(Outcome::Success);
        self.done();
    }

    fn fail(&mut self, error: &ApiError) {
        self.observation.end(Outcome::from(error.code()));
        json::raw(&mut self.out, "data: ");
        json::raw(&mut self.out, &error.to_json());
        json::raw(&mut self.out, "\n\n");
        self.done();
    }

    fn done(&mut self) {
        json::raw(&mut self.out, "data: [DONE]\n\n");
        self.ended = true;
        // The choices that still run are of no use to anybody.
        self.generation = Generation::new(Vec::new());
    }
}

impl<F: Format> http_body::Body for Events<F> {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let this = &mut *self;
        while !this.ended && this.out.len() < CHUNK {
            match this.generation.poll_piece(cx, &mut this.text) {
                Poll::Ready(Some(Ok((choice, piece)))) => this.write(choice, piece),
                Poll::Ready(Some(Err(error))) => this.fail(&error),
                Poll::Ready(None) => this.finish(),
                Poll::Pending => break,
            }
        }
        if !this.out.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(this.out.split().freeze()))));
        }
        if this.ended {
            Poll::Ready(None)
        } else {
            Poll::Pending
        }
    }

    fn is_end_stream(&self) -> bool {
        self.ended && self.out.is_empty()
    }
}
