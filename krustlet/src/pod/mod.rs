//! One pod: from its object in the API to running guests, and back to its status.

pub mod checkpoint;
pub mod context;
pub mod environment;
pub mod failure;
pub mod fields;
pub mod guest;
pub mod hooks;
pub mod http_get;
pub mod images;
pub mod lifecycle;
pub mod limits;
pub mod ports;
pub mod probes;
pub mod publish;
pub mod restart;
pub mod roster;
pub mod sources;
pub mod start;
pub mod status;
#[cfg(test)]
pub mod testing;
pub mod volumes;
pub mod worker;

use k8s_openapi::api::core::v1::{Container, Pod, PodSpec};

/// Annotations that set what the pod's API has no field for.
pub mod annotation {
    /// `host[:port],…` or `*.domain` that the pod's guests may send HTTP requests to. None without it.
    pub const ALLOWED_HOSTS: &str = "krustlet.dev/allowed-hosts";
    /// `NAME[/KEY]` of a ConfigMap with certificate authorities in PEM that the pod's outbound https trusts too; one
    /// that the pod has as a volume, since a node may read no other.
    pub const CA_BUNDLE: &str = "krustlet.dev/ca-bundle";
    /// How long it may take until a request's answer begins, e.g. `30s`.
    pub const REQUEST_TIMEOUT: &str = "krustlet.dev/request-timeout";
    /// How long an answer that has begun may pause.
    pub const STREAM_IDLE_TIMEOUT: &str = "krustlet.dev/stream-idle-timeout";
    /// How many requests a container answers at once.
    pub const MAX_CONCURRENT_REQUESTS: &str = "krustlet.dev/max-concurrent-requests";
    /// `true`: the images are pulled, verified and compiled, and the containers have completed. The next pod of these
    /// images starts at once.
    pub const PREPARE_ONLY: &str = "krustlet.dev/prepare-only";
}

/// `namespace/name`, for messages.
pub fn full_name(pod: &Pod) -> String {
    format!("{}/{}", namespace(pod), name(pod))
}

pub fn namespace(pod: &Pod) -> &str {
    pod.metadata.namespace.as_deref().unwrap_or("default")
}

pub fn name(pod: &Pod) -> &str {
    pod.metadata.name.as_deref().unwrap_or_default()
}

pub fn uid(pod: &Pod) -> &str {
    pod.metadata.uid.as_deref().unwrap_or_default()
}

pub fn phase(pod: &Pod) -> &str {
    pod.status.as_ref().and_then(|status| status.phase.as_deref()).unwrap_or_default()
}

/// Whether the pod has ended for good: such a pod is never started again.
pub fn is_finished(pod: &Pod) -> bool {
    matches!(phase(pod), "Succeeded" | "Failed")
}

/// From this priority on, a pod is the cluster's own.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;

pub fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// Whether the pod is one of the cluster's own, which a node does not evict for its own sake.
pub fn is_critical(pod: &Pod) -> bool {
    priority(pod) >= SYSTEM_CRITICAL
}

/// The place of a container in its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Runs to completion before the next one begins.
    Init,
    /// An init container with restartPolicy Always: the next one begins when it has started; it ends last.
    Sidecar,
    Main,
}

/// The pod's containers in the order in which they begin.
pub fn containers(spec: &PodSpec) -> impl Iterator<Item = (Role, &Container)> {
    let init = spec.init_containers.iter().flatten().map(|container| {
        let role = if container.restart_policy.as_deref() == Some("Always") { Role::Sidecar } else { Role::Init };
        (role, container)
    });
    init.chain(spec.containers.iter().map(|container| (Role::Main, container)))
}
