//! Prometheus metrics of the wasm side of the node. Labels never name a pod, so that their number stays small.
//!
//! A request touches atomics and no lock: the registry's own families and histograms would have every thread of the node
//! wait for two locks at each answer.

use crate::Image;
use crate::error::PullError;
use prometheus_client::encoding::{EncodeLabelSet, EncodeMetric, MetricEncoder, NoLabelSet};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Registry, Unit};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

/// 100 µs to 13 s.
const LATENCIES: usize = 18;
const SHORTEST: Duration = Duration::from_micros(100);
/// 100 to 999.
const STATUS_CODES: usize = 900;

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

/// How long answers took, in buckets of which each is twice as wide as the one before.
#[derive(Debug, Default)]
struct Latencies {
    buckets: [AtomicU64; LATENCIES],
    /// Those that took longer.
    beyond: AtomicU64,
    nanoseconds: AtomicU64,
}

impl Latencies {
    fn observe(&self, duration: Duration) {
        let times = duration.as_nanos().div_ceil(SHORTEST.as_nanos()).max(1);
        // The first power of two that is not less.
        let bucket = times.next_power_of_two().trailing_zeros() as usize;
        self.buckets.get(bucket).unwrap_or(&self.beyond).fetch_add(1, Ordering::Relaxed);
        self.nanoseconds.fetch_add(duration.as_nanos() as u64, Ordering::Relaxed);
    }
}

/// What the registry is given of them.
#[derive(Debug)]
struct ObservedLatencies(Arc<Inner>);

impl EncodeMetric for ObservedLatencies {
    fn encode(&self, mut encoder: MetricEncoder) -> Result<(), fmt::Error> {
        let latencies = &self.0.latency;
        let seconds = Duration::from_nanos(latencies.nanoseconds.load(Ordering::Relaxed)).as_secs_f64();
        let bounds = exponential_buckets(SHORTEST.as_secs_f64(), 2.0, LATENCIES as u16);
        let buckets: Vec<(f64, u64)> = bounds
            .zip(&latencies.buckets)
            .map(|(bound, count)| (bound, count.load(Ordering::Relaxed)))
            .chain([(f64::INFINITY, latencies.beyond.load(Ordering::Relaxed))])
            .collect();
        let count = buckets.iter().map(|(_, count)| count).sum();
        encoder.encode_histogram::<NoLabelSet>(seconds, count, &buckets, None)
    }

    fn metric_type(&self) -> MetricType {
        MetricType::Histogram
    }
}

#[derive(Debug)]
struct Inner {
    requests: Family<Code, Counter>,
    /// Those of `requests`, each looked up when it is first needed.
    by_code: Box<[OnceLock<Counter>]>,
    latency: Latencies,
    instances: Gauge,
    denied: Counter,
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
        let inner = Arc::new(Inner {
            requests: Family::default(),
            by_code: (0..STATUS_CODES).map(|_| OnceLock::new()).collect(),
            latency: Latencies::default(),
            instances: Gauge::default(),
            denied: Counter::default(),
            pulls: Family::default(),
            pull_seconds: Histogram::new(exponential_buckets(0.005, 2.0, 14)),
            removed: Counter::default(),
            loads: Family::default(),
            compile_seconds: Histogram::new(exponential_buckets(0.01, 2.0, 14)),
        });
        let registry = registry.sub_registry_with_prefix("krustlet");
        registry.register("http_requests", "Requests answered by guests, by status code", inner.requests.clone());
        registry.register_with_unit(
            "http_request_duration",
            "Time from a request's head to its answer's head",
            Unit::Seconds,
            ObservedLatencies(inner.clone()),
        );
        registry.register("wasm_instances", "Guest instances alive", inner.instances.clone());
        registry.register(
            "denied_connections",
            "Connections closed because who made them may not connect to the pod",
            inner.denied.clone(),
        );
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
        Self(inner)
    }

    pub fn answered(&self, code: http::StatusCode, duration: Duration) {
        let code = code.as_u16();
        let counter = || self.0.requests.get_or_create(&Code { code }).clone();
        // The http crate knows codes of three digits only.
        if let Some(known) = self.0.by_code.get(usize::from(code.saturating_sub(100))) {
            known.get_or_init(counter).inc();
        }
        self.0.latency.observe(duration);
    }

    pub fn denied(&self) {
        self.0.denied.inc();
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_counted_by_code_and_by_the_time_that_they_took() {
        let mut registry = Registry::default();
        let metrics = Metrics::register(&mut registry);
        for (code, microseconds) in
            [(100, 0), (200, 1), (200, 100), (200, 101), (404, 150), (599, 13_107_200), (999, 13_107_201)]
        {
            metrics.answered(code.try_into().unwrap(), Duration::from_micros(microseconds));
        }
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &registry).unwrap();
        for line in [
            r#"krustlet_http_requests_total{code="100"} 1"#,
            r#"krustlet_http_requests_total{code="200"} 3"#,
            r#"krustlet_http_requests_total{code="999"} 1"#,
            "# TYPE krustlet_http_request_duration_seconds histogram",
            r#"krustlet_http_request_duration_seconds_bucket{le="0.0001"} 3"#,
            r#"krustlet_http_request_duration_seconds_bucket{le="0.0002"} 5"#,
            r#"krustlet_http_request_duration_seconds_bucket{le="13.1072"} 6"#,
            r#"krustlet_http_request_duration_seconds_bucket{le="+Inf"} 7"#,
            "krustlet_http_request_duration_seconds_count 7",
            "krustlet_http_request_duration_seconds_sum 26.214753",
        ] {
            assert!(text.lines().any(|known| known == line), "{line} is not in\n{text}");
        }
    }
}
