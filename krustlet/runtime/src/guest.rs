//! What a guest is given: arguments, environment, directories, limits, a log, hosts to call; and nothing else.

use crate::cpu::{self, CpuShare, FIRST_SLICE};
use crate::egress::Outbound;
use crate::error::StartError;
use crate::executor::Executor;
use crate::files::OpenFiles;
use crate::gate::Gate;
use crate::limits::{Limiter, MAX_FIELDS, MemoryLimitExceeded};
use crate::logs::{LogFile, LogStream};
use crate::memory::{Budget, Reservation, Scope};
use crate::metrics::LiveInstance;
use crate::module::Module;
use crate::mounts::{self, Mount};
use crate::preview_1::Descriptors;
use crate::shares::Taken;
use crate::stack;
use crate::tenants::Tenant;
use std::fmt;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::Duration;
use wasmtime::component::ResourceTable;
use wasmtime::{Engine, Store};
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::p1::WasiP1Ctx;
use wasmtime_wasi::{I32Exit, WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

/// Handles (streams, headers, files, …) that one instance may hold at a time.
pub const MAX_RESOURCES: usize = 4 * 1024;
/// The same with those that a component's own parts give each other.
pub const MAX_HANDLES: usize = 4 * MAX_RESOURCES;
/// Random bytes for one call.
const MAX_RANDOM: u64 = 1024 * 1024;
/// What one call may copy out of the guest into the node's memory.
const MAX_HOSTCALL: usize = 16 * 1024 * 1024;
/// Directories that any container may have; each further one counts as a file that it has open.
const ORDINARY_MOUNTS: usize = 8;
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
    /// Bytes that all of the container's instances may make the node hold together; a share of the node without it.
    pub memory_limit: Option<u64>,
    /// What the containers of its pod may take together.
    pub pod_memory: Option<PodMemory>,
    /// What this specification takes of it.
    pub held: Vec<HeldMemory>,
    /// Cores, for all of the container's instances together.
    pub cpu_limit: Option<f64>,
    /// `host` (any port), `host:port` or `*.domain` that the guest may send HTTP requests to.
    pub allowed_hosts: Vec<String>,
    /// Certificate authorities in PEM that the guest's https requests trust beside those that the node trusts.
    pub ca_bundle: Option<String>,
    /// The address that is its pod's own, from which its requests go out; the machine's without it.
    pub source: Option<Ipv4Addr>,
    /// Who may connect to it, and what it may connect to; all of that without it.
    pub gate: Option<Arc<dyn Gate>>,
    /// A request whose answer has not begun after this is answered with 504.
    pub request_timeout: Duration,
    /// An answer that has begun may pause for so long.
    pub stream_idle_timeout: Duration,
    /// Requests beyond this many at once wait.
    pub max_concurrent_requests: usize,
    pub log: LogFile,
}

impl ContainerSpec {
    pub const DEFAULT_REQUEST_TIMEOUT: Duration = Duration::from_secs(30);
    pub const DEFAULT_STREAM_IDLE_TIMEOUT: Duration = Duration::from_secs(300);
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
            pod_memory: None,
            held: Vec::new(),
            cpu_limit: None,
            allowed_hosts: Vec::new(),
            ca_bundle: None,
            source: None,
            gate: None,
            request_timeout: Self::DEFAULT_REQUEST_TIMEOUT,
            stream_idle_timeout: Self::DEFAULT_STREAM_IDLE_TIMEOUT,
            max_concurrent_requests: Self::DEFAULT_MAX_CONCURRENT_REQUESTS,
            log,
        }
    }

    pub(crate) fn memory_limit(&self, executor: &Executor) -> u64 {
        self.memory_limit.unwrap_or(executor.default_memory)
    }

    /// The budget that its container's lies in.
    pub(crate) fn parent_memory<'a>(&'a self, executor: &'a Executor) -> &'a Arc<Budget> {
        self.pod_memory.as_ref().map_or(&executor.memory, |PodMemory(budget)| budget)
    }
}

/// What a container has used up to now.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Requests begun (0 for a command).
    pub requests: u64,
    /// Requests being served now.
    pub in_flight: u64,
    /// Bytes that the live instances make the node hold.
    pub memory_bytes: u64,
    /// Bytes of code that were loaded for its pod, whichever of the containers runs it.
    pub code_bytes: u64,
    /// Time spent executing the guest.
    pub cpu_time: Duration,
}

/// A pod's memory, for all of its containers.
#[derive(Debug, Clone)]
pub struct PodMemory(pub(crate) Arc<Budget>);

/// Some of it, until the last clone is dropped.
#[derive(Debug, Clone)]
pub struct HeldMemory(#[allow(dead_code)] Arc<Reservation>);

impl PodMemory {
    /// Takes what somebody else keeps for the pod. The error says what is lacking.
    pub fn hold(&self, bytes: u64) -> Result<HeldMemory, String> {
        self.0.reserve(bytes).map(Arc::new).map(HeldMemory).map_err(|exceeded| exceeded.to_string())
    }
}

/// A specification made ready: what its instances share.
pub struct Container {
    pub spec: ContainerSpec,
    pub tenant: Arc<Tenant>,
    pub cpu: Arc<CpuShare>,
    /// What this container holds, within `limit`.
    pub memory: Arc<Budget>,
    /// Its limit, which a container that takes its place shares as long as instances of both are alive.
    limit: Arc<Budget>,
    environment: Arc<Environment>,
    filesystem: WasiFilesystemCtx,
    outbound: Outbound,
    /// Its mounts, which are the pod's descriptors as its files are.
    _mounted: Taken,
}

/// What a guest is told when it asks, shared by all instances of its container: they may be many, and it large.
pub struct Environment {
    pub arguments: Vec<String>,
    pub variables: Vec<(String, String)>,
    pub working_dir: Option<String>,
}

impl Container {
    /// `predecessor` is the container whose place this one takes while requests are still answered by it.
    pub fn new(mut spec: ContainerSpec, executor: &Executor, predecessor: Option<&Self>) -> Result<Self, StartError> {
        spec.request_timeout = spec.request_timeout.min(MAX_REQUEST_TIMEOUT);
        spec.stream_idle_timeout = spec.stream_idle_timeout.min(MAX_REQUEST_TIMEOUT);
        let mounts = std::mem::take(&mut spec.mounts);
        let program = spec.name.rsplit('/').next().unwrap_or_default().to_owned();
        let environment = Arc::new(Environment {
            arguments: std::iter::once(program).chain(std::mem::take(&mut spec.args)).collect(),
            variables: std::mem::take(&mut spec.env),
            working_dir: spec.working_dir.take(),
        });
        let create = |cause: String, permanent| StartError::Create { container: spec.name.clone(), cause, permanent };
        let tenant = executor.tenants.of(&spec.name);
        let further = mounts.len().saturating_sub(ORDINARY_MOUNTS);
        let mounted = tenant.descriptors.take(further).ok_or_else(|| {
            create(
                format!("its pod may not have so many file descriptors that it gets {} directories", mounts.len()),
                false,
            )
        })?;
        // The mounts' own descriptors go with them: from here on there is one for each, whatever the number of instances.
        let filesystem = mounts::open(&mounts).map_err(|cause| create(cause, false))?;
        drop(mounts);
        let bytes = spec.memory_limit(executor);
        let limit = match predecessor {
            Some(predecessor) => predecessor.limit.clone(),
            None => Budget::within(spec.parent_memory(executor), Scope::Container, bytes),
        };
        limit.set_limit(bytes);
        let memory = Budget::within(&limit, Scope::Container, u64::MAX);
        let outbound = Outbound::new(&executor.egress, &memory, &tenant, &spec)
            .map_err(|cause| StartError::Config { container: spec.name.clone(), cause })?;
        let cpu = Arc::new(executor.share(&tenant, spec.cpu_limit));
        Ok(Self { spec, tenant, cpu, memory, limit, environment, filesystem, outbound, _mounted: mounted })
    }

    /// All but directories and environment, which are the container's and not each instance's own.
    fn wasi(&self) -> WasiCtxBuilder {
        let mut wasi = WasiCtxBuilder::new();
        wasi.stdout(self.spec.log.guest_stream(LogStream::Stdout))
            .stderr(self.spec.log.guest_stream(LogStream::Stderr))
            .max_random_size(MAX_RANDOM)
            .allow_tcp(false)
            .allow_udp(false)
            .allow_ip_name_lookup(false);
        wasi
    }

    fn open_files(&self) -> OpenFiles {
        OpenFiles::new(self.tenant.clone())
    }

    /// The store of one instance of a component.
    pub fn component_store(
        &self,
        engine: &Engine,
        module: &Module,
        live: LiveInstance,
    ) -> wasmtime::Result<Store<ComponentState>> {
        let mut table = ResourceTable::new();
        table.set_max_capacity(MAX_RESOURCES);
        let mut wasi = self.wasi().build();
        wasi.filesystem().clone_from(&self.filesystem);
        let mut http = WasiHttpCtx::new();
        http.set_field_size_limit(MAX_FIELDS);
        let state = ComponentState {
            wasi,
            environment: self.environment.clone(),
            http,
            table,
            outbound: self.outbound.clone(),
            limiter: Limiter::of_module(self.memory.clone(), module.instance_bytes())?,
            open_files: self.open_files(),
            _live: live,
        };
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(MAX_HOSTCALL);
        store.set_max_component_handles(MAX_HANDLES);
        store.set_epoch_deadline(FIRST_SLICE);
        store.epoch_deadline_callback(|mut context| {
            context.data_mut().count_handles()?;
            cpu::on_deadline(context)
        });
        Ok(store)
    }

    /// The store of one instance of a core module.
    pub fn core_store(
        &self,
        engine: &Engine,
        module: &Module,
        live: LiveInstance,
    ) -> wasmtime::Result<Store<CoreState>> {
        let mut wasi = self.wasi();
        wasi.args(&self.environment.arguments).envs(&self.environment.variables);
        let mut wasi = wasi.build_p1();
        wasi.ctx().ctx.filesystem().clone_from(&self.filesystem);
        wasi.ctx().table.set_max_capacity(MAX_RESOURCES);
        let limiter = Limiter::of_module(self.memory.clone(), module.instance_bytes())?;
        let descriptors = Descriptors::of(&mut wasi);
        let state = CoreState { wasi, limiter, open_files: self.open_files(), descriptors, _live: live };
        let mut store = Store::new(engine, state);
        store.limiter(|state| &mut state.limiter);
        store.set_hostcall_fuel(MAX_HOSTCALL);
        store.set_epoch_deadline(FIRST_SLICE);
        store.epoch_deadline_callback(cpu::on_deadline);
        Ok(store)
    }
}

/// The host side of a component instance.
pub struct ComponentState {
    wasi: WasiCtx,
    pub environment: Arc<Environment>,
    http: WasiHttpCtx,
    table: ResourceTable,
    outbound: Outbound,
    pub limiter: Limiter,
    pub open_files: OpenFiles,
    _live: LiveInstance,
}

impl ComponentState {
    /// Counts what the host keeps for the guest now.
    pub fn count_handles(&mut self) -> Result<(), MemoryLimitExceeded> {
        self.limiter.count_handles(&mut self.table)
    }
}

impl WasiView for ComponentState {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        stack::mark();
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for ComponentState {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        self.limiter.before_call(&mut self.table);
        WasiHttpCtxView { hooks: &mut self.outbound, table: &mut self.table, ctx: &mut self.http }
    }
}

/// The host side of a core module instance.
pub struct CoreState {
    pub wasi: WasiP1Ctx,
    pub limiter: Limiter,
    pub open_files: OpenFiles,
    pub descriptors: Descriptors,
    _live: LiveInstance,
}

/// Why a guest failed, from the error that its call gave.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Failure {
    Exit(i32),
    OutOfMemory(String),
    /// Others of the same container, pod or node hold the memory that it needs.
    MemoryTaken(String),
    /// All instances that the node can hold at once are taken.
    NodeFull,
    TimedOut,
    /// Its answer has begun and does not go on.
    Stalled,
    Trap(String),
}

impl fmt::Display for Failure {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exit(code) => write!(formatter, "the guest exited with code {code}"),
            Self::OutOfMemory(message) => write!(formatter, "out of memory: {message}"),
            Self::MemoryTaken(message) => write!(formatter, "no memory is left for it: {message}"),
            Self::NodeFull => write!(formatter, "the node holds as many instances as it can"),
            Self::TimedOut => write!(formatter, "the request took longer than its timeout"),
            Self::Stalled => write!(formatter, "its answer came to a stop for longer than its stream idle timeout"),
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
            return match exceeded.is_its_own() {
                true => Self::OutOfMemory(exceeded.to_string()),
                false => Self::MemoryTaken(exceeded.to_string()),
            };
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
