//! One container of a pod: what it does now, and what has come of it.

use super::Role;
use super::checkpoint::{KILLED, Past, PastKind};
use super::probes::{ProbeEvent, Prober};
use super::restart::{CrashLoop, Policy};
use super::roster::Entry;
use super::start::{Failure, Guest, Obstacle};
use super::status::{ContainerView, State};
use crate::backoff::Backoff;
use crate::reasons::{terminated, waiting};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, PodSpec};
use krustlet_runtime::LogFile;
use std::future::poll_fn;
use std::task::Poll;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::task::AbortOnDropHandle;

/// How a guest ended.
pub struct End {
    pub exit_code: i32,
    pub reason: &'static str,
    pub message: String,
    /// The end of its log, if the container asks for it in place of a message.
    pub last_words: String,
}

/// Why a running container is stopped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Why {
    /// The pod is at its end.
    PodEnds,
    /// activeDeadlineSeconds are over.
    Deadline,
    /// A probe gave it up.
    Unhealthy(String),
    /// Its image was changed, and it cannot be swapped in place.
    Replaced,
}

/// A container that runs.
pub struct Run {
    pub guest: Guest,
    pub log: LogFile,
    pub since: Instant,
    pub since_time: Timestamp,
    /// Reports the end of a command.
    pub _watch: Option<AbortOnDropHandle<()>>,
    pub probes: Option<Probing>,
    pub _entry: Entry,
}

pub struct Probing {
    pub _prober: Prober,
    pub events: mpsc::Receiver<(String, ProbeEvent)>,
}

pub enum Activity {
    /// Its turn has not come, or it is to be started now.
    Idle,
    Starting {
        _task: AbortOnDropHandle<()>,
    },
    /// Waits to be started again: after an end, or because of an obstacle.
    Waiting {
        until: Instant,
        obstacle: Option<Obstacle>,
        show_back_off: Option<Instant>,
    },
    Running(Run),
    Stopping {
        run: Run,
        why: Why,
        until: Instant,
        _task: AbortOnDropHandle<()>,
    },
    /// Ended for good.
    Over,
}

/// The exchange of a running container's module.
pub struct Update {
    /// Nothing under way when none.
    pub task: Option<AbortOnDropHandle<()>>,
    pub image: String,
    pub retry: Option<Instant>,
    pub backoff: Backoff,
    pub failure: Option<Failure>,
}

/// One container of the pod.
pub struct Slot {
    /// Its place among the containers of the spec, init containers first.
    pub view: ContainerView,
    pub policy: Policy,
    pub activity: Activity,
    /// Tells the reports about the present start from those about an earlier one.
    pub generation: u32,
    pub has_run: bool,
    pub interrupted: bool,
    pub crash_loop: CrashLoop,
    pub image_backoff: Backoff,
    pub configuration_backoff: Backoff,
    pub port_backoff: Backoff,
    pub update: Option<Box<Update>>,
}

impl Slot {
    pub fn new(role: Role, spec: &PodSpec, container: &Container, shown: Option<&ContainerStatus>, past: Past) -> Self {
        let policy = Policy::of(spec, container, role);
        let mut slot = Self {
            view: ContainerView {
                name: container.name.clone(),
                role,
                image: container.image.clone().unwrap_or_default(),
                image_id: shown.map(|status| status.image_id.clone()).unwrap_or_default(),
                container_id: shown.and_then(|status| status.container_id.clone()),
                state: State::waiting(waiting::CONTAINER_CREATING, ""),
                last: None,
                restarts: past.restarts,
                started: false,
                ready: false,
            },
            policy,
            activity: Activity::Idle,
            generation: 0,
            has_run: past.kind != PastKind::New,
            interrupted: false,
            crash_loop: CrashLoop::default(),
            image_backoff: Backoff::new(Duration::from_secs(10), Duration::from_secs(300)),
            configuration_backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(20)),
            port_backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(10)),
            update: None,
        };
        match past.kind {
            PastKind::New => {}
            PastKind::Ended(end) => {
                if !policy.restarts(end.exit_code) {
                    slot.activity = Activity::Over;
                }
                slot.view.state = State::Terminated(end);
            }
            PastKind::Interrupted(end) => {
                slot.interrupted = true;
                slot.view.last = Some(end);
            }
            PastKind::Waiting(end) => slot.view.last = Some(end),
        }
        slot
    }

    pub fn is_active(&self) -> bool {
        matches!(self.activity, Activity::Starting { .. } | Activity::Running(_) | Activity::Stopping { .. })
    }

    pub fn is_over(&self) -> bool {
        matches!(self.activity, Activity::Over)
    }

    /// Nothing will come after this any more.
    pub fn give_up(&mut self) {
        self.activity = Activity::Over;
        self.generation += 1;
        self.update = None;
        self.view.ready = false;
        self.view.started = false;
        // One that waited for a restart that will not come has ended with its last run.
        if matches!(self.view.state, State::Waiting { .. })
            && let Some(end) = self.view.last.take()
        {
            self.view.state = State::Terminated(end);
        }
    }

    /// Shows that the container waits. A run that ended becomes the last one.
    pub fn wait(&mut self, reason: &str, message: impl Into<String>) {
        let state = std::mem::replace(&mut self.view.state, State::waiting(reason, message));
        if let State::Terminated(end) = state {
            self.view.last = Some(end);
        }
        self.view.container_id = None;
        self.view.ready = false;
        self.view.started = false;
    }
}

/// What an end means, given why the container was stopped, if it was.
pub fn judge(end: End, why: Option<&Why>, command: bool) -> End {
    let last_words = end.last_words.clone();
    let killed = |reason, message: String| End { exit_code: KILLED, reason, message, last_words };
    match why {
        // By itself, or at the very moment when it was to be stopped.
        _ if command && (why.is_none() || end.exit_code != KILLED) => end,
        Some(Why::Deadline) => {
            killed(terminated::DEADLINE_EXCEEDED, "the pod's activeDeadlineSeconds are over".to_owned())
        }
        Some(Why::Unhealthy(message)) => killed(terminated::ERROR, message.clone()),
        Some(Why::Replaced) => killed(terminated::ERROR, "stopped for a new image".to_owned()),
        Some(Why::PodEnds) if command => killed(terminated::ERROR, "stopped with its pod".to_owned()),
        // A server that was drained did what it was to do.
        Some(Why::PodEnds) | None => end,
    }
}

/// The next event of any container's probes. Never, when none is probed.
pub async fn next_probe(slots: &mut [Slot]) -> (usize, ProbeEvent) {
    poll_fn(|context| {
        for (index, slot) in slots.iter_mut().enumerate() {
            if let Activity::Running(Run { probes: Some(probing), .. }) = &mut slot.activity
                && let Poll::Ready(Some((_, event))) = probing.events.poll_recv(context)
            {
                return Poll::Ready((index, event));
            }
        }
        Poll::Pending
    })
    .await
}

#[cfg(test)]
mod tests {
    use super::super::status::Termination;
    use super::*;

    fn end(exit_code: i32) -> End {
        End { exit_code, reason: terminated::COMPLETED, message: String::new(), last_words: String::new() }
    }

    #[test]
    fn a_drained_server_completed_and_an_unhealthy_one_did_not() {
        let drained = judge(end(0), Some(&Why::PodEnds), false);
        assert_eq!((drained.exit_code, drained.reason), (0, terminated::COMPLETED));
        let unhealthy = judge(end(0), Some(&Why::Unhealthy("liveness probe failed".into())), false);
        assert_eq!((unhealthy.exit_code, unhealthy.reason), (KILLED, terminated::ERROR));
        assert!(unhealthy.message.contains("liveness"));
    }

    #[test]
    fn a_deadline_is_the_reason_of_what_it_stopped_but_not_of_what_ended_before() {
        let stopped = judge(end(KILLED), Some(&Why::Deadline), true);
        assert_eq!(stopped.reason, terminated::DEADLINE_EXCEEDED);
        assert_eq!(judge(end(0), Some(&Why::Deadline), true).exit_code, 0);
        assert_eq!(judge(end(0), Some(&Why::Deadline), false).reason, terminated::DEADLINE_EXCEEDED);
    }

    fn slot(policy: &str, kind: PastKind) -> Slot {
        let spec = PodSpec { restart_policy: Some(policy.into()), ..PodSpec::default() };
        Slot::new(Role::Main, &spec, &Container::default(), None, Past { restarts: 3, kind })
    }

    fn termination(exit_code: i32) -> Termination {
        let mut termination = Termination::from_api(&k8s_openapi::api::core::v1::ContainerStateTerminated::default());
        termination.exit_code = exit_code;
        termination
    }

    #[test]
    fn a_container_that_ended_for_good_is_not_started_by_the_next_agent() {
        assert!(slot("Never", PastKind::Ended(termination(1))).is_over());
        assert!(slot("OnFailure", PastKind::Ended(termination(0))).is_over());
        assert!(!slot("OnFailure", PastKind::Ended(termination(1))).is_over());
        assert!(!slot("Always", PastKind::Ended(termination(0))).is_over());
    }

    #[test]
    fn an_interrupted_container_shows_its_last_run_and_keeps_its_count() {
        let slot = slot("Always", PastKind::Interrupted(termination(KILLED)));
        assert!(slot.interrupted && slot.has_run);
        assert_eq!(slot.view.restarts, 3);
        assert_eq!(slot.view.last.as_ref().map(|last| last.exit_code), Some(KILLED));
    }

    #[test]
    fn what_waits_for_a_restart_that_will_not_come_has_ended_with_its_last_run() {
        let mut slot = slot("Always", PastKind::Waiting(termination(9)));
        slot.give_up();
        assert!(matches!(&slot.view.state, State::Terminated(last) if last.exit_code == 9));
        assert!(slot.is_over());
    }
}
