//! Which pod has which port of the node's address, and which of its containers which port of the pod's own.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
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

/// Why ports cannot be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Taken {
    pub address: SocketAddr,
    pub holder: Holder,
}

/// The ports of one node and its pods.
#[derive(Debug, Default)]
pub struct Ports {
    held: Mutex<HashMap<SocketAddr, Holder>>,
    released: Arc<Notify>,
}

impl Ports {
    /// Takes all of the ports for `holder`, who may have some already, or none of them: two that want the same ports never
    /// wait for each other with one of them each. Then tells who has one.
    pub fn claim(&self, addresses: &[SocketAddr], holder: &Holder) -> Result<(), Taken> {
        let mut held = self.held.lock();
        for address in addresses {
            if let Some(other) = held.get(address).filter(|other| *other != holder) {
                return Err(Taken { address: *address, holder: other.clone() });
            }
        }
        held.extend(addresses.iter().map(|address| (*address, holder.clone())));
        Ok(())
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
        let mut held = self.held.lock();
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
}

#[cfg(test)]
mod tests {
    use super::*;

    fn holder(uid: &str, container: &str) -> Holder {
        Holder { uid: uid.into(), container: container.into(), pod: format!("default/{uid}") }
    }

    fn at<const N: usize>(numbers: [u16; N]) -> [SocketAddr; N] {
        numbers.map(|number| ([127, 0, 0, 1], number).into())
    }

    #[tokio::test]
    async fn a_port_has_one_holder_and_is_free_again_when_the_pod_is_gone() {
        let ports = Ports::default();
        assert!(ports.claim(&at([8080]), &holder("a", "web")).is_ok());
        assert!(ports.claim(&at([8080]), &holder("a", "web")).is_ok());
        assert_eq!(ports.claim(&at([8080]), &holder("a", "other")).unwrap_err().holder.container, "web");
        assert_eq!(ports.claim(&at([8080]), &holder("b", "web")).unwrap_err().holder.pod, "default/a");
        let released = ports.released();
        ports.release_pod("a");
        released.await;
        assert!(ports.claim(&at([8080]), &holder("b", "web")).is_ok());
        assert!(ports.claim(&[([127, 0, 0, 2], 8080).into()], &holder("c", "web")).is_ok(), "another address");
    }

    #[test]
    fn several_ports_are_taken_all_or_none() {
        let ports = Ports::default();
        assert!(ports.claim(&at([2]), &holder("b", "web")).is_ok());
        let taken = ports.claim(&at([1, 2, 3]), &holder("a", "web")).unwrap_err();
        assert_eq!((taken.address.port(), taken.holder.uid.as_str()), (2, "b"));
        assert!(ports.claim(&at([1, 3]), &holder("c", "web")).is_ok(), "a has none of them");
    }
}
