//! Prometheus metrics of the wasm side of the node. Labels never name a pod, so that their number stays small.

use crate::Image;
use crate::error::PullError;
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::sync::Arc;
use std::time::Duration;

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Code {
    code: u16,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Outcome {
    result: &'static str,
}

#[derive(Debug, Clone, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Source {
    source: &'static str,
}

#[derive(Debug)]
struct Inner {
    requests: Family<Code, Counter>,
    latency: Histogram,
    instances: Gauge,
    pulls: Family<Outcome, Counter>,
    pull_seconds: Histogram,
    removed: Counter,
    loads: Family<Source, Counter>,
    compile_seconds: Histogram,
}

/// Clones share the counters.
#[derive(Debug, Clone)]
pub struct Metrics(Arc<Inner>);

impl Metrics {
    pub fn register(registry: &mut Registry) -> Self {
        let inner = Inner {
            requests: Family::default(),
            // 100 µs to 13 s.
            latency: Histogram::new(exponential_buckets(0.0001, 2.0, 18)),
            instances: Gauge::default(),
            pulls: Family::default(),
            pull_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 14)),
            removed: Counter::default(),
            loads: Family::default(),
            compile_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 14)),
        };
        let registry = registry.sub_registry_with_prefix("krustlet");
        registry.register("http_requests", "Requests answered by guests, by status code", inner.requests.clone());
        registry.register_with_unit(
            "http_request_duration",
            "Time from a request's head to its answer's head",
            Unit::Seconds,
            inner.latency.clone(),
        );
        registry.register("wasm_instances", "Guest instances alive", inner.instances.clone());
        registry.register("image_pulls", "Image pulls, by result", inner.pulls.clone());
        registry.register_with_unit(
            "image_pull_duration",
            "Time of image pulls that went to a registry",
            Unit::Seconds,
            inner.pull_seconds.clone(),
        );
        registry.register("images_removed", "Images removed to free disk", inner.removed.clone());
        registry.register("module_loads", "Modules loaded, by where they came from", inner.loads.clone());
        registry.register_with_unit(
            "module_compile_duration",
            "Time of compilations",
            Unit::Seconds,
            inner.compile_seconds.clone(),
        );
        Self(Arc::new(inner))
    }

    pub fn answered(&self, code: http::StatusCode, duration: Duration) {
        self.0.requests.get_or_create(&Code { code: code.as_u16() }).inc();
        self.0.latency.observe(duration.as_secs_f64());
    }

    pub fn instance(&self) -> LiveInstance {
        self.0.instances.inc();
        LiveInstance(self.clone())
    }

    pub fn pulled(&self, result: &Result<Image, PullError>, duration: Duration) {
        let outcome = match result {
            Ok(image) if image.cached => "cached",
            Ok(_) => "pulled",
            Err(error) => error.reason(),
        };
        self.0.pulls.get_or_create(&Outcome { result: outcome }).inc();
        if outcome == "pulled" {
            self.0.pull_seconds.observe(duration.as_secs_f64());
        }
    }

    pub fn removed(&self, images: u64) {
        self.0.removed.inc_by(images);
    }

    pub fn loaded(&self, source: &'static str) {
        self.0.loads.get_or_create(&Source { source }).inc();
    }

    pub fn compiled(&self, duration: Duration) {
        self.0.compile_seconds.observe(duration.as_secs_f64());
    }
}

/// Counts one guest instance for as long as it lives.
#[derive(Debug)]
pub struct LiveInstance(Metrics);

impl Drop for LiveInstance {
    fn drop(&mut self) {
        self.0.0.instances.dec();
    }
}
