//! Growing waits between tries, with jitter so that many that failed together do not come back together.

use std::time::Duration;

/// An endless series of waits: `initial`, then doubling to `max`.
#[derive(Debug, Clone)]
pub struct Backoff {
    initial: Duration,
    max: Duration,
    next: Duration,
}

impl Backoff {
    pub fn new(initial: Duration, max: Duration) -> Self {
        Self { initial, max, next: initial }
    }

    /// For calls to the API server: quick at first, and never so slow that a server that is back goes unnoticed.
    pub fn api() -> Self {
        Self::new(Duration::from_millis(500), Duration::from_secs(4))
    }

    /// The next wait, without jitter.
    pub fn exact(&mut self) -> Duration {
        let wait = self.next;
        self.next = (self.next * 2).min(self.max);
        wait
    }

    /// The next wait, between 75 % and 125 % of the series.
    pub fn jittered(&mut self) -> Duration {
        jitter(self.exact(), 0.25)
    }

    pub fn reset(&mut self) {
        self.next = self.initial;
    }
}

impl Iterator for Backoff {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        Some(self.jittered())
    }
}

impl kube::runtime::utils::Backoff for Backoff {
    fn reset(&mut self) {
        Backoff::reset(self);
    }
}

/// `duration`, more or less by at most `share` of it.
pub fn jitter(duration: Duration, share: f64) -> Duration {
    let factor: f64 = rand::random_range((1.0 - share)..(1.0 + share));
    duration.mul_f64(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_double_up_to_the_maximum_and_start_over_after_a_reset() {
        let mut backoff = Backoff::new(Duration::from_secs(10), Duration::from_secs(300));
        let waits: Vec<u64> = (0..7).map(|_| backoff.exact().as_secs()).collect();
        assert_eq!(waits, [10, 20, 40, 80, 160, 300, 300]);
        backoff.reset();
        assert_eq!(backoff.exact().as_secs(), 10);
    }

    #[test]
    fn jitter_stays_within_its_share() {
        for _ in 0..1000 {
            let wait = jitter(Duration::from_secs(100), 0.25).as_secs_f64();
            assert!((75.0..=125.0).contains(&wait), "{wait}");
        }
    }
}
