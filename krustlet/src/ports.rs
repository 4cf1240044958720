//! Which pod has which port of the node. There is no pod network: a containerPort is a port on the node's address.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::{Mutex, MutexGuard, PoisonError};
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// Who holds a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Holder {
    /// UID of the pod.
    pub uid: String,
    pub container: String,
    /// namespace/name, for messages.
    pub pod: String,
}

/// The ports of one node.
#[derive(Debug, Default)]
pub struct Ports {
    held: Mutex<HashMap<u16, Holder>>,
    released: Arc<Notify>,
}

impl Ports {
    /// Takes the port for `holder`, who may have it already; otherwise tells who has it.
    pub fn claim(&self, port: u16, holder: &Holder) -> Result<(), Holder> {
        let mut held = self.held();
        match held.get(&port) {
            Some(other) if other != holder => Err(other.clone()),
            _ => {
                held.insert(port, holder.clone());
                Ok(())
            }
        }
    }

    /// Gives up every port of the pod.
    pub fn release_pod(&self, uid: &str) {
        self.release_where(|holder| holder.uid == uid);
    }

    /// Gives up every port of one container.
    pub fn release(&self, uid: &str, container: &str) {
        self.release_where(|holder| holder.uid == uid && holder.container == container);
    }

    fn release_where(&self, gone: impl Fn(&Holder) -> bool) {
        let mut held = self.held();
        let before = held.len();
        held.retain(|_, holder| !gone(holder));
        if held.len() < before {
            drop(held);
            self.released.notify_waiters();
        }
    }

    /// Completes when some port becomes free after this call.
    pub fn released(&self) -> OwnedNotified {
        self.released.clone().notified_owned()
    }

    fn held(&self) -> MutexGuard<'_, HashMap<u16, Holder>> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(uid: &str, container: &str) -> Holder {
        Holder { uid: uid.into(), container: container.into(), pod: format!("default/{uid}") }
    }

    #[tokio::test]
    async fn a_port_has_one_holder_and_is_free_again_when_the_pod_is_gone() {
        let ports = Ports::default();
        assert!(ports.claim(8080, &holder("a", "web")).is_ok());
        assert!(ports.claim(8080, &holder("a", "web")).is_ok());
        assert_eq!(ports.claim(8080, &holder("a", "other")).unwrap_err().container, "web");
        assert_eq!(ports.claim(8080, &holder("b", "web")).unwrap_err().pod, "default/a");
        let released = ports.released();
        ports.release_pod("a");
        released.await;
        assert!(ports.claim(8080, &holder("b", "web")).is_ok());
    }
}
