//! The life of one pod on this node as a state machine: [`PodLifecycle::step`] takes what happened and gives what is to be
//! done. No I/O and no clock: the [worker](super::worker) carries the effects out and tells what came of them.

mod advance;
mod container;
mod event;
#[cfg(test)]
mod model;
mod runs;
#[cfg(test)]
mod sim;
#[cfg(test)]
mod tests;

pub use container::End;
pub use event::{Effect, Event, Launched, Now};

use super::checkpoint::{Checkpoint, past};
use super::failure::Obstacle;
use super::fields::PodFacts;
use super::publish::Publisher;
use super::restart::Restart;
use super::status::{self, View};
use super::{Role, containers, full_name, is_finished, uid};
use crate::events::Severity;
use crate::reasons::{event as event_reason, pod as pod_reason};
use container::{Activity, ContainerLifecycle};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tracing::{debug, info};

/// A guest gets at least this long to end, as with the kubelet.
pub const MIN_GRACE: Duration = Duration::from_secs(2);
/// Longer ones are taken for this one: the clock's own range ends somewhere, with a panic.
const MAX_GRACE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// A grace period as an object tells it.
fn grace_of(seconds: i64) -> Option<Duration> {
    u64::try_from(seconds).ok().map(|seconds| Duration::from_secs(seconds).min(MAX_GRACE))
}
/// At the end of the agent, the API server has this long to hear that a deleted pod has ended and to let its object go. The
/// next agent makes up for what it did not hear.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// How often changed ConfigMaps, Secrets and tokens reach the pod's files, more or less by the share.
const REFRESH: Duration = Duration::from_secs(60);
const REFRESH_JITTER: f64 = 0.2;
/// A pod that could not be deleted is deleted again after this, and one that is still there, such as for a finalizer, after
/// that.
const DELETE_RETRY: Duration = Duration::from_secs(2);
const STILL_THERE: Duration = Duration::from_secs(30);
/// By which share the waits between tries differ, so that many that failed together do not come back together.
const RETRY_JITTER: f64 = 0.25;

/// Makes a duration differ by at most a share of it.
pub type Jitter = fn(Duration, f64) -> Duration;

pub struct PodLifecycle {
    pod: Arc<Pod>,
    facts: PodFacts,
    jitter: Jitter,
    now: Now,
    /// What the present step has to be done for.
    effects: Vec<Effect>,
    containers: Vec<ContainerLifecycle>,
    start_time: Timestamp,
    refresh_at: Option<Instant>,
    /// Its files are being brought up to date.
    refreshing: bool,
    /// The volumes are there.
    prepared: bool,
    /// The init containers are through.
    initialized: bool,
    /// A container's end restarts all of them; until they have ended.
    restarting_all: bool,

    // Why the pod comes to its end.
    /// It was deleted, and its containers have until then.
    deleted: Option<Instant>,
    /// Its object is gone.
    gone: bool,
    failure: Option<status::Failure>,
    /// Its containers have nothing left to do.
    completed: bool,
    shutdown: bool,
    /// All of its containers have ended for good.
    finished: bool,
    /// Until when an agent that stops waits for the object of a finished pod to go.
    last_words: Option<Instant>,

    // What the API was told.
    publisher: Publisher,
    /// The phase in the API is final; nothing is written any more.
    frozen: bool,
    /// It was ready once, or another agent had it before: what changes now is news.
    was_ready: bool,
    deleting: bool,
    delete_after: Option<Instant>,
}

impl PodLifecycle {
    /// The life of a pod, which is `rejected` when the node cannot take it.
    pub fn new(
        pod: Arc<Pod>,
        facts: PodFacts,
        checkpoint: &Checkpoint,
        rejected: Option<status::Failure>,
        jitter: Jitter,
        now: Now,
    ) -> Self {
        let shown = pod.status.clone().unwrap_or_default();
        let frozen = is_finished(&pod);
        let mut containers: Vec<ContainerLifecycle> = match &pod.spec {
            Some(spec) if !frozen => containers(spec)
                .map(|(role, container)| {
                    let statuses =
                        if role == Role::Main { &shown.container_statuses } else { &shown.init_container_statuses };
                    let shown = statuses.iter().flatten().find(|status| status.name == container.name);
                    let past = past(shown, checkpoint.get(&container.name));
                    ContainerLifecycle::new(role, spec, container, shown, past)
                })
                .collect(),
            _ => Vec::new(),
        };
        containers.shrink_to_fit();
        let adopted = containers.iter().any(|container| container.has_run);
        // The last agent did not get to it.
        let restarting_all = containers.iter().any(|container| {
            container.exit_code().is_some_and(|code| container.policy.after(code) == Restart::AllContainers)
        });
        let mut made = Self {
            start_time: shown.start_time.as_ref().map_or_else(|| status::seconds(now.time), |time| time.0),
            facts,
            jitter,
            now,
            effects: Vec::new(),
            containers,
            refresh_at: None,
            refreshing: false,
            prepared: false,
            initialized: false,
            restarting_all,
            deleted: None,
            gone: false,
            failure: rejected,
            completed: false,
            shutdown: false,
            finished: frozen,
            last_words: None,
            publisher: Publisher::new(jitter),
            frozen,
            was_ready: adopted,
            deleting: false,
            delete_after: None,
            pod: pod.clone(),
        };
        if adopted {
            info!(pod = full_name(&pod), uid = uid(&pod), "taking the pod back");
        }
        made.on_shown(pod);
        made
    }

    /// Takes in what happened; gives what is to be done, in this order.
    pub fn step(&mut self, event: Event, now: Now) -> Vec<Effect> {
        self.now = now;
        self.take(event);
        self.advance();
        self.publish();
        if self.shutdown && self.finished {
            self.last_words.get_or_insert(self.now.at + LAST_WORDS);
        }
        std::mem::take(&mut self.effects)
    }

    /// Whether the worker has nothing left to do: the pod's object is gone, or the agent ends.
    pub fn is_done(&self) -> bool {
        if self.gone && self.finished {
            return true;
        }
        // The API server may be away, or a finalizer may keep the object: neither keeps the agent.
        if self.last_words.is_some_and(|until| self.now.at >= until) {
            return true;
        }
        let waits = self.deleted.is_some() || self.gone || (self.failure.is_some() && !self.finished);
        let active = self.containers.iter().any(ContainerLifecycle::is_active);
        self.shutdown && !waits && !self.publisher.is_writing() && !active
    }

    pub fn is_deleted(&self) -> bool {
        self.deleted.is_some()
    }

    /// Whether the pod's files have no further use.
    pub fn is_gone(&self) -> bool {
        self.gone
    }

    /// Whether the pod may yet be ended for what it takes of the node.
    pub fn may_be_evicted(&self) -> bool {
        self.failure.is_none() && !self.finished
    }

    /// Whether all of its containers have ended for good: what they wrote is nobody's any more.
    pub fn is_finished(&self) -> bool {
        self.finished
    }

    pub fn is_shutting_down(&self) -> bool {
        self.shutdown
    }

    /// The pod's newest object.
    pub fn pod(&self) -> &Arc<Pod> {
        &self.pod
    }

    /// The container at this place, as the newest object specifies it.
    pub fn spec(&self, index: usize) -> Option<(Role, Container)> {
        containers(self.pod.spec.as_ref()?).nth(index).map(|(role, container)| (role, container.clone()))
    }

    pub fn len(&self) -> usize {
        self.containers.len()
    }

    /// Which try or run of the container is the present one.
    pub fn generation(&self, index: usize) -> Option<u32> {
        self.containers.get(index).map(|container| container.generation)
    }

    /// Whether it waits for a port, or for an address, to become free.
    pub fn waits_for(&self, wanted: Obstacle) -> bool {
        let waits = |container: &ContainerLifecycle| matches!(&container.activity, Activity::Waiting { obstacle, .. } if *obstacle == Some(wanted));
        self.containers.iter().any(waits)
    }

    /// When the next step is due even if nothing happens.
    pub fn deadline(&self) -> Option<Instant> {
        let mut deadlines: Vec<Instant> = Vec::new();
        deadlines.extend(self.refresh_at);
        deadlines.extend(self.last_words);
        if !self.frozen && !self.gone {
            deadlines.extend(self.publisher.deadline());
        }
        if self.may_delete() {
            deadlines.extend(self.delete_after);
        }
        if !self.is_ending()
            && !self.finished
            && let Some(deadline) = self.active_deadline()
        {
            let left = Duration::try_from(deadline.duration_since(self.now.time)).unwrap_or_default();
            deadlines.push(self.now.at + left);
        }
        let waits = !self.is_ending() && !self.restarting_all;
        for container in self.containers.iter().filter(|container| waits && container.is_due) {
            if let Activity::Waiting { until, show_back_off, .. } = &container.activity {
                deadlines.push(*until);
                deadlines.extend(*show_back_off);
            }
            let update = container.update.as_ref().filter(|update| !update.under_way);
            deadlines.extend(update.and_then(|update| update.retry));
        }
        deadlines.into_iter().min()
    }

    // ---- what happened ----

    fn take(&mut self, event: Event) {
        // A report about an earlier run says nothing about this one.
        if let Some((index, generation)) = event.run()
            && self.containers.get(index).is_none_or(|container| container.generation != generation)
        {
            return;
        }
        match event {
            Event::Tick => {}
            Event::Shown(pod) => self.on_shown(pod),
            Event::Gone => self.gone = true,
            Event::ShuttingDown => self.shutdown = true,
            Event::Released(released) => {
                for container in &mut self.containers {
                    if let Activity::Waiting { until, obstacle, .. } = &mut container.activity
                        && *obstacle == Some(released)
                    {
                        *until = self.now.at;
                    }
                }
            }
            Event::Addressed(address) => self.facts.pod_ip = address.to_string(),
            Event::Prepared { index, result, prepared, .. } => {
                self.prepared |= prepared;
                self.on_prepared(index, result);
            }
            Event::Launched { index, result, .. } => self.on_launched(index, result),
            Event::PostStarted { index, result, .. } => self.on_post_started(index, result),
            Event::PreStopFailed { index, cause, .. } => {
                let text = format!("preStop hook failed: {cause}");
                self.tell_of(index, Severity::Warning, event_reason::FAILED_PRE_STOP_HOOK, text);
            }
            Event::Ended { index, end, .. } => self.on_end(index, end),
            Event::Probed { index, probe, .. } => self.on_probe(index, probe),
            Event::Swapped { index, result, .. } => self.on_swapped(index, result),
            Event::Written { status, result } => self.publisher.on_written(*status, result, self.now.at),
            Event::Deleted(result) => {
                self.deleting = false;
                // Gone, or another pod by now: either way this one is no more, and the watch will say so.
                if result.is_err_and(|status| !matches!(status, Some(404 | 409))) {
                    self.delete_after = Some(self.now.at + DELETE_RETRY);
                }
            }
            Event::Evicted(message) => self.evict(message),
            Event::Refreshed { error } => {
                self.refreshing = false;
                if !self.finished {
                    self.refresh_at = Some(self.now.at + (self.jitter)(REFRESH, REFRESH_JITTER));
                }
                if let Some(message) = error {
                    self.tell(None, Severity::Warning, event_reason::FAILED_MOUNT, message);
                }
            }
        }
    }

    /// Takes in the pod's newest object.
    fn on_shown(&mut self, pod: Arc<Pod>) {
        if self.publisher.on_shown(&pod, self.now.at) {
            debug!(pod = full_name(&pod), "somebody changed the pod's status; writing it again");
        }
        if pod.metadata.deletion_timestamp.is_some() {
            let grace = pod.metadata.deletion_grace_period_seconds.and_then(grace_of).unwrap_or_default();
            let until = self.now.at + grace.max(MIN_GRACE);
            // A second delete may shorten the time, never lengthen it.
            if self.deleted.is_none() {
                info!(pod = full_name(&pod), uid = uid(&pod), "pod is deleted, {} s of grace", grace.as_secs());
            }
            self.deleted = Some(self.deleted.map_or(until, |before| before.min(until)));
        }
        // Somebody else gave the pod up, such as the garbage collector: what it runs is to end.
        if is_finished(&pod) && !self.finished {
            self.completed = true;
        }
        let before = std::mem::replace(&mut self.pod, pod.clone());
        for name in status::ephemeral(&pod).filter(|name| status::ephemeral(&before).all(|known| known != *name)) {
            let text = format!("ephemeral container {name} is not run: {}", status::NOT_DEBUGGED);
            self.tell(None, Severity::Warning, event_reason::EPHEMERAL_CONTAINER_NOT_RUN, text);
        }
    }

    fn evict(&mut self, message: String) {
        if self.failure.is_none() && !self.finished {
            self.tell(None, Severity::Warning, pod_reason::EVICTED, message.clone());
            self.failure = Some(status::Failure { reason: pod_reason::EVICTED.to_owned(), message });
        }
    }

    // ---- what the API is told ----

    fn publish(&mut self) {
        if self.frozen || self.gone || self.publisher.is_writing() {
            return;
        }
        let status = self.status();
        // Something better is about to be said: that it runs, or that it has ended.
        let progress = status::is_progress(&status) && !self.was_ready;
        let ending = self.is_ending() && !self.finished;
        if !self.publisher.begin(&status, (progress || ending) && !self.shutdown, self.now.at) {
            return;
        }
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        if ready && !self.was_ready {
            self.was_ready = true;
            self.effects.push(Effect::CountReady);
        }
        self.effects.push(Effect::Write(Box::new(status)));
    }

    fn status(&self) -> PodStatus {
        let stale = self.containers.iter().find_map(|container| {
            let failure = container.update.as_ref()?.failure.as_ref()?;
            Some((failure.reason, failure.message.as_str()))
        });
        status::build(&View {
            pod: &self.pod,
            sent: self.publisher.told(),
            facts: &self.facts,
            containers: self.containers.iter().map(|container| &container.view).collect(),
            now: status::seconds(self.now.time),
            start_time: self.start_time,
            prepared: self.prepared,
            ended: self.finished,
            failure: self.failure.as_ref(),
            shutdown: self.shutdown,
            stale,
        })
    }

    /// Deletes the object of a pod that was deleted and has ended, once its last status has arrived.
    fn delete(&mut self) {
        if self.may_delete() && self.delete_after.is_none_or(|at| self.now.at >= at) {
            self.deleting = true;
            self.delete_after = Some(self.now.at + STILL_THERE);
            self.effects.push(Effect::Delete);
        }
    }

    /// Whether the object is waiting for this agent alone to go.
    fn may_delete(&self) -> bool {
        self.finished
            && self.deleted.is_some()
            && !self.gone
            && !self.deleting
            && (self.frozen || self.publisher.has_told(&self.status()))
    }

    fn release_ports_of(&mut self, index: usize) {
        let container = Some(self.containers[index].view.name.clone());
        self.effects.push(Effect::ReleasePorts { container });
    }

    fn tell_of(&mut self, index: usize, severity: Severity, reason: &'static str, message: String) {
        let container = Some(self.containers[index].view.name.clone());
        self.tell(container, severity, reason, message);
    }

    fn tell(&mut self, container: Option<String>, severity: Severity, reason: &'static str, message: String) {
        self.effects.push(Effect::Tell { container, severity, reason, message });
    }
}
