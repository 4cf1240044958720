//! A guest that runs: a component that serves HTTP, or a command.

use krustlet_runtime::{Execution, HttpServer, Stats};
use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Debug, Clone)]
pub enum Guest {
    Server(Arc<HttpServer>),
    Command(Arc<Execution>),
}

impl Guest {
    /// Where it listens.
    pub fn served(&self) -> &[SocketAddr] {
        match self {
            Self::Server(server) => server.local_addrs(),
            Self::Command(_) => &[],
        }
    }

    pub fn stats(&self) -> Stats {
        match self {
            Self::Server(server) => server.stats(),
            Self::Command(execution) => execution.stats(),
        }
    }
}

/// Which of the two a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestKind {
    /// Answers requests until it is stopped.
    Server,
    /// Runs to completion.
    Command,
}
