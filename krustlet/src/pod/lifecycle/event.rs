//! What happens to a pod, and what is to be done about it.

use super::super::checkpoint::Record;
use super::super::failure::{Failure, Obstacle};
use super::super::guest::GuestKind;
use super::super::probes::ProbeEvent;
use super::container::End;
use crate::events::Severity;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Pod, PodStatus};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The moment of a step, on both clocks.
#[derive(Debug, Clone, Copy)]
pub struct Now {
    pub at: Instant,
    pub time: Timestamp,
}

impl Now {
    pub fn read() -> Self {
        Self { at: Instant::now(), time: Timestamp::now() }
    }
}

/// A guest that has just been started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Launched {
    pub kind: GuestKind,
    /// `repository@digest`.
    pub image: String,
    /// What it serves on.
    pub addresses: Vec<SocketAddr>,
    /// What is said of each of its ports that is not served.
    pub unserved: Vec<String>,
}

/// What happened. The `generation` says to which run of the container at `index` a report belongs.
#[derive(Debug, Clone)]
pub enum Event {
    /// Time has passed.
    Tick,
    /// The pod's object is this now.
    Shown(Arc<Pod>),
    /// The pod's object is no more.
    Gone,
    /// The agent is to end.
    ShuttingDown,
    /// Some port, or some address, has become free.
    Released(Obstacle),
    /// The pod has this address from now on.
    Addressed(IpAddr),
    /// What the container needs is there, or is not to be had; `prepared` tells whether the pod's volumes are there.
    Prepared {
        index: usize,
        generation: u32,
        result: Result<GuestKind, Failure>,
        prepared: bool,
    },
    Launched {
        index: usize,
        generation: u32,
        result: Result<Launched, Failure>,
    },
    /// The postStart hook is through.
    PostStarted {
        index: usize,
        generation: u32,
        result: Result<(), String>,
    },
    PreStopFailed {
        index: usize,
        generation: u32,
        cause: String,
    },
    /// The guest has ended, by itself or because it was stopped.
    Ended {
        index: usize,
        generation: u32,
        end: End,
    },
    Probed {
        index: usize,
        generation: u32,
        probe: ProbeEvent,
    },
    /// The image that is served was exchanged; with the new one's `repository@digest`.
    Swapped {
        index: usize,
        generation: u32,
        result: Result<String, Failure>,
    },
    /// The write has ended: with the object's new resource version, or an HTTP status if the API server gave one.
    Written {
        status: Box<PodStatus>,
        result: Result<u64, Option<u16>>,
    },
    Deleted(Result<(), Option<u16>>),
    /// The pod's files are up to date, or are not.
    Refreshed {
        error: Option<String>,
    },
    /// The pod takes more of the node than it may, or than there is.
    Evicted(String),
}

impl Event {
    /// The run that the event is about, if it is about one: its container's index and generation.
    pub fn run(&self) -> Option<(usize, u32)> {
        match self {
            Self::Prepared { index, generation, .. }
            | Self::Launched { index, generation, .. }
            | Self::PostStarted { index, generation, .. }
            | Self::PreStopFailed { index, generation, .. }
            | Self::Ended { index, generation, .. }
            | Self::Probed { index, generation, .. }
            | Self::Swapped { index, generation, .. } => Some((*index, *generation)),
            _ => None,
        }
    }
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq)]
pub enum Effect {
    /// Fetch what the container needs; what is being fetched for an earlier try is given up.
    Prepare {
        index: usize,
        generation: u32,
    },
    /// Give up what is being fetched, and what was.
    Abandon {
        index: usize,
    },
    /// Start the guest with what was fetched; the answer is given at once. `attempt` is 0 for the first run.
    Launch {
        index: usize,
        generation: u32,
        attempt: i32,
    },
    /// Run the postStart hook.
    PostStart {
        index: usize,
        generation: u32,
    },
    /// Begin to probe.
    Probe {
        index: usize,
        generation: u32,
    },
    /// Run the preStop hook, then end the guest, all of it until then.
    Stop {
        index: usize,
        generation: u32,
        until: Instant,
        grace: Duration,
    },
    /// What is being stopped has less time.
    Hasten {
        index: usize,
        until: Instant,
    },
    /// The guest has ended: nothing of it is of use any more.
    Dispose {
        index: usize,
    },
    /// Put the image that the spec names in the place of the one that is served.
    Swap {
        index: usize,
        generation: u32,
    },
    AbandonSwap {
        index: usize,
    },
    /// Let the next agent know of the run.
    Remember {
        container: String,
        record: Record,
    },
    /// Give up the ports of one container, or the ports and the address of the pod.
    ReleasePorts {
        container: Option<String>,
    },
    /// Bring the pod's files up to date.
    Refresh,
    /// An Event about the pod, or one of its containers.
    Tell {
        container: Option<String>,
        severity: Severity,
        reason: &'static str,
        message: String,
    },
    Write(Box<PodStatus>),
    /// Delete the pod's object.
    Delete,
    CountRestart,
    /// The pod is ready for the first time.
    CountReady,
}
