//! Bodies of answers: the node's own short texts, those of guests that have ended, and those of guests that still write.

use crate::cpu::Sliced;
use crate::guest::{Container, Failure};
use crate::http::{InFlight, report};
use crate::slow_client::Turn;
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::{HeaderMap, Response, header};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::Instant;
use tokio::task::AbortHandle;
use wasmtime_wasi_http::p2::bindings::http::types::ErrorCode;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

/// What a guest and the task that answers for it tell each other. A failure is told before the guest's streams are
/// closed, so that a body which ends without one is whole.
#[derive(Default)]
pub struct Exchange {
    answer: Mutex<Option<Answered>>,
    failure: Mutex<Option<Failure>>,
}

pub type Answered = Result<Response<HyperOutgoingBody>, ErrorCode>;

impl Exchange {
    pub fn answer(&self, answer: Answered) {
        *lock(&self.answer) = Some(answer);
    }

    pub fn take_answer(&self) -> Option<Answered> {
        lock(&self.answer).take()
    }

    fn is_answered(&self) -> bool {
        lock(&self.answer).is_some()
    }

    pub fn fail(&self, failure: Failure) {
        lock(&self.failure).get_or_insert(failure);
    }

    fn failure(&self) -> Option<Failure> {
        lock(&self.failure).clone()
    }
}

/// A poisoned lock only means that another thread panicked between two assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A guest that has not returned yet, its time limit, and its place among the requests in flight.
pub struct Running {
    pub guest: Sliced<()>,
    pub exchange: Arc<Exchange>,
    pub container: Arc<Container>,
    pub deadline: Instant,
    /// Made when the guest first waits; most never do.
    pub timer: Option<Pin<Box<tokio::time::Sleep>>>,
    pub in_flight: InFlight,
}

/// Why a guest is not to be waited for any longer.
pub enum Progress {
    Answered,
    Ended,
    Failed(Failure),
}

impl Running {
    /// Waits until the guest has answered, ended or failed.
    pub async fn progress(&mut self) -> Progress {
        poll_fn(|context| match self.poll(context) {
            Poll::Ready(Ok(())) => Poll::Ready(Progress::Ended),
            Poll::Ready(Err(failure)) => Poll::Ready(Progress::Failed(failure)),
            Poll::Pending if self.exchange.is_answered() => Poll::Ready(Progress::Answered),
            Poll::Pending => Poll::Pending,
        })
        .await
    }

    fn poll(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Failure>> {
        if Pin::new(&mut self.guest).poll(context).is_ready() {
            return Poll::Ready(self.exchange.failure().map_or(Ok(()), Err));
        }
        let deadline = self.deadline;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline.into())));
        timer.as_mut().poll(context).map(|()| Err(Failure::TimedOut))
    }

    /// Runs the guest on in a task of its own, while hyper sends what it writes.
    fn go_on(mut self) -> AbortHandle {
        let server = self.in_flight.server().clone();
        let aborted = server.aborted().clone();
        let task = server.executor().handle().spawn(async move {
            let result = tokio::select! {
                biased;
                () = aborted.cancelled() => return,
                result = poll_fn(|context| self.poll(context)) => result,
            };
            if let Err(failure) = result {
                report(&self.container, &failure);
                self.exchange.fail(failure);
            }
        });
        task.abort_handle()
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

/// A body that its guest still writes.
pub struct Streaming {
    body: HyperOutgoingBody,
    exchange: Arc<Exchange>,
    /// The guest, until all of the body was passed on: a client that goes away before takes it along.
    guest: Option<AbortHandle>,
    /// What the guest's content-length says, less what was passed on.
    missing: Option<u64>,
}

/// An answer on its way to the client.
pub struct Sending {
    answer: Answer,
    turn: Turn,
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
        let exchange = running.exchange.clone();
        let guest = Some(running.go_on());
        self.map(|body| Answer::Streaming(Box::new(Streaming { body, exchange, guest, missing })))
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

impl Sending {
    pub fn new(answer: Answer, mut turn: Turn) -> Self {
        if matches!(answer, Answer::Whole(_)) {
            turn.of_client();
        }
        Self { answer, turn }
    }
}

impl Body for Sending {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = self.get_mut();
        this.turn.of_guest();
        let frame = Pin::new(&mut this.answer).poll_frame(context);
        if frame.is_ready() {
            this.turn.of_client();
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.answer.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.answer.size_hint()
    }
}

impl Streaming {
    fn poll_frame(&mut self, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        match ready!(Pin::new(&mut self.body).poll_frame(context)) {
            Some(Ok(frame)) => {
                if let (Some(missing), Some(data)) = (&mut self.missing, frame.data_ref()) {
                    *missing = missing.saturating_sub(data.len() as u64);
                    if *missing == 0 {
                        // A body of known length is dropped after its last byte, not read to its end.
                        self.guest = None;
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(Cut(error.to_string())))),
            None => {
                self.guest = None;
                // What was sent cannot be taken back; breaking off tells the client that it is not all.
                Poll::Ready(self.exchange.failure().map(|failure| Err(Cut(failure.to_string()))))
            }
        }
    }
}

impl Drop for Streaming {
    fn drop(&mut self) {
        if let Some(guest) = self.guest.take() {
            guest.abort();
        }
    }
}
