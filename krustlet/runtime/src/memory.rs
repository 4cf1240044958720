//! Memory budgets: what a container's guests make the node hold counts against the container, its pod and the node at once.
//!
//! A budget admits; it does not measure. What is counted is what guests can decide on: linear memories, tables, the host's side
//! of their handles and bodies, a fixed part for each instance, and the code of loaded modules. The node's own budget lies below
//! what the machine has by what the agent, the system and idle instances may take, so that a guest is refused long before the
//! kernel looks for a process to kill.

use parking_lot::Mutex;
use std::cmp::min_by_key;
use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

const MIB: u64 = 1024 * 1024;
/// The agent itself and the system beside it: a share of the machine, and at least so much.
const SYSTEM_SHARE: u64 = 8;
const SYSTEM_MIN: u64 = 192 * MIB;
/// The most that idle instances may keep, as a share of the machine.
const IDLE_SHARE: u64 = 8;
/// A container without a limit may take this share of what the node has for guests.
const DEFAULT_SHARE: u64 = 4;
/// Where less than this is free on the machine, whoever took it, guests are given no more.
const PRESSURE_SHARE: u64 = 40;
const PRESSURE_MAX: u64 = 128 * MIB;
/// How long a look at the machine's free memory is believed.
const PRESSURE_AGE: Duration = Duration::from_millis(50);
/// Growth below this is not worth a look at the machine.
const PRESSURE_STEP: u64 = MIB;

/// Whose memory is at its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Container,
    Pod,
    Node,
}

impl fmt::Display for Scope {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Container => "container",
            Self::Pod => "pod",
            Self::Node => "node",
        })
    }
}

/// More was asked for than a budget has left.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{wanted} bytes more of memory are wanted, and the {scope} has {used} in use; its limit is {limit}")]
pub struct Exceeded {
    pub scope: Scope,
    pub wanted: u64,
    pub used: u64,
    pub limit: u64,
}

/// An amount of memory that may be taken, within that of a parent.
#[derive(Debug)]
pub struct Budget {
    scope: Scope,
    limit: AtomicU64,
    used: AtomicU64,
    parent: Option<Arc<Budget>>,
    pressure: Option<Pressure>,
}

impl Budget {
    /// A node's that looks at no machine.
    #[cfg(test)]
    pub fn node(limit: u64) -> Arc<Self> {
        Self::make(Scope::Node, limit, None, None)
    }

    pub fn within(parent: &Arc<Self>, scope: Scope, limit: u64) -> Arc<Self> {
        Self::make(scope, limit, Some(parent.clone()), None)
    }

    fn make(scope: Scope, limit: u64, parent: Option<Arc<Self>>, pressure: Option<Pressure>) -> Arc<Self> {
        Arc::new(Self { scope, limit: limit.into(), used: AtomicU64::new(0), parent, pressure })
    }

    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// What is in use beyond a smaller limit stays; nothing more is given out.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// The least limit of this budget and those that it lies in, and whose it is.
    pub fn least_limit(&self) -> (u64, Scope) {
        let own = (self.limit(), self.scope);
        match &self.parent {
            Some(parent) => min_by_key(own, parent.least_limit(), |(limit, _)| *limit),
            None => own,
        }
    }

    /// Takes memory from this budget and those that it lies in: from all of them or from none.
    pub fn take(&self, bytes: u64) -> Result<(), Exceeded> {
        if bytes == 0 {
            return Ok(());
        }
        let limit = self.limit();
        let taken = self.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |used| {
            used.checked_add(bytes).filter(|used| *used <= limit)
        });
        if let Err(used) = taken {
            return Err(Exceeded { scope: self.scope, wanted: bytes, used, limit });
        }
        let beyond = match (&self.parent, &self.pressure) {
            (Some(parent), _) => parent.take(bytes),
            (None, Some(pressure)) if bytes >= PRESSURE_STEP && pressure.is_on() => {
                Err(Exceeded { scope: self.scope, wanted: bytes, used: self.used() - bytes, limit })
            }
            (None, _) => Ok(()),
        };
        beyond.inspect_err(|_| _ = self.used.fetch_sub(bytes, Ordering::Relaxed))
    }

    /// Takes what is in use already, whether there is room for it or not.
    fn overdraw(&self, bytes: u64) {
        self.used.fetch_add(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.overdraw(bytes);
        }
    }

    pub fn give_back(&self, bytes: u64) {
        if bytes == 0 {
            return;
        }
        self.used.fetch_sub(bytes, Ordering::Relaxed);
        if let Some(parent) = &self.parent {
            parent.give_back(bytes);
        }
    }

    /// Takes memory for as long as the reservation is kept.
    pub fn reserve(self: &Arc<Self>, bytes: u64) -> Result<Reservation, Exceeded> {
        let mut reservation = Reservation::empty(self.clone());
        reservation.resize(bytes)?;
        Ok(reservation)
    }
}

/// Memory that was taken from a budget. Dropping it gives it back.
#[derive(Debug)]
pub struct Reservation {
    budget: Arc<Budget>,
    bytes: u64,
}

impl Reservation {
    pub fn empty(budget: Arc<Budget>) -> Self {
        Self { budget, bytes: 0 }
    }

    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Stays as it is where the budget has no room.
    pub fn grow(&mut self, by: u64) -> Result<(), Exceeded> {
        self.budget.take(by)?;
        self.bytes += by;
        Ok(())
    }

    /// The same for what is in use already.
    pub fn overdraw(&mut self, by: u64) {
        self.budget.overdraw(by);
        self.bytes += by;
    }

    pub fn resize(&mut self, bytes: u64) -> Result<(), Exceeded> {
        match self.bytes.checked_sub(bytes) {
            None => self.grow(bytes - self.bytes),
            Some(less) => {
                self.budget.give_back(less);
                self.bytes = bytes;
                Ok(())
            }
        }
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.budget.give_back(self.bytes);
    }
}

/// Whether the machine runs short of memory, whoever took it.
#[derive(Debug)]
struct Pressure {
    machine: Machine,
    threshold: u64,
    looked: Mutex<Option<Instant>>,
    on: AtomicBool,
}

impl Pressure {
    fn is_on(&self) -> bool {
        // Whoever finds the lock taken believes the last look.
        if let Some(mut looked) = self.looked.try_lock()
            && looked.is_none_or(|looked| looked.elapsed() > PRESSURE_AGE)
        {
            let short = self.machine.available().is_some_and(|available| available < self.threshold);
            if short != self.on.swap(short, Ordering::Relaxed) {
                match short {
                    true => tracing::warn!("the machine runs short of memory; guests are given no more"),
                    false => tracing::info!("the machine has memory for guests again"),
                }
            }
            *looked = Some(Instant::now());
        }
        self.on.load(Ordering::Relaxed)
    }
}

/// How the machine's memory is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Division {
    /// For everything that guests make the node hold.
    pub guests: u64,
    /// What idle instances may keep resident.
    pub idle: u64,
    /// A container's limit where its pod sets none.
    pub default_limit: u64,
}

impl Division {
    /// Divides so many bytes; `wanted` is what the node's operator gives to guests, instead of what would be left.
    pub fn of(machine: u64, wanted: Option<u64>) -> Self {
        let idle = machine / IDLE_SHARE;
        let left = machine.saturating_sub(idle).saturating_sub((machine / SYSTEM_SHARE).max(SYSTEM_MIN));
        // A machine that small runs nothing else.
        let guests = wanted.unwrap_or(left.max(machine / 4));
        Self { guests, idle, default_limit: guests / DEFAULT_SHARE }
    }
}

/// The machine as the agent may use it: its memory, or that of the control group that the agent is in.
#[derive(Debug, Clone)]
pub struct Machine {
    root: std::path::PathBuf,
}

impl Machine {
    pub fn this() -> Self {
        Self { root: "/".into() }
    }

    /// Bytes that the agent may use at most. None where the system does not say.
    pub fn total(&self) -> Option<u64> {
        let machine = self.meminfo("MemTotal:");
        let group = self.groups().filter_map(|group| group.limit).min();
        match (machine, group) {
            (Some(machine), Some(group)) => Some(machine.min(group)),
            (machine, group) => machine.or(group),
        }
    }

    /// Bytes that are free, or would be if the kernel wanted them.
    fn available(&self) -> Option<u64> {
        let groups = self.groups().filter_map(|group| Some(group.limit?.saturating_sub(group.used?)));
        self.meminfo("MemAvailable:").into_iter().chain(groups).min()
    }

    fn meminfo(&self, key: &str) -> Option<u64> {
        let text = std::fs::read_to_string(self.root.join("proc/meminfo")).ok()?;
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kilobytes| kilobytes * 1024)
    }

    /// The control group that this process is in and those that it lies in, of either version.
    fn groups(&self) -> impl Iterator<Item = Group> {
        let text = std::fs::read_to_string(self.root.join("proc/self/cgroup")).unwrap_or_default();
        let mounts = self.root.join("sys/fs/cgroup");
        let mut groups = Vec::new();
        for line in text.lines() {
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(controllers), Some(path)) = (parts.next(), parts.next()) else { continue };
            let (mount, files) = match controllers {
                "" => (mounts.clone(), &V2),
                _ if controllers.split(',').any(|controller| controller == "memory") => (mounts.join("memory"), &V1),
                _ => continue,
            };
            // In a namespace of its own a process may see a path that is not below its mount: then the mount is its group.
            let directory = mount.join(path.trim_start_matches('/'));
            let below = directory.ancestors().take_while(|directory| directory.starts_with(&mount));
            groups.extend(below.map(|directory| Group::read(directory, files)));
        }
        groups.into_iter()
    }
}

struct Files {
    limits: &'static [&'static str],
    used: &'static str,
    reclaimable: &'static str,
}

const V2: Files =
    Files { limits: &["memory.max", "memory.high"], used: "memory.current", reclaimable: "inactive_file " };
const V1: Files =
    Files { limits: &["memory.limit_in_bytes"], used: "memory.usage_in_bytes", reclaimable: "total_inactive_file " };

struct Group {
    limit: Option<u64>,
    used: Option<u64>,
}

impl Group {
    fn read(directory: &Path, files: &Files) -> Self {
        let number = |name: &&str| std::fs::read_to_string(directory.join(name)).ok()?.trim().parse::<u64>().ok();
        // "max" is no number; version 1 has a huge one for it.
        let limit = files.limits.iter().filter_map(number).filter(|limit| *limit < i64::MAX as u64 / 2).min();
        let cached = || {
            let text = std::fs::read_to_string(directory.join("memory.stat")).ok()?;
            text.lines().find_map(|line| line.strip_prefix(files.reclaimable))?.trim().parse::<u64>().ok()
        };
        let used = limit.and_then(|_| number(&files.used)).map(|used| used.saturating_sub(cached().unwrap_or(0)));
        Self { limit, used }
    }
}

/// The node's budget on this machine.
pub fn node_budget(machine: Machine, division: Division) -> Arc<Budget> {
    let threshold = machine.total().map_or(0, |total| (total / PRESSURE_SHARE).min(PRESSURE_MAX));
    let pressure = Pressure { machine, threshold, looked: Mutex::new(None), on: AtomicBool::new(false) };
    Budget::make(Scope::Node, division.guests, None, Some(pressure))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::testing::Random;
    use std::fs;

    fn tree() -> [Arc<Budget>; 4] {
        let node = Budget::node(1000);
        let pod = Budget::within(&node, Scope::Pod, 600);
        let [one, two] = [400, 500].map(|limit| Budget::within(&pod, Scope::Container, limit));
        [node, pod, one, two]
    }

    #[test]
    fn memory_counts_against_the_container_its_pod_and_the_node_and_is_refused_by_the_first_that_is_full() {
        let [node, pod, one, two] = tree();
        let kept = one.reserve(400).unwrap();
        assert_eq!([node.used(), pod.used(), one.used(), two.used()], [400, 400, 400, 0]);
        assert_eq!(one.reserve(1).unwrap_err().scope, Scope::Container);
        let refused = two.reserve(201).unwrap_err();
        assert_eq!((refused.scope, refused.used, refused.limit), (Scope::Pod, 400, 600));
        assert_eq!([node.used(), two.used()], [400, 0], "what was refused is counted nowhere");
        let beside = Budget::within(&node, Scope::Container, 10_000);
        assert_eq!(beside.reserve(601).unwrap_err().scope, Scope::Node);
        drop(kept);
        assert_eq!([node.used(), pod.used(), one.used()], [0; 3]);
    }

    #[test]
    fn amounts_beyond_any_number_are_refused_and_not_wrapped_around() {
        let budget = Budget::node(u64::MAX);
        let kept = budget.reserve(10).unwrap();
        assert!(budget.take(u64::MAX).is_err());
        assert_eq!(budget.used(), 10);
        drop(kept);
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn a_limit_that_was_lowered_gives_out_nothing_until_enough_came_back() {
        let budget = Budget::node(100);
        let mut kept = budget.reserve(80).unwrap();
        budget.set_limit(50);
        assert!(kept.grow(1).is_err());
        kept.resize(40).unwrap();
        kept.grow(10).unwrap();
        assert!(kept.grow(1).is_err());
    }

    #[test]
    fn whatever_is_grown_and_dropped_at_once_no_limit_is_passed_and_all_comes_back() {
        let [node, pod, one, two] = tree();
        let check = || {
            for budget in [&node, &pod, &one, &two] {
                assert!(budget.used() <= budget.limit(), "{budget:?}");
            }
        };
        std::thread::scope(|scope| {
            for seed in 0..8 {
                let (one, two) = (&one, &two);
                scope.spawn(move || {
                    let mut random = Random::new(seed);
                    let mut kept: Vec<Reservation> = Vec::new();
                    for _ in 0..20_000 {
                        let amount = random.next() % 120;
                        match random.next() % 4 {
                            0 => kept.extend(if seed % 2 == 0 { one } else { two }.reserve(amount).ok()),
                            1 if !kept.is_empty() => {
                                let index = random.next() as usize % kept.len();
                                kept.swap_remove(index);
                            }
                            2 => _ = kept.last_mut().map(|kept| kept.grow(amount)),
                            _ => _ = kept.last_mut().map(|kept| kept.resize(amount)),
                        }
                        check();
                    }
                });
            }
        });
        assert_eq!([node.used(), pod.used(), one.used(), two.used()], [0; 4]);
    }

    fn machine(files: &[(&str, &str)]) -> (tempfile::TempDir, Machine) {
        let directory = tempfile::tempdir().unwrap();
        for (path, content) in files {
            let path = directory.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        let machine = Machine { root: directory.path().to_owned() };
        (directory, machine)
    }

    const MEMINFO: (&str, &str) = ("proc/meminfo", "MemTotal:  2048 kB\nMemFree: 1 kB\nMemAvailable:  1024 kB\n");

    #[test]
    fn the_smallest_limit_of_the_control_groups_that_the_agent_is_in_is_what_it_has() {
        let (_directory, machine) = machine(&[
            MEMINFO,
            ("proc/self/cgroup", "0::/system.slice/krustlet.service\n"),
            ("sys/fs/cgroup/system.slice/memory.max", "600000\n"),
            ("sys/fs/cgroup/system.slice/krustlet.service/memory.max", "max\n"),
            ("sys/fs/cgroup/system.slice/memory.current", "500000\n"),
            ("sys/fs/cgroup/system.slice/memory.stat", "anon 1\ninactive_file 100000\n"),
        ]);
        assert_eq!((machine.total(), machine.available()), (Some(600_000), Some(200_000)));
    }

    #[test]
    fn the_first_version_of_control_groups_is_read_too() {
        let (_directory, machine) = machine(&[
            MEMINFO,
            ("proc/self/cgroup", "5:cpu,cpuacct:/a\n4:memory:/docker/abc\n"),
            ("sys/fs/cgroup/memory/memory.limit_in_bytes", "700000\n"),
            ("sys/fs/cgroup/memory/memory.usage_in_bytes", "100000\n"),
            ("sys/fs/cgroup/memory/docker/abc/memory.limit_in_bytes", "9223372036854771712\n"),
        ]);
        assert_eq!((machine.total(), machine.available()), (Some(700_000), Some(600_000)));
    }

    #[test]
    fn a_machine_without_limits_has_what_it_has() {
        let (_directory, machine) = machine(&[MEMINFO, ("proc/self/cgroup", "0::/\n")]);
        assert_eq!((machine.total(), machine.available()), (Some(2048 * 1024), Some(1024 * 1024)));
        assert!(Machine::this().total().is_none_or(|total| total > 64 * MIB));
    }

    #[test]
    fn the_parts_of_a_machine_are_less_than_the_whole() {
        for gib in [1, 2, 4, 24, 512] {
            let machine = gib * 1024 * MIB;
            let division = Division::of(machine, None);
            assert!(division.guests + division.idle + SYSTEM_MIN <= machine, "{gib}: {division:?}");
            assert!(division.guests >= machine / 2, "{gib}: {division:?}");
            assert!(division.default_limit < division.guests);
        }
        assert_eq!(Division::of(1 << 34, Some(1 << 30)).guests, 1 << 30);
    }

    #[test]
    fn a_machine_that_runs_short_gives_guests_no_more_until_it_has_again() {
        let (directory, machine) = machine(&[("proc/meminfo", "MemTotal: 4096000 kB\nMemAvailable: 1000 kB\n")]);
        let budget = node_budget(machine, Division::of(4_096_000 * 1024, None));
        assert_eq!(budget.take(2 * MIB).unwrap_err().scope, Scope::Node);
        assert_eq!(budget.used(), 0);
        fs::write(directory.path().join("proc/meminfo"), "MemTotal: 4096000 kB\nMemAvailable: 2000000 kB\n").unwrap();
        *budget.pressure.as_ref().unwrap().looked.lock() = None;
        budget.take(2 * MIB).unwrap();
    }
}
