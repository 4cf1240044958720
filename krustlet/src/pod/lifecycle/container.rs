//! One container of a pod: what it does now, and what has come of it. No I/O, no clock.

use super::super::Role;
use super::super::checkpoint::{KILLED, Past, PastKind};
use super::super::failure::{Failure, Obstacle};
use super::super::guest::GuestKind;
use super::super::restart::{CrashLoop, Restart, RestartPolicy};
use super::super::status::{ContainerView, State};
use crate::backoff::Backoff;
use crate::reasons::{terminated, waiting};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, ContainerStatus, PodSpec};
use std::time::Duration;
use tokio::time::Instant;

/// How a guest ended.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// The pod is at its end, or the agent is.
    PodEnds,
    /// activeDeadlineSeconds are over.
    Deadline,
    /// A probe gave it up.
    Unhealthy(String),
    /// Its postStart hook failed.
    PostStartFailed(String),
    /// Its image was changed, and it cannot be swapped in place.
    Replaced,
    /// Another container's end restarts all of them.
    AllRestart,
}

/// The run of a container.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    pub kind: GuestKind,
    pub since: Instant,
    pub since_time: Timestamp,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Activity {
    /// Its turn has not come, or it is to be started now.
    Idle,
    /// What it needs is being fetched.
    Preparing,
    /// What it needs is there.
    Prepared,
    /// Its guest is being started, which takes no time.
    Launching,
    /// Waits to be started again: after an end, or because of an obstacle.
    Waiting {
        until: Instant,
        obstacle: Option<Obstacle>,
        show_back_off: Option<Instant>,
    },
    /// Its guest runs, its postStart hook is not through.
    PostStart(Run),
    Running(Run),
    Stopping {
        run: Run,
        why: Why,
        until: Instant,
    },
    /// Ended for good.
    Over,
}

/// The exchange of a running container's module.
#[derive(Debug)]
pub struct Update {
    pub under_way: bool,
    pub image: String,
    pub retry: Option<Instant>,
    pub backoff: Backoff,
    pub failure: Option<Failure>,
}

impl Update {
    pub fn to(image: &str) -> Self {
        Self { under_way: false, image: image.to_owned(), retry: None, backoff: image_backoff(), failure: None }
    }
}

fn image_backoff() -> Backoff {
    Backoff::new(Duration::from_secs(10), Duration::from_secs(300))
}

#[derive(Debug)]
pub struct ContainerLifecycle {
    pub view: ContainerView,
    pub policy: RestartPolicy,
    pub activity: Activity,
    /// Those before it in the pod have come so far that its turn has come.
    pub is_due: bool,
    /// Tells the reports about the present run from those about an earlier one.
    pub generation: u32,
    pub has_run: bool,
    /// Its last run was cut off by the end of the agent.
    pub interrupted: bool,
    pub crash_loop: CrashLoop,
    image_backoff: Backoff,
    configuration_backoff: Backoff,
    port_backoff: Backoff,
    pub update: Option<Box<Update>>,
}

impl ContainerLifecycle {
    pub fn new(role: Role, spec: &PodSpec, container: &Container, shown: Option<&ContainerStatus>, past: Past) -> Self {
        let mut made = Self {
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
            policy: RestartPolicy::of(spec, container, role),
            activity: Activity::Idle,
            is_due: false,
            generation: 0,
            has_run: past.kind != PastKind::New,
            interrupted: false,
            crash_loop: CrashLoop::default(),
            image_backoff: image_backoff(),
            configuration_backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(20)),
            port_backoff: Backoff::new(Duration::from_secs(1), Duration::from_secs(10)),
            update: None,
        };
        match past.kind {
            PastKind::New => {}
            PastKind::Ended(end) => {
                if made.policy.after(end.exit_code) == Restart::No {
                    made.activity = Activity::Over;
                }
                made.view.state = State::Terminated(end);
            }
            PastKind::Interrupted(end) => {
                made.interrupted = true;
                made.view.last = Some(end);
            }
            PastKind::Waiting(end) => made.view.last = Some(end),
        }
        made
    }

    /// Whether it has a guest.
    pub fn runs(&self) -> bool {
        matches!(self.activity, Activity::PostStart(_) | Activity::Running(_) | Activity::Stopping { .. })
    }

    pub fn is_active(&self) -> bool {
        self.runs() || self.is_starting()
    }

    /// Whether its guest is about to be there.
    pub fn is_starting(&self) -> bool {
        matches!(self.activity, Activity::Preparing | Activity::Prepared | Activity::Launching)
    }

    pub fn is_over(&self) -> bool {
        self.activity == Activity::Over
    }

    /// The exit code of the last run, if it has ended.
    pub fn exit_code(&self) -> Option<i32> {
        match &self.view.state {
            State::Terminated(end) => Some(end.exit_code),
            _ => None,
        }
    }

    /// The wait before the next try, which grows with each failure of one kind.
    pub fn backoff(&mut self, obstacle: Obstacle) -> &mut Backoff {
        match obstacle {
            Obstacle::Image | Obstacle::Container => &mut self.image_backoff,
            Obstacle::Configuration => &mut self.configuration_backoff,
            Obstacle::Port | Obstacle::Address => &mut self.port_backoff,
        }
    }

    pub fn reset_backoffs(&mut self) {
        self.image_backoff.reset();
        self.configuration_backoff.reset();
        self.port_backoff.reset();
    }

    /// Nothing will come after this any more.
    pub fn give_up(&mut self) {
        self.set_aside(Activity::Over);
        // One that waited for a restart that will not come has ended with its last run.
        if matches!(self.view.state, State::Waiting { .. })
            && let Some(end) = self.view.last.take()
        {
            self.view.state = State::Terminated(end);
        }
    }

    /// What was under way is of no use any more.
    pub fn set_aside(&mut self, activity: Activity) {
        self.activity = activity;
        self.generation += 1;
        self.update = None;
        self.view.ready = false;
        self.view.started = false;
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
pub fn judge(end: End, why: Option<&Why>, kind: GuestKind) -> End {
    let command = kind == GuestKind::Command;
    let last_words = end.last_words.clone();
    let killed = |reason, message: String| End { exit_code: KILLED, reason, message, last_words };
    match why {
        // By itself, or at the very moment when it was to be stopped.
        _ if command && (why.is_none() || end.exit_code != KILLED) => end,
        Some(Why::Deadline) => {
            killed(terminated::DEADLINE_EXCEEDED, "the pod's activeDeadlineSeconds are over".to_owned())
        }
        Some(Why::Unhealthy(message) | Why::PostStartFailed(message)) => killed(terminated::ERROR, message.clone()),
        Some(Why::Replaced) => killed(terminated::ERROR, "stopped for a new image".to_owned()),
        Some(Why::AllRestart) => killed(terminated::ERROR, "stopped to restart all containers".to_owned()),
        Some(Why::PodEnds) if command => killed(terminated::ERROR, "stopped with its pod".to_owned()),
        // A server that was drained did what it was to do.
        Some(Why::PodEnds) | None => end,
    }
}

#[cfg(test)]
mod tests {
    use super::super::super::status::Termination;
    use super::*;

    fn end(exit_code: i32) -> End {
        End { exit_code, reason: terminated::COMPLETED, message: String::new(), last_words: String::new() }
    }

    #[test]
    fn a_drained_server_completed_and_an_unhealthy_one_did_not() {
        let drained = judge(end(0), Some(&Why::PodEnds), GuestKind::Server);
        assert_eq!((drained.exit_code, drained.reason), (0, terminated::COMPLETED));
        let unhealthy = judge(end(0), Some(&Why::Unhealthy("liveness probe failed".into())), GuestKind::Server);
        assert_eq!((unhealthy.exit_code, unhealthy.reason), (KILLED, terminated::ERROR));
        assert!(unhealthy.message.contains("liveness"));
    }

    #[test]
    fn a_failed_hook_is_the_reason_of_what_it_stopped_but_not_of_what_ended_before() {
        let why = Why::PostStartFailed("postStart hook failed".into());
        for kind in [GuestKind::Server, GuestKind::Command] {
            let stopped = judge(end(if kind == GuestKind::Server { 0 } else { KILLED }), Some(&why), kind);
            assert_eq!((stopped.exit_code, stopped.message.as_str()), (KILLED, "postStart hook failed"), "{kind:?}");
        }
        assert_eq!(judge(end(0), Some(&why), GuestKind::Command).exit_code, 0);
    }

    #[test]
    fn a_deadline_is_the_reason_of_what_it_stopped_but_not_of_what_ended_before() {
        let stopped = judge(end(KILLED), Some(&Why::Deadline), GuestKind::Command);
        assert_eq!(stopped.reason, terminated::DEADLINE_EXCEEDED);
        assert_eq!(judge(end(0), Some(&Why::Deadline), GuestKind::Command).exit_code, 0);
        assert_eq!(judge(end(0), Some(&Why::Deadline), GuestKind::Server).reason, terminated::DEADLINE_EXCEEDED);
    }

    fn container(policy: &str, kind: PastKind) -> ContainerLifecycle {
        let spec = PodSpec { restart_policy: Some(policy.into()), ..PodSpec::default() };
        ContainerLifecycle::new(Role::Main, &spec, &Container::default(), None, Past { restarts: 3, kind })
    }

    fn termination(exit_code: i32) -> Termination {
        let mut termination = Termination::from_api(&k8s_openapi::api::core::v1::ContainerStateTerminated::default());
        termination.exit_code = exit_code;
        termination
    }

    #[test]
    fn a_container_that_ended_for_good_is_not_started_by_the_next_agent() {
        assert!(container("Never", PastKind::Ended(termination(1))).is_over());
        assert!(container("OnFailure", PastKind::Ended(termination(0))).is_over());
        assert!(!container("OnFailure", PastKind::Ended(termination(1))).is_over());
        assert!(!container("Always", PastKind::Ended(termination(0))).is_over());
    }

    #[test]
    fn an_interrupted_container_shows_its_last_run_and_keeps_its_count() {
        let container = container("Always", PastKind::Interrupted(termination(KILLED)));
        assert!(container.interrupted && container.has_run);
        assert_eq!(container.view.restarts, 3);
        assert_eq!(container.view.last.as_ref().map(|last| last.exit_code), Some(KILLED));
    }

    #[test]
    fn what_waits_for_a_restart_that_will_not_come_has_ended_with_its_last_run() {
        let mut container = container("Always", PastKind::Waiting(termination(9)));
        container.give_up();
        assert!(matches!(&container.view.state, State::Terminated(last) if last.exit_code == 9));
        assert!(container.is_over());
    }
}
