//! The status of a pod, from the states of its containers. No I/O: what it says follows from what it is given.

use super::fields::PodFacts;
use super::{Role, is_finished};
use crate::reasons::{condition, pod as pod_reason, terminated, waiting};
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{
    ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting, ContainerStatus,
    EphemeralContainer, HostIP, Pod, PodCondition, PodIP, PodStatus,
};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::{Deserialize, Serialize};

/// What an ephemeral container is told, and the exit code of a container that no runtime could start.
pub const NOT_DEBUGGED: &str = "a WebAssembly pod has no shell and no processes that another container could join";
const CANNOT_RUN: i32 = 128;

/// How a container ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Termination {
    pub exit_code: i32,
    pub reason: String,
    pub message: String,
    pub started_at: Option<Timestamp>,
    pub finished_at: Timestamp,
    pub container_id: Option<String>,
}

impl Termination {
    /// Reads it back from the API.
    pub fn from_api(terminated: &ContainerStateTerminated) -> Self {
        Self {
            exit_code: terminated.exit_code,
            reason: terminated.reason.clone().unwrap_or_default(),
            message: terminated.message.clone().unwrap_or_default(),
            started_at: terminated.started_at.as_ref().map(|time| time.0),
            finished_at: terminated.finished_at.as_ref().map_or_else(now, |time| time.0),
            container_id: terminated.container_id.clone(),
        }
    }

    fn to_api(&self) -> ContainerStateTerminated {
        ContainerStateTerminated {
            exit_code: self.exit_code,
            reason: Some(self.reason.clone()),
            message: Some(self.message.clone()).filter(|message| !message.is_empty()),
            started_at: self.started_at.map(Time),
            finished_at: Some(Time(self.finished_at)),
            container_id: self.container_id.clone(),
            signal: None,
        }
    }
}

/// What a container does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum State {
    Waiting { reason: String, message: String },
    Running { since: Timestamp },
    Terminated(Termination),
}

impl State {
    pub fn waiting(reason: &str, message: impl Into<String>) -> Self {
        Self::Waiting { reason: reason.to_owned(), message: message.into() }
    }
}

/// One container, as its status shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ContainerView {
    pub name: String,
    pub role: Role,
    /// As the spec names it.
    pub image: String,
    /// `repository@digest` of what runs.
    pub image_id: String,
    pub container_id: Option<String>,
    pub state: State,
    pub last: Option<Termination>,
    pub restarts: i32,
    pub started: bool,
    pub ready: bool,
}

impl ContainerView {
    fn to_api(&self) -> ContainerStatus {
        let state = match &self.state {
            State::Waiting { reason, message } => ContainerState {
                waiting: Some(ContainerStateWaiting {
                    reason: Some(reason.clone()),
                    message: Some(message.clone()).filter(|message| !message.is_empty()),
                }),
                ..ContainerState::default()
            },
            State::Running { since } => ContainerState {
                running: Some(ContainerStateRunning { started_at: Some(Time(*since)) }),
                ..ContainerState::default()
            },
            State::Terminated(termination) => {
                ContainerState { terminated: Some(termination.to_api()), ..ContainerState::default() }
            }
        };
        ContainerStatus {
            name: self.name.clone(),
            image: self.image.clone(),
            image_id: self.image_id.clone(),
            container_id: self.container_id.clone(),
            state: Some(state),
            // Always there: the API server shows an empty one for none.
            last_state: Some(ContainerState {
                terminated: self.last.as_ref().map(Termination::to_api),
                ..ContainerState::default()
            }),
            ready: self.ready,
            started: Some(self.started),
            restart_count: self.restarts,
            ..ContainerStatus::default()
        }
    }

    fn succeeded(&self) -> bool {
        matches!(&self.state, State::Terminated(termination) if termination.exit_code == 0)
    }

    fn terminated(&self) -> bool {
        matches!(self.state, State::Terminated(_))
    }

    fn running(&self) -> bool {
        matches!(self.state, State::Running { .. })
    }

    /// Whether the pod may go on past this init container.
    fn initialized(&self) -> bool {
        match self.role {
            Role::Init => self.succeeded(),
            // One that is restarted has let the others begin already.
            Role::Sidecar => self.started || self.terminated() || self.last.is_some(),
            Role::Main => true,
        }
    }
}

/// Why a pod as a whole failed, whatever its containers say.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub reason: String,
    pub message: String,
}

/// Everything that a pod's status follows from.
pub struct View<'a> {
    pub pod: &'a Pod,
    /// What the API was told last; the pod may be older.
    pub sent: Option<&'a PodStatus>,
    pub facts: &'a PodFacts,
    /// In the order of the spec, init containers first.
    pub containers: Vec<&'a ContainerView>,
    pub now: Timestamp,
    pub start_time: Timestamp,
    /// Whether the volumes are there.
    pub prepared: bool,
    /// Whether every container has ended for good. Without it, a phase is never Succeeded or Failed.
    pub ended: bool,
    pub failure: Option<&'a Failure>,
    /// The agent is stopping: not ready, whatever the containers say.
    pub shutdown: bool,
    /// Why the running module is not the one that the spec names.
    pub stale: Option<(&'a str, &'a str)>,
}

/// The status to show, with the conditions that are this agent's to set.
pub fn build(view: &View<'_>) -> PodStatus {
    let pod = view.pod;
    let statuses = |init: bool| -> Option<Vec<ContainerStatus>> {
        let mut all: Vec<ContainerStatus> =
            view.containers.iter().filter(|c| (c.role != Role::Main) == init).map(|c| c.to_api()).collect();
        all.shrink_to_fit();
        (!all.is_empty()).then_some(all)
    };
    let phase = phase(view);
    let pod_ip = Some(view.facts.pod_ip.clone()).filter(|ip| !ip.is_empty());
    PodStatus {
        phase: Some(phase.to_owned()),
        reason: view.failure.map(|failure| failure.reason.clone()),
        message: view.failure.map(|failure| failure.message.clone()),
        conditions: Some(conditions(view, phase)),
        host_ip: Some(view.facts.host_ip.clone()),
        host_ips: Some(vec![HostIP { ip: view.facts.host_ip.clone() }]),
        pod_ips: pod_ip.clone().map(|ip| vec![PodIP { ip }]),
        pod_ip,
        start_time: Some(Time(view.start_time)),
        init_container_statuses: statuses(true),
        container_statuses: statuses(false),
        ephemeral_container_statuses: refused(pod),
        observed_generation: pod.metadata.generation,
        ..PodStatus::default()
    }
}

/// The names of the containers that `kubectl debug` has added.
pub fn ephemeral(pod: &Pod) -> impl Iterator<Item = &str> {
    let spec = pod.spec.iter();
    spec.flat_map(|spec| spec.ephemeral_containers.iter().flatten()).map(|container| container.name.as_str())
}

/// None of them is run. Ended with a reason, so that kubectl does not wait for it.
fn refused(pod: &Pod) -> Option<Vec<ContainerStatus>> {
    let spec = pod.spec.as_ref()?;
    let ended = ContainerState {
        terminated: Some(ContainerStateTerminated {
            exit_code: CANNOT_RUN,
            reason: Some(terminated::CONTAINER_CANNOT_RUN.to_owned()),
            message: Some(NOT_DEBUGGED.to_owned()),
            ..Default::default()
        }),
        ..Default::default()
    };
    let of = |container: &EphemeralContainer| ContainerStatus {
        name: container.name.clone(),
        image: container.image.clone().unwrap_or_default(),
        state: Some(ended.clone()),
        ..Default::default()
    };
    spec.ephemeral_containers.as_ref().map(|containers| containers.iter().map(of).collect())
}

/// The kubelet's rules, and one more: an end is told only when nothing runs any more.
fn phase(view: &View<'_>) -> &'static str {
    if is_finished(view.pod) {
        // Ended is ended, whatever is learned later.
        return if super::phase(view.pod) == "Succeeded" { "Succeeded" } else { "Failed" };
    }
    let mains = || view.containers.iter().filter(|c| c.role == Role::Main);
    if view.ended {
        let init_failed = view.containers.iter().any(|c| c.role == Role::Init && !c.succeeded());
        let succeeded = view.failure.is_none() && !init_failed && mains().all(|c| c.succeeded());
        return if succeeded { "Succeeded" } else { "Failed" };
    }
    let begun = |c: &ContainerView| c.running() || c.terminated() || c.last.is_some();
    if view.containers.iter().all(|c| c.initialized() || c.role == Role::Main && begun(c)) && mains().all(|c| begun(c))
    {
        return "Running";
    }
    // Init containers that run once more do not undo that the others have run.
    let told = view.sent.and_then(|sent| sent.phase.as_deref());
    if told.unwrap_or_else(|| super::phase(view.pod)) == "Running" { "Running" } else { "Pending" }
}

fn conditions(view: &View<'_>, phase: &str) -> Vec<PodCondition> {
    let unready: Vec<&str> =
        view.containers.iter().filter(|c| c.role != Role::Init && !c.ready).map(|c| c.name.as_str()).collect();
    let uninitialized: Vec<&str> =
        view.containers.iter().filter(|c| !c.initialized()).map(|c| c.name.as_str()).collect();
    let listed = |what: &str, names: &[&str]| format!("containers with {what} status: [{}]", names.join(" "));

    let initialized = if uninitialized.is_empty() || phase == "Succeeded" {
        Ok(())
    } else {
        Err((condition::CONTAINERS_NOT_INITIALIZED, listed("incomplete", &uninitialized)))
    };
    let containers_ready = match phase {
        "Succeeded" => Err((condition::POD_COMPLETED, String::new())),
        "Failed" => Err((condition::POD_FAILED, String::new())),
        _ if view.shutdown => Err((condition::NODE_SHUTDOWN, "the node's agent is stopping".to_owned())),
        _ if unready.is_empty() => Ok(()),
        _ => Err((condition::CONTAINERS_NOT_READY, listed("unready", &unready))),
    };
    let gates: Vec<String> = view
        .pod
        .spec
        .iter()
        .flat_map(|spec| spec.readiness_gates.iter().flatten())
        .map(|gate| gate.condition_type.clone())
        .filter(|gate| current(view.pod, gate).is_none_or(|condition| condition.status != "True"))
        .collect();
    let ready = match &containers_ready {
        Ok(()) if !gates.is_empty() => Err((
            condition::READINESS_GATES_NOT_READY,
            format!("conditions that are not True yet: [{}]", gates.join(" ")),
        )),
        other => other.clone(),
    };
    let prepared =
        if view.prepared && !matches!(phase, "Succeeded" | "Failed") { Ok(()) } else { Err(("", String::new())) };

    let mut conditions = vec![
        condition_of(view, condition::POD_SCHEDULED, Ok(())),
        condition_of(view, condition::READY_TO_START, prepared),
        condition_of(view, condition::INITIALIZED, initialized),
        condition_of(view, condition::CONTAINERS_READY, containers_ready),
        condition_of(view, condition::READY, ready),
    ];
    if let Some(failure) = view.failure.filter(|failure| failure.reason == pod_reason::EVICTED) {
        // By it a Job tells what the node did to the pod from a failure of the pod's own.
        let condition = condition_of(view, condition::DISRUPTION_TARGET, Ok(()));
        conditions.push(PodCondition {
            reason: Some(condition::TERMINATION_BY_KUBELET.to_owned()),
            message: Some(failure.message.clone()),
            ..condition
        });
    }
    match view.stale {
        Some((reason, message)) => {
            conditions.push(condition_of(view, condition::IMAGE_CURRENT, Err((reason, message.to_owned()))));
        }
        // Told only of a pod whose image was once not current.
        None if current(view.pod, condition::IMAGE_CURRENT).is_some() => {
            conditions.push(condition_of(view, condition::IMAGE_CURRENT, Ok(())));
        }
        None => {}
    }
    conditions
}

fn condition_of(view: &View<'_>, type_: &str, holds: Result<(), (&str, String)>) -> PodCondition {
    let (status, reason, message) = match holds {
        Ok(()) => ("True", "", String::new()),
        Err((reason, message)) => ("False", reason, message),
    };
    let told = view.sent.and_then(|sent| sent.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_));
    let since = told
        .or_else(|| current(view.pod, type_))
        .filter(|before| before.status == status)
        .and_then(|before| before.last_transition_time.clone())
        .unwrap_or(Time(view.now));
    PodCondition {
        type_: type_.to_owned(),
        status: status.to_owned(),
        reason: Some(reason.to_owned()).filter(|reason| !reason.is_empty()),
        message: Some(message).filter(|message| !message.is_empty()),
        last_transition_time: Some(since),
        observed_generation: view.pod.metadata.generation,
        ..PodCondition::default()
    }
}

fn current<'a>(pod: &'a Pod, type_: &str) -> Option<&'a PodCondition> {
    pod.status.as_ref()?.conditions.as_ref()?.iter().find(|condition| condition.type_ == type_)
}

/// Whether the status says no more than that a new pod is on its way to being ready, and nothing has gone wrong: then it
/// may wait a little for something better.
pub fn is_progress(status: &PodStatus) -> bool {
    let well = |container: &ContainerStatus| {
        let state = container.state.as_ref();
        let creating = state.and_then(|state| state.waiting.as_ref()).is_some_and(|waiting| {
            matches!(waiting.reason.as_deref(), Some(waiting::CONTAINER_CREATING | waiting::POD_INITIALIZING))
        });
        let running = state.is_some_and(|state| state.running.is_some());
        let succeeded = state.and_then(|state| state.terminated.as_ref()).is_some_and(|end| end.exit_code == 0);
        let first_run = container.last_state.as_ref().is_none_or(|last| last.terminated.is_none());
        first_run && (creating || running || succeeded)
    };
    let ready = status.conditions.iter().flatten().any(|c| c.type_ == condition::READY && c.status == "True");
    !ready
        && matches!(status.phase.as_deref(), Some("Pending" | "Running"))
        && status.init_container_statuses.iter().chain(&status.container_statuses).flatten().all(well)
}

/// Whether two statuses differ for a reader; times of transition alone do not count.
pub fn differs(a: &PodStatus, b: &PodStatus) -> bool {
    let timeless = |status: &PodStatus| {
        let mut status = status.clone();
        for condition in status.conditions.iter_mut().flatten() {
            condition.last_transition_time = None;
        }
        status
    };
    timeless(a) != timeless(b)
}

/// Whether the API shows something else than what was sent, in what is this agent's to say.
pub fn is_overwritten(sent: &PodStatus, shown: &PodStatus) -> bool {
    let condition_changed = |ours: &PodCondition| {
        !shown.conditions.iter().flatten().any(|c| c.type_ == ours.type_ && c.status == ours.status)
    };
    sent.phase != shown.phase
        || sent.conditions.iter().flatten().any(condition_changed)
        || sent.container_statuses != shown.container_statuses
        || sent.init_container_statuses != shown.init_container_statuses
}

/// The present, as exact as the API's times are.
pub fn now() -> Timestamp {
    seconds(Timestamp::now())
}

/// A time, as exact as the API's times are.
pub fn seconds(time: Timestamp) -> Timestamp {
    Timestamp::from_second(time.as_second()).unwrap_or(time)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{PodReadinessGate, PodSpec};

    fn view(role: Role, name: &str, state: State) -> ContainerView {
        let running = matches!(state, State::Running { .. });
        ContainerView {
            name: name.into(),
            role,
            image: "registry/app:1".into(),
            image_id: "registry/app@sha256:1".into(),
            container_id: None,
            state,
            last: None,
            restarts: 0,
            started: running,
            ready: running,
        }
    }

    fn running() -> State {
        State::Running { since: now() }
    }

    fn creating() -> State {
        State::waiting(waiting::CONTAINER_CREATING, "")
    }

    fn ended(exit_code: i32) -> State {
        State::Terminated(Termination {
            exit_code,
            reason: "Completed".into(),
            message: String::new(),
            started_at: None,
            finished_at: now(),
            container_id: None,
        })
    }

    fn built(pod: &Pod, containers: &[ContainerView], over: bool, failure: Option<&Failure>) -> PodStatus {
        build(&View {
            pod,
            sent: None,
            facts: &PodFacts { host_ip: "127.0.0.2".into(), pod_ip: "127.0.0.2".into(), ..PodFacts::default() },
            containers: containers.iter().collect(),
            now: now(),
            start_time: now(),
            prepared: true,
            ended: over,
            failure,
            shutdown: false,
            stale: None,
        })
    }

    fn phase_of(containers: &[ContainerView], over: bool) -> String {
        built(&Pod::default(), containers, over, None).phase.unwrap()
    }

    fn condition<'a>(status: &'a PodStatus, type_: &str) -> &'a PodCondition {
        status.conditions.as_ref().unwrap().iter().find(|c| c.type_ == type_).unwrap()
    }

    #[test]
    fn a_phase_is_never_succeeded_while_a_container_runs() {
        let containers = [view(Role::Main, "a", ended(0)), view(Role::Main, "b", running())];
        assert_eq!(phase_of(&containers, false), "Running");
        let containers = [view(Role::Main, "a", ended(0)), view(Role::Sidecar, "s", running())];
        assert_eq!(phase_of(&containers, false), "Running");
    }

    #[test]
    fn a_pod_succeeds_when_all_ended_well_and_fails_otherwise() {
        let good = view(Role::Main, "a", ended(0));
        let bad = view(Role::Main, "b", ended(3));
        assert_eq!(phase_of(std::slice::from_ref(&good), true), "Succeeded");
        assert_eq!(phase_of(&[good.clone(), bad], true), "Failed");
        let failure = Failure { reason: "DeadlineExceeded".into(), message: "m".into() };
        let status = built(&Pod::default(), &[good], true, Some(&failure));
        assert_eq!(status.phase.as_deref(), Some("Failed"));
        assert_eq!(status.reason.as_deref(), Some("DeadlineExceeded"));
    }

    #[test]
    fn an_evicted_pod_is_told_as_disrupted_and_no_other_failed_one_is() {
        let ended = [view(Role::Main, "a", ended(137))];
        let failed = |reason: &str| {
            let failure = Failure { reason: reason.into(), message: "too much disk".into() };
            built(&Pod::default(), &ended, true, Some(&failure))
        };
        let evicted = failed(pod_reason::EVICTED);
        let target = condition(&evicted, "DisruptionTarget");
        assert_eq!((target.status.as_str(), target.reason.as_deref()), ("True", Some("TerminationByKubelet")));
        assert_eq!(target.message.as_deref(), Some("too much disk"));
        let others = failed(pod_reason::DEADLINE_EXCEEDED);
        assert!(others.conditions.unwrap().iter().all(|c| c.type_ != "DisruptionTarget"));
    }

    #[test]
    fn init_containers_that_run_once_more_do_not_take_a_running_pod_back_to_pending() {
        let again = [view(Role::Init, "i", running()), view(Role::Main, "a", ended(88))];
        assert_eq!(phase_of(&again, false), "Pending");
        let mut pod = Pod::default();
        pod.status.get_or_insert_default().phase = Some("Running".into());
        assert_eq!(built(&pod, &again, false, None).phase.as_deref(), Some("Running"));
    }

    #[test]
    fn a_pod_whose_init_container_failed_for_good_is_failed() {
        let containers = [view(Role::Init, "i", ended(1)), view(Role::Main, "a", creating())];
        assert_eq!(phase_of(&containers, true), "Failed");
        assert_eq!(phase_of(&containers, false), "Pending");
    }

    #[test]
    fn an_ended_pod_keeps_its_phase_whatever_comes() {
        let mut pod = Pod::default();
        pod.status.get_or_insert_default().phase = Some("Succeeded".into());
        assert_eq!(built(&pod, &[view(Role::Main, "a", ended(1))], true, None).phase.as_deref(), Some("Succeeded"));
    }

    #[test]
    fn a_container_that_crashed_and_waits_keeps_its_pod_running() {
        let mut crashed = view(Role::Main, "a", State::waiting(waiting::CRASH_LOOP_BACK_OFF, ""));
        assert_eq!(phase_of(std::slice::from_ref(&crashed), false), "Pending");
        crashed.last = Some(Termination::from_api(&ContainerStateTerminated::default()));
        assert_eq!(phase_of(&[crashed], false), "Running");
    }

    #[test]
    fn ready_follows_the_containers_and_names_those_that_are_not() {
        let mut slow = view(Role::Main, "slow", running());
        slow.ready = false;
        let status = built(&Pod::default(), &[view(Role::Main, "a", running()), slow], false, None);
        let ready = condition(&status, "Ready");
        assert_eq!((ready.status.as_str(), ready.reason.as_deref()), ("False", Some("ContainersNotReady")));
        assert_eq!(ready.message.as_deref(), Some("containers with unready status: [slow]"));
        let status = built(&Pod::default(), &[view(Role::Main, "a", running())], false, None);
        for type_ in ["PodScheduled", "Initialized", "ContainersReady", "Ready"] {
            assert_eq!(condition(&status, type_).status, "True", "{type_}");
        }
    }

    #[test]
    fn a_readiness_gate_holds_ready_back_until_its_condition_is_true() {
        let mut pod = Pod {
            spec: Some(PodSpec {
                readiness_gates: Some(vec![PodReadinessGate { condition_type: "example.com/gate".into() }]),
                ..PodSpec::default()
            }),
            ..Pod::default()
        };
        let containers = [view(Role::Main, "a", running())];
        let status = built(&pod, &containers, false, None);
        assert_eq!(condition(&status, "Ready").status, "False");
        assert_eq!(condition(&status, "ContainersReady").status, "True");
        pod.status.get_or_insert_default().conditions = Some(vec![PodCondition {
            type_: "example.com/gate".into(),
            status: "True".into(),
            ..PodCondition::default()
        }]);
        assert_eq!(condition(&built(&pod, &containers, false, None), "Ready").status, "True");
    }

    #[test]
    fn initialized_waits_for_init_containers_to_end_and_sidecars_to_start() {
        let done = view(Role::Init, "i", ended(0));
        let mut sidecar = view(Role::Sidecar, "s", running());
        sidecar.started = false;
        let main = view(Role::Main, "a", creating());
        let status = built(&Pod::default(), &[done.clone(), sidecar.clone(), main.clone()], false, None);
        let initialized = condition(&status, "Initialized");
        assert_eq!(initialized.message.as_deref(), Some("containers with incomplete status: [s]"));
        sidecar.started = true;
        let status = built(&Pod::default(), &[done, sidecar, main], false, None);
        assert_eq!(condition(&status, "Initialized").status, "True");
    }

    #[test]
    fn a_condition_keeps_its_time_until_it_changes() {
        let containers = [view(Role::Main, "a", running())];
        let long_ago = Time("2020-01-01T00:00:00Z".parse().unwrap());
        let mut pod = Pod::default();
        let mut before = built(&pod, &containers, false, None);
        for condition in before.conditions.iter_mut().flatten() {
            condition.last_transition_time = Some(long_ago.clone());
        }
        pod.status = Some(before.clone());
        let after = built(&pod, &containers, false, None);
        assert_eq!(condition(&after, "Ready").last_transition_time, Some(long_ago.clone()));
        let unready = built(&pod, &[view(Role::Main, "a", creating())], false, None);
        assert_ne!(condition(&unready, "Ready").last_transition_time, Some(long_ago));
        assert!(!differs(&before, &after));
        assert!(differs(&before, &unready));
    }

    #[test]
    fn a_foreign_condition_is_no_reason_to_write_again_but_a_changed_one_of_ours_is() {
        let sent = built(&Pod::default(), &[view(Role::Main, "a", running())], false, None);
        let mut shown = sent.clone();
        shown.conditions.as_mut().unwrap().push(PodCondition { type_: "x/y".into(), ..PodCondition::default() });
        assert!(!is_overwritten(&sent, &shown));
        shown.conditions.as_mut().unwrap().iter_mut().find(|c| c.type_ == "Ready").unwrap().status = "False".into();
        assert!(is_overwritten(&sent, &shown));
    }

    #[test]
    fn being_on_the_way_is_progress_and_an_error_or_readiness_is_news() {
        let status = |containers: &[ContainerView]| built(&Pod::default(), containers, false, None);
        let main = |state| view(Role::Main, "a", state);
        assert!(is_progress(&status(&[main(creating())])));
        assert!(is_progress(&status(&[view(Role::Init, "i", ended(0)), main(creating())])));
        let mut unready = main(running());
        unready.ready = false;
        assert!(is_progress(&status(std::slice::from_ref(&unready))));
        assert!(!is_progress(&status(&[main(running())])));
        assert!(!is_progress(&status(&[main(State::waiting("ErrImagePull", "m"))])));
        assert!(!is_progress(&status(&[view(Role::Init, "i", ended(1)), main(creating())])));
        unready.last = Some(Termination::from_api(&ContainerStateTerminated::default()));
        assert!(!is_progress(&status(&[unready])));
    }
}
