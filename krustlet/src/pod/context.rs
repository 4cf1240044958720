//! What every pod of a node shares.

use super::fields::PodFacts;
use super::images::{Builders, PullSecrets};
use super::roster::Roster;
use super::sources::Objects;
use super::uid;
use super::volumes::HostPaths;
use crate::addresses::Addresses;
use crate::events::Recorder;
use crate::eviction::Evictions;
use crate::policies::NetworkPolicies;
use crate::ports::Ports;
use crate::pressure::Signals;
use k8s_openapi::api::core::v1::Pod;
use krustlet_runtime::Runtime;
use std::path::PathBuf;
use std::sync::Arc;
use tokio_util::sync::CancellationToken;

pub struct NodeContext {
    pub client: kube::Client,
    pub runtime: Runtime,
    pub events: Recorder,
    pub facts: PodFacts,
    pub addresses: Arc<Addresses>,
    pub policies: NetworkPolicies,
    pub data_dir: PathBuf,
    pub objects: Objects,
    pub pull_secrets: PullSecrets,
    /// Who must have built what runs, by namespace.
    pub builders: Builders,
    pub host_paths: Arc<HostPaths>,
    pub ports: Ports,
    pub roster: Arc<Roster>,
    pub evictions: Arc<Evictions>,
    pub signals: Arc<Signals>,
    /// The agent is to stop.
    pub shutdown: CancellationToken,
}

impl NodeContext {
    /// What the pod may learn about where it runs; its address only when it has one.
    pub fn facts_of(&self, pod: &Pod) -> PodFacts {
        let address = self.addresses.of(pod).map(|address| address.ip.to_string());
        PodFacts { pod_ip: address.unwrap_or_default(), ..self.facts.clone() }
    }

    /// Where a pod's volumes and memory are kept.
    pub fn pod_dir(&self, pod: &Pod) -> PathBuf {
        self.data_dir.join("pods").join(uid(pod))
    }
}
