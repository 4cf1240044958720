//! What a guest's stack takes counts as its container's memory when it waits.
//!
//! A guest has half a mebibyte of stack for its own calls, of which most touch a few pages. One that recurses deeply and waits
//! then has all of it, and so do a thousand of its kind. wasmtime tells neither where a stack is nor how much of it was
//! touched; but what a guest calls runs on the guest's stack and can tell the first ([`mark`]), and the kernel tells the rest.
//! It is asked when a guest stops for a while, which most requests never do.

use crate::limits::{INSTANCE, MemoryLimitExceeded};
use crate::memory::{Budget, Reservation};
use std::cell::Cell;
use std::fs::File;
use std::future::poll_fn;
use std::os::unix::fs::FileExt as _;
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use std::task::Poll;

/// Of its stack, which ends in unmapped pages, a guest and what it calls reach no further than this: half a mebibyte for its
/// own calls, and what the calls of the node's take below and above.
const REACH: usize = 640 * 1024;
/// Where the kernel does not say how much was touched, it is all that a guest may.
const UNKNOWN: u64 = 512 * 1024;
/// What most guests touch at most.
const ORDINARY: u64 = 2 * INSTANCE;
/// Bits of an entry of the page map: the page is in memory, or was and is swapped out.
const TOUCHED: u64 = (1 << 63) | (1 << 62);
const ENTRY: usize = size_of::<u64>();
const LEAST_PAGE: usize = 4096;
/// The key of the page size in what the kernel tells a process at its start.
const AT_PAGESZ: usize = 6;

thread_local! {
    /// An address on the stack of the guest that this thread executes.
    static MARK: Cell<Option<usize>> = const { Cell::new(None) };
}

/// To be called on the guest's stack.
pub fn mark() {
    let here = 0_u8;
    MARK.set(Some(std::ptr::from_ref(&here).addr()));
}

/// Runs a call of a guest's function. It fails when the guest stops and there is no memory for the stack that it has then.
pub async fn charged<T>(memory: &Arc<Budget>, call: impl Future<Output = wasmtime::Result<T>>) -> wasmtime::Result<T> {
    let mut call = pin!(call);
    let mut held = Reservation::empty(memory.clone());
    poll_fn(|context| {
        MARK.set(None);
        let result = call.as_mut().poll(context);
        if result.is_pending()
            && let Some(address) = MARK.take()
            && let Err(exceeded) = held.resize(beyond_ordinary(touched(address)))
        {
            return Poll::Ready(Err(MemoryLimitExceeded { exceeded, own: held.bytes() + INSTANCE }.into()));
        }
        result
    })
    .await
}

/// What is charged beside an instance's own part. A guest that has what it needs is not to end for a page or two.
fn beyond_ordinary(touched: u64) -> u64 {
    if touched > ORDINARY { touched - INSTANCE } else { 0 }
}

/// Bytes of the stack around this address that hold something.
fn touched(address: usize) -> u64 {
    static PAGES: OnceLock<Option<Pages>> = OnceLock::new();
    let pages = PAGES.get_or_init(Pages::of_this_process).as_ref();
    pages.and_then(|pages| pages.touched(address)).unwrap_or(UNKNOWN)
}

/// The kernel's map of the process's pages, an entry for each, and their size.
struct Pages {
    map: File,
    size: usize,
}

impl Pages {
    fn of_this_process() -> Option<Self> {
        let map = File::open("/proc/self/pagemap").ok()?;
        let auxiliary = std::fs::read("/proc/self/auxv").ok()?;
        let mut words =
            auxiliary.as_chunks::<{ size_of::<usize>() }>().0.iter().map(|word| usize::from_ne_bytes(*word));
        while let (Some(key), Some(value)) = (words.next(), words.next()) {
            if key == AT_PAGESZ && value >= LEAST_PAGE {
                return Some(Self { map, size: value });
            }
        }
        None
    }

    fn touched(&self, address: usize) -> Option<u64> {
        let mut entries = [0; 2 * REACH / LEAST_PAGE * ENTRY];
        let wanted = entries.get_mut(..2 * REACH / self.size * ENTRY)?;
        let first = address.saturating_sub(REACH) / self.size * ENTRY;
        self.map.read_exact_at(wanted, first as u64).ok()?;
        let entries = wanted.as_chunks::<ENTRY>().0.iter().map(|entry| u64::from_ne_bytes(*entry));
        Some((entries.filter(|entry| entry & TOUCHED != 0).count() * self.size) as u64)
    }
}

#[cfg(test)]
#[cfg(target_os = "linux")]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::memory::Scope;

    /// Touches so much of the stack, and does this there.
    fn at<T>(depth: usize, then: &dyn Fn() -> T) -> T {
        let block = std::hint::black_box([1_u8; 4096]);
        let result = match depth.checked_sub(block.len()) {
            Some(left) => at(left, then),
            None => then(),
        };
        std::hint::black_box(block);
        result
    }

    #[test]
    fn what_was_touched_of_a_stack_is_found_also_when_it_is_left_again() {
        let find = || {
            let here = 0_u8;
            let find = || touched(std::ptr::from_ref(&here).addr());
            let before = find();
            at(400_000, &|| ());
            (before, find())
        };
        // So deep that all that is looked at is this stack.
        let thread = std::thread::Builder::new().stack_size(32 << 20).spawn(move || at(REACH + 100_000, &find));
        let (before, after) = thread.unwrap().join().unwrap();
        assert!(before >= REACH as u64 - 4096, "{before}");
        assert!(after >= before + 300_000, "{before}, {after}");
    }

    #[tokio::test]
    async fn a_guest_that_waits_is_charged_for_its_stack_and_ended_where_there_is_no_room_and_all_comes_back() {
        for (limit, fits) in [(u64::MAX, true), (10_000, false)] {
            let budget = Budget::within(&Budget::node(u64::MAX), Scope::Container, limit);
            let inside = budget.clone();
            let thread = std::thread::Builder::new().stack_size(4 << 20).spawn(move || {
                let call = async {
                    at(400_000, &|| ());
                    mark();
                    tokio::task::yield_now().await;
                    Ok(inside.used())
                };
                let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
                let result = runtime.block_on(charged(&budget, call));
                assert_eq!(budget.used(), 0);
                result
            });
            match thread.unwrap().join().unwrap() {
                Ok(used) => assert!(fits && used >= 360_000, "{used}"),
                Err(error) => assert!(!fits && error.is::<MemoryLimitExceeded>(), "{error}"),
            }
        }
    }
}
