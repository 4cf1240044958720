//! What the agent shows of itself to its own parts: its pods, and what their containers use.

use k8s_openapi::api::core::v1::Pod;
use std::net::SocketAddr;
use std::sync::Arc;

/// The node at this moment.
pub trait View: Send + Sync + 'static {
    /// The node's pods, each with the status that the agent last found.
    fn pods(&self) -> Vec<Arc<Pod>>;
    /// What the containers that run now have used.
    fn usage(&self) -> Vec<ContainerUsage>;
    /// Where the pod's guests listen now.
    fn served(&self, uid: &str) -> Vec<SocketAddr>;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerUsage {
    pub pod_uid: String,
    pub container: String,
    pub stats: krustlet_runtime::Stats,
}
