//! What the node runs short of: the kubelet's thresholds, the conditions that follow from them, and whom they keep out.

use crate::disk::Disk;
use crate::memory::{self, Memory, PodsMemory};
use crate::pod::fields::nanos;
use crate::pod::is_critical;
use crate::reasons::node as reasons;
use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::{Pod, Toleration};
use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
use parking_lot::Mutex;
use std::fmt;
use std::time::{Duration, Instant};

/// Put on a node that is under this pressure by the cluster.
const MEMORY_TAINT: &str = "node.kubernetes.io/memory-pressure";
const NO_SCHEDULE: &str = "NoSchedule";
const MIB: u64 = 1024 * 1024;

/// How little of something the node may have left.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Threshold {
    Amount(u64),
    /// In percent.
    Share(u8),
}

impl Threshold {
    /// The amount, of so many in all.
    pub fn of(self, total: u64) -> u64 {
        match self {
            Self::Amount(amount) => amount,
            Self::Share(percent) => u64::try_from(u128::from(total) * u128::from(percent) / 100).unwrap_or(u64::MAX),
        }
    }
}

/// Below which the node is under pressure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    pub memory_available: Threshold,
    /// That of [`Self::memory_available`], where none is given: the kubelet's rule.
    pub allocatable_memory_available: Option<Threshold>,
    pub nodefs_available: Threshold,
    pub nodefs_inodes_free: Threshold,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            memory_available: Threshold::Amount(100 * MIB),
            allocatable_memory_available: None,
            nodefs_available: Threshold::Share(10),
            nodefs_inodes_free: Threshold::Share(5),
        }
    }
}

impl Thresholds {
    /// Reads the kubelet's spelling, `memory.available<100Mi,nodefs.available<10%`; what is not named keeps its default.
    ///
    /// Fails for signals that this node does not watch, and for what is no amount.
    pub fn parse(text: &str) -> anyhow::Result<Self> {
        let mut thresholds = Self::default();
        for entry in text.split(',').map(str::trim).filter(|entry| !entry.is_empty()) {
            let (signal, amount) = entry.split_once('<').with_context(|| format!("{entry:?} is not SIGNAL<AMOUNT"))?;
            let threshold = match amount.strip_suffix('%') {
                Some(percent) => {
                    let percent: u8 = percent.parse().with_context(|| format!("{amount:?} is no share"))?;
                    ensure!(percent <= 100, "{amount:?} is more than there is");
                    Threshold::Share(percent)
                }
                None => Threshold::Amount(bytes(amount).with_context(|| format!("{amount:?} is no amount"))?),
            };
            match signal {
                "memory.available" => thresholds.memory_available = threshold,
                "allocatableMemory.available" => thresholds.allocatable_memory_available = Some(threshold),
                "nodefs.available" => thresholds.nodefs_available = threshold,
                "nodefs.inodesFree" => thresholds.nodefs_inodes_free = threshold,
                _ => {
                    bail!(
                        "{signal:?} is no signal of this node: memory.available, allocatableMemory.available, \
                         nodefs.available, nodefs.inodesFree"
                    )
                }
            }
        }
        Ok(thresholds)
    }
}

pub fn bytes(quantity: &str) -> Option<u64> {
    u64::try_from(nanos(&Quantity(quantity.to_owned()))? / 1_000_000_000).ok()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resource {
    Memory,
    EphemeralStorage,
    Inodes,
}

impl Resource {
    /// As requests, limits and messages call it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Memory => "memory",
            Self::EphemeralStorage => "ephemeral-storage",
            Self::Inodes => "inodes",
        }
    }
}

impl fmt::Display for Resource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(self.name())
    }
}

/// Something that the node has too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Starved {
    pub resource: Resource,
    pub threshold: u64,
    pub available: u64,
}

/// What the node tells of itself, and keeps pods out for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pressure {
    pub memory: bool,
    pub disk: bool,
}

/// The machine's figures against the thresholds.
#[derive(Debug)]
pub struct Signals {
    memory: Memory,
    pods: PodsMemory,
    disk: Disk,
    pub thresholds: Thresholds,
    /// For so long after the last sign of it a pressure is told: else what an eviction frees brings the next pods here.
    transition: Duration,
    seen: Mutex<[Option<Instant>; 2]>,
}

impl Signals {
    pub fn new(memory: Memory, pods: PodsMemory, disk: Disk, thresholds: Thresholds, transition: Duration) -> Self {
        Self { memory, pods, disk, thresholds, transition, seen: Mutex::default() }
    }

    pub fn memory(&self) -> memory::Figures {
        self.memory.figures()
    }

    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    /// What pods may take together, in bytes: what the node is not to go below is kept from them.
    pub fn allocatable_memory(&self) -> u64 {
        let (machine, pods) = (self.memory().total, self.pods.figures().total);
        pods.min(machine).saturating_sub(self.thresholds.memory_available.of(machine))
    }

    /// The machine, whoever took its memory, or the pods together: what they may take is full before the machine is, and then
    /// those that asked for what they hold would have to do without for those that did not.
    pub fn starved_memory(&self) -> Option<Starved> {
        let Thresholds { memory_available, allocatable_memory_available, .. } = self.thresholds;
        let of = |threshold, memory::Figures { total, available }| short(Resource::Memory, threshold, total, available);
        of(memory_available, self.memory())
            .or_else(|| of(allocatable_memory_available.unwrap_or(memory_available), self.pods.figures()))
    }

    /// As the disk was when it was looked at last. Some file systems have no number of inodes.
    pub fn starved_disk(&self) -> Option<Starved> {
        let (disk, thresholds) = (self.disk.last(), self.thresholds);
        short(Resource::EphemeralStorage, thresholds.nodefs_available, disk.total, disk.available)
            .or_else(|| short(Resource::Inodes, thresholds.nodefs_inodes_free, disk.inodes, disk.inodes_free))
    }

    pub fn pressure(&self) -> Pressure {
        self.pressure_at(Instant::now())
    }

    fn pressure_at(&self, now: Instant) -> Pressure {
        let starved = [self.starved_memory().is_some(), self.starved_disk().is_some()];
        let mut seen = self.seen.lock();
        let mut holds = [false; 2];
        for ((seen, starved), holds) in seen.iter_mut().zip(starved).zip(&mut holds) {
            if starved {
                *seen = Some(now);
            }
            *holds = seen.is_some_and(|seen| starved || now.duration_since(seen) < self.transition);
        }
        let [memory, disk] = holds;
        Pressure { memory, disk }
    }
}

/// Zero in all is no answer.
fn short(resource: Resource, threshold: Threshold, total: u64, available: u64) -> Option<Starved> {
    let threshold = threshold.of(total);
    (total > 0 && available < threshold).then_some(Starved { resource, threshold, available })
}

impl Pressure {
    /// Why a pod may not come now, if it may not: the kubelet's rule, and its message. Only memory pressure spares pods that
    /// asked for something, and those that tolerate it.
    pub fn keeps_out(self, pod: &Pod) -> Option<String> {
        let conditions: Vec<&str> = [(self.memory, reasons::MEMORY_PRESSURE), (self.disk, reasons::DISK_PRESSURE)]
            .into_iter()
            .filter_map(|(holds, condition)| holds.then_some(condition))
            .collect();
        if conditions.is_empty() || is_critical(pod) {
            return None;
        }
        let best_effort = pod.status.as_ref().and_then(|status| status.qos_class.as_deref()) == Some("BestEffort");
        let mut tolerations = pod.spec.iter().flat_map(|spec| spec.tolerations.iter().flatten());
        if !self.disk && (!best_effort || tolerations.any(tolerates_memory_pressure)) {
            return None;
        }
        Some(format!("The node had condition: [{}]. ", conditions.join(" ")))
    }
}

fn tolerates_memory_pressure(toleration: &Toleration) -> bool {
    let is = |field: &Option<String>, wanted: &str| field.as_deref().unwrap_or_default() == wanted;
    let any_value = is(&toleration.operator, "Exists");
    (is(&toleration.effect, "") || is(&toleration.effect, NO_SCHEDULE))
        && (is(&toleration.key, MEMORY_TAINT) || is(&toleration.key, "") && any_value)
        && (any_value || is(&toleration.value, ""))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::disk;
    use serde_json::{Value, json};

    fn signals(memory: (u64, u64), disk: disk::Figures, thresholds: &str) -> Signals {
        let memory = Memory::with(memory::Figures { total: memory.0, available: memory.1 });
        let pods = PodsMemory::With(memory::Figures { total: 6 << 30, available: 6 << 30 });
        Signals::new(memory, pods, Disk::with(disk), Thresholds::parse(thresholds).unwrap(), Duration::from_secs(300))
    }

    const DISK: disk::Figures = disk::Figures { total: 1000, available: 100, inodes: 200, inodes_free: 10 };
    const ENOUGH: (u64, u64) = (8 << 30, 100 << 20);

    #[test]
    fn thresholds_have_the_kubelets_spelling_and_defaults() {
        assert_eq!(Thresholds::parse("").unwrap(), Thresholds::default());
        let text = "nodefs.available<1Ki, nodefs.inodesFree<0%,memory.available<2%,allocatableMemory.available<3%";
        let given = Thresholds::parse(text).unwrap();
        let wanted = Thresholds {
            memory_available: Threshold::Share(2),
            allocatable_memory_available: Some(Threshold::Share(3)),
            nodefs_available: Threshold::Amount(1024),
            nodefs_inodes_free: Threshold::Share(0),
        };
        assert_eq!(given, wanted);
        for wrong in ["nodefs.available", "nodefs.available<x", "nodefs.available<101%", "pid.available<5", "<5%"] {
            assert!(Thresholds::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_node_is_short_of_what_is_below_its_threshold_and_of_nothing_that_does_not_answer() {
        let starved = |memory, disk| {
            let signals = signals(memory, disk, "");
            [signals.starved_memory(), signals.starved_disk()].map(|starved| starved.map(|starved| starved.resource))
        };
        assert_eq!(starved(ENOUGH, DISK), [None, None]);
        let (full, no_inodes) = (disk::Figures { available: 99, ..DISK }, disk::Figures { inodes_free: 9, ..DISK });
        assert_eq!(starved(ENOUGH, full), [None, Some(Resource::EphemeralStorage)]);
        assert_eq!(starved((8 << 30, (100 << 20) - 1), no_inodes), [Some(Resource::Memory), Some(Resource::Inodes)]);
        assert_eq!(starved((0, 0), disk::Figures::default()), [None, None]);
    }

    #[test]
    fn the_pods_together_are_held_to_what_they_may_take_by_the_machines_threshold_or_one_of_their_own() {
        let starved = |thresholds: &str, total: u64, available: u64| {
            let mut signals = signals((8 << 30, 8 << 30), DISK, thresholds);
            signals.pods = PodsMemory::With(memory::Figures { total, available });
            assert_eq!(signals.pressure_at(Instant::now()).memory, signals.starved_memory().is_some());
            signals.starved_memory()
        };
        let at = |threshold, available| Some(Starved { resource: Resource::Memory, threshold, available });
        assert_eq!(starved("", 6 << 30, 100 * MIB), None);
        assert_eq!(starved("", 6 << 30, 100 * MIB - 1), at(100 * MIB, 100 * MIB - 1));
        assert_eq!(
            starved("memory.available<50%", 1000, 499),
            at(500, 499),
            "a share is one of what the pods may take"
        );
        assert_eq!(starved("allocatableMemory.available<10", 1000, 10), None);
        assert_eq!(starved("allocatableMemory.available<10", 1000, 9), at(10, 9));
        assert_eq!(starved("memory.available<50%,allocatableMemory.available<0", 1000, 0), None);
    }

    #[test]
    fn a_pressure_is_told_for_a_while_after_its_last_sign() {
        let (begin, second) = (Instant::now(), Duration::from_secs(1));
        let mut signals = signals((8 << 30, 0), DISK, "");
        let memory = |signals: &Signals, at: Duration| signals.pressure_at(begin + at).memory;
        assert!(memory(&signals, Duration::ZERO));
        signals.memory = Memory::with(memory::Figures { total: 8 << 30, available: 1 << 30 });
        assert!(memory(&signals, 299 * second));
        assert!(!memory(&signals, 300 * second));
        assert!(!signals.pressure_at(begin).disk, "the other one never was");
    }

    #[test]
    fn pods_are_kept_out_by_the_kubelets_rule() {
        let pod = |class: &str, tolerations: Value, priority: i32| -> Pod {
            let spec = json!({"containers": [], "tolerations": tolerations, "priority": priority});
            serde_json::from_value(json!({"metadata": {}, "spec": spec, "status": {"qosClass": class}})).unwrap()
        };
        let (memory, disk) = (Pressure { memory: true, disk: false }, Pressure { memory: false, disk: true });
        let both = Pressure { memory: true, disk: true };
        let out = |pressure: Pressure, pod: &Pod| pressure.keeps_out(pod).is_some();
        let plain = pod("BestEffort", json!([]), 0);
        assert!(!out(Pressure::default(), &plain));
        assert_eq!(memory.keeps_out(&plain).unwrap(), "The node had condition: [MemoryPressure]. ");
        assert_eq!(both.keeps_out(&plain).unwrap(), "The node had condition: [MemoryPressure DiskPressure]. ");
        let requests = pod("Burstable", json!([]), 0);
        assert_eq!([memory, disk, both].map(|pressure| out(pressure, &requests)), [false, true, true]);
        let critical = pod("BestEffort", json!([]), 2_000_000_000);
        assert_eq!([memory, disk, both].map(|pressure| out(pressure, &critical)), [false; 3]);
        for (toleration, tolerates) in [
            (json!({"operator": "Exists"}), true),
            (json!({"key": MEMORY_TAINT, "operator": "Exists", "effect": "NoSchedule"}), true),
            (json!({"key": MEMORY_TAINT}), true),
            (json!({"key": MEMORY_TAINT, "value": "x"}), false),
            (json!({"key": MEMORY_TAINT, "operator": "Exists", "effect": "NoExecute"}), false),
            (json!({"key": "other", "operator": "Exists"}), false),
            (json!({}), false),
        ] {
            let pod = pod("BestEffort", json!([toleration]), 0);
            assert_eq!(!out(memory, &pod), tolerates, "{toleration}");
            assert!(out(disk, &pod) && out(both, &pod));
        }
    }
}
