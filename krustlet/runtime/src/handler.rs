//! One request, from its head to its answer.
//!
//! A guest that answers in one go is executed by its connection's own task, so that an ordinary request costs no task, no
//! channel and no timer. One that writes on after its answer has begun gets a task then. When the client goes away, the
//! guest goes with it.

use crate::admission::{Flow, Refused};
use crate::answer::{Answer, Exchange, GuestResponse as _, Progress, Running, Sending, report};
use crate::authority;
use crate::connection::OpenRequest;
use crate::cpu::Sliced;
use crate::entry::{Denied, Entry};
use crate::guest::{ComponentState, Container, Failure};
use crate::http::{Server, Serving};
use crate::limits::size_of_head;
use crate::stack;
use hyper::body::Incoming;
use hyper::{Method, Request, Response, StatusCode, header};
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Instant;
use wasmtime::Store;
use wasmtime_wasi_http::WasiHttpView as _;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;

pub async fn handle(
    server: Arc<Server>,
    entry: Arc<Entry>,
    open: OpenRequest,
    request: Request<Incoming>,
) -> Result<Response<Sending>, Denied> {
    entry.check(&server).await?;
    let began = Instant::now();
    server.count_request();
    let response = if server.connections.are_clogged(&server.limits) {
        // Without a body: it would be one more that nobody takes.
        refusal(StatusCode::SERVICE_UNAVAILABLE, "").map(|_| Answer::empty())
    } else {
        match checked(request, entry.to) {
            Ok(request) => answer(&server, open.flow(), request, began).await,
            Err(refusal) => *refusal,
        }
    };
    server.metrics.answered(response.status(), began.elapsed());
    Ok(response.map(|answer| Sending::new(answer, open)))
}

async fn answer(server: &Arc<Server>, flow: &Flow, request: Request<Incoming>, began: Instant) -> Response<Answer> {
    let serving = server.current();
    let container = &serving.container;
    let deadline = began + container.spec.request_timeout;
    // In HTTP/2 a head of thousands of headers is a few bytes on the wire, and many may wait.
    let head = match container.memory.reserve(size_of_head(request.headers())) {
        Ok(head) => head,
        Err(exceeded) => return failed(container, &Failure::MemoryTaken(exceeded.to_string())),
    };
    let admitted = match server.admission.enter(flow, serving.units, deadline).await {
        Ok(admitted) => admitted,
        Err(Refused::QueueFull) => return refusal(StatusCode::SERVICE_UNAVAILABLE, "too many requests wait\n"),
        Err(Refused::TimedOut) => {
            return refusal(StatusCode::SERVICE_UNAVAILABLE, "no instance was free within the request's time\n");
        }
    };
    let method_is_head = request.method() == Method::HEAD;
    let exchange = Arc::new(Exchange::new(deadline));
    let mut running = Running {
        guest: Sliced::new(container.cpu.clone(), execute(server.clone(), serving.clone(), request, exchange.clone())),
        exchange: exchange.clone(),
        container: container.clone(),
        timer: None,
        executor: server.executor.handle().clone(),
        aborted: server.aborted.clone(),
        _head: head,
        _admitted: admitted,
    };
    let failure = match (running.progress().await, exchange.take_answer()) {
        (Progress::Failed(failure), _) => failure,
        // hyper takes a 101 for the end of HTTP on this connection.
        (_, Some(Ok(response))) if response.status().is_informational() => {
            Failure::Trap(format!("it answered with status {}, which only announces an answer", response.status()))
        }
        (Progress::Answered, Some(Ok(response))) => {
            let head_only = response.head_only(method_is_head);
            match response.map_into_streaming(running, head_only) {
                Ok(response) => return response,
                Err(failure) => failure,
            }
        }
        (Progress::Ended, Some(Ok(response))) => {
            drop(running);
            let head_only = response.head_only(method_is_head);
            match response.map_into_whole(head_only, &container.memory).await {
                Ok(response) => return response,
                Err(failure) => failure,
            }
        }
        (_, Some(Err(code))) => Failure::Trap(format!("it answered with error code {code:?}")),
        (_, None) => Failure::Trap("it ended without an answer".into()),
    };
    failed(container, &failure)
}

/// The request, if it is one that a guest should see.
fn checked(request: Request<Incoming>, local_addr: SocketAddr) -> Result<Request<Incoming>, Box<Response<Answer>>> {
    let (mut head, body) = request.into_parts();
    if head.method == Method::CONNECT {
        let mut refusal = refusal(StatusCode::NOT_IMPLEMENTED, "there are no tunnels through a guest\n");
        // What follows would be for the tunnel's other end.
        refusal.headers_mut().insert(header::CONNECTION, header::HeaderValue::from_static("close"));
        return Err(Box::new(refusal));
    }
    match authority::check(&mut head, local_addr) {
        Ok(()) => Ok(Request::from_parts(head, body)),
        Err(cause) => Err(Box::new(refusal(StatusCode::BAD_REQUEST, cause))),
    }
}

/// The answer to a request whose guest failed before anything was sent; the reason goes to the container's log.
fn failed(container: &Container, failure: &Failure) -> Response<Answer> {
    report(container, failure);
    match failure {
        Failure::TimedOut | Failure::Stalled => refusal(StatusCode::GATEWAY_TIMEOUT, "the guest took too long\n"),
        Failure::NodeFull => refusal(StatusCode::SERVICE_UNAVAILABLE, "the node is out of instances\n"),
        Failure::MemoryTaken(_) => refusal(StatusCode::SERVICE_UNAVAILABLE, "no memory is left for the request\n"),
        Failure::OutOfMemory(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the guest ran out of memory\n"),
        Failure::Exit(_) | Failure::Trap(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the guest failed\n"),
    }
}

fn refusal(status: StatusCode, text: &'static str) -> Response<Answer> {
    let mut response = Response::new(Answer::text(text));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static("text/plain"));
    if status == StatusCode::SERVICE_UNAVAILABLE {
        response.headers_mut().insert(header::RETRY_AFTER, header::HeaderValue::from_static("1"));
    }
    response
}

/// One instance's life.
async fn execute(server: Arc<Server>, serving: Arc<Serving>, request: Request<Incoming>, exchange: Arc<Exchange>) {
    match serving.container.component_store(&server.executor.engine, &serving.module, server.metrics.instance()) {
        Ok(mut store) => {
            let call = call(&serving, &mut store, request, &exchange);
            if let Err(error) = stack::charged(&serving.container.memory, call).await {
                told(&exchange, &error);
            }
            // Only now are the guest's streams closed.
            drop(store);
        }
        Err(error) => told(&exchange, &error),
    }
}

fn told(exchange: &Exchange, error: &wasmtime::Error) {
    match Failure::of(error) {
        // Exiting is a way of returning.
        Failure::Exit(0) => {}
        failure => exchange.fail(failure),
    }
}

async fn call(
    serving: &Serving,
    store: &mut Store<ComponentState>,
    request: Request<Incoming>,
    exchange: &Arc<Exchange>,
) -> wasmtime::Result<()> {
    let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
    let exchange = exchange.clone();
    let answer = store.data_mut().http().new_response_outparam_from_callback(move |answer| exchange.answer(answer))?;
    let guest = serving.guest.instantiate_async(&mut *store).await?;
    guest.wasi_http_incoming_handler().call_handle(store, request, answer).await
}
