//! How a connection gets past its container's gate: when it is made, and with each request after something has changed.

use crate::gate::{Gate, Verdict};
use crate::http::Server;
use futures::future::BoxFuture;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::net::TcpStream;

/// A connection that is not denied at once.
pub struct Entered {
    entry: Entry,
    /// Whether it is let in, where that is found out yet.
    pending: Option<BoxFuture<'static, bool>>,
}

/// A connection that was let in.
pub struct Entry {
    from: SocketAddr,
    /// What it was made to.
    pub to: SocketAddr,
    /// The gate's version that it was judged by.
    version: AtomicU64,
}

/// Its client may not connect to the container, or not any more. It hears of it by the connection's end.
#[derive(Debug, thiserror::Error)]
#[error("who made the connection may not connect to the pod")]
pub struct Denied;

impl Entered {
    /// None when it is denied: then it is reset, without a byte.
    pub fn of(server: &Server, stream: &TcpStream, from: SocketAddr) -> Option<Self> {
        let to = stream.local_addr().unwrap_or(server.local_addr);
        let entry = |version| Entry { from, to, version: AtomicU64::new(version) };
        let Some(gate) = &server.gate else { return Some(Self { entry: entry(0), pending: None }) };
        let version = gate.version();
        let pending = match gate.admits(from.ip(), to) {
            Verdict::Admitted => None,
            Verdict::Pending(verdict) => Some(verdict),
            Verdict::Denied => {
                deny(server, gate, stream, from);
                return None;
            }
        };
        Some(Self { entry: entry(version), pending })
    }

    /// None when it is denied after all.
    pub async fn judged(self, server: &Server, stream: &TcpStream) -> Option<Entry> {
        if let (Some(verdict), Some(gate)) = (self.pending, &server.gate)
            && !verdict.await
        {
            deny(server, gate, stream, self.entry.from);
            return None;
        }
        Some(self.entry)
    }
}

impl Entry {
    /// Judges the connection again if something has changed since.
    pub async fn check(&self, server: &Server) -> Result<(), Denied> {
        let Some(gate) = &server.gate else { return Ok(()) };
        let version = gate.version();
        if version == self.version.load(Ordering::Relaxed) {
            return Ok(());
        }
        let is_admitted = match gate.admits(self.from.ip(), self.to) {
            Verdict::Admitted => true,
            Verdict::Denied => false,
            Verdict::Pending(verdict) => verdict.await,
        };
        if !is_admitted {
            count(server, gate, self.from);
            return Err(Denied);
        }
        self.version.store(version, Ordering::Relaxed);
        Ok(())
    }
}

fn deny(server: &Server, gate: &Arc<dyn Gate>, stream: &TcpStream, from: SocketAddr) {
    // A reset and not an end: nothing was answered.
    let _ = stream.set_zero_linger();
    count(server, gate, from);
}

fn count(server: &Server, gate: &Arc<dyn Gate>, from: SocketAddr) {
    tracing::debug!(?gate, %from, "denied a connection");
    server.metrics.denied();
}
