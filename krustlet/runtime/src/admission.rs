//! Which request is next: each container serves so many at a time, others wait in a queue for as long as they can wait.
//!
//! There, connections take turns (start-time fair queueing): one that sends a hundred requests at once over HTTP/2 delays
//! another's first by one of them, not by a hundred. Where all have one request each, it is first come, first served.
//!
//! The queue is bounded. When it is full, whoever asked for most gives way: a newcomer takes the place of the last one of a
//! connection that has many waiting, and is refused where it would itself be the last.

use crate::shares::{Share, Starved, Taken};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::Instant;
use tokio::sync::{Notify, oneshot};

/// One container's queue.
pub struct Admission {
    me: Weak<Self>,
    share: Arc<Share>,
    queue_length: usize,
    queue: Mutex<Queue>,
    idle: Notify,
}

struct Queue {
    limit: usize,
    running: usize,
    waiting: BTreeMap<Tag, Waiting>,
    /// The round that is being served.
    round: u64,
    arrivals: u64,
    /// On the pool's list of those that it refused.
    starved: bool,
}

/// In order of rounds, then of arrival.
type Tag = (u64, u64);

struct Waiting {
    units: usize,
    admit: oneshot::Sender<Admitted>,
}

/// A connection's last round in the queue.
#[derive(Debug, Default)]
pub struct Flow(AtomicU64);

/// A request that is being served, until this is dropped.
pub struct Admitted {
    admission: Arc<Admission>,
    taken: Option<Taken>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// Too many wait already.
    QueueFull,
    /// No place became free within the request's time.
    TimedOut,
}

impl Admission {
    /// `limit` at a time, and no more than the share allows.
    pub fn new(share: Arc<Share>, limit: usize, queue_length: usize) -> Arc<Self> {
        Arc::new_cyclic(|me| Self {
            me: me.clone(),
            share,
            queue_length,
            queue: Mutex::new(Queue {
                limit,
                running: 0,
                waiting: BTreeMap::new(),
                round: 0,
                arrivals: 0,
                starved: false,
            }),
            idle: Notify::new(),
        })
    }

    pub fn set_limit(&self, limit: usize) {
        self.queue.lock().limit = limit;
        self.advance();
    }

    pub fn running(&self) -> usize {
        self.queue.lock().running
    }

    pub async fn until_idle(&self) {
        loop {
            let idle = self.idle.notified();
            if self.is_idle() {
                return;
            }
            idle.await;
        }
    }

    fn is_idle(&self) -> bool {
        let queue = self.queue.lock();
        queue.running == 0 && queue.waiting.is_empty()
    }

    /// A place among those that are served, for an instance of so many units; at `deadline` the wait ends.
    pub async fn enter(self: &Arc<Self>, flow: &Flow, units: usize, deadline: Instant) -> Result<Admitted, Refused> {
        let (tag, admitted) = {
            let mut queue = self.queue.lock();
            if queue.waiting.is_empty()
                && queue.running < queue.limit
                && let Some(taken) = self.share.take(units)
            {
                queue.running += 1;
                return Ok(Admitted { admission: self.clone(), taken: Some(taken) });
            }
            let round = 1 + queue.round.max(flow.0.load(Ordering::Relaxed));
            queue.arrivals += 1;
            let tag = (round, queue.arrivals);
            if queue.waiting.len() >= self.queue_length {
                match queue.waiting.last_entry() {
                    // Its sender is dropped, which tells it.
                    Some(last) if *last.key() > tag => drop(last.remove()),
                    _ => return Err(Refused::QueueFull),
                }
            }
            flow.0.store(round, Ordering::Relaxed);
            let (admit, admitted) = oneshot::channel();
            queue.waiting.insert(tag, Waiting { units, admit });
            (tag, admitted)
        };
        let _waiter = Waiter { admission: self, tag };
        // Where the pod's share is what is missing, the pool has to know.
        self.advance();
        match tokio::time::timeout_at(deadline.into(), admitted).await {
            Ok(Ok(admitted)) => Ok(admitted),
            Ok(Err(_)) => Err(Refused::QueueFull),
            Err(_) => Err(Refused::TimedOut),
        }
    }

    /// Admits whoever can be.
    fn advance(&self) {
        let Some(me) = self.me.upgrade() else { return };
        let mut queue = self.queue.lock();
        while queue.running < queue.limit {
            let Some(units) = queue.waiting.first_key_value().map(|(_, first)| first.units) else { break };
            let mut taken = self.share.take(units);
            if taken.is_none() && !std::mem::replace(&mut queue.starved, true) {
                let me: Weak<Self> = self.me.clone();
                self.share.wait(me);
                taken = self.share.take(units);
            }
            let Some(taken) = taken else { break };
            let Some(((round, _), first)) = queue.waiting.pop_first() else { break };
            queue.round = queue.round.max(round);
            queue.running += 1;
            if let Err(gone) = first.admit.send(Admitted { admission: me.clone(), taken: Some(taken) }) {
                // Nobody waits there any more. Giving it back takes locks, and lets the next one in.
                drop(queue);
                drop(gone);
                return;
            }
        }
    }
}

impl Starved for Admission {
    fn retry(&self) {
        self.queue.lock().starved = false;
        self.advance();
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        let admission = &self.admission;
        admission.queue.lock().running -= 1;
        // Before the next one is let in: it may need just these.
        drop(self.taken.take());
        admission.advance();
        if admission.is_idle() {
            admission.idle.notify_waiters();
        }
    }
}

/// Takes a request that does not wait any longer out of the queue.
struct Waiter<'a> {
    admission: &'a Admission,
    tag: Tag,
}

impl Drop for Waiter<'_> {
    fn drop(&mut self) {
        self.admission.queue.lock().waiting.remove(&self.tag);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::*;
    use crate::shares::Pool;
    use crate::testing::{Random, cases};
    use futures::FutureExt as _;
    use futures::future::BoxFuture;
    use std::time::Duration;

    type Entering = BoxFuture<'static, Result<Admitted, Refused>>;

    fn admission(limit: usize, length: usize) -> Arc<Admission> {
        Admission::new(Pool::new(10_000, 1).share(), limit, length)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(3600)
    }

    fn enter(admission: &Arc<Admission>, flow: &Arc<Flow>) -> Entering {
        let (admission, flow) = (admission.clone(), flow.clone());
        // These tests poll by hand, for longer than tokio lets a task poll without a pause.
        let mut entering = tokio::task::unconstrained(async move { admission.enter(&flow, 1, later()).await }).boxed();
        // So that it is in the queue from now on.
        match entering.as_mut().now_or_never() {
            None => entering,
            Some(result) => futures::future::ready(result).boxed(),
        }
    }

    /// Serves one after the other; gives the order in which they were let in.
    fn served(mut entering: Vec<(usize, Entering)>, current: Admitted) -> Vec<usize> {
        let (mut order, mut current) = (Vec::new(), Some(current));
        while !entering.is_empty() {
            drop(current.take());
            let (index, admitted) = entering
                .iter_mut()
                .enumerate()
                .find_map(|(index, (_, entering))| Some((index, entering.as_mut().now_or_never()?)))
                .expect("somebody is let in");
            order.push(entering.remove(index).0);
            current = admitted.ok();
        }
        order
    }

    #[tokio::test]
    async fn where_each_connection_has_one_request_it_is_first_come_first_served() {
        let admission = admission(1, 100);
        let first = enter(&admission, &Arc::default()).await.unwrap();
        let entering = (0..20).map(|number| (number, enter(&admission, &Arc::default()))).collect();
        assert_eq!(served(entering, first), (0..20).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_connection_with_many_requests_in_line_does_not_hold_up_one_with_few() {
        let admission = admission(1, 1000);
        let (many, few) = (Arc::<Flow>::default(), Arc::<Flow>::default());
        let first = enter(&admission, &many).await.unwrap();
        let mut entering: Vec<_> = (0..100).map(|number| (number, enter(&admission, &many))).collect();
        entering.extend((100..103).map(|number| (number, enter(&admission, &few))));
        let order = served(entering, first);
        let at = |number| order.iter().position(|served| *served == number).unwrap();
        assert!(at(100) < 3 && at(101) < 5 && at(102) < 7, "{order:?}");
        // Nobody waits for ever either, and each connection's own are in order.
        assert_eq!(order.iter().filter(|number| **number < 100).count(), 100);
        assert!(order.iter().filter(|number| **number < 100).is_sorted());
    }

    #[tokio::test]
    async fn new_connections_without_end_do_not_hold_up_one_that_is_kept() {
        let admission = admission(1, 1000);
        let kept = Arc::<Flow>::default();
        let mut current = Some(enter(&admission, &kept).await.unwrap());
        let mut others: Vec<_> = (0..5).map(|_| enter(&admission, &Arc::default())).collect();
        let mut mine = enter(&admission, &kept);
        for served in 0.. {
            others.push(enter(&admission, &Arc::default()));
            drop(current.take());
            if mine.as_mut().now_or_never().is_some() {
                break;
            }
            current = Some(others.remove(0).now_or_never().expect("the next in the queue").unwrap());
            assert!(served < 10);
        }
    }

    #[tokio::test]
    async fn a_full_line_refuses_the_one_that_asks_for_most() {
        let admission = admission(1, 10);
        let (many, few) = (Arc::<Flow>::default(), Arc::<Flow>::default());
        let _first = enter(&admission, &many).await.unwrap();
        let mut waiting: Vec<_> = (0..10).map(|_| enter(&admission, &many)).collect();
        assert_eq!(enter(&admission, &many).now_or_never().unwrap().err(), Some(Refused::QueueFull));
        let mut mine = enter(&admission, &few);
        assert!(mine.as_mut().now_or_never().is_none(), "it is in the queue");
        assert_eq!(waiting.pop().unwrap().now_or_never().unwrap().err(), Some(Refused::QueueFull));
        assert!(waiting.iter_mut().all(|waiting| waiting.as_mut().now_or_never().is_none()));
    }

    #[tokio::test]
    async fn who_cannot_be_served_in_time_hears_of_it_then_and_leaves_the_line() {
        let admission = admission(1, 10);
        let flow = Flow::default();
        let first = admission.enter(&flow, 1, later()).await.unwrap();
        let soon = Instant::now() + Duration::from_millis(50);
        assert_eq!(admission.enter(&flow, 1, soon).await.err(), Some(Refused::TimedOut));
        assert!(Instant::now() >= soon);
        assert!(admission.queue.lock().waiting.is_empty());
        drop(first);
        admission.enter(&flow, 1, later()).await.unwrap();
    }

    #[tokio::test]
    async fn what_one_container_gives_back_lets_in_who_waits_at_another() {
        // One each is guaranteed. The other two are lent to the first pod, which leaves one, and then to nobody more.
        let pool = Pool::new(4, 2);
        let (greedy, modest) = (pool.share(), pool.share());
        let (one, two, other) = (
            Admission::new(greedy.clone(), 100, 100),
            Admission::new(greedy, 100, 100),
            Admission::new(modest, 100, 100),
        );
        let held = [enter(&one, &Arc::default()).await.unwrap(), enter(&one, &Arc::default()).await.unwrap()];
        let mut sibling = enter(&two, &Arc::default());
        assert!(sibling.as_mut().now_or_never().is_none(), "containers of one pod have one share");
        let mine = enter(&other, &Arc::default()).now_or_never().expect("a guarantee is a guarantee").unwrap();
        let more = enter(&other, &Arc::default()).now_or_never().expect("one was left").unwrap();
        let mut most = enter(&other, &Arc::default());
        assert!(most.as_mut().now_or_never().is_none());
        drop(held);
        assert!(sibling.now_or_never().unwrap().is_ok());
        drop((mine, more));
        assert!(most.now_or_never().unwrap().is_ok());
    }

    #[tokio::test]
    async fn no_order_of_events_loses_a_place_or_lets_in_too_many() {
        let mut random = Random::new(6);
        cases(200, || {
            let pool = Pool::new(2 + random.below(12), 2);
            let shares = [pool.share(), pool.share()];
            let limits = [1 + random.below(4), 1 + random.below(4), 1 + random.below(4)];
            let admissions: Vec<_> = (0..3)
                .map(|which| Admission::new(shares[which % 2].clone(), limits[which], 1 + random.below(8)))
                .collect();
            let flows: Vec<Arc<Flow>> = (0..4).map(|_| Arc::default()).collect();
            let mut entering: Vec<Entering> = Vec::new();
            let mut admitted: Vec<Admitted> = Vec::new();
            for _ in 0..200 {
                match random.below(4) {
                    0 | 1 => entering.push(enter(&admissions[random.below(3)], &flows[random.below(4)])),
                    2 if !admitted.is_empty() => drop(admitted.swap_remove(random.below(admitted.len()))),
                    3 if !entering.is_empty() => drop(entering.swap_remove(random.below(entering.len()))),
                    _ => {}
                }
                entering.retain_mut(|entering| match entering.as_mut().now_or_never() {
                    None => true,
                    Some(result) => {
                        admitted.extend(result.ok());
                        false
                    }
                });
                for (admission, limit) in admissions.iter().zip(limits) {
                    let running = admitted.iter().filter(|one| Arc::ptr_eq(&one.admission, admission)).count();
                    assert_eq!(admission.running(), running);
                    assert!(running <= limit);
                }
            }
            // Everyone who still waits is let in as the others leave, and in the end all is as at the beginning.
            while !entering.is_empty() {
                admitted.pop();
                entering.retain_mut(|entering| match entering.as_mut().now_or_never() {
                    None => true,
                    Some(result) => {
                        admitted.push(result.unwrap());
                        false
                    }
                });
                assert!(entering.is_empty() || !admitted.is_empty(), "{} wait for nobody", entering.len());
            }
            drop(admitted);
            assert!(admissions.iter().all(|admission| admission.until_idle().now_or_never().is_some()));
        });
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn many_at_once_are_all_served() {
        let pool = Pool::new(6, 3);
        let admissions: Vec<_> = (0..3).map(|_| Admission::new(pool.share(), 100, 1000)).collect();
        let tasks: Vec<_> = (0..60)
            .map(|number| {
                let admission = admissions[number % 3].clone();
                tokio::spawn(async move {
                    let flow = Flow::default();
                    for _ in 0..300 {
                        let admitted = admission.enter(&flow, 1, later()).await.unwrap();
                        tokio::task::yield_now().await;
                        drop(admitted);
                    }
                })
            })
            .collect();
        for task in tasks {
            tokio::time::timeout(Duration::from_secs(60), task).await.unwrap().unwrap();
        }
    }
}
