//! The threads that guests run on, and what the node has for them together.
//!
//! Guests have an executor of their own: a guest that computes can delay other guests by a slice, and the node's own
//! work (heartbeats, the pod watch, the API) not at all.

use crate::cpu::{CpuShare, Lane, Ticker};
use crate::egress::Egress;
use crate::engine;
use crate::memory::{Budget, Division, Machine, node_budget};
use crate::tenants::{Tenant, Tenants};
use std::sync::Arc;
use tokio::runtime::Handle;
use wasmtime::Engine;
use wasmtime::error::Context as _;

/// Bytes of a machine that does not say how many it has.
const UNKNOWN_MACHINE: u64 = 2 * 1024 * 1024 * 1024;
/// How many tasks a thread polls before it looks for new connections and requests. Each poll may be a slice of a guest that
/// computes, so that tokio's default of 61 would let a request wait for 61 ms before it is even seen.
const POLLS_BETWEEN_EVENTS: u32 = 2;

/// What runs guests.
pub struct Executor {
    pub engine: Engine,
    pub egress: Arc<Egress>,
    /// For everything that guests make the node hold.
    pub memory: Arc<Budget>,
    /// A container's limit where its pod sets none.
    pub default_memory: u64,
    pub tenants: Tenants,
    ticker: Arc<Ticker>,
    workers: usize,
    runtime: Option<tokio::runtime::Runtime>,
    handle: Handle,
}

impl Executor {
    /// For at most `max_pods` pods. `guest_memory` is what guests may take together, instead of what the machine can spare.
    pub fn new(egress: Arc<Egress>, guest_memory: Option<u64>, max_pods: usize) -> wasmtime::Result<Self> {
        let machine = Machine::this();
        let division = Division::of(machine.total().unwrap_or(UNKNOWN_MACHINE), guest_memory);
        let (engine, instances) = engine::engine(division.idle).context("failed to make the wasm engine")?;
        let ticker = Ticker::start(engine.weak()).context("failed to start the epoch thread")?;
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(workers)
            .thread_name("guest")
            .max_blocking_threads(instances as usize)
            .event_interval(POLLS_BETWEEN_EVENTS)
            .enable_all()
            .build()
            .context("failed to start the guest threads")?;
        Ok(Self {
            handle: runtime.handle().clone(),
            runtime: Some(runtime),
            engine,
            egress,
            tenants: Tenants::new(instances as usize, workers, max_pods, machine.total(), division.guests),
            memory: node_budget(machine, division),
            default_memory: division.default_limit,
            ticker,
            workers,
        })
    }

    /// An executor that opens nothing, for tests.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn for_tests() -> wasmtime::Result<Self> {
        let egress = Egress::new(crate::EgressConfig::default()).map_err(wasmtime::Error::msg)?;
        Self::new(Arc::new(egress), None, 10)
    }

    /// One container's part in these threads' time.
    pub fn share(&self, tenant: &Tenant, limit: Option<f64>) -> CpuShare {
        let own = Arc::new(Lane::new(self.workers));
        CpuShare::new(self.ticker.clone(), [own, tenant.lane.clone()], limit)
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
