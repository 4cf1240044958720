//! Carries out what a pod's [lifecycle](super::lifecycle) decides: one task a pod, keyed by UID.
//!
//! Everything that takes time (fetching, stopping, writing to the API) is a task of its own that reports back with an event.
//! So a pod that is slow holds up nothing, its own other containers included, and an idle pod is a task that sleeps. Where
//! such a task panics, it reports a failure in its place.

use super::checkpoint::{Checkpoint, KILLED};
use super::context::NodeContext;
use super::failure::{Failure, Obstacle};
use super::guest::Guest;
use super::lifecycle::{Effect, End, Event, Launched, MIN_GRACE, Now, PodLifecycle};
use super::probes::{self, ProbeEvent, Prober};
use super::roster::Entry;
use super::start::{Prepared, Start, Started};
use super::volumes::PodVolumes;
use super::{full_name, hooks, name, namespace, publish, status, uid};
use crate::addresses::PodAddress;
use crate::backoff::jitter;
use crate::client::{describe, status_code};
use crate::logs;
use crate::panics::message_of;
use crate::reach::Reach;
use crate::reasons::terminated;
use crate::telemetry::metrics;
use crate::trees;
use futures::FutureExt;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod, PodStatus};
use krustlet_runtime::{Execution, ExitReason, HttpServer, LogFile};
use kube::api::{Api, DeleteParams, Preconditions};
use std::collections::VecDeque;
use std::future::poll_fn;
use std::panic::AssertUnwindSafe;
use std::path::PathBuf;
use std::sync::Arc;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::{Mutex, OnceCell, mpsc, watch};
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;
use tracing::{debug, error, warn};

/// A deleted pod with an address of its own takes requests for so long yet, at most half of its grace: those who follow its
/// EndpointSlice call it until they have heard that it goes.
const DEREGISTRATION: Duration = Duration::from_secs(3);

/// What the worker of a pod is told: the pod's newest object, or none when the object is gone.
pub type Updates = watch::Receiver<Option<Arc<Pod>>>;

/// What the tasks of a pod report to its worker.
enum Report {
    Event(Event),
    /// What the container needs is there.
    Prepared {
        index: usize,
        generation: u32,
        prepared: Box<Prepared>,
    },
}

type Task = AbortOnDropHandle<()>;

pub struct Worker {
    node: Arc<NodeContext>,
    lifecycle: PodLifecycle,
    updates: Updates,
    /// Boxed: a channel has room for 32 from the start.
    inbox: mpsc::UnboundedReceiver<Box<Report>>,
    outbox: mpsc::UnboundedSender<Box<Report>>,
    containers: Vec<Running>,
    volumes: Arc<OnceCell<PodVolumes>>,
    reading: Arc<Mutex<()>>,
    checkpoint: Checkpoint,
    /// When the first container was stopped of a pod that was deleted.
    leaving_since: Option<Instant>,
}

/// What there is of a container beside its lifecycle.
#[derive(Default)]
struct Running {
    /// Fetches what the next start needs.
    preparing: Option<Task>,
    prepared: Option<Box<Prepared>>,
    guest: Option<Live>,
    /// Exchanges the image that is served.
    swapping: Option<Task>,
}

struct Live {
    guest: Guest,
    log: LogFile,
    generation: u32,
    /// Reports the end of a command.
    _watch: Option<Task>,
    post_start: Option<Task>,
    probes: Option<Probing>,
    stopping: Option<Stopping>,
    _entry: Entry,
}

struct Probing {
    _prober: Prober,
    events: mpsc::Receiver<(String, ProbeEvent)>,
}

struct Stopping {
    until: watch::Sender<Instant>,
    _task: Task,
}

impl Worker {
    /// A worker for the pod, which is `rejected` when the node cannot take it.
    pub fn new(node: Arc<NodeContext>, pod: Arc<Pod>, updates: Updates, rejected: Option<status::Failure>) -> Self {
        let (outbox, inbox) = mpsc::unbounded_channel();
        let checkpoint = Checkpoint::open(&node.pod_dir(&pod));
        let facts = node.facts_of(&pod);
        let lifecycle = PodLifecycle::new(pod, facts, &checkpoint, rejected, jitter, Now::read());
        let containers = (0..lifecycle.len()).map(|_| Running::default()).collect();
        Self {
            node,
            lifecycle,
            updates,
            inbox,
            outbox,
            containers,
            volumes: Arc::default(),
            reading: Arc::default(),
            checkpoint,
            leaving_since: None,
        }
    }

    /// Lives as long as the pod's object does, or until the agent ends.
    pub async fn run(mut self: Box<Self>) {
        let mut emptied = false;
        let mut event = if self.node.shutdown.is_cancelled() { Event::ShuttingDown } else { Event::Tick };
        loop {
            // Boxed: it is over soon, and the task of an idle pod stays as small as what it waits for.
            Box::pin(self.step(event)).await;
            // The object of a pod that has ended may stay for long.
            if self.lifecycle.is_finished() && !std::mem::replace(&mut emptied, true) {
                tokio::spawn(remove_files(self.node.pod_dir(self.lifecycle.pod()).join("volumes")));
            }
            if self.lifecycle.is_done() {
                break;
            }
            event = self.next_event().await;
        }
        self.node.ports.release_pod(uid(self.lifecycle.pod()));
        if self.lifecycle.is_gone() {
            self.node.addresses.release(uid(self.lifecycle.pod()));
            Box::pin(self.remove_files()).await;
        }
    }

    async fn step(&mut self, event: Event) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            for effect in self.lifecycle.step(event, Now::read()) {
                // Before anything else is heard of.
                events.extend(self.perform(effect).await);
            }
        }
    }

    async fn remove_files(&self) {
        let pod = self.lifecycle.pod();
        let directory = self.node.pod_dir(pod);
        let logs = logs::pod_directory(&self.node.data_dir, pod);
        remove_files(directory).await;
        remove_files(logs).await;
    }

    /// Sleeps until something happens.
    async fn next_event(&mut self) -> Event {
        let deadline = self.lifecycle.deadline();
        let waits_for_port = self.lifecycle.waits_for(Obstacle::Port);
        let waits_for_address = self.lifecycle.waits_for(Obstacle::Address);
        let is_shutting_down = self.lifecycle.is_shutting_down();
        let may_be_evicted = self.lifecycle.may_be_evicted();
        let pod = self.lifecycle.pod().clone();
        let Self { inbox, updates, containers, node, .. } = self;
        let report = tokio::select! {
            Some(report) = inbox.recv() => report,
            changed = updates.changed() => {
                let newest = if changed.is_ok() { updates.borrow_and_update().clone() } else { None };
                return newest.map_or(Event::Gone, Event::Shown);
            }
            event = next_probe(containers) => return event,
            () = sleep_until(deadline) => return Event::Tick,
            message = node.evictions.of(uid(&pod)), if may_be_evicted => return Event::Evicted(message),
            () = node.shutdown.cancelled(), if !is_shutting_down => return Event::ShuttingDown,
            () = node.ports.released(), if waits_for_port => return Event::Released(Obstacle::Port),
            () = node.addresses.released(), if waits_for_address => return Event::Released(Obstacle::Address),
        };
        match *report {
            Report::Event(event) => event,
            Report::Prepared { index, generation, prepared } => {
                let result = Ok(prepared.kind());
                if self.lifecycle.generation(index) == Some(generation) {
                    self.containers[index].prepared = Some(prepared);
                }
                Event::Prepared { index, generation, result, prepared: true }
            }
        }
    }

    // ---- what is to be done ----

    /// Carries the effect out, or has it carried out; gives the answer if there is one at once.
    async fn perform(&mut self, effect: Effect) -> Option<Event> {
        match effect {
            Effect::Prepare { index, generation } => return Some(self.prepare(index, generation)),
            Effect::Abandon { index } => self.containers[index] = Running::default(),
            Effect::Launch { index, generation, attempt } => {
                let result = self.launch(index, generation, attempt).await;
                return Some(Event::Launched { index, generation, result });
            }
            Effect::PostStart { index, generation } => self.post_start(index, generation),
            Effect::Probe { index, generation } => self.probe(index, generation),
            Effect::Stop { index, generation, until, grace } => self.stop(index, generation, until, grace),
            Effect::Hasten { index, until } => {
                let stopping = self.containers[index].guest.as_ref().and_then(|live| live.stopping.as_ref());
                if let Some(stopping) = stopping {
                    stopping.until.send_replace(until);
                }
            }
            Effect::Dispose { index } => self.containers[index] = Running::default(),
            Effect::Swap { index, generation } => self.swap(index, generation),
            Effect::AbandonSwap { index } => drop(self.containers[index].swapping.take()),
            Effect::Remember { container, record } => self.checkpoint.set(&container, record),
            Effect::ReleasePorts { container: Some(container) } => {
                self.node.ports.release(uid(self.lifecycle.pod()), &container);
            }
            Effect::ReleasePorts { container: None } => {
                self.node.ports.release_pod(uid(self.lifecycle.pod()));
                self.node.addresses.release(uid(self.lifecycle.pod()));
            }
            Effect::Refresh => self.refresh(),
            Effect::Tell { container, severity, reason, message } => {
                self.node.events.pod(self.lifecycle.pod(), container.as_deref(), severity, reason, message);
            }
            Effect::Write(status) => self.write(*status),
            Effect::Delete => self.delete(),
            Effect::CountRestart => _ = metrics().container_restarts.inc(),
            Effect::CountReady => {
                if let Some(created) = &self.lifecycle.pod().metadata.creation_timestamp {
                    let took = Timestamp::now().duration_since(created.0).as_secs_f64().max(0.0);
                    metrics().pod_start_duration_seconds.observe(took);
                }
            }
        }
        None
    }

    fn new_start(&self, index: usize) -> Option<Start> {
        let (role, container) = self.lifecycle.spec(index)?;
        let (node, pod) = (self.node.clone(), self.lifecycle.pod().clone());
        let (address, facts) = (self.address(), node.facts_of(&pod));
        let (volumes, reading) = (self.volumes.clone(), self.reading.clone());
        Some(Start { node, pod, container, role, address, facts, volumes, reading })
    }

    /// Where the pod is reached. Before it has an address, nothing of it is served.
    fn reach(&self) -> Reach {
        let (uid, address) = (uid(self.lifecycle.pod()), self.address().ip);
        Reach::of_pod(uid, address, self.node.roster.clone(), self.node.runtime.egress_policy())
    }

    fn address(&self) -> PodAddress {
        let known = self.node.addresses.of(self.lifecycle.pod());
        known.unwrap_or_else(|| PodAddress::of_node(self.node.addresses.node()))
    }

    /// Begins to fetch what the container needs, once its pod has an address.
    fn prepare(&mut self, index: usize, generation: u32) -> Event {
        match self.node.addresses.take(self.lifecycle.pod()) {
            Ok(address) => {
                self.fetch(index, generation);
                Event::Addressed(address.ip)
            }
            Err(why) => {
                let result = Err(Failure::address(why));
                Event::Prepared { index, generation, result, prepared: self.volumes.initialized() }
            }
        }
    }

    fn fetch(&mut self, index: usize, generation: u32) {
        let Some(start) = self.new_start(index) else { return };
        let volumes = self.volumes.clone();
        let work = async move {
            match start.prepare().await {
                Ok(prepared) => Report::Prepared { index, generation, prepared: Box::new(prepared) },
                Err(failure) => Report::Event(Event::Prepared {
                    index,
                    generation,
                    result: Err(failure),
                    prepared: volumes.initialized(),
                }),
            }
        };
        let failed = move |panic: String| {
            let result = Err(Failure::container(panic));
            Report::Event(Event::Prepared { index, generation, result, prepared: false })
        };
        let task = self.spawn(work, failed);
        let container = &mut self.containers[index];
        container.prepared = None;
        container.preparing = Some(task);
    }

    async fn launch(&mut self, index: usize, generation: u32, attempt: i32) -> Result<Launched, Failure> {
        let container = &mut self.containers[index];
        drop(container.preparing.take());
        let prepared = container.prepared.take();
        let spec = self.lifecycle.spec(index);
        let (Some(prepared), Some((_, spec))) = (prepared, spec) else {
            return Err(Failure::container("the container is to be started before what it needs is there"));
        };
        let Started { guest, log, launched } = prepared.launch(attempt).await?;
        let watch = match &guest {
            Guest::Server(_) => None,
            Guest::Command(execution) => Some(self.watch(index, generation, execution.clone(), log.clone(), &spec)),
        };
        let entry = self.node.roster.enter(uid(self.lifecycle.pod()), &spec.name, guest.clone());
        self.containers[index].guest = Some(Live {
            guest,
            log,
            generation,
            _watch: watch,
            post_start: None,
            probes: None,
            stopping: None,
            _entry: entry,
        });
        Ok(launched)
    }

    /// Reports the end of a command.
    fn watch(&self, index: usize, generation: u32, execution: Arc<Execution>, log: LogFile, spec: &Container) -> Task {
        let tells = tells_last_words(spec);
        let work = async move {
            let exit = execution.wait().await;
            let reason = match exit.reason {
                ExitReason::Completed => terminated::COMPLETED,
                ExitReason::Error => terminated::ERROR,
                ExitReason::OutOfMemory => terminated::OOM_KILLED,
            };
            let last_words = last_words(tells, &log).await;
            let end = End { exit_code: exit.code, reason, message: exit.message, last_words };
            Report::Event(Event::Ended { index, generation, end })
        };
        self.spawn(work, move |panic| ended_by(panic, index, generation))
    }

    fn post_start(&mut self, index: usize, generation: u32) {
        let Some((_, spec)) = self.lifecycle.spec(index) else { return };
        let (address, reach) = (self.address(), self.reach());
        let work = async move {
            let result = match hooks::post_start(&spec) {
                Some(hook) => hooks::run(&spec, hook, address, &reach).await,
                None => Ok(()),
            };
            Report::Event(Event::PostStarted { index, generation, result })
        };
        let failed = move |panic| Report::Event(Event::PostStarted { index, generation, result: Err(panic) });
        let task = self.spawn(work, failed);
        if let Some(live) = &mut self.containers[index].guest {
            live.post_start = Some(task);
        }
    }

    fn probe(&mut self, index: usize, generation: u32) {
        let Some((_, spec)) = self.lifecycle.spec(index) else { return };
        let (sender, events) = mpsc::channel(8);
        let probing = Probing { _prober: probes::spawn(&spec, self.address(), self.reach(), sender), events };
        if let Some(live) = self.containers[index].guest.as_mut().filter(|live| live.generation == generation) {
            live.probes = Some(probing);
        }
    }

    /// Until when the pod is called though it was deleted. Who gives it no time does not wait for that.
    fn deregistered_at(&mut self, grace: Duration) -> Option<Instant> {
        let is_called = self.address().is_own && self.lifecycle.is_deleted() && !self.lifecycle.is_gone();
        let waits = is_called && grace > MIN_GRACE;
        waits.then(|| *self.leaving_since.get_or_insert_with(Instant::now) + DEREGISTRATION.min(grace / 2))
    }

    /// preStop hook, then the requests in flight, all of it until then. A command has no signals, so it ends at once, as a
    /// process without a handler for SIGTERM would.
    fn stop(&mut self, index: usize, generation: u32, until: Instant, grace: Duration) {
        let spec = self.lifecycle.spec(index).map(|(_, spec)| spec).unwrap_or_default();
        let (address, reach, deregistered_at) = (self.address(), self.reach(), self.deregistered_at(grace));
        let Some(live) = &mut self.containers[index].guest else {
            let report = ended_by("the container has no guest".to_owned(), index, generation);
            let _ = self.outbox.send(Box::new(report));
            return;
        };
        live.probes = None;
        drop(live.post_start.take());
        let (guest, log) = (live.guest.clone(), live.log.clone());
        drop(self.containers[index].swapping.take());
        let (sender, deadline) = watch::channel(until);
        let outbox = self.outbox.clone();
        let work = async move {
            if let Some(hook) = hooks::pre_stop(&spec) {
                let result = tokio::select! {
                    result = hooks::run(&spec, hook, address, &reach) => result,
                    () = passed(deadline.clone(), Duration::ZERO) => Err("the grace period ended first".to_owned()),
                };
                if let Err(cause) = result {
                    let _ = outbox.send(Box::new(Report::Event(Event::PreStopFailed { index, generation, cause })));
                }
            }
            let server = match guest {
                Guest::Server(server) => server,
                Guest::Command(execution) => {
                    execution.kill();
                    // Its watch reports the end.
                    return std::future::pending().await;
                }
            };
            if deregistered_at.is_some() {
                tokio::select! {
                    () = sleep_until(deregistered_at) => {}
                    () = passed(deadline.clone(), Duration::ZERO) => {}
                }
            }
            let finished = drain(&server, deadline, MIN_GRACE.min(grace)).await;
            let message = if finished { "" } else { "requests in flight were cut off at the end of the grace period" };
            let last_words = last_words(tells_last_words(&spec), &log).await;
            let end = End { exit_code: 0, reason: terminated::COMPLETED, message: message.to_owned(), last_words };
            Report::Event(Event::Ended { index, generation, end })
        };
        let task = self.spawn(work, move |panic| ended_by(panic, index, generation));
        if let Some(live) = &mut self.containers[index].guest {
            live.stopping = Some(Stopping { until: sender, _task: task });
        }
    }

    fn swap(&mut self, index: usize, generation: u32) {
        let live = self.containers[index].guest.as_ref();
        let Some(Live { guest: Guest::Server(server), log, .. }) = live else { return };
        let (server, log) = (server.clone(), log.clone());
        let Some(start) = self.new_start(index) else { return };
        let work = async move {
            let result = match start.prepare().await {
                Ok(prepared) => prepared.swap(server, log).await,
                Err(failure) => Err(failure),
            };
            Report::Event(Event::Swapped { index, generation, result })
        };
        let failed = move |panic: String| {
            let result = Err(Failure::container(panic));
            Report::Event(Event::Swapped { index, generation, result })
        };
        self.containers[index].swapping = Some(self.spawn(work, failed));
    }

    /// Brings the pod's files up to date in the background.
    fn refresh(&self) {
        let (node, pod, volumes) = (self.node.clone(), self.lifecycle.pod().clone(), self.volumes.clone());
        let work = async move {
            let error = match volumes.get() {
                Some(present) => present.refresh(&node.objects, &pod, &node.facts_of(&pod)).await.err(),
                None => None,
            };
            Report::Event(Event::Refreshed { error: error.map(|error| error.to_string()) })
        };
        let failed = |panic| Report::Event(Event::Refreshed { error: Some(panic) });
        self.spawn(work, failed).detach();
    }

    /// Not aborted with the worker: what is on its way may arrive.
    fn write(&self, status: PodStatus) {
        metrics().status_patches.inc();
        let pod = self.lifecycle.pod().clone();
        let api: Api<Pod> = Api::namespaced(self.node.client.clone(), namespace(&pod));
        let copy = Box::new(status.clone());
        let work = async move {
            let result = publish::write(&api, &pod, &status).await.map_err(|error| {
                let status = status_code(&error);
                match status {
                    // What the API server does not take today it does not take later, and nobody sees how the pod is.
                    Some(400 | 422) => {
                        warn!(pod = full_name(&pod), "the pod's status is not taken: {}", describe(&error));
                    }
                    _ => debug!(pod = full_name(&pod), "failed to write the pod's status: {}", describe(&error)),
                }
                status
            });
            Report::Event(Event::Written { status: Box::new(status), result })
        };
        self.spawn(work, move |_| Report::Event(Event::Written { status: copy, result: Err(None) })).detach();
    }

    fn delete(&self) {
        let pod = self.lifecycle.pod().clone();
        let api: Api<Pod> = Api::namespaced(self.node.client.clone(), namespace(&pod));
        let work = async move {
            let params = DeleteParams {
                grace_period_seconds: Some(0),
                // A pod that was recreated under this name is another pod.
                preconditions: Some(Preconditions { uid: pod.metadata.uid.clone(), resource_version: None }),
                ..DeleteParams::default()
            };
            let result = api.delete(name(&pod), &params).await.map(|_| ()).map_err(|error| {
                debug!(pod = full_name(&pod), "failed to delete the pod: {}", describe(&error));
                status_code(&error)
            });
            Report::Event(Event::Deleted(result))
        };
        self.spawn(work, |_| Report::Event(Event::Deleted(Err(None)))).detach();
    }

    /// Does the work, and reports what comes of it; or what is to be reported when it panics, with the panic's message.
    fn spawn(
        &self,
        work: impl Future<Output = Report> + Send + 'static,
        failed: impl FnOnce(String) -> Report + Send + 'static,
    ) -> Task {
        let outbox = self.outbox.clone();
        let pod = self.lifecycle.pod().clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            let report = AssertUnwindSafe(work).catch_unwind().await.unwrap_or_else(|panic| {
                let message = message_of(panic.as_ref());
                error!(pod = full_name(&pod), "a task of a pod's worker panicked: {message}");
                failed(format!("a bug in the node agent: {message}"))
            });
            let _ = outbox.send(Box::new(report));
        }))
    }
}

fn ended_by(message: String, index: usize, generation: u32) -> Report {
    let end = End { exit_code: KILLED, reason: terminated::ERROR, message, last_words: String::new() };
    Report::Event(Event::Ended { index, generation, end })
}

/// Waits for the requests in flight until the deadline, which may come nearer, and from now at least `least`; then cuts what
/// is left. Returns whether all of them were finished.
async fn drain(server: &HttpServer, deadline: watch::Receiver<Instant>, least: Duration) -> bool {
    tokio::select! {
        finished = server.drain(Duration::MAX) => finished,
        () = passed(deadline, least) => server.drain(Duration::ZERO).await,
    }
}

/// Completes when the deadline has passed, and `least` from now.
async fn passed(mut deadline: watch::Receiver<Instant>, least: Duration) {
    let earliest = Instant::now() + least;
    loop {
        let until = (*deadline.borrow_and_update()).max(earliest);
        tokio::select! {
            () = tokio::time::sleep_until(until) => return,
            Ok(()) = deadline.changed() => {}
        }
    }
}

/// The next event of any container's probes. Never, when none is probed.
async fn next_probe(containers: &mut [Running]) -> Event {
    poll_fn(|context| {
        for (index, container) in containers.iter_mut().enumerate() {
            if let Some(Live { probes: Some(probing), generation, .. }) = &mut container.guest
                && let Poll::Ready(Some((_, probe))) = probing.events.poll_recv(context)
            {
                return Poll::Ready(Event::Probed { index, generation: *generation, probe });
            }
        }
        Poll::Pending
    })
    .await
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

async fn remove_files(path: PathBuf) {
    if let Err(error) = trees::remove(path.clone()).await {
        warn!(path = %path.display(), "failed to remove a pod's files: {error}");
    }
}
