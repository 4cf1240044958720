//! The Node object and its Lease: registered, kept true, and put back when somebody deletes them.

use crate::backoff::Backoff;
use crate::client::{describe, status_code};
use crate::policies::Standing;
use crate::pressure::{Pressure, Signals};
use crate::reasons::node as reasons;
use jiff::Timestamp;
use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::api::core::v1::{
    DaemonEndpoint, Node, NodeAddress, NodeCondition, NodeDaemonEndpoints, NodeSpec, NodeStatus, NodeSystemInfo,
    ObjectReference, Taint,
};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{MicroTime, OwnerReference, Time};
use k8s_openapi::apimachinery::pkg::version::Info;
use krustlet_runtime::Ipv4Net;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use serde_json::json;
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::{debug, info, warn};

/// The kubelet's own rhythm: a lease of 40 s renewed every 10 s survives three lost renewals.
const LEASE_DURATION_SECONDS: i32 = 40;
const LEASE_RENEWAL: Duration = Duration::from_secs(10);
const LEASE_NAMESPACE: &str = "kube-node-lease";

/// An unchanged status is sent this often all the same.
const STATUS_REPORT: Duration = Duration::from_secs(300);
/// How often pressure is measured.
const MEASURE: Duration = Duration::from_secs(10);

pub const ARCHITECTURE: &str = "wasm32-wasi";
pub const OPERATING_SYSTEM: &str = "wasi";

/// Which labels the agent set at its last start, so that one that is gone from the flags goes from the Node too.
const LABELS_ANNOTATION: &str = "krustlet.dev/node-labels";

/// By which keys modules are judged from now on, for who waits until a node has taken another one.
const KEYS_LABEL: &str = "krustlet.dev/verification-keys";

/// Which address and ports pods have here, for who reads `kubectl describe node`.
const NETWORK_ANNOTATION: &str = "krustlet.dev/pod-network";

/// The minor version of Kubernetes whose API this agent is written to.
const KUBERNETES_MINOR: u32 = 37;

/// The Kubernetes version that the node counts as, then the agent's own. No kubelet may be newer than its API server
/// (https://kubernetes.io/releases/version-skew-policy/), and this agent needs nothing that an older one lacks.
fn kubelet_version(server: Option<&Info>) -> String {
    // Clouds write "36+".
    let minor = server.and_then(|server| server.minor.trim_end_matches('+').parse().ok()).unwrap_or(KUBERNETES_MINOR);
    format!("v1.{}.0+krustlet.{}", minor.min(KUBERNETES_MINOR), env!("CARGO_PKG_VERSION"))
}

/// What an operator is told of a client certificate that ends then, unrenewed.
pub fn expiry(end: Timestamp) -> String {
    format!(
        "the node's client certificate ends at {end:.0}, and its renewal is not approved: `kubectl get csr` shows the request, \
         `kubectl certificate approve NAME` approves it"
    )
}

/// What the flags say about the node.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    pub name: String,
    pub hostname: String,
    pub address: IpAddr,
    pub external_address: Option<IpAddr>,
    pub port: u16,
    pub labels: BTreeMap<String, String>,
    pub provider_id: Option<String>,
    pub max_pods: u32,
    /// The range that pods get addresses from.
    pub pod_cidr: Option<Ipv4Net>,
}

impl NodeConfig {
    /// The given labels, with those that make the node what it is. The latter win.
    fn all_labels(&self) -> BTreeMap<String, String> {
        let mut labels = self.labels.clone();
        for (key, value) in [
            ("kubernetes.io/arch", ARCHITECTURE),
            ("kubernetes.io/os", OPERATING_SYSTEM),
            ("kubernetes.io/hostname", self.name.as_str()),
            ("type", "krustlet"),
            ("node.kubernetes.io/exclude-from-external-load-balancers", "true"),
        ] {
            labels.insert(key.to_owned(), value.to_owned());
        }
        labels
    }

    fn taints() -> Vec<Taint> {
        ["NoSchedule", "NoExecute"]
            .map(|effect| Taint {
                key: "kubernetes.io/arch".to_owned(),
                value: Some(ARCHITECTURE.to_owned()),
                effect: effect.to_owned(),
                time_added: None,
            })
            .to_vec()
    }

    fn addresses(&self) -> Vec<NodeAddress> {
        let address = |type_: &str, address: String| NodeAddress { type_: type_.to_owned(), address };
        let mut addresses = vec![address("InternalIP", self.address.to_string())];
        if let Some(external) = self.external_address {
            addresses.push(address("ExternalIP", external.to_string()));
        }
        addresses.push(address("Hostname", self.hostname.clone()));
        addresses
    }

    /// The Node that the flags describe, without a status.
    fn node(&self) -> Node {
        let labels = self.all_labels();
        Node {
            metadata: ObjectMeta {
                name: Some(self.name.clone()),
                annotations: Some(BTreeMap::from([
                    (LABELS_ANNOTATION.to_owned(), label_keys(&labels)),
                    (NETWORK_ANNOTATION.to_owned(), self.network(None)),
                ])),
                labels: Some(labels),
                ..ObjectMeta::default()
            },
            spec: Some(NodeSpec {
                provider_id: self.provider_id.clone(),
                pod_cidr: self.pod_cidr.map(|range| range.to_string()),
                pod_cidrs: self.pod_cidr.map(|range| vec![range.to_string()]),
                taints: Some(Self::taints()),
                ..NodeSpec::default()
            }),
            status: None,
        }
    }

    /// The contract that holds for pods; with the Node's podCIDR, which may be another that was set before.
    fn network(&self, existing: Option<&str>) -> String {
        let Some(range) = self.pod_cidr else {
            return "node: a containerPort is a port of the node's address".to_owned();
        };
        let mut text = format!("pod: each pod has an address of its own out of {range}");
        if let Some(other) = existing.filter(|other| *other != range.to_string()) {
            text += &format!("; the Node's podCIDR {other} was set before and is of no effect");
        }
        text
    }

    /// What to change on an existing Node so that it follows the flags; nothing when it does.
    fn correction(&self, existing: &Node) -> Option<serde_json::Value> {
        let wanted = self.all_labels();
        let found = existing.metadata.labels.clone().unwrap_or_default();
        let recorded = existing
            .metadata
            .annotations
            .as_ref()
            .and_then(|all| all.get(LABELS_ANNOTATION))
            .cloned()
            .unwrap_or_default();
        let mut labels = serde_json::Map::new();
        for (key, value) in &wanted {
            if found.get(key) != Some(value) {
                labels.insert(key.clone(), json!(value));
            }
        }
        for key in recorded.split(',').filter(|key| !key.is_empty()) {
            if !wanted.contains_key(key) && found.contains_key(key) {
                labels.insert(key.to_owned(), serde_json::Value::Null);
            }
        }
        let record = label_keys(&wanted);
        let range = existing.spec.as_ref().and_then(|spec| spec.pod_cidr.as_deref()).filter(|range| !range.is_empty());
        let network = self.network(range);
        let told = existing.metadata.annotations.as_ref().and_then(|all| all.get(NETWORK_ANNOTATION));
        let mut patch = serde_json::Map::new();
        if !labels.is_empty() || record != recorded || told != Some(&network) {
            let annotations = json!({LABELS_ANNOTATION: record, NETWORK_ANNOTATION: network});
            patch.insert("metadata".into(), json!({"labels": labels, "annotations": annotations}));
        }
        let mut spec = serde_json::Map::new();
        let provider = existing.spec.as_ref().and_then(|spec| spec.provider_id.as_deref()).unwrap_or_default();
        if let Some(wanted) = &self.provider_id
            && provider.is_empty()
        {
            spec.insert("providerID".into(), json!(wanted));
        }
        // The API server takes it once and never again.
        if let (Some(wanted), None) = (self.pod_cidr, range) {
            spec.insert("podCIDR".into(), json!(wanted.to_string()));
            spec.insert("podCIDRs".into(), json!([wanted.to_string()]));
        }
        if !spec.is_empty() {
            patch.insert("spec".into(), spec.into());
        }
        (!patch.is_empty()).then_some(serde_json::Value::Object(patch))
    }

    /// The taints that the Node lacks. Kubernetes does not let a node change its own taints after it was created.
    fn missing_taints(existing: &Node) -> Vec<Taint> {
        let found = existing.spec.as_ref().and_then(|spec| spec.taints.as_ref());
        let present =
            |wanted: &Taint| found.iter().copied().flatten().any(|t| t.key == wanted.key && t.effect == wanted.effect);
        Self::taints().into_iter().filter(|taint| !present(taint)).collect()
    }
}

fn label_keys(labels: &BTreeMap<String, String>) -> String {
    labels.keys().map(String::as_str).collect::<Vec<_>>().join(",")
}

/// The machine's size, and what of it is left.
#[derive(Debug)]
pub struct Machine {
    pub signals: Arc<Signals>,
    pub cpus: u64,
}

impl Machine {
    pub fn measure(signals: Arc<Signals>) -> Self {
        let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self { signals, cpus: u64::try_from(cpus).unwrap_or(1) }
    }

    fn allocatable_disk(&self) -> u64 {
        let total = self.signals.disk().last().total;
        total.saturating_sub(self.signals.thresholds.nodefs_available.of(total))
    }

    fn resources(cpus: u64, memory: u64, disk: u64, pods: u32) -> BTreeMap<String, Quantity> {
        BTreeMap::from([
            ("cpu".to_owned(), Quantity(cpus.to_string())),
            ("memory".to_owned(), Quantity(format!("{}Ki", memory / 1024))),
            ("ephemeral-storage".to_owned(), Quantity(format!("{}Ki", disk / 1024))),
            ("pods".to_owned(), Quantity(pods.to_string())),
        ])
    }
}

/// Whether the node takes work, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Readiness {
    Ready,
    NotReady(&'static str),
}

/// What the rest of the agent tells of itself.
#[derive(Clone)]
pub struct Told {
    pub readiness: watch::Receiver<Readiness>,
    /// The fingerprint of the keys.
    pub keys: watch::Receiver<Option<String>>,
    /// When the client certificate ends, once its renewal is late.
    pub expiring: watch::Receiver<Option<Timestamp>>,
    /// Whether NetworkPolicies are kept.
    pub policies: watch::Receiver<Standing>,
}

/// Keeps one Node and its Lease.
pub struct Keeper {
    client: kube::Client,
    config: NodeConfig,
    machine: Machine,
    told: Told,
    /// The readiness that the API server has heard of.
    reported: watch::Sender<Option<Readiness>>,
    /// UID of the Node, which the Lease belongs to.
    uid: watch::Sender<Option<String>>,
    info: NodeSystemInfo,
    /// The conditions that were sent last, to keep the times of their transitions.
    sent: Vec<NodeCondition>,
    sent_at: Option<Instant>,
    warned_taints: bool,
}

impl Keeper {
    pub fn new(client: kube::Client, config: NodeConfig, machine: Machine, told: Told) -> Self {
        Self {
            client,
            config,
            machine,
            told,
            reported: watch::Sender::new(None),
            uid: watch::Sender::new(None),
            info: system_info(kubelet_version(None)),
            sent: Vec::new(),
            sent_at: None,
            warned_taints: false,
        }
    }

    /// Follows what the API server has heard of the node's readiness.
    pub fn reported(&self) -> watch::Receiver<Option<Readiness>> {
        self.reported.subscribe()
    }

    fn nodes(&self) -> Api<Node> {
        Api::all(self.client.clone())
    }

    /// Registers the node, or makes the existing one follow the flags, and sends its status. Tries until it succeeds.
    pub async fn register(&mut self) {
        let mut backoff = Backoff::api();
        loop {
            match self.try_register().await {
                Ok(()) => return,
                Err(error) => warn!(node = self.config.name, "failed to register, trying again: {}", describe(&error)),
            }
            tokio::time::sleep(backoff.jittered()).await;
        }
    }

    async fn try_register(&mut self) -> kube::Result<()> {
        match self.told.keys.borrow_and_update().clone() {
            Some(keys) => self.config.labels.insert(KEYS_LABEL.to_owned(), keys),
            None => self.config.labels.remove(KEYS_LABEL),
        };
        self.info.kubelet_version = kubelet_version(Some(&self.client.apiserver_version().await?));
        let api = self.nodes();
        let node = match api.get_opt(&self.config.name).await? {
            Some(existing) => self.correct(existing).await?,
            None => match api.create(&PostParams::default(), &self.config.node()).await {
                Ok(node) => {
                    info!(node = self.config.name, "node registered");
                    node
                }
                Err(error) if status_code(&error) == Some(409) => {
                    self.correct(api.get(&self.config.name).await?).await?
                }
                Err(error) => return Err(error),
            },
        };
        self.take_up(&node);
        self.report().await
    }

    async fn correct(&mut self, existing: Node) -> kube::Result<Node> {
        let missing = NodeConfig::missing_taints(&existing);
        if missing.is_empty() {
            self.warned_taints = false;
        } else if !self.warned_taints {
            self.warned_taints = true;
            let taints: Vec<String> =
                missing.iter().map(|t| format!("{}={}:{}", t.key, ARCHITECTURE, t.effect)).collect();
            warn!(
                "node {name} lacks its taints and may not set them itself: kubectl taint node {name} {}",
                taints.join(" "),
                name = self.config.name,
            );
        }
        match self.config.correction(&existing) {
            Some(patch) => self.nodes().patch(&self.config.name, &PatchParams::default(), &Patch::Merge(&patch)).await,
            None => Ok(existing),
        }
    }

    /// Learns from the API's Node: its UID, and since when its conditions are what they are.
    fn take_up(&mut self, node: &Node) {
        self.uid.send_if_modified(|uid| {
            let changed = *uid != node.metadata.uid;
            uid.clone_from(&node.metadata.uid);
            changed
        });
        if let Some(conditions) = node.status.as_ref().and_then(|status| status.conditions.clone()) {
            self.sent = conditions;
        }
    }

    /// Sends the node's status, whole.
    async fn report(&mut self) -> kube::Result<()> {
        let readiness = self.told.readiness.borrow_and_update().clone();
        let conditions = self.conditions(&readiness);
        let mut status = serde_json::to_value(self.status(conditions.clone())).map_err(kube::Error::SerdeError)?;
        // Addresses would be merged by type, and one that is gone from the flags would stay.
        if let Some(addresses) = status.get_mut("addresses").and_then(serde_json::Value::as_array_mut) {
            addresses.push(json!({"$patch": "replace"}));
        }
        let patch = json!({"status": status});
        self.nodes().patch_status(&self.config.name, &PatchParams::default(), &Patch::Strategic(&patch)).await?;
        self.sent = conditions;
        self.sent_at = Some(Instant::now());
        self.reported.send_replace(Some(readiness));
        Ok(())
    }

    fn status(&self, conditions: Vec<NodeCondition>) -> NodeStatus {
        let machine = &self.machine;
        let pods = self.config.max_pods;
        NodeStatus {
            addresses: Some(self.config.addresses()),
            capacity: Some(Machine::resources(
                machine.cpus,
                machine.signals.memory().total,
                machine.signals.disk().last().total,
                pods,
            )),
            allocatable: Some(Machine::resources(
                machine.cpus,
                machine.signals.allocatable_memory(),
                machine.allocatable_disk(),
                pods,
            )),
            conditions: Some(conditions),
            daemon_endpoints: Some(NodeDaemonEndpoints {
                kubelet_endpoint: Some(DaemonEndpoint { port: i32::from(self.config.port) }),
            }),
            node_info: Some(self.info.clone()),
            ..NodeStatus::default()
        }
    }

    /// Keeps Node and Lease until the future is dropped.
    pub async fn keep(mut self) {
        let lease = keep_lease(self.client.clone(), self.config.name.clone(), self.uid.subscribe());
        tokio::select! {
            () = lease => {}
            () = self.keep_node() => {}
        }
    }

    async fn keep_node(&mut self) {
        let selector = watcher::Config::default().fields(&format!("metadata.name={}", self.config.name));
        let mut events = pin!(watcher(self.nodes(), selector).backoff(Backoff::api()));
        let mut measure = tokio::time::interval(MEASURE);
        measure.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut present = true;
        let Told { mut readiness, mut keys, mut expiring, mut policies } = self.told.clone();
        loop {
            let due = tokio::select! {
                changed = readiness.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    true
                }
                Ok(()) = keys.changed() => {
                    self.register().await;
                    false
                }
                Ok(()) = expiring.changed() => true,
                Ok(()) = policies.changed() => self.is_due(),
                _ = measure.tick() => self.is_due(),
                event = futures::StreamExt::next(&mut events) => match event {
                    Some(Ok(Event::Init)) => { present = false; false }
                    Some(Ok(Event::InitApply(node) | Event::Apply(node))) => {
                        present = true;
                        self.take_up(&node);
                        self.is_due()
                    }
                    Some(Ok(Event::Delete(_))) => {
                        warn!(node = self.config.name, "somebody deleted the node; registering it again");
                        self.register().await;
                        false
                    }
                    Some(Ok(Event::InitDone)) => {
                        if !present {
                            self.register().await;
                        }
                        false
                    }
                    Some(Err(error)) => { debug!("watch on the node failed: {error}"); false }
                    None => return,
                },
            };
            if due && let Err(error) = self.report().await {
                debug!("failed to report the node's status: {}", describe(&error));
                if status_code(&error) == Some(404) {
                    self.register().await;
                }
            }
        }
    }

    fn conditions(&self, readiness: &Readiness) -> Vec<NodeCondition> {
        let expiring = *self.told.expiring.borrow();
        let policies = self.told.policies.borrow().clone();
        conditions(readiness, self.machine.signals.pressure(), expiring, &policies, &self.sent, now())
    }

    /// Whether the API's Node differs from the truth, or has not heard from us for long.
    fn is_due(&self) -> bool {
        let current = self.conditions(&self.told.readiness.borrow());
        let states = |conditions: &[NodeCondition]| -> Vec<(String, String, Option<String>)> {
            let mut states: Vec<_> = conditions
                .iter()
                .filter(|c| OUR_CONDITIONS.contains(&c.type_.as_str()))
                .map(|c| (c.type_.clone(), c.status.clone(), c.reason.clone()))
                .collect();
            states.sort();
            states
        };
        self.sent_at.is_none_or(|at| at.elapsed() >= STATUS_REPORT) || states(&current) != states(&self.sent)
    }
}

const OUR_CONDITIONS: [&str; 6] = [
    reasons::MEMORY_PRESSURE,
    reasons::DISK_PRESSURE,
    reasons::PID_PRESSURE,
    reasons::CERTIFICATE_EXPIRING,
    reasons::POLICIES_NOT_KEPT,
    reasons::READY,
];

/// The node's conditions now; those that were so before keep the time of their transition.
fn conditions(
    readiness: &Readiness,
    pressure: Pressure,
    expiring: Option<Timestamp>,
    policies: &Standing,
    before: &[NodeCondition],
    now: Timestamp,
) -> Vec<NodeCondition> {
    let condition = |type_: &str, holds: bool, reason: &str, message: &str| {
        let status = if holds { "True" } else { "False" };
        let since = before
            .iter()
            .find(|c| c.type_ == type_ && c.status == status)
            .and_then(|c| c.last_transition_time.clone())
            .unwrap_or(Time(now));
        NodeCondition {
            type_: type_.to_owned(),
            status: status.to_owned(),
            reason: Some(reason.to_owned()),
            message: Some(message.to_owned()),
            last_heartbeat_time: Some(Time(now)),
            last_transition_time: Some(since),
        }
    };
    let memory = if pressure.memory {
        condition(
            reasons::MEMORY_PRESSURE,
            true,
            reasons::INSUFFICIENT_MEMORY,
            "less memory is available than the node keeps free (--eviction-hard)",
        )
    } else {
        condition(reasons::MEMORY_PRESSURE, false, reasons::SUFFICIENT_MEMORY, "node has sufficient memory")
    };
    let disk = if pressure.disk {
        condition(
            reasons::DISK_PRESSURE,
            true,
            reasons::DISK_PRESSURE_REASON,
            "less of the data directory's disk is left than the node keeps free (--eviction-hard)",
        )
    } else {
        condition(reasons::DISK_PRESSURE, false, reasons::NO_DISK_PRESSURE, "node has no disk pressure")
    };
    let pid = condition(
        reasons::PID_PRESSURE,
        false,
        reasons::SUFFICIENT_PID,
        "guests are not processes: a node cannot run out of them",
    );
    let (type_, kept) = (reasons::CERTIFICATE_EXPIRING, reasons::CERTIFICATE_IS_KEPT);
    let certificate = match expiring {
        Some(end) => condition(type_, true, reasons::RENEWAL_NOT_APPROVED, &expiry(end)),
        None => condition(type_, false, kept, "the client certificate is renewed long before its end"),
    };
    let type_ = reasons::POLICIES_NOT_KEPT;
    let policies = match policies {
        Standing::NotKept(why) => condition(type_, true, reasons::MAY_NOT_READ, why),
        Standing::Kept | Standing::Asking(_) => {
            condition(type_, false, reasons::POLICIES_ARE_KEPT, "pods take connections as NetworkPolicies let them in")
        }
    };
    let ready = match readiness {
        Readiness::Ready => condition(reasons::READY, true, reasons::KUBELET_READY, "krustlet is taking pods"),
        Readiness::NotReady(why) => condition(reasons::READY, false, reasons::KUBELET_NOT_READY, why),
    };
    vec![memory, disk, pid, certificate, policies, ready]
}

fn now() -> Timestamp {
    crate::pod::status::now()
}

/// Renews the node's Lease, and puts it back when it is gone.
async fn keep_lease(client: kube::Client, name: String, mut uid: watch::Receiver<Option<String>>) {
    let api: Api<Lease> = Api::namespaced(client, LEASE_NAMESPACE);
    let mut held: Option<Lease> = None;
    let mut failing: Option<Instant> = None;
    let mut complained = Instant::now();
    let mut tick = tokio::time::interval(LEASE_RENEWAL);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            changed = uid.changed() => {
                if changed.is_err() {
                    return;
                }
                // The Node was put back: its Lease belongs to the new one.
                held = None;
            }
        }
        let owner = uid.borrow_and_update().clone();
        match renew(&api, &name, owner.as_deref(), held.take()).await {
            Ok(lease) => {
                held = Some(lease);
                if let Some(since) = failing.take() {
                    info!("the API server answers again after {} s", since.elapsed().as_secs());
                }
            }
            Err(error) => {
                if failing.is_none() || complained.elapsed() > Duration::from_secs(60) {
                    warn!("failed to renew the node's lease: {}", describe(&error));
                    complained = Instant::now();
                }
                failing.get_or_insert_with(Instant::now);
                // Sooner than the next beat: each one missed brings the node nearer to being given up.
                tick.reset_after(LEASE_RENEWAL / 4);
            }
        }
    }
}

async fn renew(api: &Api<Lease>, name: &str, owner: Option<&str>, held: Option<Lease>) -> kube::Result<Lease> {
    let held = match held {
        Some(lease) => Some(lease),
        None => api.get_opt(name).await?,
    };
    let beat = MicroTime(Timestamp::now());
    let owners = owner.map(|uid| {
        vec![OwnerReference {
            api_version: "v1".to_owned(),
            kind: "Node".to_owned(),
            name: name.to_owned(),
            uid: uid.to_owned(),
            ..OwnerReference::default()
        }]
    });
    let mut lease = held.clone().unwrap_or_default();
    lease.metadata.name = Some(name.to_owned());
    lease.metadata.namespace = Some(LEASE_NAMESPACE.to_owned());
    lease.metadata.owner_references = owners;
    lease.spec = Some(LeaseSpec {
        holder_identity: Some(name.to_owned()),
        lease_duration_seconds: Some(LEASE_DURATION_SECONDS),
        renew_time: Some(beat),
        ..LeaseSpec::default()
    });
    if held.is_some() {
        match api.replace(name, &PostParams::default(), &lease).await {
            // Gone, or changed by another hand: what we held is worth nothing.
            Err(error) if matches!(status_code(&error), Some(404 | 409)) => {}
            result => return result,
        }
        match api.get_opt(name).await? {
            Some(current) => {
                lease.metadata.resource_version = current.metadata.resource_version;
                lease.metadata.uid = current.metadata.uid;
                return api.replace(name, &PostParams::default(), &lease).await;
            }
            None => {
                lease.metadata.resource_version = None;
                lease.metadata.uid = None;
                lease.metadata.creation_timestamp = None;
            }
        }
    }
    api.create(&PostParams::default(), &lease).await
}

/// The node as the subject of an Event.
pub fn reference(name: &str) -> ObjectReference {
    ObjectReference {
        kind: Some("Node".to_owned()),
        api_version: Some("v1".to_owned()),
        name: Some(name.to_owned()),
        // By name, as the kubelet: `kubectl describe node` looks for it so.
        uid: Some(name.to_owned()),
        ..ObjectReference::default()
    }
}

fn system_info(kubelet_version: String) -> NodeSystemInfo {
    let read = |path: &str| std::fs::read_to_string(path).map(|text| text.trim().to_owned()).unwrap_or_default();
    let machine_id = read("/etc/machine-id");
    let uuid = sysinfo::Product::uuid().ok().filter(|uuid| !uuid.is_empty()).unwrap_or_else(|| machine_id.clone());
    let boot_id = Some(read("/proc/sys/kernel/random/boot_id"))
        .filter(|id| !id.is_empty())
        .or_else(|| sysinfo::System::boot_time().ok().map(|seconds| seconds.to_string()))
        .unwrap_or_default();
    NodeSystemInfo {
        architecture: ARCHITECTURE.to_owned(),
        operating_system: OPERATING_SYSTEM.to_owned(),
        container_runtime_version: format!("wasmtime://{}", krustlet_runtime::WASMTIME_VERSION),
        kubelet_version,
        kernel_version: sysinfo::System::kernel_version().unwrap_or_default(),
        os_image: sysinfo::System::long_os_version().unwrap_or_default(),
        system_uuid: uuid,
        machine_id,
        boot_id,
        ..NodeSystemInfo::default()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::{self, Disk};
    use crate::memory::{self, Memory, PodsMemory};
    use crate::pressure::Thresholds;

    fn config(labels: &[(&str, &str)]) -> NodeConfig {
        NodeConfig {
            name: "wasm-1".into(),
            hostname: "wasm-1.internal".into(),
            address: "127.0.0.2".parse().unwrap(),
            external_address: None,
            port: 10250,
            labels: labels.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            provider_id: Some("gce://p/z/wasm-1".into()),
            max_pods: 500,
            pod_cidr: None,
        }
    }

    #[test]
    fn a_node_that_follows_the_flags_is_left_alone() {
        let config = config(&[("team", "a")]);
        assert_eq!(config.correction(&config.node()), None);
        assert!(NodeConfig::missing_taints(&config.node()).is_empty());
    }

    #[test]
    fn a_label_that_is_gone_from_the_flags_goes_from_the_node_and_a_stranger_stays() {
        let mut node = config(&[("team", "a"), ("zone", "1")]).node();
        node.metadata.labels.as_mut().unwrap().insert("somebody".into(), "else".into());
        let patch = config(&[("zone", "2")]).correction(&node).unwrap();
        assert_eq!(patch["metadata"]["labels"], json!({"team": null, "zone": "2"}));
        assert!(patch.get("spec").is_none());
    }

    #[test]
    fn the_nodes_pod_cidr_is_set_once_and_its_annotation_says_which_contract_holds() {
        let ranged = |range: &str| NodeConfig { pod_cidr: Some(range.parse().unwrap()), ..config(&[]) };
        let (before, first) = (config(&[]).node(), ranged("10.1.0.0/24"));
        assert!(before.metadata.annotations.as_ref().unwrap()[NETWORK_ANNOTATION].starts_with("node: "));
        let patch = first.correction(&before).unwrap();
        assert_eq!(patch["spec"], json!({"podCIDR": "10.1.0.0/24", "podCIDRs": ["10.1.0.0/24"]}));
        assert_eq!(first.correction(&first.node()), None);
        let patch = ranged("10.2.0.0/24").correction(&first.node()).unwrap();
        assert!(patch.get("spec").is_none(), "the API server would refuse it");
        let told = patch["metadata"]["annotations"][NETWORK_ANNOTATION].as_str().unwrap();
        assert!(told.contains("out of 10.2.0.0/24") && told.contains("podCIDR 10.1.0.0/24"), "{told}");
        let back = config(&[]).correction(&first.node()).unwrap();
        assert!(back["metadata"]["annotations"][NETWORK_ANNOTATION].as_str().unwrap().starts_with("node: "));
    }

    #[test]
    fn flags_cannot_change_what_makes_the_node_a_wasm_node() {
        assert_eq!(config(&[("kubernetes.io/arch", "amd64")]).all_labels()["kubernetes.io/arch"], ARCHITECTURE);
    }

    #[test]
    fn missing_taints_are_found() {
        let mut node = config(&[]).node();
        node.spec.as_mut().unwrap().taints.as_mut().unwrap().remove(0);
        let missing = NodeConfig::missing_taints(&node);
        assert_eq!(missing.len(), 1);
        assert_eq!(missing[0].effect, "NoSchedule");
    }

    #[test]
    fn a_condition_keeps_the_time_of_its_transition_until_it_changes() {
        let (start, later): (Timestamp, Timestamp) =
            ("2026-01-01T00:00:00Z".parse().unwrap(), "2026-01-01T01:00:00Z".parse().unwrap());
        let not_ready = Readiness::NotReady("starting");
        let first = conditions(&not_ready, Pressure::default(), None, &Standing::Kept, &[], start);
        let same = conditions(&not_ready, Pressure::default(), None, &Standing::Kept, &first, later);
        assert_eq!(same[5].last_transition_time, Some(Time(start)));
        assert_eq!(same[5].last_heartbeat_time, Some(Time(later)));
        let ready = conditions(&Readiness::Ready, Pressure::default(), None, &Standing::Kept, &same, later);
        assert_eq!(ready[5].status, "True");
        assert_eq!(ready[5].last_transition_time, Some(Time(later)));
        assert_eq!(ready[0].last_transition_time, Some(Time(start)));
    }

    #[test]
    fn the_node_is_never_newer_than_its_api_server_nor_than_the_agent() {
        let version = |minor: &str| kubelet_version(Some(&Info { minor: minor.into(), ..Info::default() }));
        for (server, told) in [("35", "35"), ("36+", "36"), ("37", "37"), ("38+", "37"), ("", "37"), ("x", "37")] {
            assert!(version(server).starts_with(&format!("v1.{told}.0+krustlet.")), "{server:?}");
        }
        assert_eq!(kubelet_version(None), version("37"));
    }

    #[test]
    fn what_the_node_keeps_free_is_not_the_pods() {
        let memory = Memory::with(memory::Figures { total: 8 << 30, available: 0 });
        let disk = Disk::with(disk::Figures { total: 100 << 30, ..disk::Figures::default() });
        let pods = PodsMemory::With(memory::Figures { total: 6 << 30, available: 0 });
        let signals = Signals::new(memory, pods, disk, Thresholds::default(), Duration::ZERO);
        let machine = Machine::measure(Arc::new(signals));
        let (memory, disk) = (machine.signals.allocatable_memory(), machine.allocatable_disk());
        let resources = Machine::resources(2, memory, disk, 9);
        assert_eq!(resources["memory"].0, format!("{}Ki", (6u64 << 20) - 100 * 1024));
        assert_eq!(resources["ephemeral-storage"].0, format!("{}Ki", 90u64 << 20));
        assert_eq!(resources["pods"].0, "9");
    }
}
