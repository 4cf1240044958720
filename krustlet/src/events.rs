//! Kubernetes Events, sent behind the work that they tell about: a queue, a rate limit, and one Event with a count
//! where the same thing happens again.
//!
//! What cannot be sent, because the API server is away, waits and is sent later with the time at which it happened. kube's
//! own Recorder stamps an Event when it sends it, counts by reason whatever the message says, and leaves the fields empty
//! that `kubectl get events` shows as LAST SEEN and COUNT; so this is not it.

use crate::backoff::Backoff;
use crate::client::{describe, status_code};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Event, EventSource, ObjectReference, Pod};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::Resource as _;
use kube::api::{Api, ObjectMeta, Patch, PatchParams, PostParams};
use parking_lot::Mutex;
use std::collections::{HashMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::Notify;
use tracing::{debug, warn};

const COMPONENT: &str = "krustlet";

/// Different Events that wait to be sent; beyond it new ones are dropped, for they must never hold up a pod or eat the
/// memory.
const QUEUE: usize = 8192;
/// And so many of one object, so that a pod that makes many takes no other's place.
const QUEUE_OF_ONE: usize = 64;
/// As client-go, in bytes.
const MAX_MESSAGE: usize = 1024;

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

/// Something that happened, once or more often.
#[derive(Debug, Clone)]
struct Occurrence {
    object: ObjectReference,
    severity: Severity,
    key: Key,
    count: i32,
    first: Timestamp,
    last: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Key {
    uid: String,
    field: String,
    reason: &'static str,
    message: String,
}

/// What waits to be sent.
#[derive(Default)]
struct Queue {
    waiting: Mutex<Waiting>,
    arrived: Notify,
}

#[derive(Default)]
struct Waiting {
    order: VecDeque<Key>,
    occurrences: HashMap<Key, Occurrence>,
    /// How many by the UID of what they are about.
    of_one: HashMap<String, usize>,
}

impl Waiting {
    /// Whether there is room for it.
    fn push(&mut self, occurrence: Occurrence) -> bool {
        if let Some(same) = self.occurrences.get_mut(&occurrence.key) {
            same.count = same.count.saturating_add(occurrence.count);
            same.last = occurrence.last;
            return true;
        }
        let of_one = self.of_one.get(&occurrence.key.uid).copied().unwrap_or(0);
        if self.order.len() >= QUEUE || of_one >= QUEUE_OF_ONE {
            return false;
        }
        self.of_one.insert(occurrence.key.uid.clone(), of_one + 1);
        self.order.push_back(occurrence.key.clone());
        self.occurrences.insert(occurrence.key.clone(), occurrence);
        true
    }

    fn pop(&mut self) -> Option<Occurrence> {
        let key = self.order.pop_front()?;
        if let Some(of_one) = self.of_one.get_mut(&key.uid) {
            *of_one -= 1;
            if *of_one == 0 {
                self.of_one.remove(&key.uid);
            }
        }
        self.occurrences.remove(&key)
    }
}

impl Queue {
    async fn next(&self) -> Occurrence {
        loop {
            let arrived = self.arrived.notified();
            if let Some(occurrence) = self.waiting.lock().pop() {
                return occurrence;
            }
            arrived.await;
        }
    }
}

/// Takes Events from everywhere; clones share the queue.
#[derive(Clone)]
pub struct Recorder {
    queue: Arc<Queue>,
}

impl Recorder {
    /// A recorder and the task that sends what it records, which never ends.
    pub fn new(client: kube::Client, node_name: &str) -> (Self, impl Future<Output = ()> + use<>) {
        let queue = Arc::<Queue>::default();
        (Self { queue: queue.clone() }, send_all(client, node_name.to_owned(), queue))
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

    pub fn record(&self, object: ObjectReference, severity: Severity, reason: &'static str, mut message: String) {
        message.truncate(message.floor_char_boundary(MAX_MESSAGE));
        let uid = object.uid.clone().unwrap_or_default();
        let key = Key { uid, field: object.field_path.clone().unwrap_or_default(), reason, message };
        let now = Timestamp::now();
        let occurrence = Occurrence { object, severity, key, count: 1, first: now, last: now };
        if self.queue.waiting.lock().push(occurrence) {
            self.queue.arrived.notify_one();
        } else {
            debug!(reason, "event dropped: too many are waiting to be sent");
        }
    }
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
    fn again(&mut self, key: &Key, more: i32, now: Instant) -> Option<(String, i32)> {
        let told = self.told.get_mut(key)?;
        if now.duration_since(told.last) > SAME {
            return None;
        }
        told.last = now;
        told.count = told.count.saturating_add(more);
        Some((told.name.clone(), told.count))
    }

    fn remember(&mut self, key: Key, name: String, count: i32, now: Instant) {
        let told = Told { name, count, last: now };
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

async fn send_all(client: kube::Client, node_name: String, queue: Arc<Queue>) {
    let mut memory = Memory::default();
    let mut limit = Limit { tokens: BURST, filled: Instant::now() };
    let mut backoff = Backoff::api();
    loop {
        let occurrence = queue.next().await;
        tokio::time::sleep(limit.take(Instant::now())).await;
        let reason = occurrence.key.reason;
        // An Event is never told before the one that came before it.
        while let Err(error) = send(&client, &node_name, &mut memory, &occurrence).await {
            if !may_pass_later(&error) {
                warn!(reason, "the API server refused an event: {}", describe(&error));
                break;
            }
            debug!(reason, "event not sent yet: {}", describe(&error));
            tokio::time::sleep(backoff.jittered()).await;
        }
        backoff.reset();
    }
}

/// Whether the same request may have another answer later: not where the server found fault with it.
fn may_pass_later(error: &kube::Error) -> bool {
    status_code(error).is_none_or(|status| !(400..500).contains(&status) || matches!(status, 401 | 408 | 429))
}

async fn send(
    client: &kube::Client,
    node_name: &str,
    memory: &mut Memory,
    occurrence: &Occurrence,
) -> kube::Result<()> {
    let Occurrence { object, severity, key, count, first, last } = occurrence;
    let namespace = object.namespace.clone().unwrap_or_else(|| "default".to_owned());
    let api: Api<Event> = Api::namespaced(client.clone(), &namespace);
    let now = Instant::now();
    if let Some((name, count)) = memory.again(key, *count, now) {
        let patch = serde_json::json!({"count": count, "lastTimestamp": Time(*last)});
        match api.patch(&name, &PatchParams::default(), &Patch::Merge(&patch)).await {
            // Events live an hour; one that is gone is told anew.
            Err(error) if status_code(&error) == Some(404) => {}
            result => return result.map(|_| ()),
        }
    }
    let name = format!("{}.{:x}", object.name.as_deref().unwrap_or(COMPONENT), first.as_nanosecond());
    let event = Event {
        metadata: ObjectMeta { name: Some(name.clone()), namespace: Some(namespace), ..ObjectMeta::default() },
        involved_object: object.clone(),
        type_: Some(severity.as_str().to_owned()),
        reason: Some(key.reason.to_owned()),
        message: Some(key.message.clone()),
        count: Some(*count),
        first_timestamp: Some(Time(*first)),
        last_timestamp: Some(Time(*last)),
        source: Some(EventSource { component: Some(COMPONENT.to_owned()), host: Some(node_name.to_owned()) }),
        reporting_component: Some(COMPONENT.to_owned()),
        reporting_instance: Some(node_name.to_owned()),
        ..Event::default()
    };
    match api.create(&PostParams::default(), &event).await {
        // The one whose answer was lost.
        Err(error) if status_code(&error) == Some(409) => {}
        result => _ = result?,
    }
    memory.remember(key.clone(), name, *count, now);
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::routing::post;
    use axum::{Json, Router};
    use http::StatusCode;
    use std::sync::atomic::{AtomicUsize, Ordering};

    fn key(n: usize) -> Key {
        Key { uid: n.to_string(), field: String::new(), reason: "BackOff", message: "m".into() }
    }

    #[test]
    fn the_same_event_is_counted_for_ten_minutes_and_then_told_anew() {
        let mut memory = Memory::default();
        let start = Instant::now();
        assert!(memory.again(&key(1), 1, start).is_none());
        memory.remember(key(1), "pod.1".into(), 1, start);
        assert_eq!(memory.again(&key(1), 1, start), Some(("pod.1".into(), 2)));
        assert_eq!(memory.again(&key(1), 1, start), Some(("pod.1".into(), 3)));
        assert!(memory.again(&key(2), 1, start).is_none());
        assert!(memory.again(&key(1), 1, start + SAME + Duration::from_secs(1)).is_none());
    }

    #[test]
    fn memory_is_bounded() {
        let mut memory = Memory::default();
        let start = Instant::now();
        for n in 0..REMEMBERED + 10 {
            memory.remember(key(n), n.to_string(), 1, start);
        }
        assert_eq!(memory.told.len(), REMEMBERED);
        assert!(memory.again(&key(0), 1, start).is_none());
        assert!(memory.again(&key(REMEMBERED + 9), 1, start).is_some());
    }

    #[test]
    fn a_burst_passes_and_the_rest_is_slowed_to_the_rate() {
        let start = Instant::now();
        let mut limit = Limit { tokens: BURST, filled: start };
        let waits: Vec<Duration> = (0..150).map(|_| limit.take(start)).collect();
        assert_eq!(waits[99], Duration::ZERO);
        assert!((waits[149].as_secs_f64() - 1.0).abs() < 0.03, "{:?}", waits[149]);
    }

    fn occurrence(uid: &str, message: &str) -> Occurrence {
        let key = Key { uid: uid.into(), field: String::new(), reason: "BackOff", message: message.into() };
        let object = ObjectReference::default();
        let now = Timestamp::now();
        Occurrence { object, severity: Severity::Normal, key, count: 1, first: now, last: now }
    }

    #[test]
    fn what_waits_already_is_counted_and_one_object_takes_no_others_place() {
        let mut waiting = Waiting::default();
        for n in 0..1000 {
            waiting.push(occurrence("noisy", &n.to_string()));
            assert!(waiting.push(occurrence("noisy", "0")), "it is there already");
        }
        assert!(waiting.push(occurrence("quiet", "one")));
        let all: Vec<Occurrence> = std::iter::from_fn(|| waiting.pop()).collect();
        assert_eq!(all.len(), QUEUE_OF_ONE + 1);
        assert_eq!((all[0].key.message.as_str(), all[0].count), ("0", 1001));
        assert_eq!(all[QUEUE_OF_ONE].key.uid, "quiet");
        assert!(waiting.occurrences.is_empty() && waiting.of_one.is_empty());
    }

    #[test]
    fn the_queue_is_bounded() {
        let mut waiting = Waiting::default();
        let taken = (0..2 * QUEUE).filter(|n| waiting.push(occurrence(&n.to_string(), ""))).count();
        assert_eq!(taken, QUEUE);
    }

    /// An API server that is away for the first `failures` requests, and the Events that it was told.
    fn api_server(failures: usize, status: StatusCode) -> (kube::Client, Arc<Mutex<Vec<Event>>>) {
        let told = Arc::<Mutex<Vec<Event>>>::default();
        let (kept, tried) = (told.clone(), AtomicUsize::new(0));
        let create = move |Json(event): Json<Event>| {
            let away = tried.fetch_add(1, Ordering::SeqCst) < failures;
            if !away {
                kept.lock().push(event.clone());
            }
            let failure = serde_json::json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status.as_u16(), "message": "away", "reason": "away"});
            std::future::ready(if away {
                (status, Json(failure))
            } else {
                (StatusCode::CREATED, Json(serde_json::json!(event)))
            })
        };
        let create = Arc::new(create);
        let app = Router::new().route("/api/v1/namespaces/{namespace}/events", post(move |body| create(body)));
        (kube::Client::new(app, "default"), told)
    }

    #[tokio::test]
    async fn what_happens_while_the_api_server_is_away_is_told_when_it_is_back_with_its_time() {
        let (client, told) = api_server(2, StatusCode::SERVICE_UNAVAILABLE);
        let (recorder, sending) = Recorder::new(client, "node");
        let before = Timestamp::now();
        for message in ["one", "two", "two"] {
            recorder.pod(&Pod::default(), None, Severity::Normal, "Started", message);
        }
        let after = Timestamp::now();
        let all = async {
            while told.lock().len() < 2 {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! { () = sending => {}, () = all => {} }
        let told = told.lock();
        let shown = |event: &Event| (event.message.clone().unwrap(), event.count.unwrap());
        assert_eq!(told.iter().map(shown).collect::<Vec<_>>(), [("one".to_owned(), 1), ("two".to_owned(), 2)]);
        let at = told[0].first_timestamp.as_ref().unwrap().0;
        // The API's times are exact to a second.
        assert!((before.as_second()..=after.as_second()).contains(&at.as_second()));
    }

    #[tokio::test]
    async fn an_event_that_is_refused_holds_up_no_other() {
        let (client, told) = api_server(1, StatusCode::FORBIDDEN);
        let (recorder, sending) = Recorder::new(client, "node");
        for message in ["one", "two"] {
            recorder.pod(&Pod::default(), None, Severity::Normal, "Started", message);
        }
        let other = async {
            while told.lock().is_empty() {
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
        };
        tokio::select! { () = sending => {}, () = other => {} }
        assert_eq!(told.lock()[0].message.as_deref(), Some("two"));
    }
}
