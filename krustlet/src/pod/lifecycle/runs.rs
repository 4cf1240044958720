//! What becomes of a container: its guest starts, is probed, is exchanged, ends, and is started again.

use super::super::checkpoint::{KILLED, Record};
use super::super::failure::Failure;
use super::super::guest::GuestKind;
use super::super::probes::{self, ProbeEvent};
use super::super::restart::Restart;
use super::super::status::{self, State, Termination};
use super::super::{full_name, hooks, name, namespace, uid};
use super::container::{Activity, End, Run, Why, judge};
use super::event::{Effect, Launched};
use super::{PodLifecycle, REFRESH, REFRESH_JITTER, RETRY_JITTER, grace_of};
use crate::events::Severity;
use crate::reasons::{event as event_reason, waiting};
use k8s_openapi::api::core::v1::Container;
use std::time::Duration;
use tracing::info;

/// How long a failed pull shows its cause as the reason, before it shows that the next try is waited for.
const SHOW_PULL_ERROR: Duration = Duration::from_secs(2);

impl PodLifecycle {
    pub(super) fn on_prepared(&mut self, index: usize, result: Result<GuestKind, Failure>) {
        if self.containers[index].activity != Activity::Preparing {
            return;
        }
        let kind = match result {
            Ok(kind) => kind,
            Err(failure) => return self.on_failure(index, &failure),
        };
        let container = &mut self.containers[index];
        // To serve on is not to run twice: every request has an instance of its own.
        if container.interrupted && kind == GuestKind::Command && container.policy.after(KILLED) == Restart::No {
            info!(
                pod = full_name(&self.pod),
                container = container.view.name,
                "the container ran when the agent stopped, and its policy lets it run only once"
            );
            container.give_up();
            self.effects.push(Effect::Abandon { index });
            return;
        }
        container.activity = Activity::Prepared;
    }

    pub(super) fn on_launched(&mut self, index: usize, result: Result<Launched, Failure>) {
        if self.containers[index].activity != Activity::Launching {
            return;
        }
        let launched = match result {
            Ok(launched) => launched,
            Err(failure) => return self.on_failure(index, &failure),
        };
        let Some((_, spec)) = self.spec(index) else { return };
        let since_time = status::seconds(self.now.time);
        let run = Run { kind: launched.kind, since: self.now.at, since_time };
        let id = uid(&self.pod).to_owned();
        let container = &mut self.containers[index];
        if container.has_run {
            container.view.restarts += 1;
            self.effects.push(Effect::CountRestart);
        }
        container.has_run = true;
        container.interrupted = false;
        container.wait(waiting::CONTAINER_CREATING, "");
        container.view.image_id = launched.image;
        container.view.container_id = Some(format!("wasmtime://{id}.{}.{}", spec.name, container.view.restarts));
        container.reset_backoffs();
        let (restarts, generation) = (container.view.restarts, container.generation);
        // Before anything else: what has run once is never again taken for new.
        let record = Record { restarts, started_at: since_time, termination: None };
        self.effects.push(Effect::Remember { container: spec.name.clone(), record });
        self.tell_of(index, Severity::Normal, event_reason::CREATED, format!("Created container {}", spec.name));
        let mut text = format!("Started container {}", spec.name);
        if !launched.addresses.is_empty() {
            let addresses: Vec<String> = launched.addresses.iter().map(ToString::to_string).collect();
            text += &format!(", serving on {}", addresses.join(", "));
        }
        self.tell_of(index, Severity::Normal, event_reason::STARTED, text);
        for port in launched.unserved {
            self.tell_of(index, Severity::Warning, event_reason::PORT_NOT_SERVED, port);
        }
        if hooks::post_start(&spec).is_some() {
            self.containers[index].activity = Activity::PostStart(run);
            self.effects.push(Effect::PostStart { index, generation });
        } else {
            self.on_running(index, run, &spec);
        }
        let has_volumes = self.pod.spec.as_ref().is_some_and(|spec| spec.volumes.iter().flatten().next().is_some());
        if self.refresh_at.is_none() && !self.refreshing && has_volumes {
            self.refresh_at = Some(self.now.at + (self.jitter)(REFRESH, REFRESH_JITTER));
        }
    }

    pub(super) fn on_running(&mut self, index: usize, run: Run, spec: &Container) {
        let container = &mut self.containers[index];
        container.view.state = State::Running { since: run.since_time };
        container.view.started = spec.startup_probe.is_none();
        container.view.ready = container.view.started && spec.readiness_probe.is_none();
        container.activity = Activity::Running(run);
        if probes::is_probed(spec) {
            let generation = container.generation;
            self.effects.push(Effect::Probe { index, generation });
        }
    }

    /// The container's postStart hook is through.
    pub(super) fn on_post_started(&mut self, index: usize, result: Result<(), String>) {
        let Some((_, spec)) = self.spec(index) else { return };
        let Activity::PostStart(run) = &self.containers[index].activity else { return };
        match result {
            Ok(()) => {
                let run = run.clone();
                self.on_running(index, run, &spec);
            }
            Err(cause) => {
                let text = format!("postStart hook failed, container is stopped: {cause}");
                self.tell_of(index, Severity::Warning, event_reason::FAILED_POST_START_HOOK, text.clone());
                let grace = self.pod_grace();
                self.stop(index, Why::PostStartFailed(text), grace);
            }
        }
    }

    pub(super) fn on_failure(&mut self, index: usize, failure: &Failure) {
        let now = self.now.at;
        let container = &mut self.containers[index];
        let wait = (self.jitter)(container.backoff(failure.obstacle).exact(), RETRY_JITTER);
        let pull = failure.reason == waiting::ERR_IMAGE_PULL;
        let again =
            matches!(&container.view.state, State::Waiting { reason, .. } if reason == waiting::IMAGE_PULL_BACK_OFF);
        if pull && again {
            container.wait(waiting::IMAGE_PULL_BACK_OFF, format!("Back-off pulling image: {}", failure.message));
        } else {
            container.wait(failure.reason, &failure.message);
        }
        container.activity = Activity::Waiting {
            until: now + wait,
            obstacle: Some(failure.obstacle),
            show_back_off: (pull && !again).then(|| now + SHOW_PULL_ERROR),
        };
        let text = format!("{}: {}", failure.reason, failure.message);
        self.tell_of(index, Severity::Warning, failure.event, text);
    }

    /// A container's guest has ended, by itself or because it was stopped.
    pub(super) fn on_end(&mut self, index: usize, end: End) {
        let suspends = self.suspends();
        let container = &mut self.containers[index];
        let (run, why) = match std::mem::replace(&mut container.activity, Activity::Idle) {
            Activity::Running(run) | Activity::PostStart(run) => (run, None),
            Activity::Stopping { run, why, .. } => (run, Some(why)),
            other => {
                container.activity = other;
                return;
            }
        };
        container.set_aside(Activity::Idle);
        self.effects.push(Effect::Dispose { index });
        // A command that ended by itself at that very moment has ended; all else is taken up again by the next agent, and
        // until then the API goes on showing it.
        let by_itself = run.kind == GuestKind::Command && end.exit_code != KILLED;
        if suspends && matches!(why, Some(Why::PodEnds | Why::Replaced | Why::AllRestart)) && !by_itself {
            container.activity = Activity::Over;
            return;
        }
        let end = with_last_words(judge(end, why.as_ref(), run.kind));
        let termination = Termination {
            exit_code: end.exit_code,
            reason: end.reason.to_owned(),
            message: end.message,
            started_at: Some(run.since_time),
            finished_at: status::seconds(self.now.time),
            container_id: container.view.container_id.clone(),
        };
        let shown = std::mem::replace(&mut container.view.state, State::Terminated(termination.clone()));
        if let State::Terminated(before) = shown {
            container.view.last = Some(before);
        }
        let restarts = container.view.restarts;
        let record = Record { restarts, started_at: run.since_time, termination: Some(termination) };
        self.effects.push(Effect::Remember { container: container.view.name.clone(), record });
        if self.is_ending() {
            self.containers[index].give_up();
            self.release_ports_of(index);
            return;
        }
        match why {
            Some(Why::PodEnds | Why::Deadline) => self.containers[index].activity = Activity::Over,
            // Started again at once.
            Some(Why::Replaced | Why::AllRestart) => {}
            _ => self.restart(index, end.exit_code, self.now.at.duration_since(run.since)),
        }
    }

    /// Has a container that ended started again, if it is to be.
    pub(super) fn restart(&mut self, index: usize, exit_code: i32, ran: Duration) {
        let container = &mut self.containers[index];
        let restart = container.policy.after(exit_code);
        if restart == Restart::No {
            container.activity = Activity::Over;
            self.release_ports_of(index);
            return;
        }
        let wait = container.crash_loop.next(ran);
        if !wait.is_zero() {
            let container_name = container.view.name.clone();
            let message = format!(
                "back-off {}s restarting failed container={container_name} pod={}_{}({})",
                wait.as_secs(),
                name(&self.pod),
                namespace(&self.pod),
                uid(&self.pod)
            );
            container.wait(waiting::CRASH_LOOP_BACK_OFF, message);
            container.activity = Activity::Waiting { until: self.now.at + wait, obstacle: None, show_back_off: None };
            let text = format!("Back-off restarting failed container {container_name}");
            self.tell_of(index, Severity::Warning, event_reason::BACK_OFF, text);
        }
        if restart == Restart::AllContainers {
            self.restarting_all = true;
        }
    }

    pub(super) fn on_probe(&mut self, index: usize, probe: ProbeEvent) {
        let Some((_, spec)) = self.spec(index) else { return };
        let container = &mut self.containers[index];
        if !matches!(container.activity, Activity::Running(_)) {
            return;
        }
        match probe {
            ProbeEvent::Started => {
                container.view.started = true;
                container.view.ready = spec.readiness_probe.is_none();
            }
            ProbeEvent::Ready(ready) => container.view.ready = ready && container.view.started,
            ProbeEvent::Unhealthy { message, .. } => {
                self.tell_of(index, Severity::Warning, event_reason::UNHEALTHY, message);
                // Nothing better is likely to be said soon.
                self.publisher.hurry(self.now.at);
            }
            ProbeEvent::Failed { kind, message } => {
                self.tell_of(index, Severity::Normal, event_reason::KILLING, message.clone());
                let grace =
                    probes::termination_grace(&spec, kind).and_then(grace_of).unwrap_or_else(|| self.pod_grace());
                self.stop(index, Why::Unhealthy(message), grace);
            }
        }
    }

    pub(super) fn on_swapped(&mut self, index: usize, result: Result<String, Failure>) {
        let container = &mut self.containers[index];
        let Some(update) = container.update.as_mut().filter(|update| update.under_way) else { return };
        update.under_way = false;
        match result {
            Ok(image) => {
                container.view.image.clone_from(&update.image);
                let text = format!("Container {} serves {image} now", container.view.name);
                container.view.image_id = image;
                container.update = None;
                self.tell_of(index, Severity::Normal, event_reason::UPDATED, text);
            }
            Err(failure) => {
                update.retry = Some(self.now.at + (self.jitter)(update.backoff.exact(), RETRY_JITTER));
                let text = format!("{}: {}; the old image serves on", failure.reason, failure.message);
                update.failure = Some(failure);
                self.tell_of(index, Severity::Warning, event_reason::FAILED_UPDATE, text);
            }
        }
    }
}

/// As the kubelet joins what it has to say itself with what the container says.
fn with_last_words(mut end: End) -> End {
    if end.exit_code != 0 && !end.last_words.is_empty() {
        let separator = if end.message.is_empty() { "" } else { ": " };
        end.message = end.message + separator + &end.last_words;
    }
    end
}
