//! Who may connect to a container, and what it may connect to, as whoever runs it says. What that goes by is theirs to know.

use futures::future::BoxFuture;
use std::fmt;
use std::net::{IpAddr, SocketAddr};

/// Judges connections before anything is read from them, and again with the next request when something has changed.
pub trait Gate: fmt::Debug + Send + Sync {
    /// Whether one from there is let in, to what the container serves here.
    fn admits(&self, from: IpAddr, to: SocketAddr) -> Verdict;

    /// Whether one may be made to there.
    fn permits(&self, to: SocketAddr) -> Verdict;

    /// Another number than before where an answer may be another one.
    fn version(&self) -> u64;
}

pub enum Verdict {
    Admitted,
    Denied,
    /// Who is there is being found out; whether it is let in.
    Pending(BoxFuture<'static, bool>),
}
