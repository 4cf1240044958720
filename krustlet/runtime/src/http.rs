//! Serves wasi:http/proxy components: a listener for each port of a container, a fresh instance a request.
//!
//! A guest that answers in one go is executed by its connection's own task, so that an ordinary request costs no task, no
//! channel and no timer. One that writes on after its answer has begun gets a task then. When the client goes away, the
//! guest goes with it.

use crate::answer::{Answer, Exchange, GuestResponse as _, Progress, Running, Sending};
use crate::cpu::{CpuShare, Sliced};
use crate::engine::Executor;
use crate::error::StartError;
use crate::guest::{Container, ContainerSpec, Failure, Stats};
use crate::logs::LogStream;
use crate::memory::Budget;
use crate::metrics::Metrics;
use crate::module::{Code, Module};
use crate::slow_client::{Patience, Traffic, Turn, WriteTimeout};
use futures::future::join_all;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use std::convert::Infallible;
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::sync::{Notify, Semaphore};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmtime::Store;
use wasmtime_wasi_http::WasiHttpView as _;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;

const BACKLOG: u32 = 1024;
const MAX_HEAD: usize = 64 * 1024;
const MAX_STREAMS: u32 = 128;
/// When the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

type Guest = crate::guest::ComponentState;

/// A container that answers HTTP. Dropping it stops it at once; `drain` stops it gracefully.
pub struct HttpServer {
    local_addr: SocketAddr,
    server: Arc<Server>,
}

pub struct Server {
    executor: Arc<Executor>,
    metrics: Metrics,
    current: RwLock<Arc<Serving>>,
    retired: Mutex<Retired>,
    patience: Patience,
    /// Answers that wait for their clients.
    untaken: Arc<AtomicUsize>,
    requests: AtomicU64,
    in_flight: AtomicUsize,
    idle: Notify,
    /// No connection is accepted any more.
    closed: CancellationToken,
    /// No connection is open any more.
    drained: CancellationToken,
    /// What still runs is cut.
    aborted: CancellationToken,
    protocol: auto::Builder<TokioExecutor>,
}

/// What requests are answered with at the moment.
struct Serving {
    guest: ProxyPre<Guest>,
    /// While this is served, the next pod with the same module need not load it.
    _module: Module,
    container: Arc<Container>,
}

/// What containers used that were swapped out.
#[derive(Default)]
struct Retired {
    cpu_time: Duration,
    finishing: Vec<(Arc<CpuShare>, Arc<Budget>)>,
}

impl HttpServer {
    pub(crate) fn start(
        executor: &Arc<Executor>,
        metrics: &Metrics,
        module: &Module,
        spec: ContainerSpec,
        addresses: &[SocketAddr],
        patience: Patience,
    ) -> Result<Self, StartError> {
        let name = spec.name.clone();
        let serving = Serving::new(executor, module, spec, None)?;
        let mut protocol = auto::Builder::new(TokioExecutor::new());
        protocol.http1().timer(TokioTimer::new()).header_read_timeout(patience.head).max_buf_size(MAX_HEAD);
        protocol
            .http2()
            .timer(TokioTimer::new())
            .max_concurrent_streams(MAX_STREAMS)
            .max_header_list_size(MAX_HEAD as u32)
            .keep_alive_interval(patience.head);
        // The listener belongs to the guests' executor, whoever calls.
        let entered = executor.handle().enter();
        let listen = |address: &SocketAddr| {
            bind(*address).and_then(|listener| Ok((listener.local_addr()?, listener))).map_err(|error| {
                match error.kind() {
                    io::ErrorKind::AddrInUse => StartError::PortInUse { address: *address },
                    _ => StartError::Create {
                        container: name.clone(),
                        cause: format!("cannot listen on {address}: {error}"),
                        permanent: false,
                    },
                }
            })
        };
        // All of them or none: those that are there go with an error.
        let listening = addresses.iter().map(listen).collect::<Result<Vec<_>, _>>()?;
        drop(entered);
        let (local_addrs, listeners): (Vec<_>, _) = listening.into_iter().unzip();
        let local_addr = *local_addrs.first().ok_or_else(|| StartError::Create {
            container: name,
            cause: "it has no address to listen on".into(),
            permanent: true,
        })?;
        let server = Arc::new(Server {
            executor: executor.clone(),
            metrics: metrics.clone(),
            current: RwLock::new(Arc::new(serving)),
            retired: Mutex::default(),
            patience,
            untaken: Arc::default(),
            requests: AtomicU64::new(0),
            in_flight: AtomicUsize::new(0),
            idle: Notify::new(),
            closed: CancellationToken::new(),
            drained: CancellationToken::new(),
            aborted: CancellationToken::new(),
            protocol,
        });
        executor.handle().spawn(accept_all(server.clone(), listeners));
        Ok(Self { local_addr, server })
    }

    /// The first of the addresses on which it listens.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves every request that begins from now on with another module or specification. Requests in flight end with
    /// the old one; no connection is closed.
    pub async fn swap(&self, module: &Module, spec: ContainerSpec) -> Result<(), StartError> {
        let predecessor = self.server.current();
        let serving = Serving::new(&self.server.executor, module, spec, Some(&predecessor.container))?;
        let old = {
            let mut current = self.server.current.write().unwrap_or_else(PoisonError::into_inner);
            std::mem::replace(&mut *current, Arc::new(serving))
        };
        lock(&self.server.retired).finishing.push((old.container.cpu.clone(), old.container.memory.clone()));
        Ok(())
    }

    /// Stops accepting, waits at most `grace` for the requests in flight, then cuts what is left.
    /// Returns whether all of them were finished.
    pub async fn drain(&self, grace: Duration) -> bool {
        self.server.closed.cancel();
        let finished = tokio::time::timeout(grace, async {
            self.server.drained.cancelled().await;
            self.server.until_idle().await;
        })
        .await
        .is_ok();
        self.server.aborted.cancel();
        finished
    }

    pub fn stats(&self) -> Stats {
        let current = self.server.current();
        let mut retired = lock(&self.server.retired);
        let mut memory_bytes = current.container.memory.used();
        let mut cpu_time = current.container.cpu.used();
        let Retired { cpu_time: ended, finishing } = &mut *retired;
        finishing.retain(|(cpu, memory)| {
            memory_bytes += memory.used();
            // Held by no request any more: its figures are final.
            let last = Arc::strong_count(cpu) == 1;
            *(if last { &mut *ended } else { &mut cpu_time }) += cpu.used();
            !last
        });
        Stats {
            requests: self.server.requests.load(Ordering::Relaxed),
            in_flight: self.server.in_flight.load(Ordering::Relaxed) as u64,
            memory_bytes,
            cpu_time: cpu_time + *ended,
        }
    }
}

impl Drop for HttpServer {
    fn drop(&mut self) {
        self.server.closed.cancel();
        self.server.aborted.cancel();
    }
}

impl fmt::Debug for HttpServer {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "HttpServer({})", self.local_addr)
    }
}

impl Serving {
    fn new(
        executor: &Executor,
        module: &Module,
        spec: ContainerSpec,
        predecessor: Option<&Container>,
    ) -> Result<Self, StartError> {
        let Code::HttpProxy(guest) = module.code() else {
            return Err(StartError::Create {
                container: spec.name,
                cause: "its module runs to completion and answers no HTTP requests".into(),
                permanent: true,
            });
        };
        let container = Arc::new(Container::new(spec, executor, predecessor)?);
        Ok(Self { guest: guest.clone(), _module: module.clone(), container })
    }
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // So that a restart need not wait for the connections of the last run to time out.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts on all of the listeners, which share the container's connections, until the server is closed and the last
/// connection has ended.
async fn accept_all(server: Arc<Server>, listeners: Vec<TcpListener>) {
    let open = TaskTracker::new();
    let connections = Arc::new(Semaphore::new(server.patience.connections));
    join_all(listeners.into_iter().map(|listener| accept(&server, listener, &open, &connections))).await;
    open.close();
    open.wait().await;
    server.drained.cancel();
}

async fn accept(server: &Arc<Server>, listener: TcpListener, open: &TaskTracker, connections: &Arc<Semaphore>) {
    let mut failing = false;
    loop {
        let accepted = async {
            let permit = connections.clone().acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (permit, stream) = tokio::select! {
            biased;
            () = server.closed.cancelled() => break,
            accepted = accepted => accepted,
        };
        let stream = match stream {
            Ok((stream, _)) => stream,
            Err(error) => {
                // Once for a whole series: it may go on for long, on every port of the node.
                if !std::mem::replace(&mut failing, true) {
                    tracing::warn!(%error, "failed to accept a connection");
                }
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        failing = false;
        let server = server.clone();
        open.spawn(async move {
            connection(&server, stream).await;
            drop(permit);
        });
    }
}

/// One connection's life.
async fn connection(server: &Arc<Server>, stream: TcpStream) {
    // Small answers must not wait for the client's acknowledgement of earlier ones.
    let _ = stream.set_nodelay(true);
    let traffic = Traffic::new(server.untaken.clone());
    let service = service_fn(|request| handle(server.clone(), traffic.begin(), request));
    let stream = TokioIo::new(WriteTimeout::new(stream, server.patience.write));
    let mut connection = pin!(server.protocol.serve_connection(stream, service));
    let lost = tokio::select! {
        biased;
        () = server.aborted.cancelled() => return,
        // A client that breaks off is no matter for the log.
        _ = connection.as_mut() => return,
        () = server.closed.cancelled() => false,
        () = traffic.abandoned(server.patience.turn) => true,
    };
    // Requests that have begun are answered, no other is taken.
    connection.as_mut().graceful_shutdown();
    let end = async {
        if !lost {
            traffic.abandoned(server.patience.turn).await;
        }
        tokio::time::sleep(server.patience.farewell).await;
    };
    tokio::select! {
        biased;
        () = server.aborted.cancelled() => {}
        _ = connection => {}
        () = end => {}
    }
}

impl Server {
    fn current(&self) -> Arc<Serving> {
        self.current.read().unwrap_or_else(PoisonError::into_inner).clone()
    }

    async fn until_idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.in_flight.load(Ordering::SeqCst) == 0 {
                return;
            }
            idle.await;
        }
    }

    pub fn executor(&self) -> &Executor {
        &self.executor
    }

    pub fn aborted(&self) -> &CancellationToken {
        &self.aborted
    }
}

/// Counts a request for as long as its guest runs.
pub struct InFlight(Arc<Server>);

impl InFlight {
    /// None when `limit` requests are in flight.
    fn begin(server: &Arc<Server>, limit: usize) -> Option<Self> {
        server.requests.fetch_add(1, Ordering::Relaxed);
        let counted = Self(server.clone());
        // Counted before it is compared, and uncounted by the drop.
        (server.in_flight.fetch_add(1, Ordering::SeqCst) < limit).then_some(counted)
    }

    pub fn server(&self) -> &Arc<Server> {
        &self.0
    }
}

impl Drop for InFlight {
    fn drop(&mut self) {
        if self.0.in_flight.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.0.idle.notify_waiters();
        }
    }
}

async fn handle(server: Arc<Server>, turn: Turn, request: Request<Incoming>) -> Result<Response<Sending>, Infallible> {
    let began = Instant::now();
    let response = answer(&server, request, began).await;
    server.metrics.answered(response.status(), began.elapsed());
    Ok(response.map(|answer| Sending::new(answer, turn)))
}

async fn answer(server: &Arc<Server>, request: Request<Incoming>, began: Instant) -> Response<Answer> {
    let serving = server.current();
    let container = &serving.container;
    let Some(in_flight) = InFlight::begin(server, container.spec.max_concurrent_requests) else {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "too many requests at once\n");
    };
    if server.untaken.load(Ordering::Relaxed) >= server.patience.untaken {
        return refusal(StatusCode::SERVICE_UNAVAILABLE, "too many clients do not read their answers\n");
    }
    let named = request.uri().authority().is_some()
        || request.headers().get(header::HOST).is_some_and(|host| host.to_str().is_ok());
    if !named {
        return refusal(StatusCode::BAD_REQUEST, "the request names no host\n");
    }
    let exchange = Arc::<Exchange>::default();
    let mut running = Running {
        guest: Sliced::new(container.cpu.clone(), execute(server.clone(), serving.clone(), request, exchange.clone())),
        exchange: exchange.clone(),
        container: container.clone(),
        deadline: began + container.spec.request_timeout,
        timer: None,
        in_flight,
    };
    let failure = match (running.progress().await, exchange.take_answer()) {
        (Progress::Failed(failure), _) => failure,
        // hyper takes a 101 for the end of HTTP on this connection.
        (_, Some(Ok(response))) if response.status().is_informational() => {
            Failure::Trap(format!("it answered with status {}, which only announces an answer", response.status()))
        }
        (Progress::Answered, Some(Ok(response))) => return response.map_into_streaming(running),
        (Progress::Ended, Some(Ok(response))) => {
            drop(running);
            match response.map_into_whole().await {
                Ok(response) => return response,
                Err(error) => Failure::Trap(error),
            }
        }
        (_, Some(Err(code))) => Failure::Trap(format!("it answered with error code {code:?}")),
        (_, None) => Failure::Trap("it ended without an answer".into()),
    };
    failed(container, &failure)
}

/// The answer to a request whose guest failed before anything was sent; the reason goes to the container's log.
fn failed(container: &Container, failure: &Failure) -> Response<Answer> {
    report(container, failure);
    match failure {
        Failure::TimedOut => refusal(StatusCode::GATEWAY_TIMEOUT, "the guest took too long\n"),
        Failure::NodeFull => refusal(StatusCode::SERVICE_UNAVAILABLE, "the node is out of instances\n"),
        Failure::MemoryTaken(_) => refusal(StatusCode::SERVICE_UNAVAILABLE, "no memory is left for the request\n"),
        Failure::OutOfMemory(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the guest ran out of memory\n"),
        Failure::Exit(_) | Failure::Trap(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the guest failed\n"),
    }
}

/// Tells a failed request's reason where `kubectl logs` shows it.
pub fn report(container: &Container, failure: &Failure) {
    tracing::debug!(container = container.spec.name, %failure, "a request failed");
    container.spec.log.write_line(LogStream::Stderr, &format!("krustlet: request failed: {failure}"));
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
    match serving.container.component_store(&server.executor.engine, server.metrics.instance()) {
        Ok(mut store) => {
            if let Err(error) = call(&serving, &mut store, request, &exchange).await {
                tell(&exchange, &error);
            }
            // Only now are the guest's streams closed.
            drop(store);
        }
        Err(error) => tell(&exchange, &error),
    }
}

fn tell(exchange: &Exchange, error: &wasmtime::Error) {
    match Failure::of(error) {
        // Exiting is a way of returning.
        Failure::Exit(0) => {}
        failure => exchange.fail(failure),
    }
}

async fn call(
    serving: &Serving,
    store: &mut Store<Guest>,
    request: Request<Incoming>,
    exchange: &Arc<Exchange>,
) -> wasmtime::Result<()> {
    let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
    let exchange = exchange.clone();
    let answer = store.data_mut().http().new_response_outparam_from_callback(move |answer| exchange.answer(answer))?;
    let guest = serving.guest.instantiate_async(&mut *store).await?;
    guest.wasi_http_incoming_handler().call_handle(store, request, answer).await
}

/// A poisoned lock only means that another thread panicked between two assignments.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
