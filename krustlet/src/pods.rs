//! The pods of this node: follows them in the API and gives each UID a worker of its own.

use crate::backoff::Backoff;
use crate::events::Severity;
use crate::logs;
use crate::panics::message_of;
use crate::pod::context::NodeContext;
use crate::pod::start::holder;
use crate::pod::status::Failure;
use crate::pod::worker::{Updates, Worker};
use crate::pod::{containers, full_name, is_finished, phase, ports, uid};
use crate::reasons::{event, pod as reasons};
use crate::telemetry::metrics;
use crate::trees;
use futures::future::BoxFuture;
use futures::{FutureExt, StreamExt};
use k8s_openapi::api::core::v1::Pod;
use kube::api::Api;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::watch;
use tokio::task::{Id, JoinError, JoinSet};
use tracing::{debug, error, info, warn};

/// How often a pod whose worker panics is taken up again before it is failed.
const MAX_PANICS: u32 = 3;

/// Does the work on one pod.
type Work = Box<dyn Fn(Arc<NodeContext>, Arc<Pod>, Updates, Option<Failure>) -> BoxFuture<'static, ()> + Send>;

/// A pod that is worked on.
struct Worked {
    updates: watch::Sender<Option<Arc<Pod>>>,
    pod: Arc<Pod>,
    /// None when the work was given up.
    task: Option<Id>,
    panics: u32,
}

/// Follows the node's pods until the agent is to stop and every pod has come to rest.
pub struct Pods {
    node: Arc<NodeContext>,
    max_pods: u32,
    work: Work,
    /// By UID.
    workers: HashMap<String, Worked>,
    tasks: JoinSet<()>,
    /// Told once all pods that were there at the start have been taken up.
    taken_up: watch::Sender<bool>,
    /// A full list of the pods that is being received.
    listing: Vec<Arc<Pod>>,
    /// Since when the API server does not answer.
    failing: Option<Instant>,
}

impl Pods {
    pub fn new(node: Arc<NodeContext>, max_pods: u32, taken_up: watch::Sender<bool>) -> Self {
        let work: Work = Box::new(|node, pod, updates, rejected| {
            async move { Box::new(Worker::new(node, pod, updates, rejected)).run().await }.boxed()
        });
        Self {
            node,
            max_pods,
            work,
            workers: HashMap::new(),
            tasks: JoinSet::new(),
            taken_up,
            listing: Vec::new(),
            failing: None,
        }
    }

    pub async fn run(mut self) {
        let api: Api<Pod> = Api::all(self.node.client.clone());
        let selector = watcher::Config::default().fields(&format!("spec.nodeName={}", self.node.facts.node_name));
        let events = watcher(api, selector).modify(trimmed).backoff(Backoff::api());
        let mut events = pin!(events);
        let shutdown = self.node.shutdown.clone();
        // The watch goes on while pods are drained: one that is deleted meanwhile is to end as deleted.
        while !(shutdown.is_cancelled() && self.tasks.is_empty()) {
            tokio::select! {
                Some(event) = events.next() => self.on_event(event),
                Some(ended) = self.tasks.join_next_with_id(), if !self.tasks.is_empty() => self.on_worker_end(ended),
                () = shutdown.cancelled(), if !shutdown.is_cancelled() => {}
            }
        }
    }

    fn on_event(&mut self, event: watcher::Result<Event<Pod>>) {
        match event {
            // The beginning of a list, which may fail yet.
            Ok(Event::Init) => self.listing.clear(),
            Ok(event) => {
                if let Some(since) = self.failing.take() {
                    info!("the watch on pods works again after {} s", since.elapsed().as_secs());
                }
                match event {
                    Event::Init => {}
                    Event::InitApply(pod) => self.listing.push(Arc::new(pod)),
                    Event::InitDone => self.on_list(),
                    Event::Apply(pod) => self.take(Arc::new(pod)),
                    Event::Delete(pod) => self.drop_pod(uid(&pod)),
                }
            }
            Err(error) => {
                if self.failing.is_none() {
                    self.failing = Some(Instant::now());
                    warn!("the watch on pods failed, trying again; pods keep running: {error}");
                } else {
                    debug!("the watch on pods failed again: {error}");
                }
            }
        }
    }

    /// A full list has arrived: what is not in it is gone.
    fn on_list(&mut self) {
        let mut pods = std::mem::take(&mut self.listing);
        let listed: HashSet<String> = pods.iter().map(|pod| uid(pod).to_owned()).collect();
        let gone: Vec<String> = self.workers.keys().filter(|uid| !listed.contains(*uid)).cloned().collect();
        for uid in gone {
            self.drop_pod(&uid);
        }
        if !*self.taken_up.borrow() {
            // Found now, before a pod comes that is not on the list; removed while the others are taken up.
            tokio::spawn(remove_leftovers(leftovers(&self.node.data_dir, &pods)));
            self.node.addresses.take_up(&pods);
            // The pod that served on a port before the agent stopped has it again, whichever comes first now.
            for pod in pods.iter().filter(|pod| phase(pod) == "Running" && pod.metadata.deletion_timestamp.is_none()) {
                let Some(address) = self.node.addresses.of(pod) else { continue };
                for (_, container) in pod.spec.iter().flat_map(containers) {
                    let served = ports::served(container, address, self.node.addresses.node());
                    let _ = self.node.ports.claim(&served, &holder(pod, container));
                }
            }
        }
        // The oldest first, should the node be full.
        pods.sort_by(|a, b| a.metadata.creation_timestamp.cmp(&b.metadata.creation_timestamp));
        for pod in pods {
            self.take(pod);
        }
        self.taken_up.send_if_modified(|taken_up| !std::mem::replace(taken_up, true));
    }

    fn take(&mut self, pod: Arc<Pod>) {
        let id = uid(&pod).to_owned();
        let before = self.node.roster.put_pod(&id, pod.clone());
        let is_as_before = |before: Arc<Pod>| {
            before.metadata.labels == pod.metadata.labels && is_finished(&before) == is_finished(&pod)
        };
        if !before.is_some_and(is_as_before) {
            self.node.policies.pods_changed();
        }
        if let Some(worked) = self.workers.get_mut(&id) {
            worked.pod = pod.clone();
            worked.updates.send_replace(Some(pod));
        } else if !self.node.shutdown.is_cancelled() {
            let rejected = self.rejection(&pod);
            self.start(pod, rejected, 0);
        }
        self.count();
    }

    fn start(&mut self, pod: Arc<Pod>, rejected: Option<Failure>, panics: u32) {
        let (updates, receiver) = watch::channel(Some(pod.clone()));
        let task = self.tasks.spawn((self.work)(self.node.clone(), pod.clone(), receiver, rejected)).id();
        self.workers.insert(uid(&pod).to_owned(), Worked { updates, pod, task: Some(task), panics });
    }

    /// Why the node cannot take the pod. The scheduler counts too; this is for pods that it did not place.
    fn rejection(&self, pod: &Pod) -> Option<Failure> {
        let new = pod.status.as_ref().is_none_or(|status| status.start_time.is_none());
        if !new || is_finished(pod) {
            return None;
        }
        let (reason, message) = if self.active() > usize::try_from(self.max_pods).unwrap_or(usize::MAX) {
            let message = format!("Node takes {} pods and has them; raise --max-pods or add a node", self.max_pods);
            (reasons::OUT_OF_PODS, message)
        } else {
            (reasons::EVICTED, self.node.signals.pressure().keeps_out(pod)?)
        };
        info!(pod = full_name(pod), "refusing a pod: {message}");
        Some(Failure { reason: reason.to_owned(), message })
    }

    fn active(&self) -> usize {
        self.node.roster.count_pods(|pod| !is_finished(pod))
    }

    fn count(&self) {
        metrics().pods.set(i64::try_from(self.active()).unwrap_or(i64::MAX));
    }

    fn drop_pod(&mut self, uid: &str) {
        self.node.roster.remove_pod(uid);
        self.node.policies.pods_changed();
        match self.workers.get(uid) {
            Some(Worked { task: None, .. }) => {
                self.workers.remove(uid);
                self.node.addresses.release(uid);
            }
            Some(worked) => drop(worked.updates.send_replace(None)),
            None => {}
        }
        self.count();
    }

    fn on_worker_end(&mut self, ended: Result<(Id, ()), JoinError>) {
        let task = ended.as_ref().map_or_else(JoinError::id, |(id, ())| *id);
        let Some(uid) = self.workers.iter().find(|(_, worked)| worked.task == Some(task)).map(|(uid, _)| uid.clone())
        else {
            return;
        };
        if let Some(worked) = self.workers.remove(&uid)
            && let Err(error) = ended
        {
            let message = error.try_into_panic().map_or_else(|e| e.to_string(), |panic| message_of(&*panic).to_owned());
            self.on_panic(&uid, worked, &message);
        }
    }

    /// A bug ended the work on a pod; what it ran has ended with it. The pod is taken up again as after a restart of the
    /// agent, and failed if that does not help. The others live on.
    fn on_panic(&mut self, uid: &str, worked: Worked, panic: &str) {
        let Worked { updates, pod, panics, .. } = worked;
        let panics = panics + 1;
        error!(pod = full_name(&pod), uid, panics, "the work on a pod panicked: {panic}");
        self.node.ports.release_pod(uid);
        let gone = updates.borrow().is_none();
        let (rejected, next) = if panics <= MAX_PANICS {
            (None, "it is taken up again")
        } else if panics == MAX_PANICS + 1 {
            let message = format!("a bug in the node agent, {panics} times: {panic}");
            (Some(Failure { reason: event::WORKER_FAILED.to_owned(), message }), "it is failed")
        } else {
            // Not even that can be done. It is remembered, so that it is not begun once more with the next change.
            self.workers.insert(uid.to_owned(), Worked { updates, pod, task: None, panics });
            return;
        };
        let text = format!("A bug in the node agent ended its work on the pod, {next}: {panic}");
        self.node.events.pod(&pod, None, Severity::Warning, event::WORKER_FAILED, text);
        self.start(pod, rejected, panics);
        if gone {
            self.drop_pod(uid);
        }
    }
}

/// Without what nobody here reads: the objects are kept for as long as their pods live.
fn trimmed(pod: &mut Pod) {
    pod.metadata.managed_fields = None;
    if let Some(spec) = &mut pod.spec {
        // What is read as it comes has room for four.
        spec.containers.shrink_to_fit();
    }
    if let Some(status) = &mut pod.status {
        status.conditions.iter_mut().for_each(Vec::shrink_to_fit);
        status.container_statuses.iter_mut().for_each(Vec::shrink_to_fit);
    }
}

/// What pods left behind that went while no agent ran.
fn leftovers(data_dir: &Path, pods: &[Arc<Pod>]) -> Vec<PathBuf> {
    let uids: HashSet<&str> = pods.iter().map(|pod| uid(pod)).collect();
    let logs: HashSet<String> = pods.iter().map(|pod| logs::directory_name(pod)).collect();
    let unknown = |directory: &str, known: &dyn Fn(&str) -> bool| -> Vec<PathBuf> {
        let entries = std::fs::read_dir(data_dir.join(directory)).into_iter().flatten().flatten();
        entries.filter(|entry| !entry.file_name().to_str().is_some_and(known)).map(|entry| entry.path()).collect()
    };
    let mut found = unknown("pods", &|name| uids.contains(name));
    found.extend(unknown("logs", &|name| logs.contains(name)));
    found
}

async fn remove_leftovers(paths: Vec<PathBuf>) {
    for path in paths {
        info!(path = %path.display(), "removing what a pod left behind");
        if let Err(error) = trees::remove(path.clone()).await {
            warn!(path = %path.display(), "failed to remove what a pod left behind: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addresses::Addresses;
    use crate::disk::{self, Disk};
    use crate::events::Recorder;
    use crate::memory::{self, Memory, PodsMemory};
    use crate::pod::fields::PodFacts;
    use crate::pod::images::{Builders, PullSecrets};
    use crate::pod::roster::Roster;
    use crate::pod::sources::Objects;
    use crate::pod::volumes::HostPaths;
    use crate::policies::NetworkPolicies;
    use crate::ports::Ports;
    use crate::pressure::{Signals, Thresholds};
    use krustlet_runtime::{NoCredentials, OperatorsRegistries, PullLimits, Runtime, RuntimeConfig, Verification};
    use parking_lot::Mutex;
    use std::time::Duration;
    use tokio_util::sync::CancellationToken;

    fn node(directory: &Path, memory: memory::Figures) -> Arc<NodeContext> {
        let config = RuntimeConfig {
            data_dir: directory.to_owned(),
            verification: Verification::AllowUnsigned,
            credentials: Arc::new(NoCredentials),
            registries: OperatorsRegistries::default(),
            max_concurrent_compiles: 1,
            pull_limits: PullLimits::default(),
            compiler: krustlet_runtime::Compiler { program: "/bin/false".into(), arguments: Vec::new() },
            egress: krustlet_runtime::EgressConfig::default(),
            guest_memory: None,
            max_pods: 10,
        };
        let client = kube::Client::new(axum::Router::new(), "default");
        let addresses = Arc::new(Addresses::of_node([127, 0, 0, 1].into()));
        let roster = Arc::new(Roster::default());
        Arc::new(NodeContext {
            runtime: Runtime::new(config, &mut prometheus_client::registry::Registry::default()).unwrap(),
            events: Recorder::new(client.clone(), "node").0,
            facts: PodFacts::default(),
            policies: NetworkPolicies::new(addresses.clone(), roster.clone()),
            addresses,
            data_dir: directory.to_owned(),
            objects: Objects::new(client.clone()),
            pull_secrets: PullSecrets::default(),
            builders: Builders::default(),
            client,
            host_paths: Arc::new(HostPaths { allowed: Vec::new(), data_dir: directory.to_owned() }),
            evictions: Arc::default(),
            signals: Arc::new(Signals::new(
                Memory::with(memory),
                PodsMemory::With(memory),
                Disk::with(disk::Figures::default()),
                Thresholds::default(),
                Duration::ZERO,
            )),
            ports: Ports::default(),
            roster,
            shutdown: CancellationToken::new(),
        })
    }

    /// Works on one pod, which panics so often; tells what it was rejected for each time.
    async fn rejections(panics: usize) -> Vec<Option<String>> {
        let directory = tempfile::tempdir().unwrap();
        let mut pods = Pods::new(node(directory.path(), memory::Figures::default()), 10, watch::Sender::new(false));
        let seen = Arc::<Mutex<Vec<Option<String>>>>::default();
        let told = seen.clone();
        pods.work = Box::new(move |_, _, _, rejected| {
            let mut told = told.lock();
            told.push(rejected.map(|failure| failure.reason));
            let number = told.len();
            async move { assert!(number > panics, "a bug") }.boxed()
        });
        let mut pod = Pod::default();
        pod.metadata.uid = Some("uid".into());
        pods.on_event(Ok(Event::Apply(pod)));
        while let Some(ended) = pods.tasks.join_next_with_id().await {
            pods.on_worker_end(ended);
        }
        pods.drop_pod("uid");
        assert!(pods.workers.is_empty());
        let seen = seen.lock();
        seen.clone()
    }

    #[tokio::test]
    async fn a_pod_whose_worker_panics_is_taken_up_again() {
        assert_eq!(rejections(2).await, [None, None, None]);
    }

    #[tokio::test]
    async fn a_pod_whose_worker_panics_whatever_is_done_is_failed_and_then_left() {
        let failed = Some("PodWorkerFailed".to_owned());
        assert_eq!(rejections(4).await, [None, None, None, None, failed.clone()]);
        assert_eq!(rejections(usize::MAX).await, [None, None, None, None, failed]);
    }

    #[tokio::test]
    async fn a_node_under_pressure_refuses_new_pods_and_keeps_those_that_it_has() {
        let directory = tempfile::tempdir().unwrap();
        let pods = |available| {
            let memory = memory::Figures { total: 8 << 30, available };
            Pods::new(node(directory.path(), memory), 10, watch::Sender::new(false))
        };
        let pod = |status: serde_json::Value| -> Pod {
            serde_json::from_value(serde_json::json!({"metadata": {}, "status": status})).unwrap()
        };
        let new = pod(serde_json::json!({"qosClass": "BestEffort"}));
        let old = pod(serde_json::json!({"qosClass": "BestEffort", "startTime": "2026-01-01T00:00:00Z"}));
        assert_eq!(pods(0).rejection(&new).unwrap().reason, "Evicted");
        assert!(pods(0).rejection(&old).is_none());
        assert!(pods(1 << 30).rejection(&new).is_none());
    }

    #[tokio::test]
    async fn leftovers_of_unknown_pods_are_removed_and_those_of_known_ones_stay() {
        let directory = tempfile::tempdir().unwrap();
        let mut pod = Pod::default();
        pod.metadata.uid = Some("known".into());
        pod.metadata.name = Some("web".into());
        pod.metadata.namespace = Some("shop".into());
        for path in ["pods/known/volumes", "pods/unknown/volumes", "logs/shop_web_known", "logs/shop_web_unknown"] {
            std::fs::create_dir_all(directory.path().join(path)).unwrap();
        }
        remove_leftovers(leftovers(directory.path(), &[Arc::new(pod)])).await;
        let left = |path: &str| directory.path().join(path).exists();
        assert!(left("pods/known/volumes") && left("logs/shop_web_known"));
        assert!(!left("pods/unknown") && !left("logs/shop_web_unknown"));
    }
}
