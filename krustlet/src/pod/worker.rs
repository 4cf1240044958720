//! The life of one pod on this node, from the first sight of its object to the last: one task a pod, keyed by UID.
//!
//! The worker holds state and decides; everything that takes time (starting, stopping, writing to the API) is a task of
//! its own that reports back with a [`Message`]. So a pod that is slow holds up nothing, its own other containers
//! included, and an idle pod is a task that sleeps.

use super::checkpoint::{Checkpoint, Record, past};
use super::probes::{self, ProbeEvent};
use super::publish::{self, Publisher};
use super::slot::{Activity, End, Probing, Run, Slot, Update, Why, judge, next_probe};
use super::start::{Failure, Guest, NodeContext, Obstacle, Outcome, Start, Started};
use super::status::{self, State, Termination, View};
use super::volumes::PodVolumes;
use super::{Role, containers, full_name, hooks, is_finished, name, namespace, uid};
use crate::backoff::{Backoff, jitter};
use crate::client::{describe, status_code};
use crate::events::Severity;
use crate::logs;
use crate::reasons::{event, pod as pod_reason, terminated, waiting};
use crate::telemetry::metrics;
use crate::trees;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use krustlet_runtime::{ExitReason, Image, LogFile};
use kube::api::{Api, DeleteParams, Preconditions};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{OnceCell, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, info, warn};

/// A guest gets at least this long to end, as with the kubelet.
const MIN_GRACE: Duration = Duration::from_secs(2);
const DEFAULT_GRACE: Duration = Duration::from_secs(30);
/// A pod that takes what the node does not have gets no longer, as with the kubelet.
const EVICTION_GRACE: Duration = Duration::from_secs(1);
/// The longest that the end of the agent waits for a pod.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);
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
/// How long a failed pull shows its cause as the reason, before it shows that the next try is waited for.
const SHOW_PULL_ERROR: Duration = Duration::from_secs(2);

/// What the tasks of a pod report to its worker.
enum Message {
    Started { slot: usize, generation: u32, result: Box<Result<Outcome, Failure>> },
    Ended { slot: usize, generation: u32, end: Box<End> },
    Updated { slot: usize, generation: u32, result: Box<Result<Image, Failure>> },
    Written { status: Box<PodStatus>, result: kube::Result<u64> },
    Deleted(kube::Result<()>),
    Refreshed { error: Option<String> },
}

/// What the worker of a pod is told: the pod's newest object, or none when the object is gone.
pub type Updates = watch::Receiver<Option<Arc<Pod>>>;

pub struct Worker {
    node: Arc<NodeContext>,
    pod: Arc<Pod>,
    updates: Updates,
    inbox: mpsc::UnboundedReceiver<Message>,
    outbox: mpsc::UnboundedSender<Message>,
    slots: Vec<Slot>,
    volumes: Arc<OnceCell<PodVolumes>>,
    checkpoint: Checkpoint,
    start_time: Timestamp,
    refresh_at: Option<Instant>,
    /// The init containers are through.
    initialized: bool,

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

impl Worker {
    /// A worker for the pod, which is `rejected` when the node cannot take it.
    pub fn new(node: Arc<NodeContext>, pod: Arc<Pod>, updates: Updates, rejected: Option<status::Failure>) -> Self {
        let (outbox, inbox) = mpsc::unbounded_channel();
        let checkpoint = Checkpoint::open(&node.pod_dir(&pod));
        let shown = pod.status.clone().unwrap_or_default();
        let frozen = is_finished(&pod);
        let slots: Vec<Slot> = match &pod.spec {
            Some(spec) if !frozen => containers(spec)
                .map(|(role, container)| {
                    let statuses =
                        if role == Role::Main { &shown.container_statuses } else { &shown.init_container_statuses };
                    let shown = statuses.iter().flatten().find(|status| status.name == container.name);
                    Slot::new(role, spec, container, shown, past(shown, checkpoint.get(&container.name)))
                })
                .collect(),
            _ => Vec::new(),
        };
        let adopted = slots.iter().any(|slot| slot.has_run);
        let mut worker = Self {
            start_time: shown.start_time.as_ref().map_or_else(status::now, |time| time.0),
            node,
            pod: pod.clone(),
            updates,
            inbox,
            outbox,
            slots,
            volumes: Arc::default(),
            checkpoint,
            refresh_at: None,
            initialized: false,
            deleted: None,
            gone: false,
            failure: rejected,
            completed: false,
            shutdown: false,
            finished: frozen,
            last_words: None,
            publisher: Publisher::default(),
            frozen,
            was_ready: adopted,
            deleting: false,
            delete_after: None,
        };
        if adopted {
            info!(pod = full_name(&pod), uid = uid(&pod), "taking the pod back");
        }
        worker.take(pod);
        worker
    }

    /// Lives as long as the pod's object does, or until the agent ends.
    pub async fn run(mut self) {
        let mut emptied = false;
        loop {
            self.advance();
            self.publish();
            // The object of a pod that has ended may stay for long; what it wrote is nobody's any more.
            if self.finished && !std::mem::replace(&mut emptied, true) {
                tokio::spawn(remove_files(self.node.pod_dir(&self.pod).join("volumes")));
            }
            if self.shutdown && self.finished {
                self.last_words.get_or_insert_with(|| Instant::now() + LAST_WORDS);
            }
            if self.gone && self.finished || self.is_shut_down() {
                break;
            }
            self.wait().await;
        }
        self.node.ports.release_pod(uid(&self.pod));
        if self.gone {
            self.remove_files().await;
        }
    }

    /// Whether the pod stops only because the agent does: it stays in the API, and the next agent takes it up again.
    fn suspends(&self) -> bool {
        self.shutdown && self.deleted.is_none() && !self.gone && self.failure.is_none()
    }

    fn is_shut_down(&self) -> bool {
        // The API server may be away, or a finalizer may keep the object: neither keeps the agent.
        if self.last_words.is_some_and(|until| Instant::now() >= until) {
            return true;
        }
        let waits = self.deleted.is_some() || self.gone || (self.failure.is_some() && !self.finished);
        self.shutdown && !waits && !self.publisher.is_writing() && self.slots.iter().all(|slot| !slot.is_active())
    }

    async fn remove_files(&self) {
        let directory = self.node.pod_dir(&self.pod);
        let logs = logs::pod_directory(&self.node.data_dir, &self.pod);
        remove_files(directory).await;
        remove_files(logs).await;
    }

    /// Sleeps until something happens, and takes it in.
    async fn wait(&mut self) {
        let deadline = self.next_deadline();
        let waits_for_port = self
            .slots
            .iter()
            .any(|slot| matches!(slot.activity, Activity::Waiting { obstacle: Some(Obstacle::Port), .. }));
        let Self { inbox, updates, slots, node, shutdown, pod, failure, finished, .. } = self;
        tokio::select! {
            Some(message) = inbox.recv() => self.on_message(message),
            changed = updates.changed() => {
                let newest = if changed.is_ok() { updates.borrow_and_update().clone() } else { None };
                match newest {
                    Some(pod) => self.take(pod),
                    None => self.gone = true,
                }
            }
            (slot, event) = next_probe(slots) => self.on_probe(slot, event),
            () = sleep_until(deadline) => {}
            message = node.evictions.of(uid(pod)), if failure.is_none() && !*finished => self.evict(message),
            () = node.shutdown.cancelled(), if !*shutdown => self.shutdown = true,
            () = node.ports.released(), if waits_for_port => {
                for slot in &mut self.slots {
                    if let Activity::Waiting { until, obstacle: Some(Obstacle::Port), .. } = &mut slot.activity {
                        *until = Instant::now();
                    }
                }
            }
        }
    }

    /// Ends the pod because of what it takes of the node.
    fn evict(&mut self, message: String) {
        self.tell(None, Severity::Warning, pod_reason::EVICTED, message.clone());
        self.failure = Some(status::Failure { reason: pod_reason::EVICTED.to_owned(), message });
    }

    fn is_evicted(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| failure.reason == pod_reason::EVICTED)
    }

    /// Takes in the pod's newest object.
    fn take(&mut self, pod: Arc<Pod>) {
        let now = Instant::now();
        if self.publisher.on_shown(&pod, now) {
            debug!(pod = full_name(&pod), "somebody changed the pod's status; writing it again");
        }
        if pod.metadata.deletion_timestamp.is_some() {
            let seconds = pod.metadata.deletion_grace_period_seconds.and_then(|s| u64::try_from(s).ok()).unwrap_or(0);
            let until = now + Duration::from_secs(seconds).max(MIN_GRACE);
            // A second delete may shorten the time, never lengthen it.
            if self.deleted.is_none() {
                info!(pod = full_name(&pod), uid = uid(&pod), "pod is deleted, {seconds} s of grace");
            }
            self.deleted = Some(self.deleted.map_or(until, |before| before.min(until)));
        }
        // Somebody else gave the pod up, such as the garbage collector: what it runs is to end.
        if is_finished(&pod) && !self.finished {
            self.completed = true;
        }
        self.pod = pod;
    }

    fn on_message(&mut self, message: Message) {
        match message {
            Message::Started { slot, generation, result } => {
                if self.slots[slot].generation == generation {
                    match *result {
                        Ok(Outcome::Started(started)) => self.on_started(slot, started),
                        Ok(Outcome::Lost) => {
                            info!(
                                pod = full_name(&self.pod),
                                container = self.slots[slot].view.name,
                                "the container ran when the agent stopped, and its policy lets it run only once"
                            );
                            self.slots[slot].give_up();
                        }
                        Err(failure) => self.on_failure(slot, &failure),
                    }
                }
            }
            Message::Ended { slot, generation, end } => {
                if self.slots[slot].generation == generation {
                    self.on_end(slot, *end);
                }
            }
            Message::Updated { slot, generation, result } => {
                if self.slots[slot].generation == generation {
                    self.on_updated(slot, *result);
                }
            }
            Message::Written { status, result } => self.on_written(*status, result),
            Message::Deleted(result) => {
                self.deleting = false;
                // Gone, or another pod by now: either way this one is no more, and the watch will say so.
                if let Err(error) = result
                    && !matches!(status_code(&error), Some(404 | 409))
                {
                    debug!(pod = full_name(&self.pod), "failed to delete the pod: {}", describe(&error));
                    self.delete_after = Some(Instant::now() + DELETE_RETRY);
                }
            }
            Message::Refreshed { error } => {
                // The files of a pod that has ended are gone.
                if self.finished {
                    return;
                }
                self.refresh_at = Some(Instant::now() + jitter(REFRESH, REFRESH_JITTER));
                if let Some(message) = error {
                    self.tell(None, Severity::Warning, event::FAILED_MOUNT, message);
                }
            }
        }
    }

    fn on_started(&mut self, index: usize, started: Started) {
        let Some(container) = self.container(index) else { return };
        let generation = self.slots[index].generation;
        let probes = has_probes(&container).then(|| {
            let (sender, events) = mpsc::channel(8);
            Probing { _prober: probes::spawn(&container, self.node.address, sender), events }
        });
        let watch = match &started.guest {
            Guest::Server(_) => None,
            Guest::Command(execution) => {
                let (execution, log) = (execution.clone(), started.log.clone());
                let tells = tells_last_words(&container);
                Some(self.spawn(async move {
                    let exit = execution.wait().await;
                    let reason = match exit.reason {
                        ExitReason::Completed => terminated::COMPLETED,
                        ExitReason::Error => terminated::ERROR,
                        ExitReason::OutOfMemory => terminated::OOM_KILLED,
                    };
                    let last_words = last_words(tells, &log).await;
                    let end = Box::new(End { exit_code: exit.code, reason, message: exit.message, last_words });
                    Message::Ended { slot: index, generation, end }
                }))
            }
        };
        let entry = self.node.roster.enter(uid(&self.pod), &container.name, started.guest.clone());
        let now = status::now();
        let slot = &mut self.slots[index];
        if slot.has_run {
            slot.view.restarts += 1;
            metrics().container_restarts.inc();
        }
        slot.has_run = true;
        slot.interrupted = false;
        if let State::Terminated(end) = std::mem::replace(&mut slot.view.state, State::Running { since: now }) {
            slot.view.last = Some(end);
        }
        slot.view.image_id = started.image.reference;
        slot.view.container_id =
            Some(format!("wasmtime://{}.{}.{}", uid(&self.pod), slot.view.name, slot.view.restarts));
        slot.view.started = container.startup_probe.is_none();
        slot.view.ready = slot.view.started && container.readiness_probe.is_none();
        slot.image_backoff.reset();
        slot.configuration_backoff.reset();
        slot.port_backoff.reset();
        slot.activity = Activity::Running(Run {
            guest: started.guest,
            log: started.log,
            since: Instant::now(),
            since_time: now,
            _watch: watch,
            probes,
            _entry: entry,
        });
        let record = Record { restarts: slot.view.restarts, started_at: now, termination: None };
        self.checkpoint.set(&container.name, record);
        if self.refresh_at.is_none()
            && self.pod.spec.as_ref().is_some_and(|spec| spec.volumes.iter().flatten().next().is_some())
        {
            self.refresh_at = Some(Instant::now() + jitter(REFRESH, REFRESH_JITTER));
        }
    }

    fn on_failure(&mut self, index: usize, failure: &Failure) {
        let slot = &mut self.slots[index];
        let wait = match failure.obstacle {
            Obstacle::Image | Obstacle::Container => slot.image_backoff.jittered(),
            Obstacle::Configuration => slot.configuration_backoff.jittered(),
            Obstacle::Port => slot.port_backoff.jittered(),
        };
        let now = Instant::now();
        let pull = failure.reason == waiting::ERR_IMAGE_PULL;
        let again = matches!(&slot.view.state, State::Waiting { reason, .. } if reason == waiting::IMAGE_PULL_BACK_OFF);
        if pull && again {
            slot.wait(waiting::IMAGE_PULL_BACK_OFF, format!("Back-off pulling image: {}", failure.message));
        } else {
            slot.wait(failure.reason, &failure.message);
        }
        slot.activity = Activity::Waiting {
            until: now + wait,
            obstacle: Some(failure.obstacle),
            show_back_off: (pull && !again).then(|| now + SHOW_PULL_ERROR),
        };
        let name = slot.view.name.clone();
        self.tell(Some(&name), Severity::Warning, failure.event, format!("{}: {}", failure.reason, failure.message));
    }

    /// A container's guest has ended, by itself or because it was stopped.
    fn on_end(&mut self, index: usize, end: End) {
        let suspends = self.suspends();
        let slot = &mut self.slots[index];
        let (run, why) = match std::mem::replace(&mut slot.activity, Activity::Idle) {
            Activity::Running(run) => (run, None),
            Activity::Stopping { run, why, .. } => (run, Some(why)),
            other => {
                slot.activity = other;
                return;
            }
        };
        slot.generation += 1;
        slot.update = None;
        slot.view.ready = false;
        slot.view.started = false;
        if suspends && why == Some(Why::PodEnds) {
            // It did not end by itself: the API goes on showing it, and the next agent takes it up again.
            slot.activity = Activity::Over;
            return;
        }
        let mut end = judge(end, why.as_ref(), matches!(run.guest, Guest::Command(_)));
        if end.exit_code != 0 && !end.last_words.is_empty() {
            // As the kubelet joins what it has to say itself with what the container says.
            let separator = if end.message.is_empty() { "" } else { ": " };
            end.message = end.message + separator + &end.last_words;
        }
        let termination = Termination {
            exit_code: end.exit_code,
            reason: end.reason.to_owned(),
            message: end.message,
            started_at: Some(run.since_time),
            finished_at: status::now(),
            container_id: slot.view.container_id.clone(),
        };
        slot.view.state = State::Terminated(termination.clone());
        let name = slot.view.name.clone();
        let restarts = slot.view.restarts;
        let record = Record { restarts, started_at: run.since_time, termination: Some(termination) };
        self.checkpoint.set(&name, record);
        let ran = run.since.elapsed();
        drop(run);
        if self.is_ending() {
            self.slots[index].give_up();
            self.node.ports.release(uid(&self.pod), &name);
            return;
        }
        let slot = &mut self.slots[index];
        match why {
            Some(Why::PodEnds | Why::Deadline) => slot.activity = Activity::Over,
            Some(Why::Replaced) => slot.activity = Activity::Idle,
            _ if slot.policy.restarts(end.exit_code) => {
                let wait = slot.crash_loop.next(ran);
                if wait.is_zero() {
                    slot.activity = Activity::Idle;
                    return;
                }
                let message = format!(
                    "back-off {}s restarting failed container={name} pod={}_{}({})",
                    wait.as_secs(),
                    super::name(&self.pod),
                    namespace(&self.pod),
                    uid(&self.pod)
                );
                slot.wait(waiting::CRASH_LOOP_BACK_OFF, message);
                slot.activity = Activity::Waiting { until: Instant::now() + wait, obstacle: None, show_back_off: None };
                let text = format!("Back-off restarting failed container {name}");
                self.tell(Some(&name), Severity::Warning, event::BACK_OFF, text);
            }
            _ => {
                slot.activity = Activity::Over;
                self.node.ports.release(uid(&self.pod), &name);
            }
        }
    }

    fn on_probe(&mut self, index: usize, probe: ProbeEvent) {
        let Some(container) = self.container(index) else { return };
        let slot = &mut self.slots[index];
        if !matches!(slot.activity, Activity::Running(_)) {
            return;
        }
        match probe {
            ProbeEvent::Started => {
                slot.view.started = true;
                slot.view.ready = container.readiness_probe.is_none();
            }
            ProbeEvent::Ready(ready) => slot.view.ready = ready && slot.view.started,
            ProbeEvent::Unhealthy { message, .. } => {
                self.tell(Some(&container.name), Severity::Warning, event::UNHEALTHY, message);
                // Nothing better is likely to be said soon.
                self.publisher.hurry(Instant::now());
            }
            ProbeEvent::Failed { kind, message } => {
                self.tell(Some(&container.name), Severity::Normal, event::KILLING, message.clone());
                let grace = probes::termination_grace(&container, kind)
                    .and_then(|seconds| u64::try_from(seconds).ok())
                    .map_or_else(|| self.pod_grace(), Duration::from_secs);
                self.stop(index, Why::Unhealthy(message), grace);
            }
        }
    }

    // ---- what is to be done now ----

    fn is_ending(&self) -> bool {
        self.deleted.is_some() || self.gone || self.failure.is_some() || self.completed || self.shutdown
    }

    fn advance(&mut self) {
        if self.finished {
            self.delete();
            return;
        }
        self.check_deadline();
        if !self.is_ending() {
            self.advance_containers();
        }
        if self.is_ending() {
            self.stop_containers();
            if self.slots.iter().all(Slot::is_over) && !self.suspends() {
                self.finished = true;
                self.refresh_at = None;
                self.node.ports.release_pod(uid(&self.pod));
                self.delete();
            }
        }
    }

    fn check_deadline(&mut self) {
        if let Some(deadline) = self.active_deadline()
            && Timestamp::now() >= deadline
            && !self.is_ending()
        {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.tell(None, Severity::Normal, event::DEADLINE_EXCEEDED, message.clone());
            self.failure = Some(status::Failure { reason: pod_reason::DEADLINE_EXCEEDED.to_owned(), message });
        }
    }

    fn active_deadline(&self) -> Option<Timestamp> {
        let seconds = self.pod.spec.as_ref()?.active_deadline_seconds?;
        Timestamp::from_second(self.start_time.as_second().saturating_add(seconds)).ok()
    }

    /// Starts what is next: init containers one after the other, then all the others.
    fn advance_containers(&mut self) {
        let mut proceed = true;
        let mut init_failed = false;
        for index in 0..self.slots.len() {
            if !proceed && !self.initialized {
                let slot = &mut self.slots[index];
                if !slot.has_run && matches!(slot.activity, Activity::Idle) {
                    slot.wait(waiting::POD_INITIALIZING, "");
                }
                continue;
            }
            self.ensure(index);
            let slot = &self.slots[index];
            match slot.view.role {
                Role::Main => {}
                Role::Sidecar => proceed = slot.view.started,
                Role::Init => {
                    let end = match &slot.view.state {
                        State::Terminated(end) => Some(end.exit_code),
                        _ => None,
                    };
                    init_failed = slot.is_over() && end != Some(0);
                    proceed = slot.is_over() && end == Some(0);
                }
            }
        }
        // Once the main containers had their turn, a sidecar that is restarted does not hold them up.
        self.initialized |= proceed;
        let mut mains = self.slots.iter().filter(|slot| slot.view.role == Role::Main);
        self.completed = init_failed || (self.initialized && mains.all(Slot::is_over));
    }

    /// Has the container run what the spec says.
    fn ensure(&mut self, index: usize) {
        let Some(container) = self.container(index) else { return };
        let image = container.image.clone().unwrap_or_default();
        let now = Instant::now();
        let slot = &mut self.slots[index];
        match &mut slot.activity {
            Activity::Idle => self.start(index, container),
            Activity::Waiting { until, show_back_off, .. } => {
                if image != slot.view.image {
                    // What stood in the way may be gone with the old image.
                    slot.image_backoff.reset();
                    self.start(index, container);
                } else if now >= *until {
                    self.start(index, container);
                } else if show_back_off.is_some_and(|at| now >= at) {
                    *show_back_off = None;
                    let cause = match &slot.view.state {
                        State::Waiting { message, .. } => message.clone(),
                        _ => String::new(),
                    };
                    let message = format!("Back-off pulling image: {cause}");
                    slot.wait(waiting::IMAGE_PULL_BACK_OFF, message);
                    let text = format!("Back-off pulling image {image:?}");
                    self.tell(Some(&container.name), Severity::Normal, event::BACK_OFF, text);
                }
            }
            Activity::Starting { .. } if image != slot.view.image => self.start(index, container),
            Activity::Running(run) => match &run.guest {
                Guest::Server(_) => self.update(index, container, &image),
                Guest::Command(_) if image != slot.view.image => {
                    let text = format!("Container {} has a new image, it will be restarted", container.name);
                    self.tell(Some(&container.name), Severity::Normal, event::KILLING, text);
                    self.stop(index, Why::Replaced, self.pod_grace());
                }
                Guest::Command(_) => {}
            },
            Activity::Starting { .. } | Activity::Stopping { .. } | Activity::Over => {}
        }
    }

    fn start(&mut self, index: usize, container: Container) {
        let slot = &mut self.slots[index];
        slot.generation += 1;
        slot.view.image = container.image.clone().unwrap_or_default();
        if matches!(&slot.view.state, State::Waiting { reason, .. } if reason == waiting::POD_INITIALIZING) {
            slot.wait(waiting::CONTAINER_CREATING, "");
        }
        let generation = slot.generation;
        let start = self.new_start(index, container);
        let task = self.spawn(async move {
            let result = Box::new(start.run().await);
            Message::Started { slot: index, generation, result }
        });
        self.slots[index].activity = Activity::Starting { _task: task };
    }

    fn new_start(&self, index: usize, container: Container) -> Start {
        let slot = &self.slots[index];
        Start {
            node: self.node.clone(),
            pod: self.pod.clone(),
            container,
            role: slot.view.role,
            policy: slot.policy,
            volumes: self.volumes.clone(),
            attempt: if slot.has_run { slot.view.restarts + 1 } else { slot.view.restarts },
            interrupted: slot.interrupted,
        }
    }

    /// Brings a serving container to the image that the spec names, while it serves.
    fn update(&mut self, index: usize, container: Container, image: &str) {
        let now = Instant::now();
        let slot = &mut self.slots[index];
        if image == slot.view.image {
            // Nothing to do, or the change was taken back.
            slot.update = None;
            return;
        }
        let update = slot.update.get_or_insert_with(|| {
            Box::new(Update {
                task: None,
                image: String::new(),
                retry: None,
                backoff: Backoff::new(Duration::from_secs(10), Duration::from_secs(300)),
                failure: None,
            })
        });
        if update.image != image {
            image.clone_into(&mut update.image);
            update.task = None;
            update.retry = None;
            update.backoff.reset();
        }
        if update.task.is_some() || update.retry.is_some_and(|at| now < at) {
            return;
        }
        let Activity::Running(Run { guest: Guest::Server(server), log, .. }) = &slot.activity else { return };
        let (server, log, generation) = (server.clone(), log.clone(), slot.generation);
        let start = self.new_start(index, container);
        let task = self.spawn(async move {
            let result = Box::new(start.swap(server, log).await);
            Message::Updated { slot: index, generation, result }
        });
        if let Some(update) = &mut self.slots[index].update {
            update.task = Some(task);
        }
    }

    fn on_updated(&mut self, index: usize, result: Result<Image, Failure>) {
        let slot = &mut self.slots[index];
        let Some(update) = &mut slot.update else { return };
        update.task = None;
        let name = slot.view.name.clone();
        match result {
            Ok(image) => {
                slot.view.image.clone_from(&update.image);
                slot.view.image_id = image.reference;
                slot.update = None;
                let text = format!("Container {name} serves {} now", self.slots[index].view.image_id);
                self.tell(Some(&name), Severity::Normal, event::UPDATED, text);
            }
            Err(failure) => {
                update.retry = Some(Instant::now() + update.backoff.jittered());
                let text = format!("{}: {}; the old image serves on", failure.reason, failure.message);
                update.failure = Some(failure);
                self.tell(Some(&name), Severity::Warning, event::FAILED_UPDATE, text);
            }
        }
    }

    /// Stops whatever still runs; sidecars when all the others have ended.
    fn stop_containers(&mut self) {
        let why = match &self.failure {
            Some(failure) if failure.reason == pod_reason::DEADLINE_EXCEEDED => Why::Deadline,
            _ => Why::PodEnds,
        };
        let others_active = self.slots.iter().any(|slot| slot.view.role != Role::Sidecar && slot.is_active());
        for index in 0..self.slots.len() {
            if others_active && self.slots[index].view.role == Role::Sidecar && self.slots[index].is_active() {
                continue;
            }
            let grace = self.grace();
            match &self.slots[index].activity {
                Activity::Running(_) => {
                    if !self.shutdown || self.deleted.is_some() {
                        let name = self.slots[index].view.name.clone();
                        self.tell(Some(&name), Severity::Normal, event::KILLING, format!("Stopping container {name}"));
                    }
                    self.stop(index, why.clone(), grace);
                }
                Activity::Stopping { until, .. } if Instant::now() + grace + Duration::from_millis(100) < *until => {
                    self.stop(index, why.clone(), grace);
                }
                Activity::Stopping { .. } | Activity::Over => {}
                Activity::Idle | Activity::Starting { .. } | Activity::Waiting { .. } if self.suspends() => {
                    self.slots[index].activity = Activity::Over;
                    self.slots[index].generation += 1;
                }
                Activity::Idle | Activity::Starting { .. } | Activity::Waiting { .. } => self.slots[index].give_up(),
            }
        }
    }

    fn pod_grace(&self) -> Duration {
        let seconds = self.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        seconds.and_then(|seconds| u64::try_from(seconds).ok()).map_or(DEFAULT_GRACE, Duration::from_secs)
    }

    /// How long the containers have from now.
    fn grace(&self) -> Duration {
        if self.gone {
            return MIN_GRACE;
        }
        match self.deleted {
            Some(until) => until.saturating_duration_since(Instant::now()),
            None if self.is_evicted() => EVICTION_GRACE,
            None if self.shutdown => self.pod_grace().min(SHUTDOWN_GRACE),
            None => self.pod_grace(),
        }
    }

    /// Stops a running container within `grace`: preStop hook, then the requests in flight. A command has no signals, so
    /// it ends at once, as a process without a handler for SIGTERM would. Called again, it gives less time.
    fn stop(&mut self, index: usize, why: Why, grace: Duration) {
        let Some(container) = self.container(index) else { return };
        let slot = &mut self.slots[index];
        let (run, first) = match std::mem::replace(&mut slot.activity, Activity::Idle) {
            Activity::Running(mut run) => {
                run.probes = None;
                (run, true)
            }
            Activity::Stopping { run, .. } => (run, false),
            other => {
                slot.activity = other;
                return;
            }
        };
        slot.update = None;
        slot.view.ready = false;
        let generation = slot.generation;
        let (guest, log) = (run.guest.clone(), run.log.clone());
        let until = Instant::now() + grace;
        let (node, pod) = (self.node.clone(), self.pod.clone());
        let outbox = self.outbox.clone();
        let task = tokio::spawn(async move {
            if first && let Some(hook) = hooks::pre_stop(&container) {
                let result = tokio::time::timeout_at(until, hooks::run(&container, hook, node.address)).await;
                let cause = match result {
                    Ok(Ok(())) => None,
                    Ok(Err(cause)) => Some(cause),
                    Err(_) => Some("the grace period ended first".to_owned()),
                };
                if let Some(cause) = cause {
                    let text = format!("preStop hook failed: {cause}");
                    node.events.pod(&pod, Some(&container.name), Severity::Warning, event::FAILED_PRE_STOP_HOOK, text);
                }
            }
            match guest {
                Guest::Server(server) => {
                    let left = until.saturating_duration_since(Instant::now()).max(MIN_GRACE.min(grace));
                    let finished = server.drain(left).await;
                    let message =
                        if finished { "" } else { "requests in flight were cut off at the end of the grace period" };
                    let last_words = last_words(tells_last_words(&container), &log).await;
                    let (reason, message) = (terminated::COMPLETED, message.to_owned());
                    let end = Box::new(End { exit_code: 0, reason, message, last_words });
                    let _ = outbox.send(Message::Ended { slot: index, generation, end });
                }
                // Its watch reports the end.
                Guest::Command(execution) => execution.kill(),
            }
        });
        self.slots[index].activity = Activity::Stopping { run, why, until, _task: AbortOnDropHandle::new(task) };
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
        if !self.publisher.begin(&status, (progress || ending) && !self.shutdown, Instant::now()) {
            return;
        }
        self.observe(&status);
        metrics().status_patches.inc();
        let api: Api<Pod> = Api::namespaced(self.node.client.clone(), namespace(&self.pod));
        let (pod, outbox) = (self.pod.clone(), self.outbox.clone());
        // Not aborted with the worker: what is on its way may arrive.
        tokio::spawn(async move {
            let result = publish::write(&api, &pod, &status).await;
            let _ = outbox.send(Message::Written { status: Box::new(status), result });
        });
    }

    fn status(&self) -> PodStatus {
        let stale = self.slots.iter().find_map(|slot| {
            let failure = slot.update.as_ref()?.failure.as_ref()?;
            Some((failure.reason, failure.message.as_str()))
        });
        status::build(&View {
            pod: &self.pod,
            sent: self.publisher.told(),
            facts: &self.node.facts,
            containers: self.slots.iter().map(|slot| &slot.view).collect(),
            start_time: self.start_time,
            prepared: self.volumes.initialized(),
            ended: self.finished,
            failure: self.failure.as_ref(),
            shutdown: self.shutdown,
            stale,
        })
    }

    /// Measures how long the pod took to become ready.
    fn observe(&mut self, status: &PodStatus) {
        let ready = status.conditions.iter().flatten().any(|c| c.type_ == "Ready" && c.status == "True");
        if ready && !self.was_ready {
            self.was_ready = true;
            if let Some(created) = &self.pod.metadata.creation_timestamp {
                let took = Timestamp::now().duration_since(created.0).as_secs_f64().max(0.0);
                metrics().pod_start_duration_seconds.observe(took);
            }
        }
    }

    fn on_written(&mut self, status: PodStatus, result: kube::Result<u64>) {
        let result = result.map_err(|error| {
            debug!(pod = full_name(&self.pod), "failed to write the pod's status: {}", describe(&error));
            status_code(&error)
        });
        self.publisher.on_written(status, result, Instant::now());
    }

    /// Deletes the object of a pod that was deleted and has ended, once its last status has arrived.
    fn delete(&mut self) {
        if !self.may_delete() {
            return;
        }
        if let Some(at) = self.delete_after
            && Instant::now() < at
        {
            return;
        }
        self.deleting = true;
        self.delete_after = Some(Instant::now() + STILL_THERE);
        let api: Api<Pod> = Api::namespaced(self.node.client.clone(), namespace(&self.pod));
        let pod = self.pod.clone();
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                // A pod that was recreated under this name is another pod.
                preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
                ..DeleteParams::default()
            };
            let result = api.delete(name(&pod), &params).await.map(|_| ());
            let _ = outbox.send(Message::Deleted(result));
        });
    }

    /// Whether the object is waiting for this agent alone to go.
    fn may_delete(&self) -> bool {
        self.finished
            && self.deleted.is_some()
            && !self.gone
            && !self.deleting
            && (self.frozen || self.publisher.has_told(&self.status()))
    }

    // ---- helpers ----

    fn container(&self, index: usize) -> Option<Container> {
        containers(self.pod.spec.as_ref()?).nth(index).map(|(_, container)| container.clone())
    }

    fn tell(&self, container: Option<&str>, severity: Severity, reason: &'static str, message: String) {
        self.node.events.pod(&self.pod, container, severity, reason, message);
    }

    fn spawn(&self, work: impl Future<Output = Message> + Send + 'static) -> AbortOnDropHandle<()> {
        let outbox = self.outbox.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = outbox.send(work.await);
        }))
    }

    /// When the worker has something to do even if nothing happens.
    fn next_deadline(&mut self) -> Option<Instant> {
        let now = Instant::now();
        if self.refresh_at.is_some_and(|at| now >= at) {
            self.refresh_at = None;
            self.refresh();
        }
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
            && let Some(deadline) = self.active_deadline()
        {
            let left = Duration::try_from(deadline.duration_since(Timestamp::now())).unwrap_or_default();
            deadlines.push(now + left);
        }
        for slot in &self.slots {
            if let Activity::Waiting { until, show_back_off, .. } = &slot.activity {
                deadlines.push(*until);
                deadlines.extend(*show_back_off);
            }
            deadlines
                .extend(slot.update.as_ref().filter(|update| update.task.is_none()).and_then(|update| update.retry));
        }
        deadlines.into_iter().min()
    }

    /// Brings the pod's files up to date in the background.
    fn refresh(&self) {
        let (node, pod, volumes) = (self.node.clone(), self.pod.clone(), self.volumes.clone());
        let outbox = self.outbox.clone();
        tokio::spawn(async move {
            let Some(present) = volumes.get() else { return };
            let error = present.refresh(&node.objects, &pod, &node.facts).await.err().map(|error| error.to_string());
            let _ = outbox.send(Message::Refreshed { error });
        });
    }
}

async fn remove_files(path: PathBuf) {
    if let Err(error) = trees::remove(path.clone()).await {
        warn!(path = %path.display(), "failed to remove a pod's files: {error}");
    }
}

fn has_probes(container: &Container) -> bool {
    container.startup_probe.is_some() || container.readiness_probe.is_some() || container.liveness_probe.is_some()
}

/// Whether the end of the container's log is its message when it fails.
fn tells_last_words(container: &Container) -> bool {
    container.termination_message_policy.as_deref() == Some("FallbackToLogsOnError")
}

async fn last_words(told: bool, log: &LogFile) -> String {
    if told { logs::last_words(log.path()).await } else { String::new() }
}

async fn sleep_until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => tokio::time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
