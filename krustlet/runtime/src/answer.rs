//! Bodies of answers: the node's own short texts, those of guests that have ended, and those of guests that still write.

use crate::admission::Admitted;
use crate::connection::OpenRequest;
use crate::cpu::Sliced;
use crate::guest::{Container, Failure};
use crate::limits::size_of_head;
use crate::logs::LogStream;
use crate::memory::{Budget, Reservation};
use bytes::Bytes;
use hyper::body::{Body, Frame, SizeHint};
use hyper::{HeaderMap, Response, StatusCode, header};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};
use tokio::runtime::Handle;
use tokio::task::AbortHandle;
use tokio_util::sync::CancellationToken;
use wasmtime_wasi_http::p2::bindings::http::types::ErrorCode;
use wasmtime_wasi_http::p2::body::HyperOutgoingBody;

/// What a guest and the task that answers for it tell each other. A failure is told before the guest's streams are
/// closed, so that a body which ends without one is whole.
pub struct Exchange {
    answer: Mutex<Option<Answered>>,
    failure: Mutex<Option<Failure>>,
    deadline: Mutex<Deadline>,
}

pub type Answered = Result<Response<HyperOutgoingBody>, ErrorCode>;

/// By when the guest has to have done what is next.
#[derive(Debug, Clone)]
struct Deadline {
    at: Instant,
    failure: Failure,
}

impl Exchange {
    /// The answer is to begin before `deadline`.
    pub fn new(deadline: Instant) -> Self {
        Self {
            answer: Mutex::default(),
            failure: Mutex::default(),
            deadline: Mutex::new(Deadline { at: deadline, failure: Failure::TimedOut }),
        }
    }

    pub fn answer(&self, answer: Answered) {
        *self.answer.lock() = Some(answer);
    }

    pub fn take_answer(&self) -> Option<Answered> {
        self.answer.lock().take()
    }

    fn is_answered(&self) -> bool {
        self.answer.lock().is_some()
    }

    pub fn fail(&self, failure: Failure) {
        self.failure.lock().get_or_insert(failure);
    }

    fn failure(&self) -> Option<Failure> {
        self.failure.lock().clone()
    }

    /// The next piece of the answer, or its end, is to come within this time.
    fn expect(&self, within: Duration, failure: Failure) {
        *self.deadline.lock() = Deadline { at: Instant::now() + within, failure };
    }
}

/// A guest that has not returned yet, its time limit, and its place among those that are served.
pub struct Running {
    pub guest: Sliced<()>,
    pub exchange: Arc<Exchange>,
    pub container: Arc<Container>,
    /// Made when the guest first waits; most never do.
    pub timer: Option<Pin<Box<tokio::time::Sleep>>>,
    /// Where it runs on when its answer has begun, and what ends it then.
    pub executor: Handle,
    pub aborted: CancellationToken,
    /// What the request's head takes.
    pub _head: Reservation,
    /// Dropped after the guest, whose place it is.
    pub _admitted: Admitted,
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
        loop {
            let deadline = self.exchange.deadline.lock().clone();
            let at: tokio::time::Instant = deadline.at.into();
            let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(at)));
            // One that was put off is looked at when the old one is there, not at every piece.
            if timer.deadline() > at {
                timer.as_mut().reset(at);
            }
            ready!(timer.as_mut().poll(context));
            if deadline.at <= Instant::now() {
                return Poll::Ready(Err(deadline.failure));
            }
            timer.as_mut().reset(at);
        }
    }

    /// Runs the guest on in a task of its own, while hyper sends what it writes; or nobody does, as with HEAD.
    fn go_on(mut self, mut unsent: Option<HyperOutgoingBody>) -> AbortHandle {
        let aborted = self.aborted.clone();
        let task = self.executor.clone().spawn(async move {
            let run = poll_fn(|context| {
                while let Some(body) = &mut unsent {
                    match Pin::new(body).poll_frame(context) {
                        Poll::Ready(Some(Ok(_))) => {}
                        Poll::Ready(_) => unsent = None,
                        Poll::Pending => break,
                    }
                }
                self.poll(context)
            });
            let result = tokio::select! {
                biased;
                () = aborted.cancelled() => return,
                result = run => result,
            };
            if let Err(failure) = result {
                report(&self.container, &failure);
                self.exchange.fail(failure);
            }
        });
        task.abort_handle()
    }
}

/// Tells a failed request's reason where `kubectl logs` shows it.
pub fn report(container: &Container, failure: &Failure) {
    tracing::debug!(container = container.spec.name, %failure, "a request failed");
    container.spec.log.write_line(LogStream::Stderr, &format!("krustlet: request failed: {failure}"));
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
    /// The container's memory that it takes until the client has it; the guest, which it counted for before, is gone.
    memory: Option<Reservation>,
}

/// A body that its guest still writes.
pub struct Streaming {
    body: HyperOutgoingBody,
    exchange: Arc<Exchange>,
    /// The guest, until all of the body was passed on: a client that goes away before takes it along.
    guest: Option<AbortHandle>,
    /// What the guest's content-length says, less what was passed on.
    missing: Option<u64>,
    /// Between two pieces, and after the last one until the guest returns.
    idle_timeout: Duration,
    end_timeout: Duration,
    /// What its head takes, which the guest does not have any more.
    _head: Reservation,
}

/// An answer on its way to the client.
pub struct Sending {
    answer: Answer,
    request: OpenRequest,
}

#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct Cut(String);

impl Answer {
    pub fn text(text: &'static str) -> Self {
        Self::Whole(Whole { first: Some(Bytes::from_static(text.as_bytes())), ..Whole::default() })
    }

    pub fn empty() -> Self {
        Self::Whole(Whole::default())
    }

    fn head_only(kept: Reservation) -> Self {
        Self::Whole(Whole { memory: Some(kept), ..Whole::default() })
    }

    /// Bytes that are kept for the client though their guest is gone.
    fn kept(&self) -> usize {
        match self {
            Self::Whole(whole) => whole.chunks().map(Bytes::len).sum(),
            Self::Streaming(_) => 0,
        }
    }
}

impl Whole {
    fn chunks(&self) -> impl Iterator<Item = &Bytes> {
        self.first.iter().chain(&self.rest)
    }
}

/// What becomes of a guest's response. With `head_only` the client expects no body, whatever the guest says and writes.
pub trait GuestResponse {
    fn head_only(&self, method_is_head: bool) -> bool;
    /// The error says why it cannot be sent.
    fn map_into_streaming(self, running: Running, head_only: bool) -> Result<Response<Answer>, Failure>;
    /// Reads a body whose guest has ended. The error says why it cannot be sent.
    fn map_into_whole(
        self,
        head_only: bool,
        memory: &Arc<Budget>,
    ) -> impl Future<Output = Result<Response<Answer>, Failure>> + Send;
}

impl GuestResponse for Response<HyperOutgoingBody> {
    /// RFC 9110 (6.4.1).
    fn head_only(&self, method_is_head: bool) -> bool {
        method_is_head || matches!(self.status(), StatusCode::NO_CONTENT | StatusCode::NOT_MODIFIED)
    }

    fn map_into_streaming(self, running: Running, head_only: bool) -> Result<Response<Answer>, Failure> {
        let kept = kept_for_head(self.headers(), &running.container.memory)?;
        if head_only {
            let (head, body) = without_length_of_nothing(self).into_parts();
            running.go_on(Some(body));
            return Ok(Response::from_parts(head, Answer::head_only(kept)));
        }
        let missing = length(self.headers());
        let exchange = running.exchange.clone();
        let spec = &running.container.spec;
        let (idle_timeout, end_timeout) = (spec.stream_idle_timeout, spec.request_timeout);
        exchange.expect(idle_timeout, Failure::Stalled);
        let guest = Some(running.go_on(None));
        Ok(self.map(|body| {
            let streaming = Streaming { body, exchange, guest, missing, idle_timeout, end_timeout, _head: kept };
            Answer::Streaming(Box::new(streaming))
        }))
    }

    async fn map_into_whole(self, head_only: bool, memory: &Arc<Budget>) -> Result<Response<Answer>, Failure> {
        let mut kept = kept_for_head(self.headers(), memory)?;
        if head_only {
            return Ok(without_length_of_nothing(self).map(|_| Answer::head_only(kept)));
        }
        let (head, mut body) = self.into_parts();
        let mut whole = Whole::default();
        while let Some(frame) = poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await {
            let frame = frame.map_err(|error| Failure::Trap(format!("its answer's body is not usable: {error}")))?;
            let bytes = frame.data_ref().map_or(0, Bytes::len) as u64;
            kept.grow(bytes).map_err(|exceeded| Failure::MemoryTaken(exceeded.to_string()))?;
            match frame.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) if whole.first.is_none() => whole.first = Some(data),
                Ok(data) => whole.rest.push_back(data),
                Err(frame) => whole.trailers = frame.into_trailers().ok(),
            }
        }
        let written: u64 = whole.chunks().map(|chunk| chunk.len() as u64).sum();
        // The next answer on the connection would begin in the middle of this one.
        if let Some(told) = length(&head.headers).filter(|told| *told != written) {
            let cause = format!("its answer's content-length is {told}, and its body has {written} bytes");
            return Err(Failure::Trap(cause));
        }
        whole.memory = Some(kept);
        Ok(Response::from_parts(head, Answer::Whole(whole)))
    }
}

/// What an answer's head takes until the client has it: it may be many headers, and HTTP/2 keeps it as it is until its turn.
fn kept_for_head(headers: &HeaderMap, memory: &Arc<Budget>) -> Result<Reservation, Failure> {
    memory.reserve(size_of_head(headers)).map_err(|exceeded| Failure::MemoryTaken(exceeded.to_string()))
}

/// The content-length, which wasi:http lets a guest set to a number only.
fn length(headers: &HeaderMap) -> Option<u64> {
    headers.get(header::CONTENT_LENGTH)?.to_str().ok()?.parse().ok()
}

/// RFC 9110 (8.6): a 204 has no length. Answers to HEAD and 304s may tell the length that a body would have.
fn without_length_of_nothing<B>(mut response: Response<B>) -> Response<B> {
    if response.status() == StatusCode::NO_CONTENT {
        response.headers_mut().remove(header::CONTENT_LENGTH);
    }
    response
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
            Self::Whole(Whole { first, rest, trailers: None, .. }) => {
                SizeHint::with_exact(first.iter().chain(rest).map(|chunk| chunk.len() as u64).sum())
            }
            _ => SizeHint::default(),
        }
    }
}

impl Sending {
    pub fn new(answer: Answer, mut request: OpenRequest) -> Self {
        if matches!(answer, Answer::Whole(_)) {
            request.keep(answer.kept());
            request.wait_for_client();
        }
        Self { answer, request }
    }
}

impl Body for Sending {
    type Data = Bytes;
    type Error = Cut;

    fn poll_frame(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Cut>>> {
        let this = self.get_mut();
        this.request.wait_for_guest();
        let frame = Pin::new(&mut this.answer).poll_frame(context);
        if frame.is_ready() {
            this.request.wait_for_client();
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
                self.exchange.expect(self.idle_timeout, Failure::Stalled);
                if let (Some(missing), Some(data)) = (&mut self.missing, frame.data_ref()) {
                    let Some(rest) = missing.checked_sub(data.len() as u64) else {
                        return Poll::Ready(Some(Err(Cut("the body is longer than its content-length".into()))));
                    };
                    *missing = rest;
                    if rest == 0 {
                        // A body of known length is dropped after its last byte, not read to its end.
                        self.finish();
                    }
                }
                Poll::Ready(Some(Ok(frame)))
            }
            Some(Err(error)) => Poll::Ready(Some(Err(Cut(error.to_string())))),
            None => {
                let failure = self.exchange.failure().map(|failure| failure.to_string());
                let short = self.missing.is_some_and(|missing| missing > 0);
                let failure = failure.or_else(|| short.then(|| "the body is shorter than its content-length".into()));
                self.finish();
                // What was sent cannot be taken back; breaking off tells the client that it is not all.
                Poll::Ready(failure.map(|failure| Err(Cut(failure))))
            }
        }
    }

    /// All was passed on. The guest may do something more, but not for ever.
    fn finish(&mut self) {
        if self.guest.take().is_some() {
            self.exchange.expect(self.end_timeout, Failure::TimedOut);
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use http_body_util::{BodyExt as _, Empty};
    use hyper::header::HeaderValue;

    fn with_headers(count: usize) -> Response<HyperOutgoingBody> {
        let mut response = Response::new(Empty::new().map_err(|never| match never {}).boxed_unsync());
        for _ in 0..count {
            response.headers_mut().append("x", HeaderValue::from_static(""));
        }
        response
    }

    #[tokio::test]
    async fn the_head_of_an_answer_is_its_containers_memory_until_the_client_has_it() {
        let memory = Budget::node(1_000_000);
        for head_only in [true, false] {
            let _ordinary = with_headers(10).map_into_whole(head_only, &memory).await.unwrap();
            assert_eq!(memory.used(), 0);
            let large = with_headers(3000).map_into_whole(head_only, &memory).await.unwrap();
            assert!(memory.used() > 400_000);
            let refused = with_headers(3000).map_into_whole(head_only, &memory).await.err();
            assert!(matches!(refused, Some(Failure::MemoryTaken(_))), "{refused:?}");
            drop(large);
            assert_eq!(memory.used(), 0);
        }
    }
}
