//! The wasmtime engine: how code is compiled, and how many instances it holds.

use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, OptLevel, PoolingAllocationConfig};

/// Instances that may be alive at once on a node. Each reserves 8 GiB of address space, none costs memory before it is used.
/// The smaller numbers are for machines whose kernel or limits give less address space.
const MAX_INSTANCES: [u32; 3] = [2000, 400, 50];
/// A component is several core instances (its modules and the adapters between them). The pool only counts them.
pub const CORE_INSTANCES: u32 = 256;
/// What wasmtime may lay out for an instance beside its memories and tables (see `instance_size`).
pub const MAX_CONTEXT: usize = 1024 * 1024;
/// What one of the node's instances stands for; a module that needs more counts as several. The second memory is the heap of
/// guests in garbage-collected languages, which nothing says beforehand that they need.
pub const MEMORIES: u32 = 2;
pub const TABLES: u32 = 4;
/// Large enough for the function tables of language runtimes compiled to wasm.
pub const TABLE_ELEMENTS: usize = 100_000;
/// Slots that stay warm for another instance of the same module.
const WARM_SLOTS: u32 = 64;
/// Memory that an idle slot keeps; clearing it is cheaper than having the kernel map it again at the next request. Every slot
/// that was ever used keeps it, so that a machine's share for idle instances bounds it.
const KEEP_RESIDENT: usize = 1024 * 1024;
/// The same where the kernel cannot say which pages were written, so that all of them are cleared.
const KEEP_RESIDENT_BLIND: usize = 64 * 1024;
/// The same for a table: the functions of an ordinary guest.
const KEEP_TABLE: usize = 16 * 1024;
/// The same for a stack: twice what an ordinary guest touches of it. More is cleared at each request for nothing.
const KEEP_STACK: usize = 16 * 1024;
const PAGE: usize = 4096;
/// The first Linux with the PAGEMAP_SCAN ioctl.
const PAGEMAP_SCAN: (u32, u32) = (6, 7);

/// The engine, and how many instances it holds. `idle` bytes are what all idle slots together may keep.
pub fn engine(idle: u64) -> wasmtime::Result<(Engine, u32)> {
    let make = |instances| -> wasmtime::Result<_> { Ok((Engine::new(&config(instances, idle))?, instances)) };
    let mut result = make(MAX_INSTANCES[0]);
    for instances in &MAX_INSTANCES[1..] {
        if let Err(error) = &result {
            tracing::warn!(%error, instances, "this machine gives little address space; it holds fewer instances at once");
            result = make(*instances);
        }
    }
    result
}

/// What a slot may keep resident while it is idle.
struct KeepResident {
    memory: usize,
    table: usize,
    stack: usize,
}

impl KeepResident {
    fn of(instances: u32, idle: u64) -> Self {
        let share = usize::try_from(idle / u64::from(instances.max(1))).unwrap_or(usize::MAX);
        // The pool rounds up to pages.
        let part = |share: usize| share / PAGE * PAGE;
        let stack = KEEP_STACK.min(part(share / 4));
        let table = KEEP_TABLE.min(part((share - stack) / TABLES as usize));
        let memory = part((share - stack - table * TABLES as usize) / MEMORIES as usize);
        Self {
            memory: memory.min(if kernel_scans_pages() { KEEP_RESIDENT } else { KEEP_RESIDENT_BLIND }),
            table,
            stack,
        }
    }
}

fn config(instances: u32, idle: u64) -> Config {
    let mut pool = PoolingAllocationConfig::new();
    pool.total_component_instances(instances)
        .total_core_instances(instances * CORE_INSTANCES)
        .max_core_instances_per_component(CORE_INSTANCES)
        .total_memories(instances * MEMORIES)
        .total_tables(instances * TABLES)
        .total_stacks(instances)
        .total_gc_heaps(instances)
        .max_component_instance_size(MAX_CONTEXT)
        .max_core_instance_size(MAX_CONTEXT)
        .max_memories_per_module(4)
        .max_tables_per_module(8)
        .table_elements(TABLE_ELEMENTS)
        .max_unused_warm_slots(WARM_SLOTS)
        .pagemap_scan(Enabled::Auto);
    let keep = KeepResident::of(instances, idle);
    pool.linear_memory_keep_resident(keep.memory).table_keep_resident(keep.table).async_stack_keep_resident(keep.stack);
    let mut config = code_config();
    // Half a mebibyte that one guest touched would stay with the node for ever.
    config.async_stack_zeroing(true);
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pool));
    config
}

/// What shapes the code: the compiler, which runs no guests, needs no more.
pub fn code_config() -> Config {
    let mut config = Config::new();
    config
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
    use crate::memory::Division;

    #[test]
    fn code_does_not_depend_on_how_many_instances_a_machine_can_hold_nor_on_whether_it_runs_any() {
        use std::hash::{DefaultHasher, Hash as _, Hasher as _};
        let hash = |config: &Config| {
            let mut hasher = DefaultHasher::new();
            Engine::new(config).unwrap().precompile_compatibility_hash().hash(&mut hasher);
            hasher.finish()
        };
        let large = hash(&config(MAX_INSTANCES[0], 1 << 31));
        assert_eq!(large, hash(&config(MAX_INSTANCES[2], 1 << 20)));
        assert_eq!(large, hash(&code_config()));
    }

    #[test]
    fn what_idle_instances_keep_is_never_more_than_the_machines_share_for_them() {
        for machine in [1u64, 2, 4, 24, 512].map(|gib| gib << 30) {
            let idle = Division::of(machine, None).idle;
            for instances in MAX_INSTANCES {
                let keep = KeepResident::of(instances, idle);
                let slot = MEMORIES as usize * keep.memory + TABLES as usize * keep.table + keep.stack;
                let kept = u64::from(instances) * slot as u64;
                assert!(kept <= idle, "{kept} of {idle}");
            }
        }
    }
}
