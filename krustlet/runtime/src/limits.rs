//! The memory limit: bounds what a guest's linear memories and tables may take, and counts what a container holds.

use crate::engine::TABLE_ELEMENTS;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use wasmtime::ResourceLimiter;

/// Table elements are pointers.
const ELEMENT: usize = size_of::<usize>();

/// A guest asked for more than its limit. It is ended, as a container that its kernel finds over its limit.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the guest asked for {wanted} bytes of memory, its limit is {limit}")]
pub struct MemoryLimitExceeded {
    pub wanted: usize,
    pub limit: usize,
}

/// Bytes that all live instances of a container hold.
#[derive(Debug, Default)]
pub struct Usage(AtomicU64);

impl Usage {
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

/// One instance's memory.
#[derive(Debug)]
pub struct Limiter {
    limit: usize,
    used: usize,
    usage: Arc<Usage>,
}

impl Limiter {
    pub fn new(limit: Option<u64>, usage: Arc<Usage>) -> Self {
        let limit = limit.map_or(usize::MAX, |limit| usize::try_from(limit).unwrap_or(usize::MAX));
        Self { limit, used: 0, usage }
    }

    fn grow(&mut self, current: usize, desired: usize, maximum: Option<usize>, unit: usize) -> wasmtime::Result<bool> {
        // Beyond its own declared maximum the guest is told no, as it would be without a limit.
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let grown = desired.saturating_sub(current).saturating_mul(unit);
        let wanted = self.used.saturating_add(grown);
        if wanted > self.limit {
            return Err(MemoryLimitExceeded { wanted, limit: self.limit }.into());
        }
        self.used = wanted;
        self.usage.0.fetch_add(grown as u64, Ordering::Relaxed);
        Ok(true)
    }
}

impl ResourceLimiter for Limiter {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        self.grow(current, desired, maximum, 1)
    }

    fn table_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        // The pool has no larger ones. What it would refuse must not be counted as if it were there.
        let maximum = Some(maximum.unwrap_or(usize::MAX).min(TABLE_ELEMENTS));
        self.grow(current, desired, maximum, ELEMENT)
    }
}

impl Drop for Limiter {
    fn drop(&mut self) {
        self.usage.0.fetch_sub(self.used as u64, Ordering::Relaxed);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn memory_and_tables_together_are_bounded() {
        let usage = Arc::new(Usage::default());
        let mut limiter = Limiter::new(Some(200_000), usage.clone());
        assert!(limiter.memory_growing(0, 131_072, None).unwrap());
        assert!(limiter.table_growing(0, 1000, None).unwrap());
        assert_eq!(usage.bytes(), 131_072 + 8000);
        let error = limiter.memory_growing(131_072, 196_608, None).unwrap_err();
        let exceeded = error.downcast_ref::<MemoryLimitExceeded>().unwrap();
        assert_eq!((exceeded.wanted, exceeded.limit), (204_608, 200_000));
        assert!(limiter.table_growing(1000, 100_000, None).is_err());
        drop(limiter);
        assert_eq!(usage.bytes(), 0);
    }

    #[test]
    fn a_guest_that_grows_beyond_its_own_maximum_is_told_no() {
        let mut limiter = Limiter::new(Some(10), Arc::default());
        assert!(!limiter.memory_growing(0, 65_536, Some(0)).unwrap());
    }

    #[test]
    fn growth_that_the_pool_has_no_room_for_is_not_counted() {
        let usage = Arc::new(Usage::default());
        let mut limiter = Limiter::new(None, usage.clone());
        assert!(!limiter.table_growing(0, TABLE_ELEMENTS + 1, None).unwrap());
        assert_eq!(usage.bytes(), 0);
    }
}
