//! What is to be done now: which containers are to be started, stopped or brought to another image, and when the pod has
//! come to its end.

use super::super::Role;
use super::super::failure::Obstacle;
use super::super::guest::GuestKind;
use super::super::status::{self, State};
use super::container::{Activity, ContainerLifecycle, Update, Why};
use super::event::Effect;
use super::{MIN_GRACE, PodLifecycle, grace_of};
use crate::events::Severity;
use crate::reasons::{event as event_reason, pod as pod_reason, waiting};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Container;
use std::time::Duration;

const DEFAULT_GRACE: Duration = Duration::from_secs(30);
/// A pod that takes what the node does not have gets no longer, as with the kubelet.
const EVICTION_GRACE: Duration = Duration::from_secs(1);
/// The longest that the end of the agent waits for a pod.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(20);

impl PodLifecycle {
    /// Whether the pod stops only because the agent does: it stays in the API, and the next agent takes it up again.
    pub(super) fn suspends(&self) -> bool {
        self.shutdown && self.deleted.is_none() && !self.gone && self.failure.is_none()
    }

    fn is_evicted(&self) -> bool {
        self.failure.as_ref().is_some_and(|failure| failure.reason == pod_reason::EVICTED)
    }

    pub(super) fn is_ending(&self) -> bool {
        self.deleted.is_some() || self.gone || self.failure.is_some() || self.completed || self.shutdown
    }

    pub(super) fn advance(&mut self) {
        if self.finished {
            self.delete();
            return;
        }
        self.check_deadline();
        self.refresh();
        if !self.is_ending() {
            if self.restarting_all {
                self.end_all_for_restart();
            }
            if !self.restarting_all {
                self.advance_containers();
            }
        }
        if self.is_ending() {
            self.stop_containers();
            if self.containers.iter().all(ContainerLifecycle::is_over) && !self.suspends() {
                self.finished = true;
                self.refresh_at = None;
                self.effects.push(Effect::ReleasePorts { container: None });
                self.delete();
            }
        }
    }

    pub(super) fn check_deadline(&mut self) {
        if let Some(deadline) = self.active_deadline()
            && self.now.time >= deadline
            && !self.is_ending()
        {
            let message = "Pod was active on the node longer than the specified deadline".to_owned();
            self.tell(None, Severity::Normal, event_reason::DEADLINE_EXCEEDED, message.clone());
            self.failure = Some(status::Failure { reason: pod_reason::DEADLINE_EXCEEDED.to_owned(), message });
        }
    }

    pub(super) fn active_deadline(&self) -> Option<Timestamp> {
        let seconds = self.pod.spec.as_ref()?.active_deadline_seconds?;
        Timestamp::from_second(self.start_time.as_second().saturating_add(seconds)).ok()
    }

    /// Brings the pod's files up to date when it is time.
    pub(super) fn refresh(&mut self) {
        if self.refresh_at.is_some_and(|at| self.now.at >= at) {
            self.refresh_at = None;
            self.refreshing = true;
            self.effects.push(Effect::Refresh);
        }
    }

    /// Starts what is next: init containers one after the other, then all the others.
    pub(super) fn advance_containers(&mut self) {
        let mut proceed = true;
        let mut init_failed = false;
        for index in 0..self.containers.len() {
            let container = &mut self.containers[index];
            container.is_due = proceed || self.initialized;
            if !container.is_due {
                if !container.has_run && container.activity == Activity::Idle {
                    container.wait(waiting::POD_INITIALIZING, "");
                }
                continue;
            }
            self.ensure(index);
            let container = &self.containers[index];
            match container.view.role {
                Role::Main => {}
                Role::Sidecar => proceed = container.view.started,
                Role::Init => {
                    proceed = container.is_over() && container.exit_code() == Some(0);
                    init_failed = container.is_over() && !proceed;
                }
            }
        }
        // Once the main containers had their turn, a sidecar that is restarted does not hold them up.
        self.initialized |= proceed;
        let mut mains = self.containers.iter().filter(|container| container.view.role == Role::Main);
        self.completed = init_failed || (self.initialized && mains.all(ContainerLifecycle::is_over));
    }

    /// Ends what runs, so that all containers begin anew, init containers first.
    pub(super) fn end_all_for_restart(&mut self) {
        let others_run = self.others_than_sidecars_are_active();
        for index in 0..self.containers.len() {
            match &self.containers[index].activity {
                Activity::PostStart(_) | Activity::Running(_) => {
                    if !others_run || self.containers[index].view.role != Role::Sidecar {
                        let name = &self.containers[index].view.name;
                        let text = format!("Stopping container {name} to restart all containers");
                        self.tell_of(index, Severity::Normal, event_reason::KILLING, text);
                        let grace = self.pod_grace();
                        self.stop(index, Why::AllRestart, grace);
                    }
                }
                Activity::Preparing | Activity::Prepared => {
                    self.containers[index].set_aside(Activity::Idle);
                    self.effects.push(Effect::Abandon { index });
                }
                Activity::Over => self.containers[index].activity = Activity::Idle,
                Activity::Idle | Activity::Launching | Activity::Waiting { .. } | Activity::Stopping { .. } => {}
            }
        }
        if !self.containers.iter().any(ContainerLifecycle::is_active) {
            self.restarting_all = false;
            self.initialized = false;
        }
    }

    /// Has the container run what the spec says.
    pub(super) fn ensure(&mut self, index: usize) {
        let Some((_, spec)) = self.spec(index) else { return };
        let image = spec.image.clone().unwrap_or_default();
        let now = self.now.at;
        let container = &mut self.containers[index];
        match &mut container.activity {
            Activity::Idle => self.prepare(index, &spec),
            Activity::Waiting { until, show_back_off, .. } => {
                if image != container.view.image {
                    // What stood in the way may be gone with the old image.
                    container.backoff(Obstacle::Image).reset();
                    self.prepare(index, &spec);
                } else if now >= *until {
                    self.prepare(index, &spec);
                } else if show_back_off.is_some_and(|at| now >= at) {
                    *show_back_off = None;
                    let cause = match &container.view.state {
                        State::Waiting { message, .. } => message.clone(),
                        _ => String::new(),
                    };
                    container.wait(waiting::IMAGE_PULL_BACK_OFF, format!("Back-off pulling image: {cause}"));
                    let text = format!("Back-off pulling image {image:?}");
                    self.tell_of(index, Severity::Normal, event_reason::BACK_OFF, text);
                }
            }
            Activity::Preparing | Activity::Prepared if image != container.view.image => self.prepare(index, &spec),
            Activity::Prepared => self.launch(index),
            Activity::Running(run) => match run.kind {
                GuestKind::Server => self.update(index, &image),
                GuestKind::Command if image != container.view.image => {
                    let text = format!("Container {} has a new image, it will be restarted", spec.name);
                    self.tell_of(index, Severity::Normal, event_reason::KILLING, text);
                    let grace = self.pod_grace();
                    self.stop(index, Why::Replaced, grace);
                }
                GuestKind::Command => {}
            },
            Activity::Preparing
            | Activity::Launching
            | Activity::PostStart(_)
            | Activity::Stopping { .. }
            | Activity::Over => {}
        }
    }

    pub(super) fn prepare(&mut self, index: usize, spec: &Container) {
        let container = &mut self.containers[index];
        container.generation += 1;
        container.view.image = spec.image.clone().unwrap_or_default();
        if matches!(&container.view.state, State::Waiting { reason, .. } if reason == waiting::POD_INITIALIZING) {
            container.wait(waiting::CONTAINER_CREATING, "");
        }
        container.activity = Activity::Preparing;
        let generation = container.generation;
        self.effects.push(Effect::Prepare { index, generation });
    }

    pub(super) fn launch(&mut self, index: usize) {
        let container = &mut self.containers[index];
        container.activity = Activity::Launching;
        let attempt = container.view.restarts + i32::from(container.has_run);
        let generation = container.generation;
        self.effects.push(Effect::Launch { index, generation, attempt });
    }

    /// Brings a serving container to the image that the spec names, while it serves.
    pub(super) fn update(&mut self, index: usize, image: &str) {
        let container = &mut self.containers[index];
        if image == container.view.image {
            // Nothing to do, or the change was taken back.
            if container.update.take().is_some() {
                self.effects.push(Effect::AbandonSwap { index });
            }
            return;
        }
        let update = container.update.get_or_insert_with(|| Box::new(Update::to(image)));
        if update.image != image {
            **update = Update::to(image);
        }
        if update.under_way || update.retry.is_some_and(|at| self.now.at < at) {
            return;
        }
        update.under_way = true;
        let generation = container.generation;
        self.effects.push(Effect::Swap { index, generation });
    }

    pub(super) fn others_than_sidecars_are_active(&self) -> bool {
        self.containers.iter().any(|container| container.view.role != Role::Sidecar && container.is_active())
    }

    /// Stops whatever still runs; sidecars when all the others have ended.
    pub(super) fn stop_containers(&mut self) {
        let why = match &self.failure {
            Some(failure) if failure.reason == pod_reason::DEADLINE_EXCEEDED => Why::Deadline,
            _ => Why::PodEnds,
        };
        let others_active = self.others_than_sidecars_are_active();
        for index in 0..self.containers.len() {
            let container = &self.containers[index];
            if others_active && container.view.role == Role::Sidecar && container.is_active() {
                continue;
            }
            let grace = self.grace();
            match &container.activity {
                Activity::PostStart(_) | Activity::Running(_) => {
                    if !self.shutdown || self.deleted.is_some() {
                        let text = format!("Stopping container {}", container.view.name);
                        self.tell_of(index, Severity::Normal, event_reason::KILLING, text);
                    }
                    self.stop(index, why.clone(), grace);
                }
                Activity::Stopping { until, .. } if self.now.at + grace + Duration::from_millis(100) < *until => {
                    self.hasten(index, grace);
                }
                // A guest that is there in a moment is stopped then.
                Activity::Launching | Activity::Stopping { .. } | Activity::Over => {}
                Activity::Idle | Activity::Preparing | Activity::Prepared | Activity::Waiting { .. } => {
                    if container.is_starting() {
                        self.effects.push(Effect::Abandon { index });
                    }
                    if self.suspends() {
                        self.containers[index].set_aside(Activity::Over);
                    } else {
                        self.containers[index].give_up();
                    }
                }
            }
        }
    }

    pub(super) fn pod_grace(&self) -> Duration {
        let seconds = self.pod.spec.as_ref().and_then(|spec| spec.termination_grace_period_seconds);
        seconds.and_then(grace_of).unwrap_or(DEFAULT_GRACE)
    }

    /// How long the containers have from now.
    pub(super) fn grace(&self) -> Duration {
        if self.gone {
            return MIN_GRACE;
        }
        match self.deleted {
            Some(until) => until.saturating_duration_since(self.now.at),
            None if self.is_evicted() => EVICTION_GRACE,
            None if self.shutdown => self.pod_grace().min(SHUTDOWN_GRACE),
            None => self.pod_grace(),
        }
    }

    /// Stops a running container within `grace`: preStop hook, then the requests in flight.
    pub(super) fn stop(&mut self, index: usize, why: Why, grace: Duration) {
        let container = &mut self.containers[index];
        let (Activity::PostStart(run) | Activity::Running(run)) = &container.activity else { return };
        let run = run.clone();
        let until = self.now.at + grace;
        container.update = None;
        container.view.ready = false;
        container.activity = Activity::Stopping { run, why, until };
        let generation = container.generation;
        self.effects.push(Effect::Stop { index, generation, until, grace });
    }

    /// Gives a container that is being stopped less time. Why it is stopped stays.
    pub(super) fn hasten(&mut self, index: usize, grace: Duration) {
        let now = self.now.at;
        if let Activity::Stopping { until, .. } = &mut self.containers[index].activity {
            *until = now + grace;
            let until = *until;
            self.effects.push(Effect::Hasten { index, until });
        }
    }
}
