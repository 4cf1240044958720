//! Bodies of answers: the node's own short texts, those of guests that have ended, and those of guests that still write.

use crate::cpu::Sliced;
use crate::guest::{Container, Failure};
use crate::http::{InFlight, report};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::{HeaderMap, Response, header};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

/// A guest that has not returned yet, its time limit, and its place among the requests in flight.
pub struct Running {
    pub guest: Sliced<wasmtime::Result<()>>,
    pub container: Arc<Container>,
    pub deadline: Instant,
    /// Made when the guest first waits; most never do.
    pub timer: Option<Pin<Box<tokio::time::Sleep>>>,
    pub in_flight: InFlight,
}

impl Running {
    pub fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if let Poll::Ready(result) = Pin::new(&mut self.guest).poll(context) {
            return Poll::Ready(match result.map_err(|error| Failure::of(&error)) {
                // Exiting is a way of returning.
                Err(Failure::Exit(0)) => Ok(()),
                other => other,
            });
        }
        let deadline = self.deadline;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.into())));
        timer.as_mut().poll(context).map(|()| Err(Failure::TimedOut))
    }

    /// Lets the guest finish what it does after its answer is complete.
    fn detach(mut self) {
        let server = self.in_flight.server().clone();
        let aborted = server.aborted().clone();
        server.executor().handle().spawn(async move {
            tokio::select! {
                biased;
                () = aborted.cancelled() => {}
                result = poll_fn(|context| self.poll(context)) => {
                    if let Err(failure) = result {
                        report(&self.container, &failure);
                    }
                }
            }
        });
    }
}

/// The body of an answer.
pub enum Answer {
    Whole(Whole),
    Streaming(Box<Streaming>),
}

/// A body that is all here, so that its length is known.
#[derive(Default)]
pub struct Whole {
    first: Option<Bytes>,
    rest: VecDeque<Bytes>,
    trailers: Option<HeaderMap>,
}

/// A body that its guest still writes; reading it is what lets the guest go on.
pub struct Streaming {
    body: HyperOutgoingBody,
    running: Option<Running>,
    /// What the guest's content-length says, less what was passed on.
    missing: Option<u64>,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Cut(String);

impl Answer {
    pub fn text(text: &'static str) -> Self {
        Self::Whole(Whole { first: Some(Bytes::from_static(text.as_bytes())), ..Whole::default() })
    }
}

/// What becomes of a guest's response.
pub trait GuestResponse {
    fn map_into_streaming(self, running: Running) -> Response<Answer>;
    /// Reads a body whose guest has ended. The error says why it cannot be sent.
    fn map_into_whole(self) -> impl Future<Output = Result<Response<Answer>, String>> + Send;
}

impl GuestResponse for Response<HyperOutgoingBody> {
    fn map_into_streaming(self, running: Running) -> Response<Answer> {
        let missing = self
            .headers()
            .get(header::CONTENT_LENGTH)
            .and_then(|length| length.to_str().ok())
            .and_then(|length| length.parse().ok());
        self.map(|body| Answer::Streaming(Box::new(Streaming { body, running: Some(running), missing })))
    }

    async fn map_into_whole(self) -> Result<Response<Answer>, String> {
        let (head, mut body) = self.into_parts();
        let mut whole = Whole::default();
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            let frame = frame.map_err(|error| format!("its answer's body is not usable: {error}"))?;
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) if whole.first.is_none() => whole.first = Some(data),
                Ok(data) => whole.rest.push_back(data),
                Err(frame) => whole.trailers = frame.into_trailers().ok(),
            }
        }
        Ok(Response::from_parts(head, Answer::Whole(whole)))
    }
}

impl Body for Answer {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match self.get_mut() {
            Self::Whole(whole) => Poll::Ready(
                whole
                    .first
                    .take()
                    .or_else(|| whole.rest.pop_front())
                    .map(Frame::data)
                    .or_else(|| whole.trailers.take().map(Frame::trailers))
                    .map(Ok),
            ),
            Self::Streaming(streaming) => streaming.poll_frame(context),
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Whole(whole) => whole.first.is_none() && whole.rest.is_empty() && whole.trailers.is_none(),
            Self::Streaming(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            // With trailers, HTTP/1 needs chunks.
            Self::Whole(Whole { first, rest, trailers: None }) => {
                SizeHint::with_exact(first.iter().chain(rest).map(|chunk| chunk.len() as u64).sum())
            }
            _ => SizeHint::default(),
        }
    }
}

impl Streaming {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        if let Some(running) = &mut self.running {
            match running.poll(context) {
                Poll::Ready(Ok(())) => self.running = None,
                Poll::Ready(Err(failure)) => {
                    // What was sent cannot be taken back; breaking off tells the client that it is not all.
                    report(&running.container, &failure);
                    self.running = None;
                    return Poll::Ready(Some(Err(Cut(failure.to_string()))));
                }
                Poll::Pending => {}
            }
        }
        match Pin::new(&mut self.body).poll_frame(context) {
            Poll::Ready(Some(Ok(frame))) => {
                if let (Some(missing), Some(data)) = (&mut self.missing, frame.data_ref()) {
                    *missing = missing.saturating_sub(data.len() as u64);
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(error))) => Poll::Ready(Some(Err(Cut(error.to_string())))),
            Poll::Ready(None) => {
                if let Some(running) = self.running.take() {
                    running.detach();
                }
                Poll::Ready(None)
            }
            Poll::Pending => Poll::Pending,
        }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        // A body of known length is dropped after its last byte, not read to its end. Otherwise the client went away.
        if let (Some(0), Some(running)) = (self.missing, self.running.take()) {
            running.detach();
        }
    }
}
