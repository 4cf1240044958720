//! How many pulls the node makes at once, and how slow one may be.
//!
//! A pull needs one of its registry's places and one of the node's. Registries are named by pods, so that any number of them
//! may be slow on purpose: one that does not bring the minimum gives its place to who waits for one, and fails in any case
//! when that goes on or when its time is over.

use parking_lot::Mutex;
use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

/// How long a pull that was evicted may need to be gone.
const LEAVING: Duration = Duration::from_secs(1);

/// What a pull may take.
#[derive(Debug, Clone, Copy)]
pub struct PullLimits {
    /// Pulls at once, over all registries.
    pub places: usize,
    /// Pulls at once from one registry.
    pub places_per_registry: usize,
    /// Bytes a second below which a pull is slow.
    pub min_throughput: u64,
    /// A pull that was slow for so long makes room when others wait.
    pub yields_after: Duration,
    /// A pull that was slow for so long fails.
    pub fails_after: Duration,
    /// For everything but the module: manifest, signatures, config, tokens.
    pub deadline: Duration,
}

impl Default for PullLimits {
    fn default() -> Self {
        Self {
            places: 32,
            places_per_registry: 4,
            min_throughput: 64 * 1024,
            yields_after: Duration::from_secs(5),
            fails_after: Duration::from_secs(30),
            deadline: Duration::from_secs(120),
        }
    }
}

impl PullLimits {
    /// For a pull whose module has so many bytes.
    pub fn deadline_for(&self, module: u64) -> Duration {
        self.deadline + Duration::from_secs(module / self.min_throughput.max(1))
    }
}

/// How much a pull has received, and since when it is slow.
#[derive(Debug)]
pub struct Progress {
    window: Mutex<Window>,
    evicted: CancellationToken,
}

#[derive(Debug, Clone, Copy)]
struct Window {
    began: Instant,
    received: u64,
}

impl Progress {
    fn new(now: Instant) -> Self {
        Self { window: Mutex::new(Window { began: now, received: 0 }), evicted: CancellationToken::new() }
    }

    /// A piece of an answer arrived.
    pub fn received(&self, bytes: u64, limits: &PullLimits) {
        self.received_at(bytes, limits, Instant::now());
    }

    fn received_at(&self, bytes: u64, limits: &PullLimits, now: Instant) {
        let mut window = self.window.lock();
        window.received += bytes;
        let elapsed = now.duration_since(window.began);
        // A second at least, so that a burst is not taken for a rate.
        if elapsed >= Duration::from_secs(1).min(limits.yields_after) && window.received >= wanted(limits, elapsed) {
            *window = Window { began: now, received: 0 };
        }
    }

    /// For how long it has brought less than the minimum.
    fn slow_for(&self, now: Instant) -> Duration {
        now.duration_since(self.window.lock().began)
    }
}

fn wanted(limits: &PullLimits, elapsed: Duration) -> u64 {
    u64::try_from(u128::from(limits.min_throughput) * elapsed.as_millis() / 1000).unwrap_or(u64::MAX)
}

/// The node's places for pulls.
#[derive(Debug)]
pub struct Places {
    pub limits: PullLimits,
    node: Arc<Semaphore>,
    registries: Mutex<HashMap<String, Weak<Semaphore>>>,
    taken: Mutex<Vec<Arc<Progress>>>,
}

/// A place; free again when dropped.
pub struct Place<'a> {
    places: &'a Places,
    pub progress: Arc<Progress>,
    _registry: OwnedSemaphorePermit,
    _node: OwnedSemaphorePermit,
}

impl Places {
    pub fn new(limits: PullLimits) -> Self {
        Self {
            node: Arc::new(Semaphore::new(limits.places.max(1))),
            limits,
            registries: Mutex::default(),
            taken: Mutex::default(),
        }
    }

    /// Waits for a place to pull from `registry`. None only when the runtime is shutting down.
    pub async fn take(&self, registry: &str) -> Option<Place<'_>> {
        let registry = self.registry(registry).acquire_owned().await.ok()?;
        let mut waiting = std::pin::pin!(self.node.clone().acquire_owned());
        let node = loop {
            tokio::select! {
                biased;
                permit = &mut waiting => break permit.ok()?,
                () = tokio::time::sleep(self.until_next_yields()) => {
                    if self.evict_slowest() {
                        // It needs a moment to go, and nobody else has to for the same one who waits.
                        let leaving = tokio::time::timeout(LEAVING, &mut waiting);
                        if let Ok(permit) = leaving.await {
                            break permit.ok()?;
                        }
                    }
                }
            }
        };
        let progress = Arc::new(Progress::new(Instant::now()));
        self.taken.lock().push(progress.clone());
        Some(Place { places: self, progress, _registry: registry, _node: node })
    }

    fn registry(&self, registry: &str) -> Arc<Semaphore> {
        let mut registries = self.registries.lock();
        if let Some(known) = registries.get(registry).and_then(Weak::upgrade) {
            return known;
        }
        registries.retain(|_, known| known.strong_count() > 0);
        let made = Arc::new(Semaphore::new(self.limits.places_per_registry.max(1)));
        registries.insert(registry.to_owned(), Arc::downgrade(&made));
        made
    }

    /// How long until there is a pull that has to make room, if none becomes faster.
    fn until_next_yields(&self) -> Duration {
        let now = Instant::now();
        let slowest = self.taken.lock().iter().map(|taken| taken.slow_for(now)).max().unwrap_or_default();
        self.limits.yields_after.saturating_sub(slowest)
    }

    /// False when there is none that is slow.
    fn evict_slowest(&self) -> bool {
        let now = Instant::now();
        let mut taken = self.taken.lock();
        let slowest = taken.iter().enumerate().max_by_key(|(_, taken)| taken.slow_for(now)).map(|(index, _)| index);
        if let Some(index) = slowest
            && taken.get(index).is_some_and(|slowest| slowest.slow_for(now) >= self.limits.yields_after)
        {
            taken.swap_remove(index).evicted.cancel();
            return true;
        }
        false
    }
}

/// Why a pull lost its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// Others waited, and it was the slowest.
    Evicted,
    TooSlow,
}

impl Place<'_> {
    /// Resolves when the pull has to end.
    pub async fn lost(&self) -> Lost {
        let limits = &self.places.limits;
        loop {
            let left = limits.fails_after.saturating_sub(self.progress.slow_for(Instant::now()));
            if left.is_zero() {
                return Lost::TooSlow;
            }
            tokio::select! {
                () = self.progress.evicted.cancelled() => return Lost::Evicted,
                () = tokio::time::sleep(left) => {}
            }
        }
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.places.taken.lock().retain(|taken| !Arc::ptr_eq(taken, &self.progress));
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn limits() -> PullLimits {
        PullLimits {
            places: 2,
            places_per_registry: 1,
            yields_after: Duration::from_millis(20),
            ..PullLimits::default()
        }
    }

    #[test]
    fn a_trickle_is_slow_from_its_beginning_and_the_minimum_is_not() {
        let limits = PullLimits::default();
        let began = Instant::now();
        let (trickle, steady) = (Progress::new(began), Progress::new(began));
        for second in 1..=60 {
            let now = began + SECOND * second;
            trickle.received_at(limits.min_throughput - 1, &limits, now);
            steady.received_at(limits.min_throughput, &limits, now);
            assert_eq!(trickle.slow_for(now), SECOND * second);
            assert_eq!(steady.slow_for(now), Duration::ZERO);
        }
    }

    #[test]
    fn one_that_was_fast_and_stalls_has_no_credit() {
        let limits = PullLimits::default();
        let began = Instant::now();
        let progress = Progress::new(began);
        progress.received_at(1 << 30, &limits, began + SECOND);
        assert_eq!(progress.slow_for(began + SECOND * 31), SECOND * 30);
    }

    #[tokio::test]
    async fn one_registry_has_its_own_places_and_leaves_the_others_theirs() {
        let places = Places::new(limits());
        let first = places.take("a.example").await.unwrap();
        let mut second = std::pin::pin!(places.take("a.example"));
        assert!(futures::poll!(&mut second).is_pending());
        places.take("b.example").await.unwrap();
        drop(first);
        second.await.unwrap();
        assert_eq!(places.registries.lock().len(), 2, "those that are not used any more are forgotten with the next");
    }

    #[tokio::test]
    async fn the_slowest_makes_room_for_who_waits() {
        let places = Places::new(limits());
        let slow = places.take("slow.example").await.unwrap();
        let fast = places.take("fast.example").await.unwrap();
        let third = places.take("third.example");
        let evicted = async {
            let lost = slow.lost().await;
            drop(slow);
            lost
        };
        let busy = async {
            loop {
                fast.progress.received(1 << 20, &places.limits);
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        };
        tokio::select! {
            (third, lost) = futures::future::join(third, evicted) => {
                assert!(third.is_some());
                assert_eq!(lost, Lost::Evicted);
            }
            () = busy => {}
        }
        assert!(!fast.progress.evicted.is_cancelled());
    }

    #[tokio::test]
    async fn a_slow_pull_fails_also_when_nobody_waits() {
        let places = Places::new(PullLimits { fails_after: Duration::from_millis(20), ..limits() });
        let place = places.take("slow.example").await.unwrap();
        assert_eq!(place.lost().await, Lost::TooSlow);
    }

    #[test]
    fn a_large_module_has_more_time() {
        let limits = PullLimits::default();
        assert_eq!(limits.deadline_for(0), limits.deadline);
        assert_eq!(limits.deadline_for(64 * 1024 * 60), limits.deadline + Duration::from_secs(60));
    }
}
