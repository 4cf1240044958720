//! What the containers of one pod have together, and what a node has for all of its pods.

use crate::cpu::Lane;
use crate::shares::{Pool, Share, Shares};
use rustix::process::{Resource, getrlimit, setrlimit};
use std::sync::Arc;
use tokio::sync::Semaphore;

/// Of the process's file descriptors, one in so many is the agent's own: logs, listeners, the API server, registries.
const OWN_DESCRIPTORS: usize = 4;
/// What a connection may hold in the node's memory: a head that is being read, an answer that is being written.
const BYTES_PER_CONNECTION: u64 = 128 * 1024;
/// Of the machine's memory, all connections together take at most one part in so many.
const MEMORY_FOR_CONNECTIONS: u64 = 8;
/// Names that the guests of one pod may be resolving at once: each holds a thread, which nothing can call back.
const MAX_LOOKUPS: usize = 8;
/// In which memory for code is shared.
pub const CODE_UNIT: u64 = 64 * 1024;
/// Where the process's limits name no number.
const MANY_DESCRIPTORS: u64 = 1 << 20;

/// One pod, by the name that its containers' names begin with.
pub struct Tenant {
    pub instances: Arc<Share>,
    /// Connections in and out, and files.
    pub descriptors: Arc<Share>,
    /// Memory for the code of its modules, in units: that of guests, which it is a part of, has no pod to be counted against.
    pub code: Arc<Share>,
    pub lane: Arc<Lane>,
    /// Directories that are being listed: each takes a thread, whose time nobody is charged for.
    pub listings: Arc<Semaphore>,
    pub lookups: Arc<Semaphore>,
}

impl Tenant {
    /// Bytes of code that were loaded for it.
    pub fn code_bytes(&self) -> u64 {
        self.code.used() as u64 * CODE_UNIT
    }
}

/// The pods of one node.
pub struct Tenants {
    instances: Arc<Pool>,
    descriptors: Arc<Pool>,
    code: Arc<Pool>,
    workers: usize,
    known: Shares<Tenant>,
}

impl Tenants {
    /// At most `most` pods on a node that holds so many instances, executes so many guests at a time and has so much memory,
    /// `guests` of it for guests.
    pub fn new(instances: usize, workers: usize, most: usize, memory: Option<u64>, guests: u64) -> Self {
        let descriptors = descriptors(memory);
        tracing::debug!(instances, descriptors, "what all pods have together");
        Self {
            instances: Pool::new(instances, most),
            descriptors: Pool::new(descriptors, most),
            code: Pool::new(usize::try_from(guests / CODE_UNIT).unwrap_or(usize::MAX), most),
            workers,
            known: Shares::default(),
        }
    }

    /// The one of the container with this name: `NAMESPACE/POD/CONTAINER`.
    pub fn of(&self, container: &str) -> Arc<Tenant> {
        let pod = container.rsplit_once('/').map_or(container, |(pod, _)| pod);
        self.known.of(pod, || Tenant {
            instances: self.instances.share(),
            descriptors: self.descriptors.share(),
            code: self.code.share(),
            lane: Arc::new(Lane::new(self.workers)),
            listings: Arc::new(Semaphore::new(self.workers)),
            lookups: Arc::new(Semaphore::new(MAX_LOOKUPS)),
        })
    }
}

/// File descriptors for all pods: what the process may have, and its memory can carry, less the agent's own.
fn descriptors(memory: Option<u64>) -> usize {
    let allowed = open_files();
    let allowed = allowed - allowed / OWN_DESCRIPTORS as u64;
    let carried = memory.map_or(allowed, |bytes| bytes / MEMORY_FOR_CONNECTIONS / BYTES_PER_CONNECTION);
    usize::try_from(allowed.min(carried)).unwrap_or(usize::MAX)
}

/// Raises the limit of this process as far as it may be; the usual one, 1024, is for programs that call `select`.
fn open_files() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let raised = rustix::process::Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::debug!(%error, "failed to raise the limit of open files");
    }
    getrlimit(Resource::Nofile).current.unwrap_or(MANY_DESCRIPTORS).min(MANY_DESCRIPTORS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_process_may_open_as_many_files_as_it_is_allowed_and_keeps_some_for_itself() {
        let given = descriptors(None) as u64;
        let limit = getrlimit(Resource::Nofile);
        assert_eq!(limit.current, limit.maximum);
        assert!(limit.current.is_none_or(|limit| given <= limit * 3 / 4 + 1), "{given} of {limit:?}");
    }

    #[test]
    fn containers_of_one_pod_have_one_tenant() {
        let tenants = Tenants::new(100, 2, 10, None, 0);
        let one = tenants.of("default/pod/one");
        assert!(Arc::ptr_eq(&one, &tenants.of("default/pod/two")));
        assert!(!Arc::ptr_eq(&one, &tenants.of("other/pod/one")));
    }
}
