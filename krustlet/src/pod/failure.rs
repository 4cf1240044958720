//! Why a container could not be started, in the words that its status and its Events show.

use super::sources::ConfigError;
use crate::reasons::{event, waiting};
use krustlet_runtime::{LoadError, PullError, StartError};

/// Which kind of obstacle stands in the way; they are retried at different rhythms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    Image,
    Configuration,
    Port,
    /// The node has no address left for the pod.
    Address,
    Container,
}

/// Why a container could not be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub obstacle: Obstacle,
    /// The waiting reason.
    pub reason: &'static str,
    pub message: String,
    /// The reason of the Event.
    pub event: &'static str,
}

impl Failure {
    pub fn container(message: impl Into<String>) -> Self {
        Self {
            obstacle: Obstacle::Container,
            reason: waiting::CREATE_CONTAINER_ERROR,
            message: message.into(),
            event: event::FAILED,
        }
    }

    pub fn configuration(message: impl Into<String>) -> Self {
        Self {
            obstacle: Obstacle::Configuration,
            reason: waiting::CREATE_CONTAINER_CONFIG_ERROR,
            message: message.into(),
            event: event::FAILED,
        }
    }

    pub fn port(message: impl Into<String>) -> Self {
        Self { obstacle: Obstacle::Port, reason: waiting::PORT_IN_USE, message: message.into(), event: event::FAILED }
    }

    pub fn address(message: impl Into<String>) -> Self {
        Self {
            obstacle: Obstacle::Address,
            reason: waiting::NO_POD_ADDRESS,
            message: message.into(),
            event: event::FAILED_POD_SANDBOX,
        }
    }

    pub fn volumes(error: &ConfigError) -> Self {
        Self { event: event::FAILED_MOUNT, ..Self::configuration(error.to_string()) }
    }

    pub fn pull(error: &PullError) -> Self {
        Self { obstacle: Obstacle::Image, reason: error.reason(), message: error.to_string(), event: event::FAILED }
    }

    pub fn load(error: &LoadError) -> Self {
        Self { obstacle: Obstacle::Image, reason: error.reason(), message: error.to_string(), event: event::FAILED }
    }

    pub fn start(error: &StartError) -> Self {
        let obstacle = match error {
            StartError::PortInUse { .. } => Obstacle::Port,
            StartError::Config { .. } => Obstacle::Configuration,
            StartError::Create { .. } => Obstacle::Container,
        };
        Self { obstacle, reason: error.reason(), message: error.to_string(), event: event::FAILED }
    }
}
