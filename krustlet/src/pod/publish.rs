//! When a pod's status is written to the API: the newest one only, one write at a time, and none that says nothing new.

use super::lifecycle::Jitter;
use super::status;
use super::{name, uid};
use crate::backoff::Backoff;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use kube::api::{Api, Patch, PatchParams};
use serde_json::{Value, json};
use std::time::Duration;
use tokio::time::Instant;

/// A status that only says that the pod is on its way waits this long for something better to say, and the next such one
/// twice as long, up to the most.
const MIN_DELAY: Duration = Duration::from_millis(300);
const MAX_DELAY: Duration = Duration::from_secs(5);
/// How long after another hand changed our status it is written again, at the soonest.
const AFTER_OVERWRITE: Duration = Duration::from_secs(1);
/// How long the watch may take to say that a pod is gone whose status could not be written for that reason.
const AFTER_GONE: Duration = Duration::from_secs(10);

/// What the API was told of one pod. Decides; the writing is [`write`].
#[derive(Debug)]
pub struct Publisher {
    told: Option<PodStatus>,
    /// Resource version of the pod with what was told.
    version: u64,
    writing: bool,
    not_before: Option<Instant>,
    delay: Duration,
    delayed_until: Option<Instant>,
    backoff: Backoff,
    jitter: Jitter,
}

impl Publisher {
    pub fn new(jitter: Jitter) -> Self {
        Self {
            told: None,
            version: 0,
            writing: false,
            not_before: None,
            delay: MIN_DELAY,
            delayed_until: None,
            backoff: Backoff::api(),
            jitter,
        }
    }

    /// What the API was told last.
    pub fn told(&self) -> Option<&PodStatus> {
        self.told.as_ref()
    }

    pub fn is_writing(&self) -> bool {
        self.writing
    }

    /// Whether the API knows all of this.
    pub fn has_told(&self, status: &PodStatus) -> bool {
        !self.writing && self.told.as_ref().is_some_and(|told| !status::differs(told, status))
    }

    /// Whether to write the status now; then a write is under way until [`Self::on_written`]. A status that may wait is
    /// held back for a moment, because a better one is likely to follow.
    pub fn begin(&mut self, status: &PodStatus, may_wait: bool, now: Instant) -> bool {
        if self.writing || self.not_before.is_some_and(|at| now < at) {
            return false;
        }
        self.not_before = None;
        if self.has_told(status) {
            self.delayed_until = None;
            return false;
        }
        if may_wait && now < *self.delayed_until.get_or_insert(now + self.delay) {
            return false;
        }
        self.delay = if may_wait { (self.delay * 2).min(MAX_DELAY) } else { MIN_DELAY };
        self.delayed_until = None;
        self.writing = true;
        true
    }

    /// Ends the wait for something better to say, from the moment that there is something to say.
    pub fn hurry(&mut self, now: Instant) {
        self.delayed_until = Some(now);
    }

    /// A write has ended: with the pod's new resource version, or an HTTP status if the API server gave one.
    pub fn on_written(&mut self, status: PodStatus, result: Result<u64, Option<u16>>, now: Instant) {
        self.writing = false;
        match result {
            Ok(version) => {
                self.version = version;
                self.told = Some(status);
                self.backoff.reset();
            }
            Err(Some(404)) => self.not_before = Some(now + AFTER_GONE),
            Err(_) => self.not_before = Some(now + (self.jitter)(self.backoff.exact(), 0.25)),
        }
    }

    /// Looks at the pod as the API shows it. Returns whether another hand changed what was told; it will be told again.
    pub fn on_shown(&mut self, pod: &Pod, now: Instant) -> bool {
        let overwritten = match (&self.told, &pod.status) {
            // An older version is from before our own last write.
            (Some(told), Some(shown)) => {
                !self.writing && version(pod) > self.version && status::is_overwritten(told, shown)
            }
            _ => false,
        };
        if overwritten {
            self.told = None;
            self.not_before = Some(now + AFTER_OVERWRITE);
        }
        overwritten
    }

    /// When [`Self::begin`] may have another answer even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        // Before the former nothing is written, however little the latter leaves.
        if self.writing { None } else { self.not_before.or(self.delayed_until) }
    }
}

/// Writes the status; returns the pod's new resource version. The UID in the patch makes it fail on another pod of the
/// same name.
pub async fn write(api: &Api<Pod>, pod: &Pod, status: &PodStatus) -> kube::Result<u64> {
    let status = with_nulls(status).map_err(kube::Error::SerdeError)?;
    let patch = json!({"metadata": {"uid": uid(pod)}, "status": status});
    let answer = api.patch_status(name(pod), &PatchParams::default(), &Patch::Strategic(&patch)).await?;
    Ok(version(&answer))
}

/// In a patch what is not said stays as it is, so a reason that is over has to be taken back.
fn with_nulls(status: &PodStatus) -> serde_json::Result<Value> {
    let take_back = |value: &mut Value| {
        if let Some(fields) = value.as_object_mut() {
            for field in ["reason", "message"] {
                fields.entry(field).or_insert(Value::Null);
            }
        }
    };
    let mut body = serde_json::to_value(status)?;
    take_back(&mut body);
    body.get_mut("conditions").and_then(Value::as_array_mut).into_iter().flatten().for_each(take_back);
    if let Some(fields) = body.as_object_mut() {
        fields.entry("podIP").or_insert(Value::Null);
        // Addresses would be merged, and one that the pod or its node had before would stay.
        for addresses in ["podIPs", "hostIPs"] {
            let addresses = fields.entry(addresses).or_insert_with(|| json!([]));
            addresses.as_array_mut().into_iter().for_each(|all| all.push(json!({"$patch": "replace"})));
        }
    }
    Ok(body)
}

/// The object's resource version; it grows with each write.
fn version(pod: &Pod) -> u64 {
    pod.metadata.resource_version.as_deref().and_then(|version| version.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{HostIP, PodCondition, PodIP};

    fn status(phase: &str) -> PodStatus {
        PodStatus { phase: Some(phase.into()), ..PodStatus::default() }
    }

    fn fresh() -> Publisher {
        Publisher::new(|duration, _| duration)
    }

    fn told(phase: &str, now: Instant) -> Publisher {
        let mut publisher = fresh();
        assert!(publisher.begin(&status(phase), false, now));
        publisher.on_written(status(phase), Ok(10), now);
        publisher
    }

    fn shown(version: u64, phase: &str) -> Pod {
        let mut pod = Pod { status: Some(status(phase)), ..Pod::default() };
        pod.metadata.resource_version = Some(version.to_string());
        pod
    }

    #[test]
    fn progress_waits_for_something_better_and_is_told_when_that_does_not_come() {
        let now = Instant::now();
        let mut publisher = fresh();
        assert!(!publisher.begin(&status("Pending"), true, now));
        assert_eq!(publisher.deadline(), Some(now + MIN_DELAY));
        let mut quick = fresh();
        assert!(!quick.begin(&status("Pending"), true, now));
        assert!(quick.begin(&status("Running"), false, now + MIN_DELAY / 2));
        assert!(publisher.begin(&status("Pending"), true, now + MIN_DELAY));
    }

    #[test]
    fn in_a_hurry_nothing_waits() {
        let now = Instant::now();
        let mut publisher = fresh();
        assert!(!publisher.begin(&status("Pending"), true, now));
        publisher.hurry(now);
        assert!(publisher.begin(&status("Pending"), true, now));
        publisher.on_written(status("Pending"), Ok(1), now);
        assert!(!publisher.begin(&status("Running"), true, now), "and the hurry is over");
    }

    #[test]
    fn a_pod_that_takes_long_is_told_of_less_and_less_often() {
        let mut now = Instant::now();
        let mut publisher = fresh();
        let mut waits = Vec::new();
        for step in 0..7 {
            let begun = now;
            while !publisher.begin(&status(&step.to_string()), true, now) {
                now = publisher.deadline().unwrap();
            }
            waits.push((now - begun).as_millis());
            publisher.on_written(status(&step.to_string()), Ok(step), now);
        }
        assert_eq!(waits, [300, 600, 1200, 2400, 4800, 5000, 5000]);
    }

    #[test]
    fn there_is_one_write_at_a_time_and_the_newest_follows() {
        let now = Instant::now();
        let mut publisher = fresh();
        assert!(publisher.begin(&status("Pending"), false, now));
        assert!(!publisher.begin(&status("Running"), false, now));
        assert_eq!(publisher.deadline(), None);
        publisher.on_written(status("Pending"), Ok(1), now);
        assert!(publisher.begin(&status("Running"), false, now));
        publisher.on_written(status("Running"), Ok(2), now);
        assert!(!publisher.begin(&status("Running"), false, now));
        assert!(publisher.has_told(&status("Running")));
    }

    #[test]
    fn a_failed_write_is_repeated_after_a_while() {
        let now = Instant::now();
        let mut publisher = fresh();
        assert!(publisher.begin(&status("Running"), false, now));
        publisher.on_written(status("Running"), Err(None), now);
        assert!(!publisher.begin(&status("Running"), false, now));
        let later = publisher.deadline().unwrap();
        assert!(publisher.begin(&status("Running"), false, later));
    }

    #[test]
    fn haste_does_not_wake_up_for_what_may_not_be_written_yet() {
        let now = Instant::now();
        let mut publisher = fresh();
        assert!(publisher.begin(&status("Running"), false, now));
        publisher.on_written(status("Running"), Err(None), now);
        publisher.hurry(now);
        assert!(!publisher.begin(&status("Running"), false, now));
        assert!(publisher.deadline().unwrap() > now);
    }

    #[test]
    fn what_another_hand_changed_is_told_again_but_an_echo_of_the_past_is_not() {
        let now = Instant::now();
        let mut publisher = told("Running", now);
        assert!(!publisher.on_shown(&shown(9, "Pending"), now));
        assert!(!publisher.on_shown(&shown(11, "Running"), now));
        assert!(publisher.on_shown(&shown(12, "Failed"), now));
        assert!(!publisher.begin(&status("Running"), false, now));
        assert!(publisher.begin(&status("Running"), false, now + AFTER_OVERWRITE));
    }

    #[test]
    fn nothing_is_left_to_wake_up_for_when_all_is_told() {
        let now = Instant::now();
        let mut publisher = told("Running", now);
        assert!(!publisher.begin(&status("Pending"), true, now));
        assert!(!publisher.begin(&status("Running"), true, now));
        assert_eq!(publisher.deadline(), None);
    }

    #[test]
    fn a_reason_that_is_over_is_taken_back() {
        let mut status = status("Running");
        status.conditions = Some(vec![PodCondition { type_: "Ready".into(), ..PodCondition::default() }]);
        let patch = with_nulls(&status).unwrap();
        assert_eq!(patch["reason"], Value::Null);
        assert!(patch["conditions"][0].as_object().unwrap().contains_key("message"));
    }

    #[test]
    fn an_address_takes_the_place_of_the_one_before() {
        let mut status = status("Running");
        let replace = json!({"$patch": "replace"});
        let patch = with_nulls(&status).unwrap();
        assert_eq!((&patch["podIP"], &patch["podIPs"]), (&Value::Null, &json!([replace])));
        assert_eq!(patch["hostIPs"], json!([replace]));
        status.host_ips = Some(vec![HostIP { ip: "10.0.0.9".into() }]);
        status.pod_ip = Some("10.0.0.1".into());
        status.pod_ips = Some(vec![PodIP { ip: "10.0.0.1".into() }]);
        let patch = with_nulls(&status).unwrap();
        assert_eq!((&patch["podIP"], &patch["podIPs"]), (&json!("10.0.0.1"), &json!([{"ip": "10.0.0.1"}, replace])));
        assert_eq!(patch["hostIPs"], json!([{"ip": "10.0.0.9"}, replace]));
    }
}
