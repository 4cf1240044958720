//! Names that the node resolves itself, before DNS is asked; and where its own containers are served, which is open to those
//! who call them by such a name.

use futures::future::BoxFuture;
use parking_lot::RwLock;
use std::collections::HashSet;
use std::fmt;
use std::net::SocketAddr;
use std::sync::{Arc, OnceLock};

/// Knows names such as those of Kubernetes' Services.
pub trait NameService: Send + Sync {
    /// Where the next request to this name and port is to go, or why there is no such place. None when the name is not one
    /// of those that this service knows: then it is looked up as any other.
    fn endpoint(&self, name: &str, port: u16) -> Option<BoxFuture<'static, Result<SocketAddr, String>>>;
}

/// A node's part in it.
#[derive(Default)]
pub struct Names {
    service: OnceLock<Arc<dyn NameService>>,
    served: RwLock<HashSet<SocketAddr>>,
}

impl Names {
    pub fn set(&self, service: Arc<dyn NameService>) {
        let _ = self.service.set(service);
    }

    pub fn endpoint(&self, name: &str, port: u16) -> Option<BoxFuture<'static, Result<SocketAddr, String>>> {
        self.service.get()?.endpoint(name, port)
    }

    /// Whether one of the node's own containers listens there, so that nobody else does.
    pub fn serves(&self, address: &SocketAddr) -> bool {
        self.served.read().contains(address)
    }

    /// Takes note of listeners, for as long as the note lives.
    pub fn note(self: &Arc<Self>, addresses: Vec<SocketAddr>) -> Note {
        self.served.write().extend(&addresses);
        Note { names: self.clone(), addresses }
    }
}

impl fmt::Debug for Names {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Names")
    }
}

/// That a container listens on these addresses.
pub struct Note {
    names: Arc<Names>,
    addresses: Vec<SocketAddr>,
}

impl Drop for Note {
    fn drop(&mut self) {
        let mut served = self.names.served.write();
        for address in &self.addresses {
            served.remove(address);
        }
    }
}
