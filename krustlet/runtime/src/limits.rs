//! What one instance holds: its linear memories and tables, and the host's side of its handles, counted against its container.

use crate::egress::{BODY_CHUNK_SIZE, BODY_CHUNKS};
use crate::engine::TABLE_ELEMENTS;
use crate::linkers::MAX_WRITE;
use crate::memory::{Budget, Exceeded, Reservation};
use http::HeaderMap;
use std::any::Any;
use std::sync::Arc;
use wasmtime::ResourceLimiter;
use wasmtime::component::{Resource, ResourceTable};
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream};
use wasmtime_wasi_http::FieldMap;
use wasmtime_wasi_http::p2::body::{HostFutureTrailers, HostIncomingBody, HostOutgoingBody};
use wasmtime_wasi_http::p2::types::{
    HostIncomingRequest, HostIncomingResponse, HostOutgoingRequest, HostOutgoingResponse,
};

/// Table elements are pointers.
pub const ELEMENT: usize = size_of::<usize>();
/// An instance's own part of the node: its stack, its store, its handles to the world.
pub const INSTANCE: u64 = 32 * 1024;
/// Each call may leave as much as headers may take.
const CALLS_UNCOUNTED: u32 = 4;
/// A handle, whatever it is to.
const HANDLE: u64 = 256;
/// What a stream of a guest's keeps of what was read and not yet taken.
pub const READ_AHEAD: u64 = 64 * 1024;
/// The head of an ordinary request or answer is a part of what an instance takes.
const ORDINARY_HEAD: u64 = 4 * 1024;
/// What WASI's implementation lets a map of headers hold, as it counts.
pub const MAX_FIELDS: usize = 128 * 1024;
/// A header's place in its map: its hash, name, first value and links, and its place in the index.
const HEADER: usize = 112;
/// The same of a further value of the same name, in a list that may be twice as long.
const FURTHER_VALUE: usize = 2 * 72;
/// What a name or a value costs beside its bytes: an allocation has a head and a least size, and so has its count of owners.
const ALLOCATION: usize = 64;

/// A guest asked for more than its limit. It is ended, as a container that its kernel finds over its limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{exceeded}; this instance holds {own}")]
pub struct MemoryLimitExceeded {
    pub exceeded: Exceeded,
    /// Bytes that the instance itself held.
    pub own: u64,
}

impl MemoryLimitExceeded {
    /// Whether the instance would not have fit if it had been alone.
    pub fn is_its_own(&self) -> bool {
        self.own.saturating_add(self.exceeded.wanted) > self.exceeded.limit
    }
}

/// One instance's memory.
#[derive(Debug)]
pub struct Limiter {
    budget: Arc<Budget>,
    /// What the guest itself allocated.
    guest: Reservation,
    /// What the host keeps for it.
    host: Reservation,
    /// Calls since its handles were counted.
    uncounted: u32,
    /// There was no room for what it held.
    overdrawn: Option<MemoryLimitExceeded>,
}

impl Limiter {
    /// Fails when the container has no memory for another instance, of whose module each takes so many bytes.
    pub fn of_module(budget: Arc<Budget>, bytes: u64) -> Result<Self, MemoryLimitExceeded> {
        let mut limiter = Self::new(budget)?;
        limiter.guest.grow(bytes).map_err(|exceeded| limiter.exceeded(exceeded))?;
        Ok(limiter)
    }

    fn new(budget: Arc<Budget>) -> Result<Self, MemoryLimitExceeded> {
        let (guest, host) = (Reservation::empty(budget.clone()), Reservation::empty(budget.clone()));
        let mut limiter = Self { budget, guest, host, uncounted: 0, overdrawn: None };
        limiter.host.grow(INSTANCE).map_err(|exceeded| limiter.exceeded(exceeded))?;
        Ok(limiter)
    }

    /// Memory that the host needs for the guest, and gives back itself.
    pub fn reserve(&self, bytes: u64) -> Result<Reservation, MemoryLimitExceeded> {
        self.budget.reserve(bytes).map_err(|exceeded| self.exceeded(exceeded))
    }

    fn exceeded(&self, exceeded: Exceeded) -> MemoryLimitExceeded {
        MemoryLimitExceeded { exceeded, own: self.guest.bytes() + self.host.bytes() }
    }

    fn grow(&mut self, current: usize, desired: usize, maximum: Option<usize>, unit: usize) -> wasmtime::Result<bool> {
        // Beyond its own declared maximum the guest is told no, as it would be without a limit.
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(false);
        }
        let grown = desired.saturating_sub(current).saturating_mul(unit) as u64;
        match self.guest.grow(grown) {
            Ok(()) => Ok(true),
            Err(exceeded) => Err(self.exceeded(exceeded).into()),
        }
    }

    /// Counts what the host keeps for the guest's handles. What can be large is measured, the rest is taken to be small.
    pub fn count_handles(&mut self, table: &mut ResourceTable) -> Result<(), MemoryLimitExceeded> {
        self.uncounted = 0;
        if let Some(exceeded) = self.overdrawn {
            return Err(exceeded);
        }
        let handles: u64 = table.iter_mut().map(|entry| HANDLE + size_of_entry(entry)).sum();
        self.host.resize(INSTANCE + handles).map_err(|exceeded| self.exceeded(exceeded))
    }

    /// A call is made that may make a large handle. A guest that waits is not asked for its handles: what it has when it begins
    /// to wait is counted by now, and if there was no room for it, others get none and the guest ends when it goes on.
    pub fn before_call(&mut self, table: &mut ResourceTable) {
        self.uncounted += 1;
        if self.uncounted >= CALLS_UNCOUNTED
            && let Err(exceeded) = self.count_handles(table)
            && self.overdrawn.is_none()
        {
            self.host.overdraw(exceeded.exceeded.wanted);
            self.overdrawn = Some(exceeded);
        }
    }
}

fn size_of_entry(entry: &(dyn Any + Send)) -> u64 {
    if let Some(fields) = entry.downcast_ref::<FieldMap>() {
        size_of_fields(fields)
    } else if let Some(request) = entry.downcast_ref::<HostOutgoingRequest>() {
        let texts =
            [&request.authority, &request.path_with_query].into_iter().flatten().map(String::len).sum::<usize>();
        size_of_fields(&request.headers) + texts as u64
    } else if let Some(response) = entry.downcast_ref::<HostOutgoingResponse>() {
        size_of_fields(&response.headers)
    } else if let Some(response) = entry.downcast_ref::<HostIncomingResponse>() {
        size_of_fields(&response.headers) + response.body.as_ref().map_or(0, |_| BODY_CHUNK_SIZE as u64)
    } else if let Some(request) = entry.downcast_ref::<HostIncomingRequest>() {
        request.body.as_ref().map_or(0, |_| BODY_CHUNK_SIZE as u64)
    } else if entry.is::<HostIncomingBody>() {
        BODY_CHUNK_SIZE as u64
    } else if let Some(trailers) = entry.downcast_ref::<HostFutureTrailers>() {
        match trailers {
            HostFutureTrailers::Waiting(_) => BODY_CHUNK_SIZE as u64,
            HostFutureTrailers::Done(Ok(Some(trailers))) => size_of_fields(trailers),
            HostFutureTrailers::Done(_) | HostFutureTrailers::Consumed => 0,
        }
    } else if entry.is::<DynInputStream>() {
        READ_AHEAD
    } else if entry.is::<DynOutputStream>() {
        MAX_WRITE as u64
    } else if entry.is::<HostOutgoingBody>() {
        (BODY_CHUNKS * BODY_CHUNK_SIZE) as u64
    } else {
        0
    }
}

/// What the map itself takes, by the room that it has, and what is in it.
pub fn size_of_fields(fields: &HeaderMap) -> u64 {
    let names: usize = fields.keys().map(|name| name.as_str().len() + ALLOCATION).sum();
    let values: usize = fields.values().map(|value| value.len() + ALLOCATION).sum();
    (fields.capacity() * HEADER + further_values(fields) * FURTHER_VALUE + names + values) as u64
}

/// What the headers of a request or an answer take beside what an instance takes anyway, while no guest has them.
pub fn size_of_head(fields: &HeaderMap) -> u64 {
    Some(size_of_fields(fields)).filter(|size| *size > ORDINARY_HEAD).unwrap_or(0)
}

/// How many values are not the first of their name.
fn further_values(fields: &HeaderMap) -> usize {
    fields.len() - fields.keys_len()
}

/// Changes a map of headers. One keeps the room of the further values that are removed from it, which nothing tells; so it is
/// made anew without.
pub fn change_fields<T>(
    table: &mut ResourceTable,
    fields: &Resource<FieldMap>,
    change: impl FnOnce(&mut FieldMap) -> T,
) -> wasmtime::Result<T> {
    let fields = table.get_mut(fields)?;
    let before = further_values(fields);
    let result = change(fields);
    if further_values(fields) < before {
        let mut anew = FieldMap::new_mutable(MAX_FIELDS);
        for (name, value) in fields.iter() {
            anew.append_raw(name.clone(), value.clone())?;
        }
        *fields = anew;
    }
    Ok(result)
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::egress::{Completion, Sent};
    use crate::memory::Scope;
    use wasmtime_wasi_http::{RequestOptions, WasiBody, WasiHttpHooks};

    #[test]
    fn memory_and_tables_together_are_bounded() {
        let budget = Budget::node(200_000);
        let mut limiter = Limiter::new(budget.clone()).unwrap();
        assert!(limiter.memory_growing(0, 131_072, None).unwrap());
        assert!(limiter.table_growing(0, 1000, None).unwrap());
        assert_eq!(budget.used(), INSTANCE + 131_072 + 8000);
        let error = limiter.memory_growing(131_072, 196_608, None).unwrap_err();
        let exceeded = error.downcast_ref::<MemoryLimitExceeded>().unwrap();
        assert_eq!((exceeded.exceeded.wanted, exceeded.exceeded.limit), (65_536, 200_000));
        assert!(exceeded.is_its_own());
        assert!(limiter.table_growing(1000, 100_000, None).is_err());
        drop(limiter);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn the_limit_is_that_of_all_instances_together() {
        let budget = Budget::within(&Budget::node(u64::MAX), Scope::Container, 300_000);
        let mut first = Limiter::new(budget.clone()).unwrap();
        assert!(first.memory_growing(0, 150_000, None).unwrap());
        let mut second = Limiter::new(budget.clone()).unwrap();
        let error = second.memory_growing(0, 150_000, None).unwrap_err();
        assert!(!error.downcast_ref::<MemoryLimitExceeded>().unwrap().is_its_own(), "alone it would have fit");
        drop(first);
        assert!(second.memory_growing(0, 150_000, None).unwrap());
        let third = Limiter::new(Budget::within(&budget, Scope::Container, 10));
        assert!(third.unwrap_err().is_its_own(), "not even an instance fits");
    }

    #[test]
    fn a_guest_that_grows_beyond_its_own_maximum_is_told_no() {
        let mut limiter = Limiter::new(Budget::node(INSTANCE)).unwrap();
        assert!(!limiter.memory_growing(0, 65_536, Some(0)).unwrap());
    }

    #[test]
    fn growth_that_the_pool_has_no_room_for_is_not_counted() {
        let budget = Budget::node(u64::MAX);
        let mut limiter = Limiter::new(budget.clone()).unwrap();
        assert!(!limiter.table_growing(0, TABLE_ELEMENTS + 1, None).unwrap());
        assert_eq!(budget.used(), INSTANCE);
    }

    /// A map with a header of 100 kB.
    fn fields(table: &mut ResourceTable) -> Resource<FieldMap> {
        let mut map = FieldMap::new_mutable(MAX_FIELDS);
        let value = http::HeaderValue::from_bytes(&[b'a'; 100_000]).unwrap();
        map.append_raw(http::HeaderName::from_static("x"), value).unwrap();
        table.push(map).unwrap()
    }

    #[test]
    fn what_a_guest_holds_is_counted_while_it_calls_and_others_get_no_room_where_there_was_none() {
        let budget = Budget::within(&Budget::node(u64::MAX), Scope::Container, 1_000_000);
        let mut limiter = Limiter::new(budget.clone()).unwrap();
        let mut table = ResourceTable::new();
        for made in 0..10 {
            limiter.before_call(&mut table);
            fields(&mut table);
            let uncounted = u64::from(CALLS_UNCOUNTED);
            assert!(budget.used() >= 100_000 * (made + 1_u64).saturating_sub(uncounted), "{made}");
        }
        for _ in 0..CALLS_UNCOUNTED {
            limiter.before_call(&mut table);
        }
        assert!(Limiter::new(budget.clone()).is_err(), "there is no room for another");
        assert!(limiter.count_handles(&mut table).is_err(), "it ends when it goes on");
        drop(limiter);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_map_of_headers_counts_with_its_own_parts_and_with_room_that_it_keeps() {
        let value = || http::HeaderValue::from_static("");
        let name = |number: usize| http::HeaderName::from_bytes(format!("x{number}").as_bytes()).unwrap();
        let mut map = HeaderMap::new();
        assert_eq!(size_of_fields(&map), 0);
        for number in 0..1000 {
            map.append(name(number), value());
        }
        let parts = size_of::<http::HeaderName>() + size_of::<http::HeaderValue>() + 3 * size_of::<usize>();
        assert!(size_of_fields(&map) >= 1000 * (parts + 2 * 32) as u64);
        map.clear();
        assert!(size_of_fields(&map) >= (1000 * parts) as u64, "the room stays");
    }

    struct Hooks;

    impl WasiHttpHooks for Hooks {
        fn send_request(
            &mut self,
            _request: http::Request<WasiBody>,
            _options: Option<RequestOptions>,
            _processed: Completion,
        ) -> Box<dyn Future<Output = Sent> + Send> {
            Box::new(std::future::pending())
        }
    }

    #[test]
    fn a_map_keeps_all_but_the_values_that_were_removed_and_may_be_changed_further() {
        let mut table = ResourceTable::new();
        let fields = table.push(FieldMap::new_mutable(MAX_FIELDS)).unwrap();
        let mut change = |name: &str, values: usize| {
            let values = (0..values).map(|number| number.to_string().into_bytes()).collect();
            change_fields(&mut table, &fields, |map| map.set(&mut Hooks, name.to_owned(), values)).unwrap().unwrap();
            let map = table.get(&fields).unwrap();
            let count = |name: &str| map.get_all(name).iter().count();
            (count("kept"), count("gone"), map.capacity())
        };
        assert_eq!(change("kept", 2).0, 2);
        assert_eq!(change("gone", 1000).1, 1000);
        assert_eq!(change("gone", 1).1, 1);
        for number in 0..100 {
            change(&format!("x{number}"), 2);
        }
        let (kept, gone, room) = change("kept", 0);
        assert_eq!((kept, gone), (0, 1));
        assert!(room < 200);
    }

    #[test]
    fn headers_and_bodies_that_the_host_keeps_for_a_guest_count() {
        let budget = Budget::node(1_000_000);
        let mut limiter = Limiter::new(budget.clone()).unwrap();
        let mut table = ResourceTable::new();
        let first = fields(&mut table);
        limiter.count_handles(&mut table).unwrap();
        assert!(budget.used() > INSTANCE + 100_000);
        for _ in 0..10 {
            fields(&mut table);
        }
        assert!(limiter.count_handles(&mut table).is_err());
        table.delete(first).unwrap();
        let (body, _stream) = HostOutgoingBody::new(
            wasmtime_wasi_http::p2::body::StreamContext::Response,
            None,
            BODY_CHUNKS,
            BODY_CHUNK_SIZE,
        );
        let mut other = ResourceTable::new();
        other.push(body).unwrap();
        limiter.count_handles(&mut other).unwrap();
        assert!(budget.used() >= INSTANCE + (BODY_CHUNKS * BODY_CHUNK_SIZE) as u64);
        limiter.count_handles(&mut ResourceTable::new()).unwrap();
        assert_eq!(budget.used(), INSTANCE);
    }
}
