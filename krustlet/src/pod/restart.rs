//! When a container that ended is started again, and how long that waits. No I/O, no clock.

use super::Role;
use crate::backoff::Backoff;
use k8s_openapi::api::core::v1::{Container, PodSpec};
use std::time::Duration;

/// The kubelet's figures: a first restart at once, then 10 s doubling to 300 s, forgotten after 10 min of good running.
const FIRST_BACKOFF: Duration = Duration::from_secs(10);
const MAX_BACKOFF: Duration = Duration::from_secs(300);
const GOOD_RUN: Duration = Duration::from_secs(600);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Policy {
    Always,
    OnFailure,
    Never,
}

impl Policy {
    /// The policy that one container of a pod lives under.
    pub fn of(spec: &PodSpec, container: &Container, role: Role) -> Self {
        let named = |name: Option<&str>| match name {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        };
        let policy = match container.restart_policy.as_deref() {
            Some(own) => named(Some(own)),
            None => named(spec.restart_policy.as_deref()),
        };
        match (role, policy) {
            // An init container that completed is done, whatever the pod's policy.
            (Role::Init, Self::Always) => Self::OnFailure,
            _ => policy,
        }
    }

    /// Whether a container that ended with `exit_code` runs again.
    pub fn restarts(self, exit_code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit_code != 0,
            Self::Never => false,
        }
    }
}

/// The waits between the restarts of one container.
#[derive(Debug, Clone)]
pub struct CrashLoop {
    backoff: Backoff,
    restarted: bool,
}

impl Default for CrashLoop {
    fn default() -> Self {
        Self { backoff: Backoff::new(FIRST_BACKOFF, MAX_BACKOFF), restarted: false }
    }
}

impl CrashLoop {
    /// How long to wait before the next start of a container that ran for `ran`.
    pub fn next(&mut self, ran: Duration) -> Duration {
        if ran >= GOOD_RUN {
            *self = Self::default();
        }
        if std::mem::replace(&mut self.restarted, true) { self.backoff.exact() } else { Duration::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec(policy: &str) -> PodSpec {
        PodSpec { restart_policy: Some(policy.into()), ..PodSpec::default() }
    }

    #[test]
    fn each_policy_restarts_what_it_says() {
        let table = [(Policy::Always, true, true), (Policy::OnFailure, false, true), (Policy::Never, false, false)];
        for (policy, after_success, after_failure) in table {
            assert_eq!(policy.restarts(0), after_success, "{policy:?}");
            assert_eq!(policy.restarts(1), after_failure, "{policy:?}");
            assert_eq!(policy.restarts(137), after_failure, "{policy:?}");
        }
    }

    #[test]
    fn an_init_container_that_completed_is_not_run_again() {
        let container = Container::default();
        assert_eq!(Policy::of(&spec("Always"), &container, Role::Init), Policy::OnFailure);
        assert_eq!(Policy::of(&spec("Never"), &container, Role::Init), Policy::Never);
        assert_eq!(Policy::of(&spec("Always"), &container, Role::Main), Policy::Always);
    }

    #[test]
    fn a_sidecar_is_always_restarted_whatever_its_pods_policy() {
        let sidecar = Container { restart_policy: Some("Always".into()), ..Container::default() };
        assert_eq!(Policy::of(&spec("Never"), &sidecar, Role::Sidecar), Policy::Always);
    }

    #[test]
    fn restarts_wait_ten_seconds_doubling_to_five_minutes() {
        let mut crash_loop = CrashLoop::default();
        let waits: Vec<u64> = (0..8).map(|_| crash_loop.next(Duration::from_secs(1)).as_secs()).collect();
        assert_eq!(waits, [0, 10, 20, 40, 80, 160, 300, 300]);
    }

    #[test]
    fn ten_minutes_of_good_running_forgive_the_past() {
        let mut crash_loop = CrashLoop::default();
        for _ in 0..5 {
            crash_loop.next(Duration::from_secs(1));
        }
        assert_eq!(crash_loop.next(Duration::from_secs(600)), Duration::ZERO);
        assert_eq!(crash_loop.next(Duration::from_secs(599)), Duration::from_secs(10));
    }
}
