//! Kubernetes Events, sent behind the work that they tell about: a queue, a rate limit, and one Event with a count
//! where the same thing happens again.

use crate::client::{describe, status_code};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource as _;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use std::collections::{HashMap, VecDeque};
use std::time::{Duration, Instant};
use tokio::sync::mpsc;
use tracing::debug;

const COMPONENT: &str = "krustlet";

/// Events that wait to be sent; beyond it new ones are dropped, for they must never hold up a pod or eat the memory.
const QUEUE: usize = 8192;

/// As the kubelet: no more than this many a second in the long run, and so many at once.
const RATE: f64 = 50.0;
const BURST: f64 = 100.0;

/// The same thing within this time is counted, and not told again.
const SAME: Duration = Duration::from_secs(600);
/// How many Events are remembered for counting.
const REMEMBERED: usize = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Severity {
    Normal,
    Warning,
}

impl Severity {
    fn as_str(self) -> &'static str {
        match self {
            Self::Normal => "Normal",
            Self::Warning => "Warning",
        }
    }
}

struct Occurrence {
    object: ObjectReference,
    severity: Severity,
    reason: &'static str,
    message: String,
    at: Timestamp,
}

/// Takes Events from everywhere; clones share the queue.
#[derive(Clone)]
pub struct Recorder {
    queue: mpsc::Sender<Box<Occurrence>>,
}

impl Recorder {
    /// A recorder and the task that sends what it records. The task ends when the last recorder is gone.
    pub fn new(client: kube::Client, node_name: &str) -> (Self, impl Future<Output = ()> + use<>) {
        let (queue, incoming) = mpsc::channel(QUEUE);
        (Self { queue }, send_all(client, node_name.to_owned(), incoming))
    }

    /// Tells about the pod, or one of its containers.
    pub fn pod(
        &self,
        pod: &Pod,
        container: Option<&str>,
        severity: Severity,
        reason: &'static str,
        message: impl Into<String>,
    ) {
        let mut object = pod.object_ref(&());
        // The resource version would make each Event one of a different object.
        object.resource_version = None;
        object.field_path = container.map(|name| format!("spec.containers{{{name}}}"));
        self.record(object, severity, reason, message.into());
    }

    pub fn record(&self, object: ObjectReference, severity: Severity, reason: &'static str, message: String) {
        let occurrence = Occurrence { object, severity, reason, message, at: Timestamp::now() };
        if self.queue.try_send(Box::new(occurrence)).is_err() {
            debug!(reason, "event dropped: too many are waiting to be sent");
        }
    }
}

#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    field: String,
    reason: &'static str,
    message: String,
}

struct Told {
    name: String,
    count: i32,
    last: Instant,
}

/// What was told lately, the oldest forgotten first.
#[derive(Default)]
struct Memory {
    told: HashMap<Key, Told>,
    order: VecDeque<Key>,
}

impl Memory {
    /// The name and the count of the Event to count up, when the same was told lately.
    fn again(&mut self, key: &Key, now: Instant) -> Option<(String, i32)> {
        let told = self.told.get_mut(key)?;
        if now.duration_since(told.last) > SAME {
            return None;
        }
        told.last = now;
        told.count += 1;
        Some((told.name.clone(), told.count))
    }

    fn remember(&mut self, key: Key, name: String, now: Instant) {
        let told = Told { name, count: 1, last: now };
        if self.told.insert(key.clone(), told).is_none() {
            self.order.push_back(key);
        }
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.told.remove(&oldest);
        }
    }
}

/// A token bucket.
struct Limit {
    tokens: f64,
    filled: Instant,
}

impl Limit {
    /// How long to wait before the next one.
    fn take(&mut self, now: Instant) -> Duration {
        let gained = now.duration_since(self.filled).as_secs_f64() * RATE;
        self.tokens = (self.tokens + gained).min(BURST) - 1.0;
        self.filled = now;
        if self.tokens >= 0.0 { Duration::ZERO } else { Duration::from_secs_f64(-self.tokens / RATE) }
    }
}

async fn send_all(client: kube::Client, node_name: String, mut incoming: mpsc::Receiver<Box<Occurrence>>) {
    let mut memory = Memory::default();
    let mut limit = Limit { tokens: BURST, filled: Instant::now() };
    while let Some(occurrence) = incoming.recv().await {
        tokio::time::sleep(limit.take(Instant::now())).await;
        send(&client, &node_name, &mut memory, *occurrence).await;
    }
}

async fn send(client: &kube::Client, node_name: &str, memory: &mut Memory, occurrence: Occurrence) {
    let Occurrence { object, severity, reason, message, at } = occurrence;
    let namespace = object.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    let key = Key {
        uid: object.uid.clone().unwrap_or_default(),
        field: object.field_path.clone().unwrap_or_default(),
        reason,
        message: message.clone(),
    };
    let now = Instant::now();
    if let Some((name, count)) = memory.again(&key, now) {
        let patch = serde_json::json!({"count": count, "lastTimestamp": Time(at)});
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            // Events live an hour; one that is gone is told anew.
            Err(error) if status_code(&error) == Some(404) => {}
            Err(error) => return debug!(reason, "event not sent: {}", describe(&error)),
            Ok(_) => return,
        }
    }
    let name = format!("{}.{:x}", object.name.as_deref().unwrap_or(COMPONENT), at.as_nanosecond());
    let event = Event {
        metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace), ..ObjectMeta::default() },
        involved_object: object,
        type_: Some(severity.as_str().to_owned()),
        reason: Some(reason.to_owned()),
        message: Some(message),
        count: Some(1),
        first_timestamp: Some(Time(at)),
        last_timestamp: Some(Time(at)),
        source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: Some(node_name.to_owned()) }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        ..Event::default()
    };
    match api.create(&PostParams::default(), &event).await {
        Ok(_) => memory.remember(key, name, now),
        Err(error) => debug!(reason, "event not sent: {}", describe(&error)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(n: usize) -> Key {
        Key { uid: n.to_string(), field: String::new(), reason: "BackOff", message: "m".into() }
    }

    #[test]
    fn the_same_event_is_counted_for_ten_minutes_and_then_told_anew() {
        let mut memory = Memory::default();
        let start = Instant::now();
        assert!(memory.again(&key(1), start).is_none());
        memory.remember(key(1), "pod.1".into(), start);
        assert_eq!(memory.again(&key(1), start), Some(("pod.1".into(), 2)));
        assert_eq!(memory.again(&key(1), start), Some(("pod.1".into(), 3)));
        assert!(memory.again(&key(2), start).is_none());
        assert!(memory.again(&key(1), start + SAME + Duration::from_secs(1)).is_none());
    }

    #[test]
    fn memory_is_bounded() {
        let mut memory = Memory::default();
        let start = Instant::now();
        for n in 0..REMEMBERED + 10 {
            memory.remember(key(n), n.to_string(), start);
        }
        assert_eq!(memory.told.len(), REMEMBERED);
        assert!(memory.again(&key(0), start).is_none());
        assert!(memory.again(&key(REMEMBERED + 9), start).is_some());
    }

    #[test]
    fn a_burst_passes_and_the_rest_is_slowed_to_the_rate() {
        let start = Instant::now();
        let mut limit = Limit { tokens: BURST, filled: start };
        let waits: Vec<Duration> = (0..150).map(|_| limit.take(start)).collect();
        assert_eq!(waits[99], Duration::ZERO);
        assert!((waits[149].as_secs_f64() - 1.0).abs() < 0.03, "{:?}", waits[149]);
    }
}
