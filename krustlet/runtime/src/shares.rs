//! Fair shares of what a node has a fixed number of: guest instances, file descriptors.
//!
//! Half of them is kept for guarantees: so many that each pod which the node takes has a few of its own whatever the others
//! do. The other half is for whoever needs more, by the rule of dynamic thresholds (Choudhury and Hahne, 1998): one may take
//! more for as long as what it has beyond its guarantee is not more than what is left. One greedy pod thus gets half of the
//! shared half, two a third each, and something is always left for the next.
//!
//! Taking and giving back is a few atomic operations; a lock is taken only where somebody waits.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use tokio::sync::Notify;

/// One kind of thing, for the whole node.
pub struct Pool {
    guaranteed: usize,
    shared: usize,
    /// Of `shared`.
    used: AtomicUsize,
    /// Whether anybody is in `starved`.
    contended: AtomicBool,
    starved: Mutex<Vec<Weak<dyn Starved>>>,
}

/// Somebody who was refused and wants to hear when it may be otherwise.
pub trait Starved: Send + Sync {
    /// Tries again, and has itself put on the list again if it is still refused.
    fn retry(&self);
}

/// One pod's part of a pool.
pub struct Share {
    pool: Arc<Pool>,
    used: AtomicUsize,
}

/// So many units, until it is dropped.
pub struct Taken {
    share: Arc<Share>,
    units: usize,
}

impl Pool {
    /// `total` units among at most `holders`.
    pub fn new(total: usize, holders: usize) -> Arc<Self> {
        let guaranteed = (total / 2 / holders.max(1)).max(1);
        Arc::new(Self {
            guaranteed,
            shared: total - total / 2,
            used: AtomicUsize::new(0),
            contended: AtomicBool::new(false),
            starved: Mutex::default(),
        })
    }

    pub fn share(self: &Arc<Self>) -> Arc<Share> {
        Arc::new(Share { pool: self.clone(), used: AtomicUsize::new(0) })
    }

    fn beyond(&self, used: usize) -> usize {
        used.saturating_sub(self.guaranteed)
    }

    fn wake(&self) {
        // Whoever is refused first says that he waits and then looks once more: one of both sees the other.
        if !self.contended.swap(false, Ordering::SeqCst) {
            return;
        }
        let starved = std::mem::take(&mut *self.starved.lock());
        for waiting in starved.iter().filter_map(Weak::upgrade) {
            waiting.retry();
        }
    }
}

impl Share {
    /// The most that it could have if nobody else had any.
    pub fn most(&self) -> usize {
        self.pool.guaranteed + self.pool.shared.div_ceil(2)
    }

    pub fn used(&self) -> usize {
        self.used.load(Ordering::SeqCst)
    }

    /// None when these would be more than its share.
    pub fn take(self: &Arc<Self>, units: usize) -> Option<Taken> {
        let pool = &self.pool;
        let mut used = self.used.load(Ordering::SeqCst);
        loop {
            let beyond = pool.beyond(used + units);
            let more = beyond - pool.beyond(used);
            let lent = more == 0
                || pool
                    .used
                    .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |lent| {
                        let left = pool.shared.checked_sub(lent + more)?;
                        (beyond <= left + more).then_some(lent + more)
                    })
                    .is_ok();
            if !lent {
                return None;
            }
            match self.used.compare_exchange(used, used + units, Ordering::SeqCst, Ordering::SeqCst) {
                Ok(_) => return Some(Taken { share: self.clone(), units }),
                Err(now) => {
                    pool.used.fetch_sub(more, Ordering::SeqCst);
                    used = now;
                }
            }
        }
    }

    /// Has `starved` retried once anything is given back. It must try once more after this call.
    pub fn wait(&self, starved: Weak<dyn Starved>) {
        self.pool.starved.lock().push(starved);
        self.pool.contended.store(true, Ordering::SeqCst);
    }

    /// Waits for its turn as long as it takes.
    pub async fn acquire(self: &Arc<Self>, units: usize) -> Taken {
        let woken = Arc::new(Woken::default());
        loop {
            if let Some(taken) = self.take(units) {
                return taken;
            }
            let (weak, woken): (Weak<Woken>, _) = (Arc::downgrade(&woken), woken.0.notified());
            self.wait(weak);
            match self.take(units) {
                Some(taken) => return taken,
                None => woken.await,
            }
        }
    }
}

#[derive(Default)]
struct Woken(Notify);

impl Starved for Woken {
    fn retry(&self) {
        self.0.notify_one();
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let pool = &self.share.pool;
        let used = self.share.used.fetch_sub(self.units, Ordering::SeqCst);
        let lent = pool.beyond(used) - pool.beyond(used - self.units);
        if lent > 0 {
            pool.used.fetch_sub(lent, Ordering::SeqCst);
        }
        pool.wake();
    }
}

/// What each pod has a part of, by the pod's name.
pub struct Shares<T>(Mutex<HashMap<String, Weak<T>>>);

impl<T> Default for Shares<T> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<T> Shares<T> {
    /// The one of this pod, which all of its containers have together.
    pub fn of(&self, pod: &str, make: impl FnOnce() -> T) -> Arc<T> {
        let mut known = self.0.lock();
        if let Some(share) = known.get(pod).and_then(Weak::upgrade) {
            return share;
        }
        known.retain(|_, share| share.strong_count() > 0);
        let share = Arc::new(make());
        known.insert(pod.to_owned(), Arc::downgrade(&share));
        share
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::testing::{Random, cases};
    use std::time::Duration;

    fn fill(share: &Arc<Share>) -> Vec<Taken> {
        std::iter::from_fn(|| share.take(1)).collect()
    }

    #[test]
    fn one_that_takes_all_it_can_get_leaves_the_others_theirs() {
        let pool = Pool::new(2000, 500);
        let greedy = pool.share();
        let taken = fill(&greedy);
        assert_eq!(taken.len(), greedy.most());
        assert_eq!(taken.len(), 502);
        // A second gets as much as the first left it, a third of all in the end, and so on.
        let second = fill(&pool.share()).len();
        assert!((200..=300).contains(&second), "{second}");
    }

    #[test]
    fn however_many_are_greedy_everyone_has_its_guarantee() {
        let pool = Pool::new(2000, 500);
        let greedy: Vec<_> = (0..490).map(|_| fill(&pool.share())).collect();
        assert!(greedy.iter().map(Vec::len).sum::<usize>() <= 2000 - 20);
        let late: Vec<_> = (0..10).map(|_| fill(&pool.share())).collect();
        assert!(late.iter().all(|taken| taken.len() >= 2));
    }

    #[test]
    fn what_is_given_back_is_there_again() {
        let pool = Pool::new(100, 10);
        let share = pool.share();
        for _ in 0..3 {
            let taken = fill(&share);
            assert_eq!(taken.len(), share.most());
            drop(taken);
            assert_eq!((share.used(), pool.used.load(Ordering::SeqCst)), (0, 0));
        }
    }

    #[test]
    fn no_order_of_taking_and_giving_back_breaks_the_promises() {
        let mut random = Random::new(5);
        cases(300, || {
            let (total, holders) = (1 + random.below(300), 1 + random.below(12));
            let pool = Pool::new(total, holders);
            let shares: Vec<_> = (0..holders).map(|_| pool.share()).collect();
            let mut taken: Vec<Vec<Taken>> = shares.iter().map(|_| Vec::new()).collect();
            for _ in 0..400 {
                let who = random.below(holders);
                let units = 1 + random.below(3);
                if random.below(3) == 0 && !taken[who].is_empty() {
                    let which = random.below(taken[who].len());
                    taken[who].swap_remove(which);
                } else if let Some(more) = shares[who].take(units) {
                    taken[who].push(more);
                } else {
                    assert!(shares[who].used() + units > pool.guaranteed, "its guarantee was refused");
                }
                let used: Vec<usize> = shares.iter().map(|share| share.used()).collect();
                let held: Vec<usize> = taken.iter().map(|taken| taken.iter().map(|taken| taken.units).sum()).collect();
                assert_eq!(used, held);
                let lent: usize = used.iter().map(|used| pool.beyond(*used)).sum();
                assert_eq!(lent, pool.used.load(Ordering::SeqCst));
                assert!(lent <= pool.shared);
                assert!(used.iter().all(|used| *used <= shares[0].most() + 3));
                if holders <= total / 2 {
                    assert!(used.iter().sum::<usize>() <= total, "more was given than there is");
                }
            }
        });
    }

    #[test]
    fn threads_that_take_and_give_back_at_once_lose_nothing() {
        let pool = Pool::new(20, 4);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                let share = pool.share();
                scope.spawn(move || {
                    for _ in 0..10_000 {
                        drop((share.take(1), share.take(2)));
                    }
                });
            }
        });
        assert_eq!(pool.used.load(Ordering::SeqCst), 0);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn who_waits_hears_of_what_others_give_back() {
        let pool = Pool::new(8, 4);
        let (holder, waiting) = (pool.share(), pool.share());
        // One each is guaranteed; of the four that are shared, two go to one holder and the last but one to the next.
        let (held, mut mine) = (fill(&holder), fill(&waiting));
        let woken = tokio::spawn({
            let waiting = waiting.clone();
            async move { waiting.acquire(1).await }
        });
        tokio::task::yield_now().await;
        assert!(!woken.is_finished());
        drop(held);
        mine.push(tokio::time::timeout(Duration::from_secs(10), woken).await.unwrap().unwrap());
        assert_eq!(waiting.used(), mine.len());
        // And many at once, over and over.
        let racing: Vec<_> = (0..20)
            .map(|_| {
                let share = waiting.clone();
                tokio::spawn(async move {
                    for _ in 0..500 {
                        let taken = share.acquire(1).await;
                        tokio::task::yield_now().await;
                        drop(taken);
                    }
                })
            })
            .collect();
        drop(mine);
        for task in racing {
            tokio::time::timeout(Duration::from_secs(30), task).await.unwrap().unwrap();
        }
    }

    #[test]
    fn containers_of_one_pod_have_one_share() {
        let shares = Shares::default();
        let one = shares.of("default/pod", || 1);
        assert!(Arc::ptr_eq(&one, &shares.of("default/pod", || 2)));
        assert!(!Arc::ptr_eq(&one, &shares.of("default/other", || 3)));
        drop(one);
        assert_eq!(*shares.of("default/pod", || 4), 4);
    }
}
