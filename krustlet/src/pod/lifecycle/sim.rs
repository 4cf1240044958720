//! A pod's lifecycle without a cluster, a runtime or a clock: for its tests.

use super::super::checkpoint::Checkpoint;
use super::super::failure::{Failure, Obstacle};
use super::super::fields::PodFacts;
use super::super::guest::GuestKind;
use super::super::status;
use super::PodLifecycle;
use super::container::End;
use super::event::{Effect, Event, Launched, Now};
use crate::reasons::{event as event_reason, terminated, waiting};
use jiff::SignedDuration;
use k8s_openapi::api::core::v1::{ContainerStatus, Pod, PodStatus};
use serde_json::{Value, json};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

pub struct Sim {
    pub life: PodLifecycle,
    pub object: Pod,
    pub now: Now,
    /// Everything that was to be done, in order.
    pub done: Vec<Effect>,
    /// What the next agent would read.
    pub checkpoint: Checkpoint,
    version: u64,
    _directory: tempfile::TempDir,
}

pub fn pod(spec: Value) -> Pod {
    let metadata = json!({"name": "pod", "namespace": "test", "uid": "uid", "resourceVersion": "1"});
    serde_json::from_value(json!({"metadata": metadata, "spec": spec})).unwrap()
}

/// A container's spec.
pub fn container(name: &str, more: Value) -> Value {
    let mut container = json!({"name": name, "image": "app:1"});
    container.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    container
}

pub fn post_start() -> Value {
    json!({"lifecycle": {"postStart": {"httpGet": {"port": 80}}}})
}

pub fn end(exit_code: i32) -> End {
    let reason = if exit_code == 0 { terminated::COMPLETED } else { terminated::ERROR };
    End { exit_code, reason, message: String::new(), last_words: String::new() }
}

impl Sim {
    /// The first step of a new pod, of one main container unless the spec has its own.
    pub fn new(mut spec: Value) -> Self {
        if spec.get("containers").is_none() {
            spec["containers"] = json!([container("main", json!({}))]);
        }
        Self::of(pod(spec), None)
    }

    pub fn of(object: Pod, rejected: Option<status::Failure>) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let now = Now { at: Instant::now(), time: "2030-01-01T00:00:00Z".parse().unwrap() };
        let checkpoint = Checkpoint::open(directory.path());
        let life = PodLifecycle::new(Arc::new(object.clone()), PodFacts::default(), &checkpoint, rejected, same, now);
        let mut sim = Self { life, object, now, done: Vec::new(), checkpoint, version: 1, _directory: directory };
        sim.step(Event::Tick);
        sim
    }

    /// Ends the agent without a word, and starts the next one.
    pub fn restart_agent(&mut self) {
        let object = Arc::new(self.object.clone());
        self.life = PodLifecycle::new(object, PodFacts::default(), &self.checkpoint, None, same, self.now);
        self.step(Event::Tick);
    }

    pub fn step(&mut self, event: Event) -> Vec<Effect> {
        let effects = self.life.step(event, self.now);
        for effect in &effects {
            if let Effect::Remember { container, record } = effect {
                self.checkpoint.set(container, record.clone());
            }
        }
        self.done.extend(effects.clone());
        effects
    }

    /// Lets time pass.
    pub fn pass(&mut self, time: Duration) -> Vec<Effect> {
        self.now.at += time;
        self.now.time += SignedDuration::try_from(time).unwrap();
        self.step(Event::Tick)
    }

    pub fn generation(&self, index: usize) -> u32 {
        self.life.generation(index).unwrap()
    }

    pub fn prepared(&mut self, index: usize, kind: GuestKind) -> Vec<Effect> {
        let generation = self.generation(index);
        self.step(Event::Prepared { index, generation, result: Ok(kind), prepared: true })
    }

    pub fn cannot_prepare(&mut self, index: usize, obstacle: Obstacle) -> Vec<Effect> {
        let reason = match obstacle {
            Obstacle::Image => waiting::ERR_IMAGE_PULL,
            Obstacle::Port => waiting::PORT_IN_USE,
            _ => waiting::CREATE_CONTAINER_ERROR,
        };
        let failure = Failure { obstacle, reason, message: "no".into(), event: event_reason::FAILED };
        let generation = self.generation(index);
        self.step(Event::Prepared { index, generation, result: Err(failure), prepared: true })
    }

    pub fn launched(&mut self, index: usize, kind: GuestKind) -> Vec<Effect> {
        let generation = self.generation(index);
        let launched = Launched { kind, image: "app@sha256:1".into(), addresses: Vec::new(), unserved: Vec::new() };
        self.step(Event::Launched { index, generation, result: Ok(launched) })
    }

    /// From the wish to start it to its guest.
    pub fn run(&mut self, index: usize, kind: GuestKind) -> Vec<Effect> {
        let launch = self.prepared(index, kind);
        assert!(launch.iter().any(|e| matches!(e, Effect::Launch { index: i, .. } if *i == index)), "{launch:?}");
        self.launched(index, kind)
    }

    pub fn ended(&mut self, index: usize, exit_code: i32) -> Vec<Effect> {
        let generation = self.generation(index);
        self.step(Event::Ended { index, generation, end: end(exit_code) })
    }

    pub fn post_started(&mut self, index: usize, result: Result<(), &str>) -> Vec<Effect> {
        let generation = self.generation(index);
        self.step(Event::PostStarted { index, generation, result: result.map_err(str::to_owned) })
    }

    /// The API's object changes by another hand.
    pub fn change(&mut self, change: impl FnOnce(&mut Pod)) -> Vec<Effect> {
        change(&mut self.object);
        self.show()
    }

    pub fn show(&mut self) -> Vec<Effect> {
        self.version += 1;
        self.object.metadata.resource_version = Some(self.version.to_string());
        self.step(Event::Shown(Arc::new(self.object.clone())))
    }

    pub fn delete(&mut self, grace: i64) -> Vec<Effect> {
        let now = self.now.time;
        self.change(|pod| {
            pod.metadata.deletion_timestamp = Some(k8s_openapi::apimachinery::pkg::apis::meta::v1::Time(now));
            pod.metadata.deletion_grace_period_seconds = Some(grace);
        })
    }

    /// The status that is being written arrives, and every one after it; gives the last one.
    pub fn publish(&mut self) -> PodStatus {
        loop {
            let begun = self.done.iter().rev().find_map(|effect| match effect {
                Effect::Write(status) => Some(status.clone()),
                _ => None,
            });
            if let Some(status) = begun.filter(|_| self.life.publisher.is_writing()) {
                self.version += 1;
                self.object.status = Some((*status).clone());
                self.object.metadata.resource_version = Some(self.version.to_string());
                self.step(Event::Written { status, result: Ok(self.version) });
                self.show();
            } else {
                // What may wait is waited for.
                match self.life.publisher.deadline() {
                    Some(at) => _ = self.pass(at.saturating_duration_since(self.now.at)),
                    None => return self.object.status.clone().unwrap_or_default(),
                }
            }
        }
    }

    pub fn phase(&mut self) -> String {
        self.publish().phase.unwrap()
    }

    pub fn status_of(&mut self, name: &str) -> ContainerStatus {
        let status = self.publish();
        let mut all = status.container_statuses.into_iter().chain(status.init_container_statuses).flatten();
        all.find(|container| container.name == name).unwrap()
    }

    pub fn restarts(&mut self, name: &str) -> i32 {
        self.status_of(name).restart_count
    }

    /// Which containers are being prepared by these effects.
    pub fn prepares(effects: &[Effect]) -> Vec<usize> {
        let index = |effect: &Effect| match effect {
            Effect::Prepare { index, .. } => Some(*index),
            _ => None,
        };
        effects.iter().filter_map(index).collect()
    }

    pub fn told(&self, reason: &str) -> Vec<String> {
        let message = |effect: &Effect| match effect {
            Effect::Tell { reason: told, message, .. } if *told == reason => Some(message.clone()),
            _ => None,
        };
        self.done.iter().filter_map(message).collect()
    }
}

fn same(duration: Duration, _: f64) -> Duration {
    duration
}

pub fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}
