//! What the agent remembers of a pod's containers over its own restart, and what it makes of it.
//!
//! The API's status is the first memory; the file beside the pod's volumes covers what ended or began between the last
//! status that arrived and a crash. So a container that ended is not run twice, and restartCount never goes back.

use super::status::{Termination, now};
use crate::reasons::terminated;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::ContainerStatus;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The exit code of what was ended by force.
pub const KILLED: i32 = 137;

/// One container's latest run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// Which run it is: 0 for the first.
    pub restarts: i32,
    pub started_at: Timestamp,
    /// None while it runs.
    pub termination: Option<Termination>,
}

/// The records of one pod, in a file.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    /// Boxed: a node of the map has room for eleven.
    records: BTreeMap<String, Box<Record>>,
}

impl Checkpoint {
    /// Reads the file in the pod's directory. A file that is missing or damaged is an empty one: then the API's status
    /// is all there is.
    pub fn open(pod_dir: &Path) -> Self {
        let path = pod_dir.join("containers.json");
        let records = match std::fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).unwrap_or_else(|error| {
                tracing::warn!(path = %path.display(), "ignoring a damaged checkpoint: {error}");
                BTreeMap::new()
            }),
            Err(_) => BTreeMap::new(),
        };
        Self { path, records }
    }

    pub fn get(&self, container: &str) -> Option<&Record> {
        self.records.get(container).map(Box::as_ref)
    }

    /// Remembers the run. A crash of the machine may lose it, a crash of the agent does not.
    pub fn set(&mut self, container: &str, record: Record) {
        self.records.insert(container.to_owned(), Box::new(record));
        if let Err(error) = self.write() {
            tracing::warn!(path = %self.path.display(), "failed to write a checkpoint: {error}");
        }
    }

    fn write(&self) -> std::io::Result<()> {
        if let Some(directory) = self.path.parent() {
            std::fs::create_dir_all(directory)?;
        }
        let temporary = self.path.with_extension("new");
        std::fs::write(&temporary, serde_json::to_vec(&self.records)?)?;
        std::fs::rename(&temporary, &self.path)
    }
}

/// What is known about a container when the agent takes its pod up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Past {
    pub restarts: i32,
    pub kind: PastKind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PastKind {
    /// It has never run.
    New,
    /// It ended, and nothing was decided about what follows.
    Ended(Termination),
    /// It ran when the agent stopped, and ended with it.
    Interrupted(Termination),
    /// It waited to be started again after this end.
    Waiting(Termination),
}

/// Puts the two memories together: the later run wins, and of the same run the one that knows its end.
pub fn past(shown: Option<&ContainerStatus>, record: Option<&Record>) -> Past {
    let shown_restarts = shown.map_or(0, |status| status.restart_count);
    let shown_kind = shown.map_or(PastKind::New, kind);
    let Some(record) = record else {
        return Past { restarts: shown_restarts, kind: shown_kind };
    };
    let recorded_kind = match &record.termination {
        Some(termination) => PastKind::Ended(termination.clone()),
        None => PastKind::Interrupted(interrupted(Some(record.started_at), None)),
    };
    let later = record.restarts > shown_restarts;
    let same = record.restarts == shown_restarts;
    let knows_more = same && matches!(shown_kind, PastKind::New | PastKind::Interrupted(_));
    // It was cut off, and what the agent after that waited for was not its next run.
    let still_interrupted = same && record.termination.is_none() && matches!(shown_kind, PastKind::Waiting(_));
    if later || knows_more || still_interrupted {
        Past { restarts: record.restarts, kind: recorded_kind }
    } else {
        Past { restarts: shown_restarts, kind: shown_kind }
    }
}

fn kind(status: &ContainerStatus) -> PastKind {
    let state = status.state.as_ref();
    if let Some(end) = state.and_then(|state| state.terminated.as_ref()) {
        return PastKind::Ended(Termination::from_api(end));
    }
    if let Some(running) = state.and_then(|state| state.running.as_ref()) {
        let started = running.started_at.as_ref().map(|time| time.0);
        return PastKind::Interrupted(interrupted(started, status.container_id.clone()));
    }
    match status.last_state.as_ref().and_then(|state| state.terminated.as_ref()) {
        Some(end) => PastKind::Waiting(Termination::from_api(end)),
        None => PastKind::New,
    }
}

fn interrupted(started_at: Option<Timestamp>, container_id: Option<String>) -> Termination {
    Termination {
        exit_code: KILLED,
        reason: terminated::ERROR.to_owned(),
        message: "the node's agent stopped while the container ran".to_owned(),
        started_at,
        finished_at: now(),
        container_id,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{
        ContainerState, ContainerStateRunning, ContainerStateTerminated, ContainerStateWaiting,
    };

    fn status(restarts: i32, state: ContainerState) -> ContainerStatus {
        ContainerStatus { restart_count: restarts, state: Some(state), ..ContainerStatus::default() }
    }

    fn running() -> ContainerState {
        ContainerState { running: Some(ContainerStateRunning::default()), ..ContainerState::default() }
    }

    fn ended(exit_code: i32) -> ContainerState {
        ContainerState {
            terminated: Some(ContainerStateTerminated { exit_code, ..ContainerStateTerminated::default() }),
            ..ContainerState::default()
        }
    }

    fn record(restarts: i32, exit_code: Option<i32>) -> Record {
        Record {
            restarts,
            started_at: now(),
            termination: exit_code.map(|exit_code| Termination {
                exit_code,
                ..Termination::from_api(&ContainerStateTerminated::default())
            }),
        }
    }

    #[test]
    fn a_container_that_was_never_seen_is_new() {
        assert_eq!(past(None, None), Past { restarts: 0, kind: PastKind::New });
    }

    #[test]
    fn an_end_that_the_api_never_learned_of_is_remembered() {
        let past = past(Some(&status(2, running())), Some(&record(2, Some(0))));
        assert_eq!(past.restarts, 2);
        assert!(matches!(past.kind, PastKind::Ended(end) if end.exit_code == 0));
    }

    #[test]
    fn restart_count_is_the_higher_one_of_the_two() {
        assert_eq!(past(Some(&status(5, running())), Some(&record(3, None))).restarts, 5);
        assert_eq!(past(Some(&status(3, ended(1))), Some(&record(4, None))).restarts, 4);
        assert_eq!(past(Some(&status(7, running())), None).restarts, 7);
    }

    #[test]
    fn a_container_that_ran_when_the_agent_stopped_was_interrupted() {
        let past = past(Some(&status(0, running())), Some(&record(0, None)));
        assert!(matches!(past.kind, PastKind::Interrupted(end) if end.exit_code == KILLED));
    }

    #[test]
    fn an_end_that_the_api_shows_stays_an_end() {
        let past = past(Some(&status(1, ended(3))), Some(&record(1, None)));
        assert!(matches!(past.kind, PastKind::Ended(end) if end.exit_code == 3));
    }

    #[test]
    fn a_container_that_waited_in_a_crash_loop_waits_on() {
        let mut waiting =
            status(4, ContainerState { waiting: Some(ContainerStateWaiting::default()), ..ContainerState::default() });
        waiting.last_state = Some(ended(9));
        let past = past(Some(&waiting), None);
        assert_eq!(past.restarts, 4);
        assert!(matches!(past.kind, PastKind::Waiting(end) if end.exit_code == 9));
    }

    #[test]
    fn a_container_that_was_interrupted_and_then_waited_for_an_obstacle_is_interrupted_still() {
        let mut waiting =
            status(0, ContainerState { waiting: Some(ContainerStateWaiting::default()), ..ContainerState::default() });
        waiting.last_state = Some(ended(KILLED));
        assert!(matches!(past(Some(&waiting), Some(&record(0, None))).kind, PastKind::Interrupted(_)));
        assert!(matches!(past(Some(&waiting), Some(&record(0, Some(1)))).kind, PastKind::Waiting(_)));
    }

    #[test]
    fn records_survive_being_written_and_a_damaged_file_is_none() {
        let directory = tempfile::tempdir().unwrap();
        let mut checkpoint = Checkpoint::open(directory.path());
        checkpoint.set("web", record(2, Some(1)));
        assert_eq!(Checkpoint::open(directory.path()).get("web"), checkpoint.get("web"));
        std::fs::write(directory.path().join("containers.json"), "{").unwrap();
        assert_eq!(Checkpoint::open(directory.path()).get("web"), None);
    }
}
