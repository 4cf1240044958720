//! Which pod has which port of the node's address, and which of its containers which port of the pod's own.

use parking_lot::Mutex;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::sync::Arc;
use tokio::sync::Notify;
use tokio::sync::futures::OwnedNotified;

/// Ports of one pod.
const MAX_OF_POD: usize = 1024;
/// Of the ephemeral ports, pods may listen on one part in so many. Linux gives a connection that goes out none of those that
/// anybody listens on, at whatever address: with none left, nothing on this machine would reach anything.
const EPHEMERAL_SHARE: usize = 2;
/// Where the system does not say which they are (RFC 6335).
const EPHEMERAL: RangeInclusive<u16> = 49152..=65535;

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
pub enum Refused {
    Taken { address: SocketAddr, holder: Holder },
    TooManyOfPod,
    TooManyEphemeral(RangeInclusive<u16>),
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Taken { address, holder } => write!(
                formatter,
                "port {} of {} is served by container {} of pod {}",
                address.port(),
                address.ip(),
                holder.container,
                holder.pod
            ),
            Self::TooManyOfPod => write!(formatter, "a pod may have {MAX_OF_POD} ports"),
            Self::TooManyEphemeral(range) => write!(
                formatter,
                "pods listen on as many of the ports from {} to {} as they may, which the node's own connections need",
                range.start(),
                range.end()
            ),
        }
    }
}

/// The ports of one node and its pods.
#[derive(Debug)]
pub struct Ports {
    held: Mutex<HashMap<SocketAddr, Holder>>,
    released: Arc<Notify>,
    ephemeral: RangeInclusive<u16>,
}

impl Default for Ports {
    fn default() -> Self {
        Self { held: Mutex::default(), released: Arc::default(), ephemeral: ephemeral().unwrap_or(EPHEMERAL) }
    }
}

/// The ports that the kernel gives to connections.
fn ephemeral() -> Option<RangeInclusive<u16>> {
    let text = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").ok()?;
    let (first, last) = text.trim().split_once(char::is_whitespace)?;
    Some(first.parse().ok()?..=last.trim().parse().ok()?)
}

impl Ports {
    /// Takes all of the ports for `holder`, who may have some already, or none of them: two that want the same ports never
    /// wait for each other with one of them each. Then tells who has one.
    pub fn claim(&self, addresses: &[SocketAddr], holder: &Holder) -> Result<(), Refused> {
        let mut held = self.held.lock();
        for address in addresses {
            if let Some(other) = held.get(address).filter(|other| *other != holder) {
                return Err(Refused::Taken { address: *address, holder: other.clone() });
            }
        }
        let new = || addresses.iter().filter(|address| !held.contains_key(address));
        if new().next().is_some() {
            let of_pod = held.values().filter(|other| other.uid == holder.uid).count();
            if of_pod + new().count() > MAX_OF_POD {
                return Err(Refused::TooManyOfPod);
            }
            let is_ephemeral = |address: &&SocketAddr| self.ephemeral.contains(&address.port());
            let ephemeral: HashSet<u16> =
                held.keys().chain(new()).filter(is_ephemeral).map(|address| address.port()).collect();
            if new().any(|address| is_ephemeral(&address)) && ephemeral.len() > self.ephemeral.len() / EPHEMERAL_SHARE {
                return Err(Refused::TooManyEphemeral(self.ephemeral.clone()));
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
        let taken = Refused::Taken { address: ([127, 0, 0, 1], 8080).into(), holder: holder("a", "web") };
        assert_eq!(ports.claim(&at([8080]), &holder("a", "other")), Err(taken.clone()));
        assert_eq!(ports.claim(&at([8080]), &holder("b", "web")), Err(taken));
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
        let taken = Refused::Taken { address: ([127, 0, 0, 1], 2).into(), holder: holder("b", "web") };
        assert_eq!(ports.claim(&at([1, 2, 3]), &holder("a", "web")), Err(taken));
        assert!(ports.claim(&at([1, 3]), &holder("c", "web")).is_ok(), "a has none of them");
    }

    fn many(numbers: RangeInclusive<u16>) -> Vec<SocketAddr> {
        numbers.map(|number| ([127, 0, 0, 1], number).into()).collect()
    }

    #[test]
    fn a_pod_has_so_many_ports_and_no_more_in_however_many_containers() {
        let ports = Ports::default();
        assert_eq!(ports.claim(&many(1..=1025), &holder("a", "one")), Err(Refused::TooManyOfPod));
        assert!(ports.claim(&many(1..=1000), &holder("a", "one")).is_ok());
        assert!(ports.claim(&many(1..=1000), &holder("a", "one")).is_ok(), "it has them");
        assert_eq!(ports.claim(&many(1001..=1025), &holder("a", "two")), Err(Refused::TooManyOfPod));
        assert!(ports.claim(&many(1001..=1024), &holder("a", "two")).is_ok());
        assert!(ports.claim(&many(1025..=2000), &holder("b", "one")).is_ok());
    }

    #[test]
    fn pods_leave_the_nodes_connections_half_of_the_ports_that_these_go_out_from() {
        let ports = Ports { ephemeral: 101..=200, ..Ports::default() };
        let too_many = Err(Refused::TooManyEphemeral(101..=200));
        assert_eq!(ports.claim(&many(101..=151), &holder("a", "web")), too_many);
        assert!(ports.claim(&many(61..=130), &holder("a", "web")).is_ok());
        let elsewhere: Vec<_> = (101..=130).map(|number| ([127, 0, 0, 2], number).into()).collect();
        assert!(ports.claim(&elsewhere, &holder("b", "web")).is_ok(), "a number counts once");
        assert!(ports.claim(&many(131..=150), &holder("c", "web")).is_ok());
        assert_eq!(ports.claim(&many(151..=151), &holder("d", "web")), too_many);
        assert!(ports.claim(&many(201..=300), &holder("d", "web")).is_ok(), "others are no matter");
        ports.release_pod("a");
        ports.release_pod("b");
        assert!(ports.claim(&many(151..=151), &holder("d", "web")).is_ok());
    }
}
