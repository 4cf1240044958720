//! Connections whose clients have not shown yet who they are. Where there are too many connections the oldest of these goes,
//! so that nobody can keep the API server out by holding connections open.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use tokio_util::sync::CancellationToken;

#[derive(Debug, Clone, Default)]
pub struct Strangers(Arc<Mutex<Queue>>);

#[derive(Debug, Default)]
struct Queue {
    next: u64,
    /// By order of arrival.
    waiting: BTreeMap<u64, CancellationToken>,
}

impl Strangers {
    fn queue(&self) -> MutexGuard<'_, Queue> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more connection, of somebody unknown.
    pub fn enter(&self) -> Stranger {
        let mut queue = self.queue();
        let number = queue.next;
        queue.next += 1;
        let turned_out = CancellationToken::new();
        queue.waiting.insert(number, turned_out.clone());
        Stranger { number, turned_out, all: self.clone() }
    }

    /// Ends the connection of the one who has been unknown for longest; false when there is none.
    pub fn turn_out_oldest(&self) -> bool {
        let oldest = self.queue().waiting.pop_first();
        oldest.map(|(_, turned_out)| turned_out.cancel()).is_some()
    }
}

#[derive(Debug)]
pub struct Stranger {
    number: u64,
    turned_out: CancellationToken,
    all: Strangers,
}

impl Stranger {
    /// The client has shown who it is: its connection stays.
    pub fn introduce(&self) {
        self.all.queue().waiting.remove(&self.number);
    }

    /// Resolves when the connection is to end.
    pub async fn turned_out(&self) {
        self.turned_out.cancelled().await;
    }
}

impl Drop for Stranger {
    fn drop(&mut self) {
        self.introduce();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_stranger_goes_first_and_who_is_known_never() {
        let strangers = Strangers::default();
        let known = strangers.enter();
        let [first, second] = [(); 2].map(|()| strangers.enter());
        known.introduce();
        drop(strangers.enter());
        assert!(strangers.turn_out_oldest());
        assert!(first.turned_out.is_cancelled() && !second.turned_out.is_cancelled());
        assert!(strangers.turn_out_oldest() && second.turned_out.is_cancelled());
        assert!(!strangers.turn_out_oldest());
        assert!(!known.turned_out.is_cancelled());
    }
}
