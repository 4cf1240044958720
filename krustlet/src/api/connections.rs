//! Which connection is closed where there are too many: the oldest unauthenticated one, else the one that has been idle for
//! longest. So nobody can keep the API server out by holding connections open; one with a request under way stays.

use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone, Default)]
pub struct Connections(Arc<Mutex<All>>);

#[derive(Debug, Default)]
struct All {
    next: u64,
    /// By order of arrival.
    open: BTreeMap<u64, State>,
}

#[derive(Debug)]
struct State {
    closed: CancellationToken,
    /// Whether a request on it was allowed.
    authenticated: bool,
    requests: usize,
    /// When the last request ended.
    last: Instant,
}

impl Connections {
    pub fn add(&self) -> Connection {
        let mut all = self.0.lock();
        let number = all.next;
        all.next += 1;
        let closed = CancellationToken::new();
        let state = State { closed: closed.clone(), authenticated: false, requests: 0, last: Instant::now() };
        all.open.insert(number, state);
        Connection { number, closed, all: self.clone() }
    }

    /// Closes the one that is least worth; false when each has a request under way that was allowed.
    pub fn close_one(&self) -> bool {
        let mut all = self.0.lock();
        let oldest_unauthenticated = all.open.iter().find(|(_, state)| !state.authenticated);
        let idle = || all.open.iter().filter(|(_, state)| state.requests == 0).min_by_key(|(_, state)| state.last);
        let Some(number) = oldest_unauthenticated.or_else(idle).map(|(number, _)| *number) else { return false };
        all.open.remove(&number).map(|state| state.closed.cancel()).is_some()
    }
}

/// One connection, open as long as it is not dropped.
#[derive(Debug)]
pub struct Connection {
    number: u64,
    closed: CancellationToken,
    all: Connections,
}

impl Connection {
    /// Resolves when it is to be closed.
    pub async fn closed(&self) {
        self.closed.cancelled().await;
    }

    /// A request on it was allowed.
    pub fn authenticated(&self) {
        self.change(|state| state.authenticated = true);
    }

    /// A request that is under way for as long as what this gives lives.
    pub fn request(self: &Arc<Self>) -> Request {
        self.change(|state| state.requests += 1);
        Request(self.clone())
    }

    /// Whether it has had no request for so long.
    pub fn is_idle(&self, since: Duration) -> bool {
        self.all
            .0
            .lock()
            .open
            .get(&self.number)
            .is_some_and(|state| state.requests == 0 && state.last.elapsed() >= since)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        if let Some(state) = self.all.0.lock().open.get_mut(&self.number) {
            change(state);
        }
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.all.0.lock().open.remove(&self.number);
    }
}

#[derive(Debug)]
pub struct Request(Arc<Connection>);

impl Drop for Request {
    fn drop(&mut self) {
        self.0.change(|state| {
            state.requests -= 1;
            state.last = Instant::now();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closed(connections: &[&Arc<Connection>]) -> Vec<bool> {
        connections.iter().map(|connection| connection.closed.is_cancelled()).collect()
    }

    #[test]
    fn the_oldest_unauthenticated_one_goes_first_then_the_longest_idle_and_never_a_busy_one() {
        let connections = Connections::default();
        let [busy, idle, longer, first, second] = [(); 5].map(|()| Arc::new(connections.add()));
        let all = [&busy, &idle, &longer, &first, &second];
        for known in [&busy, &idle, &longer] {
            known.authenticated();
        }
        let _request = busy.request();
        // Unauthenticated it stays, whatever it asks for.
        let _other = first.request();
        drop(longer.request());
        drop(idle.request());
        drop(connections.add());
        for expected in [
            [false, false, false, true, false],
            [false, false, false, true, true],
            [false, false, true, true, true],
            [false, true, true, true, true],
        ] {
            assert!(connections.close_one());
            assert_eq!(closed(&all), expected);
        }
        assert!(!connections.close_one());
    }

    #[test]
    fn a_connection_is_idle_when_its_last_request_is_over_for_long_enough() {
        let connection = Arc::new(Connections::default().add());
        let request = connection.request();
        assert!(!connection.is_idle(Duration::ZERO));
        drop(request);
        assert!(connection.is_idle(Duration::ZERO));
        assert!(!connection.is_idle(Duration::from_secs(60)));
    }
}
