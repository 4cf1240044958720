//! Serves wasi:http/proxy components: a listener for each port of a container, its connections, and the module behind them.

use crate::admission::Admission;
use crate::connection::{Connection, Connections, Limits, Lost, Registered, Stream};
use crate::cpu::CpuShare;
use crate::entry::Entered;
use crate::error::StartError;
use crate::executor::Executor;
use crate::gate::Gate;
use crate::guest::{ComponentState, Container, ContainerSpec, Stats};
use crate::handler::handle;
use crate::memory::Budget;
use crate::metrics::Metrics;
use crate::module::{Code, Module};
use crate::name_service::Note;
use crate::shares::{Share, Taken};
use futures::future::join_all;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto;
use parking_lot::{Mutex, RwLock};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use wasmtime_wasi_http::p2::bindings::ProxyPre;

const BACKLOG: u32 = 1024;
const MAX_HEAD: usize = 64 * 1024;
/// The least that RFC 9113 (5.1.2) recommends.
const MAX_STREAMS: u32 = 100;
/// What a client may send on one HTTP/2 connection before somebody reads it, and what may wait to be sent on one stream.
const WINDOW: u32 = 128 * 1024;
const STREAM_WINDOW: u32 = 64 * 1024;
const STREAM_SEND_BUFFER: usize = 16 * 1024;
/// When the process is out of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A container that answers HTTP. Dropping it stops it at once; `drain` stops it gracefully.
pub struct HttpServer {
    local_addr: SocketAddr,
    local_addrs: Vec<SocketAddr>,
    server: Arc<Server>,
}

pub struct Server {
    pub executor: Arc<Executor>,
    pub metrics: Metrics,
    pub local_addr: SocketAddr,
    pub limits: Limits,
    pub admission: Arc<Admission>,
    pub connections: Arc<Connections>,
    pub gate: Option<Arc<dyn Gate>>,
    current: RwLock<Arc<Serving>>,
    retired: Mutex<Retired>,
    requests: AtomicU64,
    /// No connection is accepted any more.
    closed: CancellationToken,
    /// No connection is open any more.
    drained: CancellationToken,
    /// What still runs is cut.
    pub aborted: CancellationToken,
    protocol: auto::Builder<TokioExecutor>,
}

/// What requests are answered with at the moment.
pub struct Serving {
    pub guest: ProxyPre<ComponentState>,
    /// While this is served, the next pod with the same module need not load it.
    pub module: Module,
    pub container: Arc<Container>,
    /// Of the node's instances, what one of these counts for.
    pub units: usize,
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
        limits: Limits,
    ) -> Result<Self, StartError> {
        let name = spec.name.clone();
        let serving = Serving::new(executor, module, spec, None)?;
        // One port is what every container has. Each further one is a descriptor of its pod's.
        let further = addresses.len().saturating_sub(1);
        let descriptors = serving.container.tenant.descriptors.take(further).ok_or_else(|| StartError::Create {
            container: name.clone(),
            cause: format!("its pod may not have so many file descriptors that it can listen on {further} more ports"),
            permanent: false,
        })?;
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
        let note = executor.egress.names.note(local_addrs.clone());
        let local_addr = *local_addrs.first().ok_or_else(|| StartError::Create {
            container: name,
            cause: "it has no address to listen on".into(),
            permanent: true,
        })?;
        let server = Arc::new(Server {
            executor: executor.clone(),
            metrics: metrics.clone(),
            local_addr,
            limits,
            admission: serving.admission(&limits),
            connections: Connections::new(),
            gate: serving.container.spec.gate.clone(),
            current: RwLock::new(Arc::new(serving)),
            retired: Mutex::default(),
            requests: AtomicU64::new(0),
            closed: CancellationToken::new(),
            drained: CancellationToken::new(),
            aborted: CancellationToken::new(),
            protocol: protocol(&limits),
        });
        executor.handle().spawn(accept_all(server.clone(), listeners, (note, descriptors)));
        Ok(Self { local_addr, local_addrs, server })
    }

    /// The addresses on which it listens.
    pub fn local_addrs(&self) -> &[SocketAddr] {
        &self.local_addrs
    }

    /// The first of them.
    pub fn local_addr(&self) -> SocketAddr {
        self.local_addr
    }

    /// Serves every request that begins from now on with another module or specification. Requests in flight end with
    /// the old one; no connection is closed.
    pub async fn swap(&self, module: &Module, spec: ContainerSpec) -> Result<(), StartError> {
        let predecessor = self.server.current();
        let serving = Serving::new(&self.server.executor, module, spec, Some(&predecessor.container))?;
        let limit = serving.container.spec.max_concurrent_requests;
        let old = std::mem::replace(&mut *self.server.current.write(), Arc::new(serving));
        self.server.admission.set_limit(limit);
        self.server.retired.lock().finishing.push((old.container.cpu.clone(), old.container.memory.clone()));
        Ok(())
    }

    /// Stops accepting, waits at most `grace` for the requests in flight, then cuts what is left.
    /// Returns whether all of them were finished.
    pub async fn drain(&self, grace: Duration) -> bool {
        self.server.closed.cancel();
        let finished = tokio::time::timeout(grace, async {
            self.server.drained.cancelled().await;
            self.server.admission.until_idle().await;
        })
        .await
        .is_ok();
        self.server.aborted.cancel();
        finished
    }

    pub fn stats(&self) -> Stats {
        let current = self.server.current();
        let mut retired = self.server.retired.lock();
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
            in_flight: self.server.admission.running() as u64,
            memory_bytes,
            code_bytes: current.container.tenant.code_bytes(),
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
        module.check_memory(&spec, executor)?;
        let units = module.units();
        let container = Arc::new(Container::new(spec, executor, predecessor)?);
        module.charge(&container.spec.name, &container.tenant)?;
        if units > container.tenant.instances.most() {
            return Err(StartError::Create {
                container: container.spec.name.clone(),
                cause: format!(
                    "an instance of its module takes {units} of the node's places, more than a pod may have"
                ),
                permanent: true,
            });
        }
        Ok(Self { guest: guest.clone(), module: module.clone(), container, units })
    }

    fn admission(&self, limits: &Limits) -> Arc<Admission> {
        let Container { spec, tenant, .. } = &*self.container;
        Admission::new(tenant.instances.clone(), spec.max_concurrent_requests, limits.queue)
    }
}

fn protocol(limits: &Limits) -> auto::Builder<TokioExecutor> {
    let mut protocol = auto::Builder::new(TokioExecutor::new());
    // Its timeout would run on a connection that is idle, too; ours is in `Connection::lost`.
    protocol.http1().timer(TokioTimer::new()).header_read_timeout(None).max_buf_size(MAX_HEAD);
    protocol
        .http2()
        .timer(TokioTimer::new())
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEAD as u32)
        .initial_connection_window_size(WINDOW)
        .initial_stream_window_size(STREAM_WINDOW)
        .max_send_buf_size(STREAM_SEND_BUFFER)
        .keep_alive_interval(limits.read_header_timeout);
    protocol
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // So that a restart need not wait for the connections of the last run to time out.
    socket.set_reuseaddr(true)?;
    // Inherited by connections: so that one whose client is gone without a word ends some day.
    socket.set_keepalive(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Accepts on all of the listeners, which share the container's connections, until the server is closed and the last
/// connection has ended.
async fn accept_all(server: Arc<Server>, listeners: Vec<TcpListener>, (note, further): (Note, Taken)) {
    let open = TaskTracker::new();
    let descriptors = server.current().container.tenant.descriptors.clone();
    // The note goes before the listeners: whoever has their addresses next is somebody else.
    let withdraw = async {
        server.closed.cancelled().await;
        drop(note);
    };
    let accept = join_all(listeners.into_iter().map(|listener| accept(&server, listener, &open, &descriptors)));
    tokio::join!(biased; withdraw, accept);
    drop(further);
    open.close();
    open.wait().await;
    server.drained.cancel();
}

async fn accept(server: &Arc<Server>, listener: TcpListener, open: &TaskTracker, descriptors: &Arc<Share>) {
    let mut failing = false;
    loop {
        // First the connection, then room for it: an idle one gives way to one that is there, not to one that may come.
        let accepted = async {
            let (stream, from) = listener.accept().await?;
            // Who is not let in takes nobody's room.
            let Some(entered) = Entered::of(server, &stream, from) else { return Ok(None) };
            let registered = server.connections.admit(&server.limits, descriptors).await;
            Ok(Some((stream, entered, registered)))
        };
        let accepted: io::Result<_> = tokio::select! {
            biased;
            () = server.closed.cancelled() => break,
            accepted = accepted => accepted,
        };
        let (stream, entered, registered) = match accepted {
            Ok(Some(accepted)) => accepted,
            Ok(None) => {
                failing = false;
                continue;
            }
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
        open.spawn(async move { serve(&server, stream, entered, registered).await });
    }
}

/// One connection's life.
async fn serve(server: &Arc<Server>, stream: TcpStream, entered: Entered, registered: Registered) {
    let connection: &Arc<Connection> = &registered.connection;
    let entry = tokio::select! {
        biased;
        () = server.closed.cancelled() => return,
        entry = entered.judged(server, &stream) => match entry {
            Some(entry) => Arc::new(entry),
            None => return,
        },
    };
    // Small answers must not wait for the client's acknowledgement of earlier ones.
    let _ = stream.set_nodelay(true);
    // Counted here: in HTTP/2 what answers is another task, which begins some time later.
    let service = service_fn(|request| handle(server.clone(), entry.clone(), connection.begin(), request));
    let stream = TokioIo::new(Stream::new(stream, connection.clone(), server.limits.write_timeout));
    let mut serving = pin!(server.protocol.serve_connection(stream, service));
    let lost = tokio::select! {
        biased;
        () = server.aborted.cancelled() => return,
        // A client that breaks off is no matter for the log.
        _ = serving.as_mut() => return,
        () = server.closed.cancelled() => None,
        lost = connection.lost(&server.limits) => Some(lost),
    };
    // Requests that have begun are answered, no other is taken.
    serving.as_mut().graceful_shutdown();
    if lost == Some(Lost::Evicted) && (futures::poll!(serving.as_mut()).is_ready() || connection.is_idle()) {
        // Another waits for its room. It was told what its protocol has a word for.
        return;
    }
    let end = async {
        if lost != Some(Lost::TimedOut) {
            connection.until_idle(&server.limits).await;
        }
        tokio::time::sleep(server.limits.close_timeout).await;
    };
    tokio::select! {
        biased;
        () = server.aborted.cancelled() => {}
        _ = serving => {}
        () = end => {}
    }
}

impl Server {
    pub fn current(&self) -> Arc<Serving> {
        self.current.read().clone()
    }

    pub fn count_request(&self) {
        self.requests.fetch_add(1, Ordering::Relaxed);
    }
}
