//! What the results of one probe mean, with the kubelet's thresholds: results in, events out. No I/O, no clock.

use std::fmt::{Display, Formatter};

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    Startup,
    Readiness,
    Liveness,
}

impl Display for ProbeKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Startup => "startup",
            Self::Readiness => "readiness",
            Self::Liveness => "liveness",
        })
    }
}

/// What a container's probes make of it. A container without a startup probe counts as started at once, and one without
/// a readiness probe as ready once it is started; nothing is sent for that unless a startup probe held it up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeEvent {
    Started,
    Ready(bool),
    /// The startup or liveness probe failed as often as it may: the container is to be restarted. The probe stops.
    Failed {
        kind: ProbeKind,
        message: String,
    },
    /// One try failed: the text of an Event with reason Unhealthy.
    Unhealthy {
        kind: ProbeKind,
        message: String,
    },
}

/// The state of one probe: how often in a row it gave the same result, and what was made of it.
#[derive(Debug)]
pub struct Tracker {
    pub kind: ProbeKind,
    container: String,
    success_threshold: u32,
    failure_threshold: u32,
    last: Option<bool>,
    run: u32,
    ready: bool,
}

#[derive(Debug, PartialEq, Eq)]
pub enum Next {
    Again,
    /// The startup probe has done its work.
    Passed,
    /// The container is to be restarted.
    GaveUp,
}

impl Tracker {
    pub fn new(kind: ProbeKind, container: &str, success_threshold: u32, failure_threshold: u32) -> Self {
        Self {
            kind,
            container: container.to_owned(),
            success_threshold: success_threshold.max(1),
            failure_threshold: failure_threshold.max(1),
            last: None,
            run: 0,
            ready: false,
        }
    }

    /// Takes in one try; gives what it means.
    pub fn observe(&mut self, result: Result<(), String>) -> (Vec<ProbeEvent>, Next) {
        let kind = self.kind;
        let success = result.is_ok();
        self.run = if self.last == Some(success) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let mut events = Vec::new();
        if let Err(cause) = &result {
            let word = match kind {
                ProbeKind::Startup => "Startup",
                ProbeKind::Readiness => "Readiness",
                ProbeKind::Liveness => "Liveness",
            };
            events.push(ProbeEvent::Unhealthy { kind, message: format!("{word} probe failed: {cause}") });
        }
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold {
            return (events, Next::Again);
        }
        match (kind, success) {
            (ProbeKind::Startup, true) => {
                events.push(ProbeEvent::Started);
                return (events, Next::Passed);
            }
            (ProbeKind::Readiness, ready) => {
                if self.ready != ready {
                    self.ready = ready;
                    events.push(ProbeEvent::Ready(ready));
                }
            }
            (ProbeKind::Liveness, true) => {}
            (ProbeKind::Startup | ProbeKind::Liveness, false) => {
                let message = format!("Container {} failed {kind} probe, will be restarted", self.container);
                events.push(ProbeEvent::Failed { kind, message });
                return (events, Next::GaveUp);
            }
        }
        (events, Next::Again)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tracker(kind: ProbeKind, success_threshold: u32, failure_threshold: u32) -> Tracker {
        Tracker::new(kind, "app", success_threshold, failure_threshold)
    }

    /// What a sequence of tries (`+` and `-`) says, Unhealthy left out.
    fn told(mut tracker: Tracker, tries: &str) -> Vec<(usize, ProbeEvent)> {
        let mut told = Vec::new();
        for (number, result) in tries.chars().enumerate() {
            let result = if result == '+' { Ok(()) } else { Err("broken".to_owned()) };
            let (events, next) = tracker.observe(result);
            let told_now = events.into_iter().filter(|event| !matches!(event, ProbeEvent::Unhealthy { .. }));
            told.extend(told_now.map(|event| (number, event)));
            if next != Next::Again {
                break;
            }
        }
        told
    }

    fn failed(kind: ProbeKind) -> ProbeEvent {
        ProbeEvent::Failed { kind, message: format!("Container app failed {kind} probe, will be restarted") }
    }

    #[test]
    fn readiness_changes_only_when_a_threshold_is_reached_in_a_row() {
        let tries = "+-+++--+---+--";
        let expected = [(4, ProbeEvent::Ready(true)), (10, ProbeEvent::Ready(false))];
        assert_eq!(told(tracker(ProbeKind::Readiness, 3, 3), tries), expected);
    }

    #[test]
    fn a_container_is_ready_at_the_first_success() {
        assert_eq!(told(tracker(ProbeKind::Readiness, 1, 3), "+++"), [(0, ProbeEvent::Ready(true))]);
    }

    #[test]
    fn a_container_that_was_never_ready_is_not_told_to_be_unready() {
        assert_eq!(told(tracker(ProbeKind::Readiness, 1, 1), "---"), []);
    }

    #[test]
    fn liveness_gives_up_after_as_many_failures_in_a_row_as_it_may_have() {
        let expected = [(6, failed(ProbeKind::Liveness))];
        assert_eq!(told(tracker(ProbeKind::Liveness, 1, 3), "--+-----"), [(5, failed(ProbeKind::Liveness))]);
        assert_eq!(told(tracker(ProbeKind::Liveness, 1, 3), "--+-+-"), []);
        assert_eq!(told(tracker(ProbeKind::Liveness, 1, 1), "++++++-"), expected);
    }

    #[test]
    fn startup_passes_once_or_gives_up() {
        assert_eq!(told(tracker(ProbeKind::Startup, 1, 3), "--++"), [(2, ProbeEvent::Started)]);
        assert_eq!(told(tracker(ProbeKind::Startup, 1, 2), "--+"), [(1, failed(ProbeKind::Startup))]);
    }

    #[test]
    fn every_failed_try_is_told_as_unhealthy() {
        let (events, next) = tracker(ProbeKind::Liveness, 1, 3).observe(Err("statuscode: 500".into()));
        let message = "Liveness probe failed: statuscode: 500".to_owned();
        assert_eq!(events, [ProbeEvent::Unhealthy { kind: ProbeKind::Liveness, message }]);
        assert_eq!(next, Next::Again);
    }
}
