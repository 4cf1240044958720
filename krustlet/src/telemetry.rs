//! What the agent tells about itself: JSON log lines on stderr, and the metrics of its Kubernetes side.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use std::sync::LazyLock;
use tracing::level_filters::LevelFilter;
use tracing_subscriber::EnvFilter;

/// Sends log lines to stderr, one JSON object each; `RUST_LOG` chooses them, `info` when it is not set.
pub fn init() -> anyhow::Result<()> {
    let filter = EnvFilter::builder().with_default_directive(LevelFilter::INFO.into()).from_env()?;
    // It warns at each try; who watches says once that it fails.
    let filter = filter.add_directive("kube_runtime::watcher=error".parse()?);
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_writer(std::io::stderr)
        .with_env_filter(filter)
        .try_init()
        .map_err(|error| anyhow::anyhow!("failed to start logging: {error}"))
}

/// The metrics of the Kubernetes side; those of the wasm side are the runtime's. Their names are those of the fields.
#[derive(Debug)]
pub struct Metrics {
    /// Pods on this node that have not ended.
    pub pods: Gauge,
    /// Containers that run now.
    pub containers_running: Gauge,
    /// Containers started again after they ended or failed a probe.
    pub container_restarts: Counter,
    /// Seconds from a pod's creation to its being Ready for the first time.
    pub pod_start_duration_seconds: Histogram,
    /// Probe tries by kind and result.
    pub probe_results: Family<ProbeLabels, Counter>,
    /// Status PATCHes sent for pods.
    pub status_patches: Counter,
    /// Requests to the node's HTTPS API by the first part of their path and the answer's status.
    pub api_requests: Family<ApiLabels, Counter>,
    /// Clients that follow a log now.
    pub log_followers: Gauge,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ProbeLabels {
    pub probe: &'static str,
    pub result: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub struct ApiLabels {
    pub endpoint: &'static str,
    pub code: u16,
}

/// One for the process, as its log is.
pub fn metrics() -> &'static Metrics {
    static METRICS: LazyLock<Metrics> = LazyLock::new(|| Metrics {
        pods: Gauge::default(),
        containers_running: Gauge::default(),
        container_restarts: Counter::default(),
        // 5 ms to 80 s: a cached module is a few milliseconds, a first pull and compile some seconds.
        pod_start_duration_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 15)),
        probe_results: Family::default(),
        status_patches: Counter::default(),
        api_requests: Family::default(),
        log_followers: Gauge::default(),
    });
    &METRICS
}

impl Metrics {
    /// Adds them to what `/metrics` shows, each as `krustlet_` and its field's name (and `_total` for a counter).
    pub fn register(&self, registry: &mut Registry) {
        let registry = registry.sub_registry_with_prefix("krustlet");
        registry.register("pods", "Pods on this node that have not ended", self.pods.clone());
        registry.register("containers_running", "Containers that run now", self.containers_running.clone());
        registry.register(
            "container_restarts",
            "Containers started again after they ended or failed a probe",
            self.container_restarts.clone(),
        );
        registry.register(
            "pod_start_duration_seconds",
            "Time from a pod's creation to its being Ready for the first time",
            self.pod_start_duration_seconds.clone(),
        );
        registry.register("probe_results", "Probe tries by kind and result", self.probe_results.clone());
        registry.register("status_patches", "Status PATCHes sent for pods", self.status_patches.clone());
        registry.register(
            "api_requests",
            "Requests to the node's HTTPS API by endpoint and status",
            self.api_requests.clone(),
        );
        registry.register("log_followers", "Clients that follow a log now", self.log_followers.clone());
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_is_shown_under_the_agents_name() {
        let mut registry = Registry::default();
        metrics().register(&mut registry);
        metrics().probe_results.get_or_create(&ProbeLabels { probe: "liveness", result: "failed" }).inc();
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            "# TYPE krustlet_pods gauge",
            "# TYPE krustlet_container_restarts counter",
            "krustlet_container_restarts_total ",
            "krustlet_pod_start_duration_seconds_bucket",
            "krustlet_probe_results_total{probe=\"liveness\",result=\"failed\"}",
            "krustlet_status_patches_total ",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }

    #[test]
    fn the_dashboard_shows_every_metric_of_the_kubernetes_side() {
        let dashboard = include_str!("../dashboards/krustlet.json");
        let mut registry = Registry::default();
        metrics().register(&mut registry);
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        let names = text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next());
        for name in names {
            assert!(dashboard.contains(name), "{name} is on no panel");
        }
    }
}
