//! Ends pods that take more of the node's memory or disk than it has, or more of the disk than they may: what the kubelet's
//! eviction manager does, with its thresholds, its order and its messages.

use crate::disk::Disk;
use crate::image_gc::ImageGc;
use crate::logs;
use crate::pod::roster::Roster;
use crate::pod::{Role, containers, full_name, is_critical, is_finished, priority, uid};
use crate::pressure::{Resource, Signals, Starved, bytes};
use crate::trees::{self, Usage};
use crate::view::View as _;
use k8s_openapi::api::core::v1::{Container, Pod, ResourceRequirements};
use krustlet_runtime::Stats;
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
/// How often it is looked whether it is gone.
const CLEANUP_LOOK: Duration = Duration::from_millis(200);
/// A pod that holds less memory is not evicted for the sake of it. Most pods here are that small, and where something else has
/// taken the machine's memory, their end would bring nothing back.
const WORTHWHILE: u64 = 4 * 1024 * 1024;

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
    if let Some(limit) = of_pod(pod, Resource::EphemeralStorage, Kind::Limit)
        && exceeds(usage.total(), limit)
    {
        return Some(format!("Pod ephemeral local storage usage exceeds the total limit of containers {limit}. "));
    }
    containers(spec).find_map(|(_, container)| {
        let limit = resource(container, Resource::EphemeralStorage, Kind::Limit)?;
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
    empty_dirs.any(|source| source.size_limit.is_some())
        || of_pod(pod, Resource::EphemeralStorage, Kind::Limit).is_some()
}

#[derive(Clone, Copy)]
enum Kind {
    Limit,
    Request,
}

fn resource(container: &Container, resource: Resource, kind: Kind) -> Option<u64> {
    listed(container.resources.as_ref()?, resource, kind)
}

fn listed(resources: &ResourceRequirements, resource: Resource, kind: Kind) -> Option<u64> {
    let list = match kind {
        Kind::Limit => &resources.limits,
        Kind::Request => &resources.requests,
    };
    bytes(&list.as_ref()?.get(resource.name())?.0)
}

/// A pod's own, or the sum over the containers that run at the same time; none when no container has any.
fn of_pod(pod: &Pod, name: Resource, kind: Kind) -> Option<u64> {
    let spec = pod.spec.as_ref()?;
    if let Some(own) = spec.resources.as_ref().and_then(|resources| listed(resources, name, kind)) {
        return Some(own);
    }
    let (mut sum, mut sidecars, mut highest_init, mut any) = (0u64, 0u64, 0u64, false);
    for (role, container) in containers(spec) {
        let amount = resource(container, name, kind);
        any |= amount.is_some();
        let amount = amount.unwrap_or(0);
        match role {
            Role::Main => sum = sum.saturating_add(amount),
            Role::Sidecar => {
                sum = sum.saturating_add(amount);
                sidecars = sidecars.saturating_add(amount);
                highest_init = highest_init.max(sidecars);
            }
            Role::Init => highest_init = highest_init.max(sidecars.saturating_add(amount)),
        }
    }
    any.then_some(sum.max(highest_init)).filter(|amount| *amount > 0)
}

/// What a pod takes of what the node is short of.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Consumption {
    used: u64,
    /// It could not be counted to its end.
    more: bool,
    request: u64,
    /// By container, with its request.
    containers: Vec<(String, u64, u64)>,
}

impl Consumption {
    /// `code` is what was loaded for the pod and no container has alone.
    fn of_memory(pod: &Pod, used: impl Fn(&str) -> u64, code: u64) -> Self {
        let spec = pod.spec.iter().flat_map(containers);
        let containers: Vec<_> = spec
            .map(|(_, container)| {
                let request = resource(container, Resource::Memory, Kind::Request).unwrap_or(0);
                (container.name.clone(), used(&container.name), request)
            })
            .collect();
        let used = containers.iter().map(|(_, used, _)| used).sum::<u64>().saturating_add(code);
        let request = of_pod(pod, Resource::Memory, Kind::Request).unwrap_or(0);
        Self { used, more: false, request, containers }
    }

    /// Of bytes, or of files, which nobody can request.
    fn of_disk(pod: &Pod, usage: &PodUsage, short: Resource) -> Self {
        let amount = |usage: Usage| if short == Resource::Inodes { usage.files } else { usage.bytes };
        let logs = |name: &str| usage.logs.get(name).map_or(0, |usage| amount(*usage));
        let spec = pod.spec.iter().flat_map(|spec| &spec.containers);
        let containers = spec.map(|container| {
            let request = resource(container, short, Kind::Request).unwrap_or(0);
            (container.name.clone(), logs(&container.name), request)
        });
        let total = usage.total();
        let request = of_pod(pod, short, Kind::Request).unwrap_or(0);
        Self { used: amount(total), more: total.more, request, containers: containers.collect() }
    }
}

/// The kubelet's order under pressure: pods that take more than they requested first, then those of lower priority, then those
/// that take most above their request. Critical ones never.
pub fn rank(mut pods: Vec<(Arc<Pod>, Consumption)>) -> Vec<(Arc<Pod>, Consumption)> {
    pods.retain(|(pod, _)| !is_critical(pod));
    pods.sort_by_cached_key(|(pod, Consumption { used, more, request, .. })| {
        let above = i128::from(*used) - i128::from(*request);
        (Reverse(*more || used > request), priority(pod), Reverse((*more, above)))
    });
    pods
}

/// What a pod is told that has to go for the node.
fn low_on(starved: Starved, taken: &Consumption) -> String {
    let Starved { resource: name, threshold, available } = starved;
    let mut message =
        format!("The node was low on resource: {name}. Threshold quantity: {threshold}, available: {available}. ");
    for (container, used, request) in taken.containers.iter().filter(|(_, used, request)| used > request) {
        message += &format!(
            "Container {container} was using {used}, request is {request}, has larger consumption of {name}. "
        );
    }
    message
}

/// Looks after memory and disk for as long as the agent runs.
pub struct Evictor {
    pub roster: Arc<Roster>,
    pub evictions: Arc<Evictions>,
    pub data_dir: PathBuf,
    pub signals: Arc<Signals>,
    pub disk: Disk,
    pub images: Arc<ImageGc>,
    /// How long the present round has measured.
    pub measuring: Duration,
}

impl Evictor {
    pub async fn run(mut self) {
        loop {
            self.keep_limits().await;
            // As with the kubelet, one pod at a time, and memory first: it does not wait.
            while let Some(starved) = self.signals.starved_memory() {
                let taken = self.memory();
                if !self.evict_first(starved, taken).await {
                    break;
                }
            }
            if let Some(starved) = self.signals.starved_disk() {
                self.relieve_disk(starved).await;
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

    /// What the pods hold that hold enough.
    fn memory(&self) -> Vec<(Arc<Pod>, Consumption)> {
        let usage = self.roster.usage();
        let mut by_pod: HashMap<&str, HashMap<&str, &Stats>> = HashMap::new();
        for used in &usage {
            by_pod.entry(&used.pod_uid).or_default().insert(&used.container, &used.stats);
        }
        let pods = self.active().into_iter().filter_map(|pod| {
            let stats = by_pod.get(uid(&pod))?;
            let code = stats.values().map(|stats| stats.code_bytes).max().unwrap_or(0);
            let used = |container: &str| stats.get(container).map_or(0, |stats| stats.memory_bytes);
            let taken = Consumption::of_memory(&pod, used, code);
            Some((pod, taken))
        });
        pods.filter(|(_, taken)| taken.used >= WORTHWHILE).collect()
    }

    /// Makes room: images that nobody uses go first, then one pod.
    async fn relieve_disk(&mut self, starved: Starved) {
        warn!(
            "the node is low on {}: {} are left of at least {}",
            starved.resource, starved.available, starved.threshold
        );
        self.images.remove_unused().await;
        self.disk.next().await;
        let Some(starved) = self.signals.starved_disk() else { return };
        let mut pods = Vec::new();
        for pod in self.active() {
            let usage = self.measure(pod.clone()).await;
            let taken = Consumption::of_disk(&pod, &usage, starved.resource);
            pods.push((pod, taken));
        }
        if self.evict_first(starved, pods).await {
            // What it had is free in the next figures only.
            self.disk.next().await;
        }
    }

    /// Evicts the pod that comes first, and waits until it has ended, when what it had is free. Gives whether there was one.
    async fn evict_first(&self, starved: Starved, pods: Vec<(Arc<Pod>, Consumption)>) -> bool {
        let Some((pod, taken)) = rank(pods).into_iter().next() else {
            warn!("the node is low on {}, and has no pod that may be evicted", starved.resource);
            return false;
        };
        info!(pod = full_name(&pod), "evicting a pod: the node is low on {}", starved.resource);
        self.evictions.evict(uid(&pod), low_on(starved, &taken));
        let begin = Instant::now();
        while begin.elapsed() < CLEANUP && self.active().iter().any(|active| uid(active) == uid(&pod)) {
            tokio::time::sleep(CLEANUP_LOOK).await;
        }
        true
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

    const STARVED: Starved = Starved { resource: Resource::EphemeralStorage, threshold: 10, available: 1 };

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
        let limit = |init: Value, main: Value| {
            let pod = pod(json!({"initContainers": init, "containers": main}));
            of_pod(&pod, Resource::EphemeralStorage, Kind::Limit)
        };
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
                let taken = Consumption::of_disk(&pod, &usage(used, 0), Resource::EphemeralStorage);
                (Arc::new(pod), taken)
            });
            rank(pods.collect()).into_iter().map(|(pod, _)| pod.metadata.name.clone().unwrap()).collect()
        };
        let order = ranked(vec![
            ("within", json!({"priority": -5}), 90),
            ("most", json!({}), 900),
            ("important", json!({"priority": 1000}), 5000),
            ("some", json!({}), 200),
            ("critical", json!({"priority": 2_000_000_000}), 9000),
            ("least-important", json!({"priority": -1}), 101),
        ]);
        assert_eq!(order, ["least-important", "most", "some", "important", "within"]);
    }

    #[test]
    fn a_pod_that_goes_for_the_node_is_told_what_it_took() {
        let resources = json!({"requests": {"memory": "5"}});
        let pod = pod(json!({"containers": [{}, {"name": "within", "resources": resources}]}));
        let message = low_on(STARVED, &Consumption::of_disk(&pod, &usage(0, 7), Resource::EphemeralStorage));
        assert!(
            message
                .starts_with("The node was low on resource: ephemeral-storage. Threshold quantity: 10, available: 1. ")
        );
        assert!(message.contains("Container app was using 7, request is 0"), "{message}");
        let starved = Starved { resource: Resource::Memory, ..STARVED };
        let message = low_on(starved, &Consumption::of_memory(&pod, |_| 5, 0));
        assert!(
            message.contains("Container app was using 5, request is 0, has larger consumption of memory"),
            "{message}"
        );
        assert!(!message.contains("Container within"), "{message}");
    }

    #[test]
    fn a_pods_request_is_its_own_or_that_of_the_containers_that_run_at_the_same_time() {
        let requests = |bytes: &str| json!({"requests": {"memory": bytes}});
        let mut spec = json!({
            "initContainers": [{"name": "init", "resources": requests("9")}],
            "containers": [{"resources": requests("3")}, {"name": "b", "resources": requests("4")}],
        });
        assert_eq!(Consumption::of_memory(&pod(spec.clone()), |_| 1, 0).request, 9);
        spec["resources"] = requests("100");
        let taken = Consumption::of_memory(&pod(spec), |_| 1, 0);
        assert_eq!((taken.request, taken.used), (100, 3));
    }

    #[test]
    fn the_code_that_was_loaded_for_a_pod_is_the_pods_memory_and_no_containers() {
        let with_code = |name: &str, code| {
            let mut pod = pod(json!({"containers": [{}, {"name": "b"}]}));
            pod.metadata.name = Some(name.into());
            let taken = Consumption::of_memory(&pod, |_| 5, code);
            (Arc::new(pod), taken)
        };
        let order = rank(vec![with_code("shares", 0), with_code("large", 1000)]);
        assert_eq!(order.iter().map(|(_, taken)| taken.used).collect::<Vec<_>>(), [1010, 10]);
        assert!(order[0].1.containers.iter().all(|(_, used, _)| *used == 5));
    }

    /// Pods with any priority, request and usage: of each two neighbours in the order, the kubelet would take the first.
    #[test]
    fn whatever_pods_there_are_the_first_to_go_is_the_one_that_the_kubelet_takes() {
        let mut state = 0x9E37_79B9_7F4A_7C15_u64;
        let mut random = |below: u64| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 33) % below
        };
        for _ in 0..2_000 {
            let pods: Vec<(Arc<Pod>, Consumption)> = (0..random(12))
                .map(|number| {
                    let priority = [-1, 0, 0, 1000, 2_000_000_000][random(5) as usize];
                    let mut pod = pod(json!({"containers": [{}], "priority": priority}));
                    pod.metadata.name = Some(number.to_string());
                    let taken =
                        Consumption { used: random(4), more: random(9) == 0, request: random(4), ..Default::default() };
                    (Arc::new(pod), taken)
                })
                .collect();
            let evictable = pods.iter().filter(|(pod, _)| !is_critical(pod)).count();
            let order = rank(pods);
            assert_eq!(order.len(), evictable, "none is lost, and no critical one is there");
            for pair in order.windows(2) {
                let [(first, a), (second, b)] = pair else { continue };
                let exceeds = |taken: &Consumption| taken.more || taken.used > taken.request;
                let above = |taken: &Consumption| (taken.more, taken.used as i64 - taken.request as i64);
                assert!(exceeds(a) || !exceeds(b), "{pair:?}");
                if exceeds(a) == exceeds(b) {
                    assert!(priority(first) <= priority(second), "{pair:?}");
                    assert!(priority(first) < priority(second) || above(a) >= above(b), "{pair:?}");
                }
            }
        }
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
