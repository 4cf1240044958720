//! Ends pods that take more of the node's disk than they may, or than it has: what the kubelet's eviction manager does for
//! ephemeral storage, with its thresholds, its order and its messages.

use crate::disk::{Disk, Figures};
use crate::image_gc::ImageGc;
use crate::logs;
use crate::pod::fields::nanos;
use crate::pod::roster::Roster;
use crate::pod::{Role, containers, full_name, is_finished, uid};
use crate::trees::{self, Usage};
use crate::view::View as _;
use anyhow::{Context as _, bail, ensure};
use k8s_openapi::api::core::v1::{Container, Pod};
use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::watch;
use tracing::{info, warn};

/// How often pods are measured that have a limit, and the node is looked at; as with the kubelet.
const PERIOD: Duration = Duration::from_secs(10);
/// Measuring takes no more than one part in so many of the time.
const SHARE: u32 = 10;
/// How long a pod that was evicted may take to be gone before the next one follows.
const CLEANUP: Duration = Duration::from_secs(30);
/// From this priority on, a pod is the cluster's own and is never evicted for the node's sake.
const SYSTEM_CRITICAL: i32 = 2_000_000_000;
const RESOURCE: &str = "ephemeral-storage";

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

/// Below which the node is under disk pressure.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Thresholds {
    pub available: Threshold,
    pub inodes_free: Threshold,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self { available: Threshold::Share(10), inodes_free: Threshold::Share(5) }
    }
}

impl Thresholds {
    /// Reads the kubelet's spelling, `nodefs.available<10%,nodefs.inodesFree<5%`; what is not named keeps its default.
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
                "nodefs.available" => thresholds.available = threshold,
                "nodefs.inodesFree" => thresholds.inodes_free = threshold,
                _ => bail!("{signal:?} is no signal of this node: nodefs.available, nodefs.inodesFree"),
            }
        }
        Ok(thresholds)
    }

    /// What the node has too little of, if anything.
    pub fn starved(self, disk: Figures) -> Option<Starved> {
        let bytes = self.available.of(disk.total);
        let inodes = self.inodes_free.of(disk.inodes);
        if disk.total > 0 && disk.available < bytes {
            return Some(Starved { resource: RESOURCE, threshold: bytes, available: disk.available });
        }
        // Some file systems have no number of inodes.
        (disk.inodes > 0 && disk.inodes_free < inodes).then_some(Starved {
            resource: "inodes",
            threshold: inodes,
            available: disk.inodes_free,
        })
    }
}

fn bytes(quantity: &str) -> Option<u64> {
    let quantity = k8s_openapi::apimachinery::pkg::api::resource::Quantity(quantity.to_owned());
    u64::try_from(nanos(&quantity)? / 1_000_000_000).ok()
}

/// Something that the node has too little of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Starved {
    pub resource: &'static str,
    threshold: u64,
    available: u64,
}

/// The pods that are to end, and why. Written by [`Evictor`], followed by the pods' workers.
#[derive(Debug, Default)]
pub struct Evictions(watch::Sender<HashMap<String, String>>);

impl Evictions {
    fn evict(&self, uid: &str, message: String) {
        self.0.send_modify(|asked| drop(asked.insert(uid.to_owned(), message)));
    }

    /// Waits until the pod is to end, and gives the reason.
    pub async fn of(&self, uid: &str) -> String {
        let mut asked = self.0.subscribe();
        let found = match asked.wait_for(|asked| asked.contains_key(uid)).await {
            Ok(asked) => asked.get(uid).cloned(),
            Err(_) => None,
        };
        match found {
            Some(message) => message,
            None => std::future::pending().await,
        }
    }

    /// Forgets pods that are gone.
    fn retain(&self, known: impl Fn(&str) -> bool) {
        self.0.send_if_modified(|asked| {
            asked.retain(|uid, _| known(uid));
            false
        });
    }
}

/// What a pod takes of the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PodUsage {
    /// emptyDirs by name.
    empty_dirs: BTreeMap<String, Usage>,
    /// Files of ConfigMaps and the like.
    files: Usage,
    /// By container.
    logs: BTreeMap<String, Usage>,
}

impl PodUsage {
    /// Walks the pod's directories, where blocking is allowed.
    pub fn measure(data_dir: &Path, pod: &Pod) -> Self {
        let volumes = data_dir.join("pods").join(uid(pod)).join("volumes");
        let logs = logs::pod_directory(data_dir, pod);
        let spec = pod.spec.iter();
        let mut usage = Self::default();
        for volume in spec.clone().flat_map(|spec| spec.volumes.iter().flatten()) {
            if volume.host_path.is_some() {
                continue;
            }
            let found = trees::measure(&volumes.join(&volume.name));
            match &volume.empty_dir {
                Some(_) => drop(usage.empty_dirs.insert(volume.name.clone(), found)),
                None => usage.files.add(found),
            }
        }
        for (_, container) in spec.flat_map(containers) {
            usage.logs.insert(container.name.clone(), trees::measure(&logs.join(&container.name)));
        }
        usage
    }

    fn total(&self) -> Usage {
        let mut total = self.files;
        self.empty_dirs.values().chain(self.logs.values()).for_each(|usage| total.add(*usage));
        total
    }
}

/// Why the pod is to end for its own limits, if it is. The messages are the kubelet's.
pub fn over_limit(pod: &Pod, usage: &PodUsage) -> Option<String> {
    let spec = pod.spec.as_ref()?;
    for volume in spec.volumes.iter().flatten() {
        let Some(limit) = volume.empty_dir.as_ref().and_then(|source| source.size_limit.as_ref()) else { continue };
        let Some(bytes) = bytes(&limit.0).filter(|bytes| *bytes > 0) else { continue };
        if usage.empty_dirs.get(&volume.name).is_some_and(|usage| exceeds(*usage, bytes)) {
            return Some(format!("Usage of EmptyDir volume {:?} exceeds the limit {:?}. ", volume.name, limit.0));
        }
    }
    if let Some(limit) = pod_limit(pod)
        && exceeds(usage.total(), limit)
    {
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "));
    }
    containers(spec).find_map(|(_, container)| {
        let limit = resource(container, Kind::Limit)?;
        let used = usage.logs.get(&container.name)?;
        exceeds(*used, limit)
            .then(|| format!("Container {} exceeded its local ephemeral storage limit \"{limit}\". ", container.name))
    })
}

/// More than can be counted is more than any limit.
fn exceeds(usage: Usage, limit: u64) -> bool {
    usage.more || usage.bytes > limit
}

/// Whether the pod has anything to be held to, so that measuring it is worth its while.
fn is_limited(pod: &Pod) -> bool {
    let empty_dirs = pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten());
    let mut empty_dirs = empty_dirs.filter_map(|volume| volume.empty_dir.as_ref());
    empty_dirs.any(|source| source.size_limit.is_some()) || pod_limit(pod).is_some()
}

#[derive(Clone, Copy)]
enum Kind {
    Limit,
    Request,
}

fn resource(container: &Container, kind: Kind) -> Option<u64> {
    let resources = container.resources.as_ref()?;
    let list = match kind {
        Kind::Limit => &resources.limits,
        Kind::Request => &resources.requests,
    };
    bytes(&list.as_ref()?.get(RESOURCE)?.0)
}

/// The sum over the containers that run at the same time; none when no container has a limit.
fn pod_limit(pod: &Pod) -> Option<u64> {
    let spec = pod.spec.as_ref()?;
    let (mut sum, mut sidecars, mut highest_init, mut any) = (0u64, 0u64, 0u64, false);
    for (role, container) in containers(spec) {
        let limit = resource(container, Kind::Limit);
        any |= limit.is_some();
        let limit = limit.unwrap_or(0);
        match role {
            Role::Main => sum = sum.saturating_add(limit),
            Role::Sidecar => {
                sum = sum.saturating_add(limit);
                sidecars = sidecars.saturating_add(limit);
                highest_init = highest_init.max(sidecars);
            }
            Role::Init => highest_init = highest_init.max(sidecars.saturating_add(limit)),
        }
    }
    any.then_some(sum.max(highest_init)).filter(|limit| *limit > 0)
}

fn requested(pod: &Pod) -> u64 {
    let containers = pod.spec.iter().flat_map(|spec| &spec.containers);
    containers.filter_map(|container| resource(container, Kind::Request)).sum()
}

fn is_critical(pod: &Pod) -> bool {
    priority(pod) >= SYSTEM_CRITICAL
}

fn priority(pod: &Pod) -> i32 {
    pod.spec.as_ref().and_then(|spec| spec.priority).unwrap_or(0)
}

/// The kubelet's order under disk pressure: pods that take more than they requested first, then those of lower priority,
/// then those that take most above their request. Critical ones never.
pub fn rank(mut pods: Vec<(Arc<Pod>, PodUsage)>, starved: Starved) -> Vec<(Arc<Pod>, PodUsage)> {
    pods.retain(|(pod, _)| !is_critical(pod));
    pods.sort_by_cached_key(|(pod, usage)| {
        let (total, request) = (usage.total(), requested(pod));
        let above = if starved.resource == RESOURCE { total.bytes.saturating_sub(request) } else { total.files };
        (Reverse(total.more || total.bytes > request), priority(pod), Reverse((total.more, above)))
    });
    pods
}

/// What a pod is told that has to go for the node.
fn low_on(starved: Starved, pod: &Pod, usage: &PodUsage) -> String {
    let Starved { resource: name, threshold, available } = starved;
    let mut message =
        format!("The node was low on resource: {name}. Threshold quantity: {threshold}, available: {available}. ");
    let spec = pod.spec.iter();
    for container in spec.flat_map(|spec| &spec.containers) {
        let used = usage.logs.get(&container.name).map_or(0, |usage| usage.bytes);
        let request = resource(container, Kind::Request).unwrap_or(0);
        if used > request {
            message += &format!(
                "Container {} was using {used}, request is {request}, has larger consumption of {name}. ",
                container.name
            );
        }
    }
    message
}

/// Looks after the disk for as long as the agent runs.
pub struct Evictor {
    pub roster: Arc<Roster>,
    pub evictions: Arc<Evictions>,
    pub data_dir: PathBuf,
    pub disk: Disk,
    pub thresholds: Thresholds,
    pub images: Arc<ImageGc>,
    /// How long the present round has measured.
    pub measuring: Duration,
}

impl Evictor {
    pub async fn run(mut self) {
        loop {
            self.keep_limits().await;
            if let Some(starved) = self.thresholds.starved(self.disk.last()) {
                self.relieve(starved).await;
            }
            self.evictions.retain(|uid| self.roster.has_pod(uid));
            tokio::time::sleep(PERIOD.max(std::mem::take(&mut self.measuring) * SHARE)).await;
        }
    }

    /// Pods that have not ended yet and are not ending.
    fn active(&self) -> Vec<Arc<Pod>> {
        let pods = self.roster.pods().into_iter();
        pods.filter(|pod| !is_finished(pod) && pod.metadata.deletion_timestamp.is_none()).collect()
    }

    /// Evicts the pods that take more than their own limits.
    async fn keep_limits(&mut self) {
        for pod in self.active().into_iter().filter(|pod| is_limited(pod)) {
            let usage = self.measure(pod.clone()).await;
            if let Some(message) = over_limit(&pod, &usage) {
                info!(pod = full_name(&pod), "evicting a pod: {message}");
                self.evictions.evict(uid(&pod), message);
            }
        }
    }

    /// Makes room: images that nobody uses go first, then one pod.
    async fn relieve(&mut self, starved: Starved) {
        warn!(
            "the node is low on {}: {} are left of at least {}",
            starved.resource, starved.available, starved.threshold
        );
        self.images.remove_unused().await;
        let Some(starved) = self.thresholds.starved(self.disk.next().await) else { return };
        let mut pods = Vec::new();
        for pod in self.active() {
            let usage = self.measure(pod.clone()).await;
            pods.push((pod, usage));
        }
        let Some((pod, usage)) = rank(pods, starved).into_iter().next() else {
            warn!("the node is low on {}, and has no pod that may be evicted", starved.resource);
            return;
        };
        info!(pod = full_name(&pod), "evicting a pod: the node is low on {}", starved.resource);
        self.evictions.evict(uid(&pod), low_on(starved, &pod, &usage));
        // What it had is free only when it has ended.
        let begin = Instant::now();
        while begin.elapsed() < CLEANUP && self.active().iter().any(|active| uid(active) == uid(&pod)) {
            self.disk.next().await;
        }
    }

    async fn measure(&mut self, pod: Arc<Pod>) -> PodUsage {
        let data_dir = self.data_dir.clone();
        let begin = Instant::now();
        let measured = tokio::task::spawn_blocking(move || PodUsage::measure(&data_dir, &pod)).await;
        self.measuring += begin.elapsed();
        measured.unwrap_or_default()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn pod(spec: Value) -> Pod {
        let mut pod = json!({"metadata": {"name": "web", "namespace": "shop", "uid": "u-1"}, "spec": spec});
        for container in pod["spec"]["containers"].as_array_mut().unwrap() {
            if container.get("name").is_none() {
                container["name"] = json!("app");
            }
        }
        serde_json::from_value(pod).unwrap()
    }

    fn limited(name: &str, bytes: &str) -> Value {
        json!({"name": name, "resources": {"limits": {"ephemeral-storage": bytes}}})
    }

    fn bytes(bytes: u64) -> Usage {
        Usage { bytes, files: 1, more: false }
    }

    fn usage(empty_dir: u64, log: u64) -> PodUsage {
        PodUsage {
            empty_dirs: [("cache".to_owned(), bytes(empty_dir))].into(),
            files: bytes(0),
            logs: [("app".to_owned(), bytes(log))].into(),
        }
    }

    const STARVED: Starved = Starved { resource: RESOURCE, threshold: 10, available: 1 };

    #[test]
    fn an_empty_dir_is_held_to_its_size_limit_and_what_cannot_be_counted_is_more() {
        let pod = pod(json!({"containers": [{}], "volumes": [{"name": "cache", "emptyDir": {"sizeLimit": "1Ki"}}]}));
        assert!(is_limited(&pod));
        assert_eq!(over_limit(&pod, &usage(1024, 1 << 30)), None, "logs are not in it");
        let message = over_limit(&pod, &usage(1025, 0)).unwrap();
        assert_eq!(message, "Usage of EmptyDir volume \"cache\" exceeds the limit \"1Ki\". ");
        let mut uncounted = usage(0, 0);
        uncounted.empty_dirs.insert("cache".into(), Usage { more: true, ..bytes(0) });
        assert!(over_limit(&pod, &uncounted).is_some());
    }

    #[test]
    fn a_container_is_held_to_its_limit_by_its_logs_and_the_pod_by_everything() {
        let pod = pod(json!({"containers": [limited("app", "1k"), limited("other", "1k")]}));
        assert_eq!(over_limit(&pod, &usage(0, 1000)), None);
        let message = over_limit(&pod, &usage(0, 1001)).unwrap();
        assert_eq!(message, "Container app exceeded its local ephemeral storage limit \"1000\". ");
        let message = over_limit(&pod, &usage(1500, 501)).unwrap();
        assert!(message.contains("total limit of containers 2000"), "{message}");
    }

    #[test]
    fn a_pods_limit_is_that_of_the_containers_that_run_at_the_same_time() {
        let sidecar = |bytes: &str| {
            let mut container = limited("side", bytes);
            container["restartPolicy"] = json!("Always");
            container
        };
        let limit = |init: Value, main: Value| pod_limit(&pod(json!({"initContainers": init, "containers": main})));
        assert_eq!(limit(json!([]), json!([{}])), None);
        assert_eq!(limit(json!([]), json!([limited("a", "3"), {}, limited("b", "4")])), Some(7));
        assert_eq!(limit(json!([limited("i", "9")]), json!([limited("a", "3")])), Some(9));
        assert_eq!(limit(json!([sidecar("5"), limited("i", "9")]), json!([limited("a", "3")])), Some(14));
        assert_eq!(limit(json!([limited("i", "6"), sidecar("5")]), json!([limited("a", "3")])), Some(8));
    }

    #[test]
    fn pods_go_in_the_kubelets_order() {
        let ranked = |pods: Vec<(&str, Value, u64)>| -> Vec<String> {
            let pods = pods.into_iter().map(|(name, mut spec, used)| {
                spec["containers"] = json!([{"resources": {"requests": {"ephemeral-storage": "100"}}}]);
                let mut pod = pod(spec);
                pod.metadata.name = Some(name.to_owned());
                (Arc::new(pod), usage(used, 0))
            });
            rank(pods.collect(), STARVED).into_iter().map(|(pod, _)| pod.metadata.name.clone().unwrap()).collect()
        };
        let order = ranked(vec![
            ("within", json!({"priority": -5}), 90),
            ("most", json!({}), 900),
            ("important", json!({"priority": 1000}), 5000),
            ("some", json!({}), 200),
            ("critical", json!({"priority": SYSTEM_CRITICAL}), 9000),
            ("least-important", json!({"priority": -1}), 101),
        ]);
        assert_eq!(order, ["least-important", "most", "some", "important", "within"]);
    }

    #[test]
    fn thresholds_have_the_kubelets_spelling_and_defaults() {
        let disk = |available, inodes_free| Figures { total: 1000, available, inodes: 200, inodes_free };
        let default = Thresholds::parse("").unwrap();
        assert_eq!(default, Thresholds::default());
        assert_eq!(default.starved(disk(100, 10)), None);
        assert_eq!(default.starved(disk(99, 10)).unwrap().resource, RESOURCE);
        assert_eq!(default.starved(disk(100, 9)).unwrap().resource, "inodes");
        assert_eq!(default.starved(Figures::default()), None, "a disk that does not answer");
        let given = Thresholds::parse("nodefs.available<1Ki, nodefs.inodesFree<0%").unwrap();
        assert_eq!(given, Thresholds { available: Threshold::Amount(1024), inodes_free: Threshold::Share(0) });
        for wrong in ["nodefs.available", "nodefs.available<x", "nodefs.available<101%", "pid.available<5", "<5%"] {
            assert!(Thresholds::parse(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_pod_that_goes_for_the_node_is_told_what_it_took() {
        let message = low_on(STARVED, &pod(json!({"containers": [{}]})), &usage(0, 7));
        assert!(
            message
                .starts_with("The node was low on resource: ephemeral-storage. Threshold quantity: 10, available: 1. ")
        );
        assert!(message.contains("Container app was using 7, request is 0"), "{message}");
    }

    #[test]
    fn volumes_and_logs_are_measured_and_the_hosts_directories_are_not() {
        let data = tempfile::tempdir().unwrap();
        let volumes = [
            json!({"name": "cache", "emptyDir": {}}),
            json!({"name": "host", "hostPath": {"path": "/"}}),
            json!({"name": "conf", "configMap": {"name": "c"}}),
        ];
        let pod = pod(json!({"containers": [{}], "volumes": volumes}));
        for path in
            ["pods/u-1/volumes/cache", "pods/u-1/volumes/conf", "pods/u-1/volumes/host", "logs/shop_web_u-1/app"]
        {
            std::fs::create_dir_all(data.path().join(path)).unwrap();
            let file = data.path().join(path).join("file");
            std::fs::write(&file, [1; 8192]).unwrap();
            std::fs::File::open(file).unwrap().sync_all().unwrap();
        }
        let usage = PodUsage::measure(data.path(), &pod);
        assert_eq!((usage.total().files, usage.empty_dirs.len(), usage.logs["app"].files), (3, 1, 1));
        assert!(usage.total().bytes >= 3 * 8192);
    }

    #[tokio::test]
    async fn the_worker_of_an_evicted_pod_hears_of_it_and_no_other_does() {
        let evictions = Evictions::default();
        let (mut ours, mut other) = (std::pin::pin!(evictions.of("a")), std::pin::pin!(evictions.of("b")));
        assert!(futures::poll!(&mut ours).is_pending());
        evictions.evict("a", "why".into());
        assert_eq!(ours.await, "why");
        assert!(futures::poll!(&mut other).is_pending());
        evictions.retain(|uid| uid != "a");
        assert!(futures::poll!(std::pin::pin!(evictions.of("a"))).is_pending());
    }
}
