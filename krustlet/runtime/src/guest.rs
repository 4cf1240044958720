//! What a guest is given: arguments, environment, directories, limits, a log, hosts to call; and nothing else.

use crate::cpu::{self, CpuShare, FIRST_SLICE};
use crate::engine::Executor;
use crate::error::StartError;
use crate::limits::{Limiter, MemoryLimitExceeded, Usage};
use crate::logs::{LogFile, LogStream};
use crate::metrics::LiveInstance;
use crate::mounts::{self, Mount};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use wasmtime::component::{Linker, ResourceTable};
use wasmtime::{Engine, Store};
use wasmtime_wasi::cli::{WasiCli, WasiCliView as _};
use wasmtime_wasi::filesystem::{WasiFilesystem, WasiFilesystemCtx, WasiFilesystemView as _};
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::p2::bindings::{cli, filesystem, random};
use wasmtime_wasi::random::WasiRandom;
use wasmtime_wasi::{I32Exit, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::{
    Error as HttpError, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView,
};

/// Handles (streams, headers, files, …) that one instance may hold at a time.
const MAX_RESOURCES: usize = 16 * 1024;
/// Random bytes for one call.
const MAX_RANDOM: u64 = 1024 * 1024;
/// What one call may copy out of the guest into the node's memory.
const MAX_HOSTCALL: usize = 16 * 1024 * 1024;
/// Chunks of a body that wait for the client; with their size, what a slow client can make the node hold.
const BODY_CHUNKS: usize = 4;
const BODY_CHUNK_SIZE: usize = 64 * 1024;
/// HTTP requests that the guests of one container may have open at once: each is one of the node's file descriptors.
const MAX_OUTBOUND: usize = 256;
/// Longer timeouts are taken for this one: the clock's own range ends somewhere, with a panic.
const MAX_REQUEST_TIMEOUT: Duration = Duration::from_secs(365 * 24 * 3600);

/// One container: what to give its guest, and how much it may take.
#[derive(Debug, Clone)]
pub struct ContainerSpec {
    /// For logs and messages, e.g. `namespace/pod/container`. A command sees the last part as its program name.
    pub name: String,
    /// Arguments after the program name.
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
    pub mounts: Vec<Mount>,
    /// Where the guest begins, as its `initial-cwd`.
    pub working_dir: Option<String>,
    /// Bytes of linear memory and tables, for each instance.
    pub memory_limit: Option<u64>,
    /// Cores, for all of the container's instances together.
    pub cpu_limit: Option<f64>,
    /// `host` (any port) or `host:port` that the guest may send HTTP requests to.
    pub allowed_hosts: Vec<String>,
    /// A request that takes longer is answered with 504.
    pub request_timeout: Duration,
    /// Requests beyond this many at once are answered with 503.
    pub max_concurrent_requests: usize,
    pub log: LogFile,
}

impl ContainerSpec {
    pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
    pub const DEFAULT_MAX_CONCURRENT_REQUESTS: usize = 200;

    /// A container that is given nothing, with the default limits.
    pub fn new(name: impl Into<String>, log: LogFile) -> Self {
        Self {
            name: name.into(),
            args: Vec::new(),
            env: Vec::new(),
            mounts: Vec::new(),
            working_dir: None,
            memory_limit: None,
            cpu_limit: None,
            allowed_hosts: Vec::new(),
            request_timeout: Self::DEFAULT_REQUEST_TIMEOUT,
            max_concurrent_requests: Self::DEFAULT_MAX_CONCURRENT_REQUESTS,
            log,
        }
    }
}

/// What a container has used up to now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests begun (0 for a command).
    pub requests: u64,
    /// Requests being served now.
    pub in_flight: u64,
    /// Bytes of linear memory and tables that the live instances hold.
    pub memory_bytes: u64,
    /// Time spent executing the guest.
    pub cpu_time: Duration,
}

/// A specification made ready: what its instances share.
pub struct Container {
    pub spec: ContainerSpec,
    pub cpu: Arc<CpuShare>,
    pub usage: Arc<Usage>,
    environment: Arc<Environment>,
    filesystem: WasiFilesystemCtx,
    allowed_hosts: Arc<[AllowedHost]>,
    outbound: Arc<Semaphore>,
}

/// What a guest is told when it asks, shared by all instances of its container: they may be many, and it large.
struct Environment {
    arguments: Vec<String>,
    variables: Vec<(String, String)>,
    working_dir: Option<String>,
}

impl Container {
    pub fn new(mut spec: ContainerSpec, executor: &Executor) -> Result<Self, StartError> {
        spec.request_timeout = spec.request_timeout.min(MAX_REQUEST_TIMEOUT);
        let mounts = std::mem::take(&mut spec.mounts);
        let program = spec.name.rsplit('/').next().unwrap_or_default().to_owned();
        let environment = Arc::new(Environment {
            arguments: std::iter::once(program).chain(std::mem::take(&mut spec.args)).collect(),
            variables: std::mem::take(&mut spec.env),
            working_dir: spec.working_dir.take(),
        });
        let create = |cause: String, permanent| StartError::Create { container: spec.name.clone(), cause, permanent };
        // The mounts' own descriptors go with them: from here on there is one for each, whatever the number of instances.
        let filesystem = mounts::open(&mounts).map_err(|cause| create(cause, false))?;
        drop(mounts);
        let allowed_hosts = spec
            .allowed_hosts
            .iter()
            .map(|entry| AllowedHost::parse(entry))
            .collect::<Result<_, _>>()
            .map_err(|cause| create(cause, true))?;
        let cpu = Arc::new(executor.share(spec.cpu_limit));
        let outbound = Arc::new(Semaphore::new(MAX_OUTBOUND));
        Ok(Self { spec, cpu, usage: Arc::default(), environment, filesystem, allowed_hosts, outbound })
    }

    /// All but directories and environment, which are the container's and not each instance's own.
    fn wasi(&self) -> WasiCtxBuilder {
        let mut wasi = WasiCtxBuilder::new();
        wasi.stdout(self.spec.log.guest_stream(LogStream::Stdout))
            .stderr(self.spec.log.guest_stream(LogStream::Stderr))
            .max_random_size(MAX_RANDOM)
            .allow_tcp(false)
            .allow_udp(false);
        wasi
    }

    fn limiter(&self) -> Limiter {
        Limiter::new(self.spec.memory_limit, self.usage.clone())
    }

    /// The store of one component instance.
    pub fn component_store(&self, engine: &Engine, live: LiveInstance) -> wasmtime::Result<Store<ComponentState>> {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_RESOURCES);
        let mut wasi = self.wasi().build();
        wasi.filesystem().clone_from(&self.filesystem);
        let state = ComponentState {
            wasi,
            environment: self.environment.clone(),
            http: WasiHttpCtx::new(),
            table,
            hooks: Hooks {
                allowed: self.allowed_hosts.clone(),
                timeout: self.spec.request_timeout,
                open: self.outbound.clone(),
            },
            limiter: self.limiter(),
            _live: live,
        };
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(MAX_HOSTCALL);
        store.set_epoch_deadline(FIRST_SLICE);
        store.epoch_deadline_callback(cpu::on_deadline);
        Ok(store)
    }

    /// The store of one core module instance.
    pub fn core_store(&self, engine: &Engine, live: LiveInstance) -> wasmtime::Result<Store<CoreState>> {
        let mut wasi = self.wasi();
        wasi.args(&self.environment.arguments).envs(&self.environment.variables);
        let mut wasi = wasi.build_p1();
        wasi.ctx().ctx.filesystem().clone_from(&self.filesystem);
        let state = CoreState { wasi, limiter: self.limiter(), _live: live };
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_epoch_deadline(FIRST_SLICE);
        store.epoch_deadline_callback(cpu::on_deadline);
        Ok(store)
    }
}

/// The host side of a component instance.
pub struct ComponentState {
    wasi: WasiCtx,
    environment: Arc<Environment>,
    http: WasiHttpCtx,
    table: ResourceTable,
    hooks: Hooks,
    limiter: Limiter,
    _live: LiveInstance,
}

/// Gives `wasi:cli/environment` from what the container's instances share.
struct SharedEnvironment;

impl wasmtime::component::HasData for SharedEnvironment {
    type Data<'a> = &'a Environment;
}

impl cli::environment::Host for &Environment {
    fn get_environment(&mut self) -> wasmtime::Result<Vec<(String, String)>> {
        Ok(self.variables.clone())
    }

    fn get_arguments(&mut self) -> wasmtime::Result<Vec<String>> {
        Ok(self.arguments.clone())
    }

    fn initial_cwd(&mut self) -> wasmtime::Result<Option<String>> {
        Ok(self.working_dir.clone())
    }
}

impl WasiView for ComponentState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for ComponentState {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

/// The host side of a core module instance.
pub struct CoreState {
    wasi: WasiP1Ctx,
    limiter: Limiter,
    _live: LiveInstance,
}

/// What components may import: all of wasi:cli and wasi:http 0.2 but the sockets.
pub fn component_linker(engine: &Engine) -> wasmtime::Result<Linker<ComponentState>> {
    type State = ComponentState;
    let mut linker = Linker::new(engine);
    let l = &mut linker;
    wasmtime_wasi_http::p2::add_to_linker_async(l)?;
    cli::exit::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::environment::add_to_linker::<State, SharedEnvironment>(l, |state| &*state.environment)?;
    cli::terminal_input::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_output::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_stdin::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_stdout::add_to_linker::<State, WasiCli>(l, State::cli)?;
    cli::terminal_stderr::add_to_linker::<State, WasiCli>(l, State::cli)?;
    filesystem::types::add_to_linker::<State, WasiFilesystem>(l, State::filesystem)?;
    filesystem::preopens::add_to_linker::<State, WasiFilesystem>(l, State::filesystem)?;
    random::insecure::add_to_linker::<State, WasiRandom>(l, |state| state.wasi.random())?;
    random::insecure_seed::add_to_linker::<State, WasiRandom>(l, |state| state.wasi.random())?;
    Ok(linker)
}

/// What core modules may import: WASI preview 1, whose socket calls work on no descriptor that a guest here can have.
pub fn core_linker(engine: &Engine) -> wasmtime::Result<wasmtime::Linker<CoreState>> {
    let mut linker = wasmtime::Linker::new(engine);
    wasmtime_wasi::p1::add_to_linker_async(&mut linker, |state: &mut CoreState| &mut state.wasi)?;
    Ok(linker)
}

/// Why a guest failed, from the error that its call gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    Exit(i32),
    OutOfMemory(String),
    /// All instances that the node can hold at once are taken.
    NodeFull,
    TimedOut,
    Trap(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(formatter, "the guest exited with code {code}"),
            Self::OutOfMemory(message) => write!(formatter, "out of memory: {message}"),
            Self::NodeFull => write!(formatter, "the node holds as many instances as it can"),
            Self::TimedOut => write!(formatter, "the request took longer than its timeout"),
            Self::Trap(message) => write!(formatter, "the guest failed: {message}"),
        }
    }
}

impl Failure {
    pub fn of(error: &wasmtime::Error) -> Self {
        if let Some(exit) = error.downcast_ref::<I32Exit>() {
            return Self::Exit(exit.0);
        }
        if let Some(exceeded) = error.downcast_ref::<MemoryLimitExceeded>() {
            return Self::OutOfMemory(exceeded.to_string());
        }
        if error.is::<wasmtime::PoolConcurrencyLimitError>() {
            return Self::NodeFull;
        }
        // The last cause is the trap itself; what stands before it is the backtrace.
        match error.downcast_ref::<wasmtime::Trap>() {
            Some(trap) => Self::Trap(trap.to_string()),
            None => Self::Trap(error.root_cause().to_string()),
        }
    }
}

/// A host that a guest may call.
#[derive(Debug, Clone, PartialEq, Eq)]
struct AllowedHost {
    host: String,
    port: Option<u16>,
}

impl AllowedHost {
    fn parse(entry: &str) -> Result<Self, String> {
        let refused = || format!("allowed host {entry:?} is neither \"host\" nor \"host:port\"");
        let authority: http::uri::Authority = entry.trim().parse().map_err(|_| refused())?;
        let host = authority.host().to_ascii_lowercase();
        // What follows the host can only be a port; what stands before it, a user.
        let rest = authority.as_str().len() - host.len();
        if host.is_empty() || (rest > 0 && authority.port_u16().is_none()) || entry.contains('@') {
            return Err(refused());
        }
        Ok(Self { host, port: authority.port_u16() })
    }

    fn allows(&self, host: &str, port: u16) -> bool {
        self.host.eq_ignore_ascii_case(host) && self.port.is_none_or(|allowed| allowed == port)
    }
}

/// The guest's way out: HTTP requests, to listed hosts only.
struct Hooks {
    allowed: Arc<[AllowedHost]>,
    timeout: Duration,
    open: Arc<Semaphore>,
}

type Sent = Result<(http::Response<WasiBody>, Completion), HttpError>;
type Completion = Box<dyn Future<Output = Result<(), HttpError>> + Send>;

impl Hooks {
    fn allows(&self, uri: &http::Uri) -> bool {
        let Some(authority) = uri.authority() else { return false };
        let default = if uri.scheme() == Some(&http::uri::Scheme::HTTPS) { 443 } else { 80 };
        let port = match authority.port() {
            Some(port) => port.as_u16(),
            None => default,
        };
        // A user part would make the host's name ambiguous to a reader of the list.
        !authority.as_str().contains('@') && self.allowed.iter().any(|allowed| allowed.allows(authority.host(), port))
    }
}

impl WasiHttpHooks for Hooks {
    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _processed: Completion,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        if !self.allows(request.uri()) {
            tracing::debug!(uri = %request.uri(), "denied a guest's request to a host that is not allowed");
            return Box::new(std::future::ready(Err(HttpError::HttpRequestDenied)));
        }
        let Ok(open) = self.open.clone().try_acquire_owned() else {
            return Box::new(std::future::ready(Err(HttpError::ConnectionLimitReached)));
        };
        // No wait is longer than the request that the guest itself is answering.
        let mut options = options.unwrap_or_default();
        for timeout in
            [&mut options.connect_timeout, &mut options.first_byte_timeout, &mut options.between_bytes_timeout]
        {
            *timeout = Some(timeout.unwrap_or(self.timeout).min(self.timeout));
        }
        Box::new(async move {
            use http_body_util::BodyExt;
            let (response, completion) = wasmtime_wasi_http::default_send_request(request, Some(options)).await?;
            let completion: Completion = Box::new(async move {
                let _open = open;
                completion.await
            });
            Ok((response.map(BodyExt::boxed_unsync), completion))
        })
    }

    fn p2_outgoing_body_buffer_chunks(&mut self) -> usize {
        BODY_CHUNKS
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_CHUNK_SIZE
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::pin::Pin;

    fn allows(allowed: &[&str], uri: &str) -> bool {
        let allowed = allowed.iter().map(|entry| AllowedHost::parse(entry).unwrap()).collect();
        hooks(allowed, 1).allows(&uri.parse().unwrap())
    }

    fn hooks(allowed: Arc<[AllowedHost]>, open: usize) -> Hooks {
        Hooks { allowed, timeout: Duration::from_secs(10), open: Arc::new(Semaphore::new(open)) }
    }

    #[tokio::test]
    async fn a_guest_may_have_so_many_requests_open_and_no_more_until_one_ends() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut hooks = hooks(Arc::new([AllowedHost::parse(&address.to_string()).unwrap()]), 1);
        let mut send = || {
            let body = http_body_util::BodyExt::boxed_unsync(http_body_util::BodyExt::map_err(
                http_body_util::Empty::<bytes::Bytes>::new(),
                |never| match never {},
            ));
            let request = http::Request::get(format!("http://{address}/")).body(body).unwrap();
            Pin::from(hooks.send_request(request, None, Box::new(std::future::ready(Ok(())))))
        };
        let mut first = send();
        assert!(futures::poll!(&mut first).is_pending());
        assert!(matches!(send().await, Err(HttpError::ConnectionLimitReached)));
        drop(first);
        assert!(futures::poll!(send()).is_pending());
    }

    #[test]
    fn only_listed_hosts_may_be_called() {
        assert!(!allows(&[], "https://example.com/"));
        assert!(allows(&["Example.com"], "https://example.COM/path"));
        assert!(allows(&["example.com"], "http://example.com:8080/"));
        assert!(!allows(&["example.com"], "https://evil.example.com/"));
        assert!(!allows(&["example.com"], "https://example.com.evil/"));
        assert!(!allows(&["example.com"], "https://user@example.com/"));
    }

    #[test]
    fn a_listed_port_is_the_only_one() {
        assert!(allows(&["example.com:443"], "https://example.com/"));
        assert!(!allows(&["example.com:443"], "http://example.com/"));
        assert!(allows(&["127.0.0.1:8080"], "http://127.0.0.1:8080/"));
        assert!(!allows(&["127.0.0.1:8080"], "http://127.0.0.1:8081/"));
    }

    #[test]
    fn entries_that_are_no_hosts_are_refused() {
        for entry in ["", "https://example.com", "example.com/path", "user@host", "host:port", "a b"] {
            assert!(AllowedHost::parse(entry).is_err(), "{entry}");
        }
    }
}
