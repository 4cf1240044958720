//! The wasmtime engine and the threads that guests run on.
//!
//! Guests have an executor of their own: a guest that computes can delay other guests by a slice, and the node's own
//! work (heartbeats, the pod watch, the API) not at all.

use crate::cpu::{CpuShare, Ticker};
use crate::guest::{self, ComponentState, CoreState};
use std::sync::Arc;
use tokio::runtime::Handle;
use wasmtime::component::Linker;
use wasmtime::error::Context as _;
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig};

/// Instances that may be alive at once on a node. Each reserves address space, none costs memory before it is used.
const MAX_INSTANCES: u32 = 2000;
/// A component is several core instances (its modules and the adapters between them).
const CORE_INSTANCES: u32 = 8;
const TABLES: u32 = 4;
/// Large enough for the function tables of language runtimes compiled to wasm.
const TABLE_ELEMENTS: usize = 100_000;
/// Only guests in garbage-collected languages have a heap of this kind.
const MAX_GC_HEAPS: u32 = 200;
/// Slots that stay warm for another instance of the same module.
const WARM_SLOTS: u32 = 64;
/// Memory that a warm slot keeps; clearing it is cheaper than having the kernel map it again at the next request.
const KEEP_RESIDENT: usize = 1024 * 1024;
/// The same where the kernel cannot say which pages were written, so that all of them are cleared.
const KEEP_RESIDENT_BLIND: usize = 64 * 1024;
/// The first Linux with the PAGEMAP_SCAN ioctl.
const PAGEMAP_SCAN: (u32, u32) = (6, 7);

/// How many tasks a thread polls before it looks for new connections and requests. Each poll may be a slice of a guest that
/// computes, so that tokio's default of 61 would let a request wait for 61 ms before it is even seen.
const POLLS_BETWEEN_EVENTS: u32 = 2;

/// What runs guests.
pub struct Executor {
    pub engine: Engine,
    pub component_linker: Linker<ComponentState>,
    pub core_linker: wasmtime::Linker<CoreState>,
    ticker: Arc<Ticker>,
    workers: usize,
    runtime: Option<tokio::runtime::Runtime>,
    handle: Handle,
}

impl Executor {
    pub fn new() -> wasmtime::Result<Self> {
        let engine = Engine::new(&config()).context("failed to make the wasm engine")?;
        let ticker = Ticker::start(engine.weak()).context("failed to start the epoch thread")?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .thread_name("guest")
            .event_interval(POLLS_BETWEEN_EVENTS)
            .enable_all()
            .build()
            .context("failed to start the guest threads")?;
        Ok(Self {
            component_linker: guest::component_linker(&engine).context("failed to link the component imports")?,
            core_linker: guest::core_linker(&engine).context("failed to link the core module imports")?,
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
            engine,
            ticker,
            workers,
        })
    }

    /// One container's part in these threads' time.
    pub fn share(&self, limit: Option<f64>) -> CpuShare {
        CpuShare::new(self.ticker.clone(), self.workers, limit)
    }

    pub fn handle(&self) -> &Handle {
        &self.handle
    }
}

impl Drop for Executor {
    fn drop(&mut self) {
        // Dropping a runtime blocks, which is not allowed where the last owner may be dropped.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

fn config() -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(MAX_INSTANCES)
        .total_core_instances(MAX_INSTANCES * CORE_INSTANCES)
        .total_memories(MAX_INSTANCES)
        .total_tables(MAX_INSTANCES * TABLES)
        .total_stacks(MAX_INSTANCES)
        .total_gc_heaps(MAX_GC_HEAPS)
        .max_memories_per_module(4)
        .max_tables_per_module(8)
        .table_elements(TABLE_ELEMENTS)
        .max_unused_warm_slots(WARM_SLOTS)
        .pagemap_scan(Enabled::Auto);
    let keep = if kernel_scans_pages() { KEEP_RESIDENT } else { KEEP_RESIDENT_BLIND };
    pool.linear_memory_keep_resident(keep).table_keep_resident(keep);

    let mut config = Config::new();
    config
        .allocation_strategy(InstanceAllocationStrategy::Pooling(pool))
        .epoch_interruption(true)
        .cranelift_opt_level(OptLevel::Speed)
        .memory_init_cow(true)
        // Only WASI 0.3 needs it, and every store would carry its state.
        .concurrency_support(false);
    config
}

#[cfg(target_os = "linux")]
fn kernel_scans_pages() -> bool {
    let release = rustix::system::uname();
    let release = release.release().to_string_lossy();
    let mut numbers = release.split(|character: char| !character.is_ascii_digit()).map(str::parse::<u32>);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => (major, minor) >= PAGEMAP_SCAN,
        _ => false,
    }
}

#[cfg(not(target_os = "linux"))]
fn kernel_scans_pages() -> bool {
    false
}
