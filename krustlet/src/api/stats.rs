//! What the node and its containers use: `/stats/summary` as JSON, `/metrics/resource` for the metrics server.

use crate::disk::Disk;
use crate::logs;
use crate::view::ContainerUsage;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Container, Pod};
use parking_lot::Mutex;
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, HashMap};
use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use sysinfo::{Pid, ProcessRefreshKind, ProcessesToUpdate, System};

/// A rate is measured over at least this long; a shorter time only repeats the last one.
const RATE_WINDOW: f64 = 5.0;

/// Makes both reports; remembers CPU times between them, to tell rates.
pub struct Stats {
    node_name: String,
    data_dir: PathBuf,
    disk: Disk,
    started: Timestamp,
    rates: Mutex<HashMap<String, Sample>>,
}

#[derive(Debug, Clone, Copy)]
struct Sample {
    at: Timestamp,
    cpu: Duration,
    /// Nanoseconds of CPU time a second.
    rate: Option<u64>,
}

/// Both reports read files, so they are made where blocking is allowed.
impl Stats {
    pub fn new(node_name: String, data_dir: PathBuf, disk: Disk) -> Self {
        Self { node_name, data_dir, disk, started: Timestamp::now(), rates: Mutex::default() }
    }

    /// The kubelet's `stats/v1alpha1` Summary, as far as there is something to tell.
    pub fn summary(&self, pods: &[Arc<Pod>], usage: &[ContainerUsage]) -> Value {
        let now = Timestamp::now();
        let machine = Machine::read();
        let usage = by_pod(usage);
        let none = BTreeMap::new();
        let mut seen = Vec::new();
        let pods: Vec<Value> = pods
            .iter()
            .map(|pod| {
                let uid = pod.metadata.uid.clone().unwrap_or_default();
                self.pod(pod, usage.get(uid.as_str()).unwrap_or(&none), now, &mut seen)
            })
            .collect();
        let mut node = json!({"nodeName": self.node_name, "startTime": machine.booted});
        if let Some((used, available)) = machine.memory {
            node["memory"] = memory(now, used, Some(available));
        }
        if let Some((cpu, resident)) = machine.agent {
            node["systemContainers"] = json!([{
                "name": "kubelet",
                "startTime": self.started,
                "cpu": self.cpu("agent".into(), cpu, now, &mut seen),
                "memory": memory(now, resident, None),
            }]);
        }
        if let Some(cpu) = machine.cpu {
            node["cpu"] = self.cpu("node".into(), cpu, now, &mut seen);
        }
        let figures = self.disk.last();
        if figures.total > 0 {
            let disk = json!({
                "time": now, "capacityBytes": figures.total, "availableBytes": figures.available,
                "usedBytes": figures.total.saturating_sub(figures.available),
                "inodes": figures.inodes, "inodesFree": figures.inodes_free,
                "inodesUsed": figures.inodes.saturating_sub(figures.inodes_free),
            });
            node["runtime"] = json!({"imageFs": disk});
            node["fs"] = disk;
        }
        self.rates.lock().retain(|key, _| seen.contains(key));
        json!({"node": node, "pods": pods})
    }

    fn pod(&self, pod: &Pod, usage: &BTreeMap<&str, &ContainerUsage>, now: Timestamp, seen: &mut Vec<String>) -> Value {
        let uid = pod.metadata.uid.clone().unwrap_or_default();
        let directory = logs::pod_directory(&self.data_dir, pod);
        let mut on_disk = 0;
        let containers: Vec<Value> = containers(pod)
            .filter_map(|container| {
                let used = usage.get(container.name.as_str())?;
                let size = files_size(&directory.join(&container.name));
                on_disk += size;
                let mut report = json!({
                    "name": container.name,
                    "cpu": self.cpu(format!("{uid}/{}", container.name), used.stats.cpu_time, now, seen),
                    "memory": memory(now, used.stats.memory_bytes, None),
                    "logs": {"time": now, "usedBytes": size},
                });
                if let Some(started) = started(pod, &container.name) {
                    report["startTime"] = json!(started);
                }
                Some(report)
            })
            .collect();
        let mut report = json!({
            "podRef": {"name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": pod.metadata.uid},
            "startTime": pod.status.as_ref().and_then(|status| status.start_time.as_ref()),
            "containers": containers,
        });
        if !containers.is_empty() {
            let cpu: Duration = usage.values().map(|used| used.stats.cpu_time).sum();
            let bytes = usage.values().map(|used| used.stats.memory_bytes).sum();
            report["cpu"] = self.cpu(uid, cpu, now, seen);
            report["memory"] = memory(now, bytes, None);
            report["ephemeral-storage"] = json!({"time": now, "usedBytes": on_disk});
        }
        report
    }

    fn cpu(&self, key: String, cpu: Duration, now: Timestamp, seen: &mut Vec<String>) -> Value {
        let mut report = Map::new();
        report.insert("time".into(), json!(now));
        report.insert("usageCoreNanoSeconds".into(), json!(nanos(cpu)));
        let mut rates = self.rates.lock();
        let sample = next_sample(rates.get(&key).copied(), now, cpu);
        if let Some(rate) = sample.rate {
            report.insert("usageNanoCores".into(), json!(rate));
        }
        rates.insert(key.clone(), sample);
        seen.push(key);
        Value::Object(report)
    }

    /// What the metrics server scrapes, in Prometheus' text format and with the kubelet's names.
    pub fn resource_metrics(&self, pods: &[Arc<Pod>], usage: &[ContainerUsage]) -> String {
        let machine = Machine::read();
        let at = Timestamp::now().as_millisecond();
        let usage = by_pod(usage);
        let (mut cpu, mut memory, mut start) =
            (Family::new(CONTAINER_CPU), Family::new(CONTAINER_MEMORY), Family::new(CONTAINER_START));
        let (mut pod_cpu, mut pod_memory) = (Family::new(POD_CPU), Family::new(POD_MEMORY));
        for pod in pods {
            let Some(used) = pod.metadata.uid.as_deref().and_then(|uid| usage.get(uid)) else { continue };
            let (name, namespace) = (pod.metadata.name.as_deref(), pod.metadata.namespace.as_deref());
            let of_pod = format!("namespace={:?},pod={:?}", namespace.unwrap_or_default(), name.unwrap_or_default());
            let (mut pod_time, mut pod_bytes) = (Duration::ZERO, 0);
            for container in containers(pod) {
                let Some(used) = used.get(container.name.as_str()) else { continue };
                let labels = format!("{{container={:?},{of_pod}}}", container.name);
                cpu.line(&labels, used.stats.cpu_time.as_secs_f64(), Some(at));
                memory.line(&labels, used.stats.memory_bytes, Some(at));
                if let Some(started) = started(pod, &container.name) {
                    start.line(&labels, started.as_millisecond() as f64 / 1000.0, None);
                }
                pod_time += used.stats.cpu_time;
                pod_bytes += used.stats.memory_bytes;
            }
            let labels = format!("{{{of_pod}}}");
            pod_cpu.line(&labels, pod_time.as_secs_f64(), Some(at));
            pod_memory.line(&labels, pod_bytes, Some(at));
        }
        let (mut node_cpu, mut node_memory) = (Family::new(NODE_CPU), Family::new(NODE_MEMORY));
        if let Some(time) = machine.cpu {
            node_cpu.line("", time.as_secs_f64(), Some(at));
        }
        if let Some((used, _)) = machine.memory {
            node_memory.line("", used, Some(at));
        }
        let mut error = Family::new(SCRAPE_ERROR);
        error.line("", 0, None);
        let families = [cpu, memory, start, node_cpu, node_memory, pod_cpu, pod_memory, error];
        families.map(Family::text).concat()
    }
}

type Description = (&'static str, &'static str, &'static str);
const CONTAINER_CPU: Description =
    ("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the container in core-seconds");
const CONTAINER_MEMORY: Description =
    ("container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes");
const CONTAINER_START: Description =
    ("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds");
const NODE_CPU: Description =
    ("node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node in core-seconds");
const NODE_MEMORY: Description = ("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes");
const POD_CPU: Description =
    ("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds");
const POD_MEMORY: Description = ("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes");
const SCRAPE_ERROR: Description =
    ("resource_scrape_error", "gauge", "1 if there was an error while getting container metrics, 0 otherwise");

/// One metric with its lines.
struct Family {
    description: Description,
    lines: String,
}

impl Family {
    fn new(description: Description) -> Self {
        Self { description, lines: String::new() }
    }

    fn line(&mut self, labels: &str, value: impl std::fmt::Display, at: Option<i64>) {
        let time = at.map(|at| format!(" {at}")).unwrap_or_default();
        // Writing to a String cannot fail.
        let _ = writeln!(self.lines, "{}{labels} {value}{time}", self.description.0);
    }

    fn text(self) -> String {
        let (name, kind, help) = self.description;
        if self.lines.is_empty() {
            return String::new();
        }
        format!("# HELP {name} {help}\n# TYPE {name} {kind}\n{}", self.lines)
    }
}

fn by_pod(usage: &[ContainerUsage]) -> HashMap<&str, BTreeMap<&str, &ContainerUsage>> {
    let mut pods: HashMap<&str, BTreeMap<&str, &ContainerUsage>> = HashMap::new();
    for used in usage {
        pods.entry(&used.pod_uid).or_default().insert(&used.container, used);
    }
    pods
}

fn containers(pod: &Pod) -> impl Iterator<Item = &Container> {
    pod.spec.iter().flat_map(|spec| spec.init_containers.iter().flatten().chain(&spec.containers))
}

fn started(pod: &Pod, container: &str) -> Option<Timestamp> {
    let state = logs::status(pod, container)?.state.as_ref()?;
    state.running.as_ref()?.started_at.as_ref().map(|time| time.0)
}

fn memory(now: Timestamp, bytes: u64, available: Option<u64>) -> Value {
    let mut report = json!({"time": now, "usageBytes": bytes, "workingSetBytes": bytes, "rssBytes": bytes});
    if let Some(available) = available {
        report["availableBytes"] = json!(available);
    }
    report
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

fn next_sample(last: Option<Sample>, now: Timestamp, cpu: Duration) -> Sample {
    let fresh = Sample { at: now, cpu, rate: None };
    match last {
        None => fresh,
        // The container was restarted: its time began anew.
        Some(last) if cpu < last.cpu => fresh,
        Some(last) => {
            let seconds = now.duration_since(last.at).as_secs_f64();
            if seconds < RATE_WINDOW {
                return last;
            }
            let rate = nanos(cpu - last.cpu) as f64 / seconds;
            Sample { rate: Some(rate as u64), ..fresh }
        }
    }
}

fn files_size(directory: &Path) -> u64 {
    let entries = std::fs::read_dir(directory).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).filter(|metadata| metadata.is_file()).map(|file| file.len()).sum()
}

/// The machine, and the agent on it, as far as the operating system tells.
struct Machine {
    booted: Option<Timestamp>,
    /// Since boot; known on Linux only.
    cpu: Option<Duration>,
    /// Bytes that are used, and that are available.
    memory: Option<(u64, u64)>,
    /// CPU time and resident bytes.
    agent: Option<(Duration, u64)>,
}

impl Machine {
    fn read() -> Self {
        let system = system().ok();
        let agent = system.as_ref().and_then(|system| system.process(Pid::from_u32(std::process::id())));
        let booted = System::boot_time().ok().and_then(|seconds| i64::try_from(seconds).ok());
        Self {
            booted: booted.and_then(|seconds| Timestamp::from_second(seconds).ok()),
            cpu: std::fs::read_to_string("/proc/stat").ok().and_then(|stat| busy_time(&stat)),
            memory: system.as_ref().map(|system| {
                let available = system.available_memory();
                (system.total_memory().saturating_sub(available), available)
            }),
            agent: agent.map(|agent| (Duration::from_millis(agent.accumulated_cpu_time()), agent.memory())),
        }
    }
}

fn system() -> Result<System, sysinfo::Error> {
    let mut system = System::new()?;
    system.refresh_memory();
    let what = ProcessRefreshKind::nothing().with_cpu().with_memory();
    system.refresh_processes_specifics(ProcessesToUpdate::Some(&[Pid::from_u32(std::process::id())]), false, what);
    Ok(system)
}

/// The time that all CPUs were busy, from the first line of `/proc/stat`; its unit is 1/100 s on every Linux.
fn busy_time(stat: &str) -> Option<Duration> {
    let mut words = stat.lines().next()?.split_ascii_whitespace();
    if words.next()? != "cpu" {
        return None;
    }
    let ticks: Vec<u64> = words.map_while(|word| word.parse().ok()).collect();
    // user nice system idle iowait irq softirq steal; guest time is in user already.
    let busy: u64 = [0, 1, 2, 5, 6, 7].iter().filter_map(|at| ticks.get(*at)).sum();
    Some(Duration::from_millis(busy.saturating_mul(10)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::disk::Figures;
    use krustlet_runtime::Stats as Used;

    fn pod() -> Arc<Pod> {
        let pod = json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u-1"},
            "spec": {"containers": [{"name": "app"}, {"name": "idle"}]},
            "status": {"containerStatuses": [{
                "name": "app", "image": "", "imageID": "", "ready": true, "restartCount": 0,
                "state": {"running": {"startedAt": "2026-01-01T00:00:00Z"}},
            }]},
        });
        Arc::new(serde_json::from_value(pod).unwrap())
    }

    fn usage(cpu: Duration) -> Vec<ContainerUsage> {
        let stats = Used { memory_bytes: 1 << 20, cpu_time: cpu, ..Used::default() };
        vec![ContainerUsage { pod_uid: "u-1".into(), container: "app".into(), stats }]
    }

    #[test]
    fn the_summary_tells_what_runs_and_what_it_uses() {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs/shop_web_u-1/app");
        std::fs::create_dir_all(&logs).unwrap();
        std::fs::write(logs.join("0.log"), "12345").unwrap();
        let stats =
            Stats::new("node-1".into(), dir.path().to_owned(), Disk::with(Figures { total: 9, ..Figures::default() }));
        let summary = stats.summary(&[pod()], &usage(Duration::from_millis(3)));
        let pod = &summary["pods"][0];
        assert_eq!(pod["podRef"], json!({"name": "web", "namespace": "shop", "uid": "u-1"}));
        assert_eq!(pod["containers"].as_array().unwrap().len(), 1, "only what runs");
        let container = &pod["containers"][0];
        assert_eq!(container["cpu"]["usageCoreNanoSeconds"], 3_000_000);
        assert_eq!(container["memory"]["workingSetBytes"], 1 << 20);
        assert_eq!(
            (&container["logs"]["usedBytes"], &container["startTime"]),
            (&json!(5), &json!("2026-01-01T00:00:00Z"))
        );
        assert_eq!(pod["ephemeral-storage"]["usedBytes"], 5);
        let node = &summary["node"];
        assert_eq!(node["nodeName"], "node-1");
        assert!(node["memory"]["workingSetBytes"].as_u64().unwrap() > 0);
        assert_eq!(node["systemContainers"][0]["name"], "kubelet");
        assert!(node["systemContainers"][0]["memory"]["rssBytes"].as_u64().unwrap() > 0);
        assert_eq!(
            (&node["fs"]["capacityBytes"], &node["runtime"]["imageFs"]["capacityBytes"]),
            (&json!(9), &json!(9))
        );
    }

    #[test]
    fn rates_of_what_is_gone_are_forgotten() {
        let dir = tempfile::tempdir().unwrap();
        let stats =
            Stats::new("node-1".into(), dir.path().to_owned(), Disk::with(Figures { total: 9, ..Figures::default() }));
        stats.summary(&[pod()], &usage(Duration::ZERO));
        assert!(stats.rates.lock().contains_key("u-1/app"));
        stats.summary(&[], &[]);
        assert!(!stats.rates.lock().contains_key("u-1/app"));
    }

    #[test]
    fn resource_metrics_have_the_kubelets_names_and_labels() {
        let dir = tempfile::tempdir().unwrap();
        let stats =
            Stats::new("node-1".into(), dir.path().to_owned(), Disk::with(Figures { total: 9, ..Figures::default() }));
        let text = stats.resource_metrics(&[pod()], &usage(Duration::from_millis(1500)));
        for line in [
            "# TYPE container_cpu_usage_seconds_total counter\n",
            "\ncontainer_cpu_usage_seconds_total{container=\"app\",namespace=\"shop\",pod=\"web\"} 1.5 ",
            "\ncontainer_memory_working_set_bytes{container=\"app\",namespace=\"shop\",pod=\"web\"} 1048576 ",
            "\ncontainer_start_time_seconds{container=\"app\",namespace=\"shop\",pod=\"web\"} 1767225600\n",
            "\npod_cpu_usage_seconds_total{namespace=\"shop\",pod=\"web\"} 1.5 ",
            "\nnode_memory_working_set_bytes ",
            "\nresource_scrape_error 0\n",
        ] {
            assert!(text.contains(line), "{line:?} is not in\n{text}");
        }
    }

    #[test]
    fn a_rate_is_measured_over_a_while_and_starts_anew_with_the_container() {
        let start: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let at = |seconds: i64| start + jiff::SignedDuration::from_secs(seconds);
        let first = next_sample(None, at(0), Duration::from_secs(1));
        assert_eq!(first.rate, None);
        let soon = next_sample(Some(first), at(1), Duration::from_secs(2));
        assert_eq!((soon.at, soon.rate), (at(0), None));
        let later = next_sample(Some(soon), at(10), Duration::from_secs(6));
        assert_eq!(later.rate, Some(500_000_000));
        assert_eq!(next_sample(Some(later), at(11), Duration::from_secs(7)).rate, Some(500_000_000));
        assert_eq!(next_sample(Some(later), at(20), Duration::ZERO).rate, None);
    }

    #[test]
    fn busy_time_leaves_out_waiting() {
        let stat = "cpu  100 10 50 9999 8888 5 3 2 77 7\ncpu0 1 1 1 1\n";
        assert_eq!(busy_time(stat), Some(Duration::from_millis(1700)));
        assert_eq!(busy_time("intr 1"), None);
    }
}
