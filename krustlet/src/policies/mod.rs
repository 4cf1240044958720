//! NetworkPolicies, kept by the node itself: who may connect to a pod is judged where its connections are accepted, and what its
//! guests may connect to where that is done for them.
//!
//! The [rules] are pure. The policies of the cluster are followed from the start; its pods and its namespaces' labels only for
//! as long as a policy that selects a pod of this node goes by them. A watch that breaks leaves what was known.

mod gate;
mod peers;
mod rules;
mod selector;
mod watches;

use crate::addresses::{Addresses, PodAddress};
use crate::events::{Recorder, Severity};
use crate::pod::roster::Roster;
use crate::pod::{full_name, is_finished, namespace, uid};
use crate::reasons::event;
use crate::view::View as _;
use gate::PodGate;
use k8s_openapi::api::core::v1::{Container, Pod};
use krustlet_runtime::Gate;
use parking_lot::RwLock;
use peers::Peers;
use rules::{Direction, Policy};
use selector::Labels;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::{Notify, watch};

/// Gives the node what it reads for them; `components/node.py` makes it.
pub const CLUSTER_ROLE: &str = "krustlet-network-policies";

/// The policies as one node keeps them; clones share everything.
#[derive(Clone)]
pub struct NetworkPolicies(Arc<Inner>);

struct Inner {
    addresses: Arc<Addresses>,
    roster: Arc<Roster>,
    known: RwLock<Known>,
    /// Counts what changes in what is known.
    version: AtomicU64,
    changed: Notify,
    /// A pod of this node came, went or has other labels.
    pods_changed: Notify,
    standing: watch::Sender<Standing>,
}

/// What is known of the cluster.
#[derive(Default)]
struct Known {
    /// By namespace.
    policies: BTreeMap<String, Vec<Arc<Policy>>>,
    /// None while nothing needs them, or they were not listed yet.
    peers: Option<Peers>,
    /// By name; as above.
    namespaces: Option<HashMap<String, Labels>>,
}

/// Whether this node keeps the policies.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// They were not listed yet; the last that was heard of that.
    Asking(Option<String>),
    Kept,
    /// Why it cannot.
    NotKept(String),
}

/// What of the cluster has to be known for the pods of this node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Needs {
    pods: bool,
    namespaces: bool,
}

impl fmt::Debug for NetworkPolicies {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("NetworkPolicies")
    }
}

impl NetworkPolicies {
    pub fn new(addresses: Arc<Addresses>, roster: Arc<Roster>) -> Self {
        Self(Arc::new(Inner {
            addresses,
            roster,
            known: RwLock::default(),
            version: AtomicU64::new(1),
            changed: Notify::new(),
            pods_changed: Notify::new(),
            standing: watch::Sender::new(Standing::Asking(None)),
        }))
    }

    /// Follows the cluster; never ends.
    pub async fn keep(self, client: kube::Client, events: Recorder) {
        watches::keep(self, client, events).await;
    }

    pub fn standing(&self) -> watch::Receiver<Standing> {
        self.0.standing.subscribe()
    }

    /// For a pod of this node that came, went or has other labels.
    pub fn pods_changed(&self) {
        self.bump();
        self.0.pods_changed.notify_one();
    }

    /// Who may connect to the container, and to whom it may. None for a pod on the host's network: its traffic is the node's.
    pub fn gate(&self, pod: &Arc<Pod>, container: &Container, address: PodAddress) -> Option<Arc<dyn Gate>> {
        (!is_on_host(pod)).then(|| {
            let gate = PodGate::new(self.clone(), pod.clone(), container, address, self.0.addresses.node());
            Arc::new(gate) as Arc<dyn Gate>
        })
    }

    /// Waits until it is known who may connect to the pod, or known that this node is not to know.
    pub async fn known_for(&self, pod: &Pod) {
        let mut standing = self.standing();
        // The sender lives as long as this does.
        let _ = standing.wait_for(|standing| !matches!(standing, Standing::Asking(_))).await;
        loop {
            let changed = self.0.changed.notified();
            if matches!(*self.0.standing.borrow(), Standing::NotKept(_)) {
                return;
            }
            let needs = self.needs_of(pod);
            if self.0.known.read().meets(needs) {
                return;
            }
            changed.await;
        }
    }

    fn needs_of(&self, pod: &Pod) -> Needs {
        if is_on_host(pod) || is_finished(pod) {
            return Needs::default();
        }
        let known = self.0.known.read();
        Needs {
            pods: known.selecting(pod).any(Policy::names_pods),
            namespaces: known.selecting(pod).any(Policy::names_namespaces),
        }
    }

    /// What has changed may be what a connection is judged by.
    fn bump(&self) {
        self.0.version.fetch_add(1, Ordering::SeqCst);
        self.0.changed.notify_waiters();
    }

    fn change(&self, change: impl FnOnce(&mut Known)) {
        change(&mut self.0.known.write());
        self.bump();
    }

    fn stand(&self, standing: Standing) {
        if self.0.standing.send_if_modified(|before| std::mem::replace(before, standing.clone()) != standing) {
            self.bump();
        }
    }

    /// The pod of this node that has the address.
    fn pod_at(&self, address: IpAddr) -> Option<Arc<Pod>> {
        self.0.roster.pod(&self.0.addresses.holder(address)?)
    }
}

impl Known {
    fn meets(&self, needs: Needs) -> bool {
        (!needs.pods || self.peers.is_some()) && (!needs.namespaces || self.namespaces.is_some())
    }

    /// The policies that are about the pod.
    fn selecting<'a>(&'a self, pod: &'a Pod) -> impl Iterator<Item = &'a Policy> {
        let of_namespace = self.policies.get(namespace(pod)).into_iter().flatten();
        of_namespace.map(|policy| &**policy).filter(|policy| policy.selects(&pod.metadata.labels))
    }
}

fn is_on_host(pod: &Pod) -> bool {
    pod.spec.as_ref().and_then(|spec| spec.host_network) == Some(true)
}

/// Tells on each pod which of its policies is not kept, or not whole: once.
struct Untold {
    policies: NetworkPolicies,
    events: Recorder,
    /// UID of the pod, name of the policy, and what was said.
    told: HashSet<(String, String, &'static str)>,
}

impl Untold {
    fn new(policies: NetworkPolicies, events: Recorder) -> Self {
        Self { policies, events, told: HashSet::new() }
    }

    /// Looks at all pods of the node; gives what has to be known for them.
    fn review(&mut self) -> Needs {
        let mut needs = Needs::default();
        let inner = self.policies.0.clone();
        let known = inner.known.read();
        let mut said = HashSet::new();
        if !known.policies.is_empty() {
            for pod in inner.roster.pods().iter().filter(|pod| !is_finished(pod)) {
                let is_on_host = is_on_host(pod);
                for policy in known.selecting(pod) {
                    needs.pods |= !is_on_host && policy.names_pods();
                    needs.namespaces |= !is_on_host && policy.names_namespaces();
                    for what in lacking(policy, is_on_host, inner.addresses.has_own(pod)) {
                        let key = (uid(pod).to_owned(), policy.name.clone(), what);
                        if !self.told.contains(&key) {
                            let message = format!("NetworkPolicy {}/{} {what}", policy.namespace, policy.name);
                            tracing::info!(pod = full_name(pod), "{message}");
                            self.events.pod(pod, None, Severity::Warning, event::POLICY_NOT_KEPT, message);
                        }
                        said.insert(key);
                    }
                }
            }
        }
        // What is the case no longer is told again when it is again.
        self.told = said;
        needs
    }
}

/// What of a policy that selects a pod this node does not do.
fn lacking(policy: &Policy, is_on_host: bool, has_address: bool) -> Vec<&'static str> {
    if is_on_host {
        return vec![
            "does not apply to this pod: it is on the host's network (hostNetwork), and its traffic is the node's",
        ];
    }
    let mut lacking = Vec::new();
    if policy.is_of(Direction::Ingress) && !has_address {
        lacking.push(
            "is kept for connections of other machines alone: the pod has no address of its own (--pod-cidr), and pods of \
             this node cannot be told from the node, which may always connect",
        );
    }
    if policy.is_of(Direction::Egress) && !has_address {
        lacking.push(
            "is kept for connections to other machines alone: pods have no addresses of their own (--pod-cidr), and what is \
             called on this node cannot be told from the node, which may always be called",
        );
    }
    if policy.names_ports_of_others() {
        lacking.push(
            "allows egress to ports by name: of pods of other nodes their names are not known, and such a rule allows none \
             of their ports",
        );
    }
    lacking
}
