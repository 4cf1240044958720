//! The gate of one container: from a connection's addresses to the judgement of the [rules](super::rules).

use super::rules::{self, Direction, Judgement, Port, Remote, RemotePod};
use super::selector::Labelled;
use super::{NetworkPolicies, Standing};
use crate::addresses::PodAddress;
use crate::pod::{containers, full_name, namespace, ports, uid};
use futures::FutureExt as _;
use k8s_openapi::api::core::v1::{Container, ContainerPort, Pod};
use krustlet_runtime::{Gate, Verdict};
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use tokio::time::Instant;

/// How long a connection waits whose pod is not known: one that has just begun is known when its status has gone through the API
/// server. Where packets are dropped, a client tries again within this time.
const UNKNOWN: Duration = Duration::from_secs(1);
/// The same while the pods of the cluster are being listed.
const LISTING: Duration = Duration::from_secs(10);

#[derive(Clone)]
pub struct PodGate(Arc<Inner>);

/// A connection that somebody makes to the pod, or it to somebody.
#[derive(Clone, Copy)]
enum Connection {
    In { from: IpAddr, to: SocketAddr },
    Out { to: SocketAddr },
}

impl Connection {
    fn direction(self) -> Direction {
        match self {
            Self::In { .. } => Direction::Ingress,
            Self::Out { .. } => Direction::Egress,
        }
    }

    /// The other end.
    fn remote(self) -> IpAddr {
        match self {
            Self::In { from, .. } => from,
            Self::Out { to } => to.ip(),
        }
    }
}

struct Inner {
    policies: NetworkPolicies,
    /// As it was when its container began; its labels may be others now.
    pod: Arc<Pod>,
    node: IpAddr,
    /// The pod's own address.
    own: Option<IpAddr>,
    /// What the container serves where.
    served: Vec<(SocketAddr, Port)>,
}

impl fmt::Debug for PodGate {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&full_name(&self.0.pod))
    }
}

impl PodGate {
    pub fn new(
        policies: NetworkPolicies,
        pod: Arc<Pod>,
        container: &Container,
        address: PodAddress,
        node: IpAddr,
    ) -> Self {
        let served = ports::declared(container, address, node)
            .map(|(socket, port)| {
                let number = u16::try_from(port.container_port).unwrap_or_default();
                (socket, Port { number, name: port.name.clone() })
            })
            .collect();
        let own = address.is_own.then_some(address.ip);
        Self(Arc::new(Inner { policies, pod, node, own, served }))
    }

    fn verdict(&self, connection: Connection) -> Verdict {
        match self.judge(connection) {
            Judgement::Admitted => Verdict::Admitted,
            Judgement::Denied => Verdict::Denied,
            Judgement::Unknown => Verdict::Pending(self.clone().settled(connection).boxed()),
        }
    }

    /// Whether it is the node that connects, which may as it may to any pod, or the pod itself.
    ///
    /// To an address of its own a kernel connects from that very address, and to one of 127.0.0.0/8 from 127.0.0.1, unless who
    /// connects chose another one: guests have their pods'.
    fn is_node(&self, from: IpAddr, to: IpAddr) -> bool {
        let loopback = [IpAddr::V4(Ipv4Addr::LOCALHOST), IpAddr::V6(Ipv6Addr::LOCALHOST)];
        from == to || from == self.0.node || loopback.contains(&from)
    }

    fn judge(&self, connection: Connection) -> Judgement {
        let Inner { policies, pod, served, .. } = &*self.0;
        let inner = &policies.0;
        let known = inner.known.read();
        if known.policies.is_empty() {
            return match *inner.standing.borrow() {
                Standing::Asking(_) => Judgement::Unknown,
                Standing::Kept | Standing::NotKept(_) => Judgement::Admitted,
            };
        }
        if !known.policies.contains_key(namespace(pod)) {
            return Judgement::Admitted;
        }
        let newest = inner.roster.pod(uid(pod));
        let labels_of = |namespace: &str| {
            let known = known.namespaces.as_ref()?.get(namespace)?;
            Some(known as &dyn Labelled)
        };
        // What this node gives its own addresses to, it knows first.
        let ip = connection.remote();
        let own = policies.pod_at(ip);
        let ports: Vec<Port> = match connection {
            Connection::In { to, .. } => {
                served.iter().filter(|(socket, _)| *socket == to).map(|(_, port)| port.clone()).collect()
            }
            Connection::Out { to } => {
                let name = own.as_deref().and_then(|own| name_of(own, to.port()));
                vec![Port { number: to.port(), name }]
            }
        };
        let remote = match &own {
            Some(own) => Some((namespace(own), &own.metadata.labels as &dyn Labelled)),
            None => known
                .peers
                .as_ref()
                .and_then(|peers| peers.at(ip))
                .map(|peer| (&*peer.namespace, &peer.labels as &dyn Labelled)),
        };
        let pod_there =
            remote.map(|(namespace, labels)| RemotePod { namespace, labels, namespace_labels: labels_of(namespace) });
        let policies = known.selecting(newest.as_ref().unwrap_or(pod));
        rules::judge(policies, connection.direction(), &Remote { ip, pod: pod_there }, &ports)
    }

    /// Whether it may be made, once it is known whose the address is or there is no more waiting for it.
    async fn settled(self, connection: Connection) -> bool {
        let began = Instant::now();
        loop {
            let changed = self.0.policies.0.changed.notified();
            match self.judge(connection) {
                Judgement::Admitted => return true,
                Judgement::Denied => return false,
                Judgement::Unknown => {}
            }
            let inner = &self.0.policies.0;
            let is_listing = match *inner.standing.borrow() {
                Standing::Asking(_) => true,
                Standing::Kept => inner.known.read().peers.is_none(),
                // It may not list them.
                Standing::NotKept(_) => false,
            };
            let until = began + if is_listing { LISTING } else { UNKNOWN };
            if tokio::time::timeout_at(until, changed).await.is_err() {
                return false;
            }
        }
    }
}

/// What the pod's container calls that port.
fn name_of(pod: &Pod, number: u16) -> Option<String> {
    let containers = pod.spec.iter().flat_map(containers);
    let mut ports = containers.flat_map(|(_, container)| container.ports.iter().flatten());
    let is_it = |port: &&ContainerPort| port.container_port == i32::from(number) && ports::is_tcp(port);
    ports.find(is_it)?.name.clone()
}

impl Gate for PodGate {
    fn admits(&self, from: IpAddr, to: SocketAddr) -> Verdict {
        let (from, to) = (from.to_canonical(), SocketAddr::new(to.ip().to_canonical(), to.port()));
        if self.is_node(from, to.ip()) { Verdict::Admitted } else { self.verdict(Connection::In { from, to }) }
    }

    fn permits(&self, to: SocketAddr) -> Verdict {
        let to = SocketAddr::new(to.ip().to_canonical(), to.port());
        let is_own = self.0.own == Some(to.ip());
        if is_own || to.ip() == self.0.node { Verdict::Admitted } else { self.verdict(Connection::Out { to }) }
    }

    fn version(&self) -> u64 {
        self.0.policies.0.version.load(Ordering::SeqCst)
    }
}
