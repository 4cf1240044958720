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

/// Instances that may be alive at once on a node. Each reserves 4 GiB of address space, none costs memory before it is used.
/// The smaller numbers are for machines whose kernel or limits give less address space.
const MAX_INSTANCES: [u32; 3] = [2000, 400, 50];
/// A component is several core instances (its modules and the adapters between them).
const CORE_INSTANCES: u32 = 8;
const TABLES: u32 = 4;
/// Large enough for the function tables of language runtimes compiled to wasm.
pub const TABLE_ELEMENTS: usize = 100_000;
/// Only guests in garbage-collected languages have a heap of this kind: one instance in so many.
const INSTANCES_PER_GC_HEAP: u32 = 10;
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
        let engine = engine().context("failed to make the wasm engine")?;
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

fn engine() -> wasmtime::Result<Engine> {
    let mut result = Engine::new(&config(MAX_INSTANCES[0]));
    for instances in &MAX_INSTANCES[1..] {
        if let Err(error) = &result {
            tracing::warn!(%error, instances, "this machine gives little address space; it holds fewer instances at once");
            result = Engine::new(&config(*instances));
        }
    }
    result
}

fn config(instances: u32) -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(instances)
        .total_core_instances(instances * CORE_INSTANCES)
        .total_memories(instances)
        .total_tables(instances * TABLES)
        .total_stacks(instances)
        .total_gc_heaps(instances.div_ceil(INSTANCES_PER_GC_HEAP))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn code_does_not_depend_on_how_many_instances_a_machine_can_hold() {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let hash = |instances| {
            let mut hasher = DefaultHasher::new();
            Engine::new(&config(instances)).unwrap().precompile_compatibility_hash().hash(&mut hasher);
            hasher.finish()
        };
        assert_eq!(hash(MAX_INSTANCES[0]), hash(MAX_INSTANCES[2]));
    }
}
