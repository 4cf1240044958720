//! Who runs when. Guests run in slices of about one tick; between two slices others get their turn.
//!
//! Three rules keep one pod's guests from delaying another's:
//! - A ticker thread advances the engine's epoch; a guest that runs into its deadline yields to the executor. The ticker
//!   sleeps while no guest executes, so that an idle node costs nothing.
//! - Of one container, and of one pod, no more guests than there are worker threads stand in the executor's queue at a time
//!   (their lanes); the others wait outside. Two hundred endless loops in one pod thus cost another's request as much as two
//!   do, in however many containers they are; and those of one container cost its neighbour in the pod not much more.
//! - A container with a CPU limit pays for each slice; one in debt sleeps until it has paid, as under CFS bandwidth control.
//!   A slice costs the CPU time that its thread has had, not the time that went by: on a machine with more to do than it has
//!   cores a container does not pay for the turns of others. Most requests end before that could differ by much, and are
//!   charged by the clock, which is no system call.

use crate::stack;
use futures::future::BoxFuture;
use rustix::time::{ClockId, clock_gettime};
use std::cell::Cell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll, ready};
use std::thread::Thread;
use std::time::{Duration, Instant};
use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};
use wasmtime::{EngineWeak, StoreContextMut, UpdateDeadline};

/// The length of a slice.
pub const TICK: Duration = Duration::from_millis(1);
/// Ticks before the first yield: most requests end within them and never yield.
pub const FIRST_SLICE: u64 = 2;
/// The ticker goes to sleep after this many ticks without a guest.
const IDLE_TICKS: u32 = 20;
/// A guest for whose place in the lane another one waits leaves it after this many slices.
const MAX_SLICES: u32 = 10;
/// A slice that is shorter is charged by the clock.
const SHORT: Duration = Duration::from_micros(200);
/// A thread is not asked again for its CPU time before a slice that begins so soon after the last answer.
const FRESH: Duration = Duration::from_millis(1);
/// The CPU limit is kept over this period, as CFS does it.
const PERIOD: Duration = Duration::from_millis(100);

/// Advances the epoch while guests execute.
#[derive(Debug)]
pub struct Ticker {
    executing: AtomicUsize,
    asleep: AtomicBool,
    thread: Thread,
}

impl Ticker {
    /// The thread ends when the engine is gone.
    pub fn start(engine: EngineWeak) -> std::io::Result<Arc<Self>> {
        let (send, receive) = std::sync::mpsc::sync_channel::<std::sync::Weak<Self>>(1);
        let thread = std::thread::Builder::new()
            .name("epoch".into())
            .spawn(move || {
                if let Ok(ticker) = receive.recv() {
                    Self::run(&ticker, &engine);
                }
            })?
            .thread()
            .clone();
        let ticker = Arc::new(Self { executing: AtomicUsize::new(0), asleep: AtomicBool::new(false), thread });
        let _ = send.send(Arc::downgrade(&ticker));
        Ok(ticker)
    }

    fn run(ticker: &std::sync::Weak<Self>, engine: &EngineWeak) {
        let mut idle = 0;
        loop {
            std::thread::sleep(TICK);
            let (Some(engine), Some(ticker)) = (engine.upgrade(), ticker.upgrade()) else { return };
            engine.increment_epoch();
            drop(engine);
            idle = if ticker.executing.load(Ordering::SeqCst) == 0 { idle + 1 } else { 0 };
            if idle < IDLE_TICKS {
                continue;
            }
            ticker.asleep.store(true, Ordering::SeqCst);
            // A guest that entered before the store did not see it, and must be seen here.
            if ticker.executing.load(Ordering::SeqCst) == 0 {
                drop(ticker);
                std::thread::park();
            } else {
                ticker.asleep.store(false, Ordering::SeqCst);
            }
            idle = 0;
        }
    }

    fn enter(&self) {
        self.executing.fetch_add(1, Ordering::SeqCst);
        if self.asleep.load(Ordering::SeqCst) && self.asleep.swap(false, Ordering::SeqCst) {
            self.thread.unpark();
        }
    }

    fn leave(&self) {
        self.executing.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Ticker {
    fn drop(&mut self) {
        self.thread.unpark();
    }
}

/// The places that the guests of one container or pod have in the executor's queue.
#[derive(Debug)]
pub struct Lane {
    places: Arc<Semaphore>,
    /// Guests that wait for one.
    waiting: AtomicUsize,
}

impl Lane {
    pub fn new(places: usize) -> Self {
        Self { places: Arc::new(Semaphore::new(places)), waiting: AtomicUsize::new(0) }
    }
}

/// One container's part in the machine's time.
#[derive(Debug)]
pub struct CpuShare {
    ticker: Arc<Ticker>,
    /// The container's and the pod's. A guest takes a place in the first before it asks for one in the second, so that there
    /// it waits for two of each container at most.
    lanes: [Arc<Lane>; 2],
    used: AtomicU64,
    quota: Option<Quota>,
}

/// A leaky bucket in time: the instant at which everything used up to now is paid for.
#[derive(Debug)]
struct Quota {
    cores: f64,
    burst: u64,
    origin: Instant,
    /// Nanoseconds after `origin`.
    paid: AtomicU64,
}

impl Quota {
    fn new(cores: f64) -> Self {
        let cores = cores.max(0.001);
        let period = PERIOD.as_nanos() as u64;
        Self { cores, burst: period, origin: Instant::now(), paid: AtomicU64::new(0) }
    }

    fn now(&self) -> u64 {
        self.origin.elapsed().as_nanos() as u64
    }

    fn charge(&self, used: Duration) {
        let cost = (used.as_nanos() as f64 / self.cores) as u64;
        let now = self.now();
        let _ = self.paid.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |paid| {
            Some(paid.max(now.saturating_sub(self.burst)).saturating_add(cost))
        });
    }

    /// How long to wait until the next slice is allowed.
    fn debt(&self) -> Option<Duration> {
        let ahead = self.paid.load(Ordering::Relaxed).saturating_sub(self.now());
        (ahead > 0).then(|| Duration::from_nanos(ahead))
    }
}

impl CpuShare {
    pub fn new(ticker: Arc<Ticker>, lanes: [Arc<Lane>; 2], limit: Option<f64>) -> Self {
        Self { ticker, lanes, used: AtomicU64::new(0), quota: limit.map(Quota::new) }
    }

    pub fn used(&self) -> Duration {
        Duration::from_nanos(self.used.load(Ordering::Relaxed))
    }

    fn charge(&self, used: Duration) {
        self.used.fetch_add(used.as_nanos() as u64, Ordering::Relaxed);
        if let Some(quota) = &self.quota {
            quota.charge(used);
        }
    }
}

/// The CPU time that this thread has had.
fn thread_time() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}

thread_local! {
    /// When the slice that this thread executes began, and whether the guest was made to yield in it.
    static SLICE: Cell<Option<Instant>> = const { Cell::new(None) };
    static YIELDED: Cell<bool> = const { Cell::new(false) };
    /// This thread's CPU time as it was asked for last, and when.
    static ASKED: Cell<Option<(Instant, Duration)>> = const { Cell::new(None) };
}

/// What a guest does when it runs into its deadline.
pub fn on_deadline<T>(_store: StoreContextMut<'_, T>) -> wasmtime::Result<UpdateDeadline> {
    // A deadline set before a long wait is past when the guest goes on; its slice has only begun.
    if SLICE.get().is_some_and(|began| began.elapsed() < TICK / 2) {
        return Ok(UpdateDeadline::Continue(1));
    }
    YIELDED.set(true);
    // One that computes on calls nothing that would tell where its stack is.
    stack::mark();
    // wasmtime's yield wakes its own task, which the executor puts behind all others. `tokio::task::yield_now` would not
    // do: a task that it wakes goes first where new events are looked for often.
    Ok(UpdateDeadline::Yield(1))
}

/// What happens on this thread while it lives is charged to the container, also when it ends in a panic.
struct Slice<'a> {
    share: &'a CpuShare,
    began: Instant,
    /// The thread's CPU time then, or a moment before.
    thread_time: Duration,
}

impl<'a> Slice<'a> {
    fn begin(share: &'a CpuShare) -> Self {
        let began = Instant::now();
        SLICE.set(Some(began));
        YIELDED.set(false);
        share.ticker.enter();
        let fresh = ASKED.get().filter(|(at, _)| began.saturating_duration_since(*at) < FRESH);
        let thread_time = fresh.map_or_else(|| ask(began), |(_, time)| time);
        Self { share, began, thread_time }
    }

    fn cost(&self) -> Duration {
        let elapsed = self.began.elapsed();
        if elapsed < SHORT {
            return elapsed;
        }
        ask(self.began + elapsed).saturating_sub(self.thread_time).min(elapsed)
    }
}

fn ask(now: Instant) -> Duration {
    let time = thread_time();
    ASKED.set(Some((now, time)));
    time
}

impl Drop for Slice<'_> {
    fn drop(&mut self) {
        self.share.charge(self.cost());
        self.share.ticker.leave();
        SLICE.set(None);
    }
}

type Acquire = BoxFuture<'static, Result<OwnedSemaphorePermit, AcquireError>>;

/// A guest's execution, in slices that its container pays for.
pub struct Sliced<T> {
    guest: BoxFuture<'static, T>,
    share: Arc<CpuShare>,
    /// In how many lanes this guest has its place. In all: it is executing, or yielded and will go on.
    admitted: usize,
    /// Slices since then.
    slices: u32,
    acquire: Option<Waiting>,
    sleep: Option<Pin<Box<tokio::time::Sleep>>>,
}

struct Waiting {
    acquire: Acquire,
    lane: Arc<Lane>,
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.lane.waiting.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<T> Sliced<T> {
    pub fn new(share: Arc<CpuShare>, guest: impl Future<Output = T> + Send + 'static) -> Self {
        Self { guest: Box::pin(guest), share, admitted: 0, slices: 0, acquire: None, sleep: None }
    }

    fn release(&mut self) {
        let held = std::mem::take(&mut self.admitted);
        if held > 0 {
            self.slices = 0;
        }
        for lane in self.share.lanes.iter().take(held) {
            lane.places.add_permits(1);
        }
    }

    fn poll_admitted(&mut self, context: &mut Context<'_>) -> Poll<()> {
        if let Some(sleep) = &mut self.sleep {
            ready!(sleep.as_mut().poll(context));
            self.sleep = None;
        }
        if let Some(debt) = self.share.quota.as_ref().and_then(Quota::debt) {
            self.release();
            let mut sleep = Box::pin(tokio::time::sleep(debt));
            if sleep.as_mut().poll(context).is_pending() {
                self.sleep = Some(sleep);
                return Poll::Pending;
            }
        }
        while let Some(lane) = self.share.lanes.get(self.admitted) {
            if self.acquire.is_none() {
                if let Ok(permit) = lane.places.try_acquire() {
                    permit.forget();
                    self.admitted += 1;
                    continue;
                }
                let lane = lane.clone();
                lane.waiting.fetch_add(1, Ordering::Relaxed);
                let acquire = Box::pin(lane.places.clone().acquire_owned());
                self.acquire = Some(Waiting { acquire, lane });
            }
            if let Some(waiting) = &mut self.acquire {
                if let Ok(permit) = ready!(waiting.acquire.as_mut().poll(context)) {
                    permit.forget();
                    self.admitted += 1;
                }
                self.acquire = None;
            }
        }
        Poll::Ready(())
    }
}

impl<T> Future for Sliced<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<T> {
        let this = &mut *self;
        ready!(this.poll_admitted(context));
        let slice = Slice::begin(&this.share);
        let result = this.guest.as_mut().poll(context);
        drop(slice);
        // A guest that yielded keeps its place for some slices more.
        this.slices += 1;
        let may_keep =
            this.slices < MAX_SLICES || this.share.lanes.iter().all(|lane| lane.waiting.load(Ordering::Relaxed) == 0);
        let keeps = result.is_pending() && YIELDED.get() && may_keep;
        if !keeps {
            this.release();
        }
        result
    }
}

impl<T> Drop for Sliced<T> {
    fn drop(&mut self) {
        self.release();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use futures::FutureExt as _;
    use std::panic::AssertUnwindSafe;

    fn share(limit: Option<f64>) -> (wasmtime::Engine, Arc<CpuShare>) {
        let engine = wasmtime::Engine::default();
        let ticker = Ticker::start(engine.weak()).unwrap();
        (engine, Arc::new(CpuShare::new(ticker, [Arc::new(Lane::new(1)), Arc::new(Lane::new(1))], limit)))
    }

    /// Computes until this thread has had so much CPU time; gives the time that went by.
    fn compute(time: Duration) -> Duration {
        let (began, until) = (Instant::now(), thread_time() + time);
        while thread_time() < until {
            std::hint::spin_loop();
        }
        began.elapsed()
    }

    #[test]
    fn a_guest_is_not_charged_for_the_time_that_other_threads_had() {
        let (_engine, share) = share(None);
        let stop = AtomicBool::new(false);
        let computed = Duration::from_millis(100);
        let cores = std::thread::available_parallelism().unwrap().get();
        let elapsed = std::thread::scope(|scope| {
            for _ in 0..4 * cores {
                scope.spawn(|| {
                    while !stop.load(Ordering::Relaxed) {
                        std::hint::spin_loop();
                    }
                });
            }
            let elapsed = Sliced::new(share.clone(), async move { compute(computed) }).now_or_never();
            stop.store(true, Ordering::Relaxed);
            elapsed.unwrap()
        });
        let used = share.used();
        assert!(elapsed > used * 2, "four threads a core beside it, and {used:?} of {elapsed:?} were its own");
        assert!((computed..computed * 3 / 2).contains(&used), "charged {used:?}");
    }

    #[test]
    fn a_thread_that_waits_costs_its_container_nothing_of_its_quota() {
        let (_engine, share) = share(Some(0.1));
        let wait = async { std::thread::sleep(PERIOD / 2) };
        Sliced::new(share.clone(), wait).now_or_never().unwrap();
        assert!(share.used() < PERIOD / 10, "charged {:?}", share.used());
        assert_eq!(share.quota.as_ref().unwrap().debt(), None);
        Sliced::new(share.clone(), async { compute(PERIOD / 2) }).now_or_never().unwrap();
        assert!(share.quota.as_ref().unwrap().debt() > Some(PERIOD), "half a period's work is five periods at a tenth");
    }

    #[test]
    fn many_short_slices_cost_what_they_compute() {
        let (_engine, share) = share(None);
        let began = thread_time();
        for _ in 0..1000 {
            Sliced::new(share.clone(), async { compute(SHORT / 10) }).now_or_never().unwrap();
        }
        let (used, computed) = (share.used(), thread_time() - began);
        assert!((SHORT * 100..computed * 2).contains(&used), "charged {used:?} for {computed:?}");
    }

    #[test]
    fn a_panic_in_a_slice_leaves_no_guest_counted_and_no_place_taken() {
        let (_engine, share) = share(None);
        let guest = Sliced::new(share.clone(), async { panic!("on purpose") });
        assert!(AssertUnwindSafe(guest).catch_unwind().now_or_never().unwrap().is_err());
        assert_eq!(share.ticker.executing.load(Ordering::SeqCst), 0, "the ticker would never sleep again");
        assert!(share.lanes.iter().all(|lane| lane.places.available_permits() == 1));
        assert!(SLICE.get().is_none());
    }
}
