//! When a container that ended is started again, and how long that waits. No I/O, no clock.

use super::Role;
use crate::backoff::Backoff;
use k8s_openapi::api::core::v1::{Container, ContainerRestartRule, PodSpec};
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
    fn named(name: Option<&str>) -> Self {
        match name {
            Some("Never") => Self::Never,
            Some("OnFailure") => Self::OnFailure,
            _ => Self::Always,
        }
    }

    fn restarts(self, exit_code: i32) -> bool {
        match self {
            Self::Always => true,
            Self::OnFailure => exit_code != 0,
            Self::Never => false,
        }
    }
}

/// What follows the end of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Restart {
    No,
    Container,
    /// Every container of the pod, init containers first.
    AllContainers,
}

/// What one container's spec and its pod's say about its restarts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestartPolicy {
    rules: Vec<Rule>,
    policy: Policy,
    /// An init container that completed is done, whatever its policy.
    completes: bool,
}

/// One of a container's `restartPolicyRules`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    restart: Restart,
    /// Whether the exit code is to be one of the values, or none of them.
    among: bool,
    values: Vec<i32>,
}

impl Rule {
    /// None for a rule of a kind that is not known: as with the kubelet, such a rule matches nothing.
    fn of(rule: &ContainerRestartRule) -> Option<Self> {
        let restart = match rule.action.as_str() {
            "Restart" => Restart::Container,
            "RestartAllContainers" => Restart::AllContainers,
            _ => return None,
        };
        let codes = rule.exit_codes.as_ref()?;
        let among = match codes.operator.as_str() {
            "In" => true,
            "NotIn" => false,
            _ => return None,
        };
        Some(Self { restart, among, values: codes.values.clone().unwrap_or_default() })
    }

    fn matches(&self, exit_code: i32) -> bool {
        self.values.contains(&exit_code) == self.among
    }
}

impl RestartPolicy {
    /// The policy that one container of a pod lives under.
    pub fn of(spec: &PodSpec, container: &Container, role: Role) -> Self {
        let own = container.restart_policy.as_deref();
        let policy = Policy::named(own.or(spec.restart_policy.as_deref()));
        Self {
            // Rules count only beside a policy of the container's own.
            rules: match own {
                Some(_) => container.restart_policy_rules.iter().flatten().filter_map(Rule::of).collect(),
                None => Vec::new(),
            },
            policy,
            completes: role == Role::Init,
        }
    }

    /// What follows an end with `exit_code`: the first rule that matches decides, and without one the policy.
    pub fn after(&self, exit_code: i32) -> Restart {
        match self.rules.iter().find(|rule| rule.matches(exit_code)) {
            Some(Rule { restart: Restart::AllContainers, .. }) => Restart::AllContainers,
            _ if self.completes && exit_code == 0 => Restart::No,
            Some(rule) => rule.restart,
            None if self.policy.restarts(exit_code) => Restart::Container,
            None => Restart::No,
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
    use serde_json::{Value, json};

    fn spec(policy: &str) -> PodSpec {
        PodSpec { restart_policy: Some(policy.into()), ..PodSpec::default() }
    }

    fn policy(pod: &str, container: &Container, role: Role) -> RestartPolicy {
        RestartPolicy::of(&spec(pod), container, role)
    }

    fn container(policy: Option<&str>, rules: Value) -> Container {
        serde_json::from_value(json!({"name": "a", "restartPolicy": policy, "restartPolicyRules": rules})).unwrap()
    }

    #[test]
    fn each_policy_restarts_what_it_says() {
        let table = [("Always", true, true), ("OnFailure", false, true), ("Never", false, false)];
        for (name, after_success, after_failure) in table {
            let restarts = |code| policy(name, &Container::default(), Role::Main).after(code) == Restart::Container;
            assert_eq!([restarts(0), restarts(1), restarts(137)], [after_success, after_failure, after_failure]);
        }
    }

    #[test]
    fn an_init_container_that_completed_is_not_run_again() {
        let container = Container::default();
        assert_eq!(policy("Always", &container, Role::Init).after(0), Restart::No);
        assert_eq!(policy("Always", &container, Role::Init).after(1), Restart::Container);
        assert_eq!(policy("Never", &container, Role::Init).after(1), Restart::No);
        assert_eq!(policy("Always", &container, Role::Main).after(0), Restart::Container);
    }

    #[test]
    fn a_container_s_own_policy_comes_before_its_pods() {
        for (pod, own, exit_code, expected) in [
            ("Never", "Always", 0, Restart::Container),
            ("Always", "Never", 1, Restart::No),
            ("Always", "OnFailure", 0, Restart::No),
            ("Never", "OnFailure", 1, Restart::Container),
        ] {
            let container = container(Some(own), Value::Null);
            assert_eq!(policy(pod, &container, Role::Main).after(exit_code), expected, "{pod} {own}");
        }
        assert_eq!(
            policy("Never", &container(Some("Always"), Value::Null), Role::Sidecar).after(0),
            Restart::Container
        );
    }

    #[test]
    fn the_first_rule_that_matches_decides_and_without_one_the_policy() {
        let rules = json!([
            {"action": "Restart", "exitCodes": {"operator": "In", "values": [42, 43]}},
            {"action": "RestartAllContainers", "exitCodes": {"operator": "In", "values": [43, 88]}},
            {"action": "Dance", "exitCodes": {"operator": "In", "values": [7]}},
            {"action": "Restart", "exitCodes": {"operator": "Near", "values": [7]}},
            {"action": "Restart"},
        ]);
        let never = policy("Always", &container(Some("Never"), rules.clone()), Role::Main);
        let expected = [
            (42, Restart::Container),
            (43, Restart::Container),
            (88, Restart::AllContainers),
            (7, Restart::No),
            (0, Restart::No),
        ];
        for (exit_code, restart) in expected {
            assert_eq!(never.after(exit_code), restart, "{exit_code}");
        }
        let rules = json!([{"action": "Restart", "exitCodes": {"operator": "NotIn", "values": [1]}}]);
        let after = |role, code| policy("Always", &container(Some("Never"), rules.clone()), role).after(code);
        let main = [Restart::Container, Restart::No, Restart::Container];
        assert_eq!([after(Role::Main, 0), after(Role::Main, 1), after(Role::Main, 2)], main);
        assert_eq!(after(Role::Init, 0), Restart::No, "an init container that completed is done");
    }

    #[test]
    fn rules_without_a_policy_of_the_container_count_for_nothing() {
        let rules = json!([{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]);
        assert_eq!(policy("Never", &container(None, rules), Role::Main).after(42), Restart::No);
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
