//! The pods of this node: follows them in the API and gives each UID a worker of its own.

use crate::backoff::Backoff;
use crate::logs;
use crate::pod::start::{NodeContext, holder};
use crate::pod::status::Failure;
use crate::pod::worker::Worker;
use crate::pod::{containers, full_name, is_finished, phase, port, uid};
use crate::reasons::pod as reasons;
use crate::telemetry::metrics;
use crate::trees;
use futures::StreamExt;
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
use tokio::task::JoinSet;
use tracing::{debug, info, warn};

/// Follows the node's pods until the agent is to stop and every pod has come to rest.
pub struct Pods {
    node: Arc<NodeContext>,
    max_pods: u32,
    workers: HashMap<String, watch::Sender<Option<Arc<Pod>>>>,
    tasks: JoinSet<String>,
    /// Told once all pods that were there at the start have been taken up.
    taken_up: watch::Sender<bool>,
    /// A full list of the pods that is being received.
    listing: Vec<Arc<Pod>>,
    /// Since when the API server does not answer.
    failing: Option<Instant>,
}

impl Pods {
    pub fn new(node: Arc<NodeContext>, max_pods: u32, taken_up: watch::Sender<bool>) -> Self {
        Self {
            node,
            max_pods,
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
        let events = watcher(api, selector).modify(|pod| pod.metadata.managed_fields = None).backoff(Backoff::api());
        let mut events = pin!(events);
        let shutdown = self.node.shutdown.clone();
        // The watch goes on while pods are drained: one that is deleted meanwhile is to end as deleted.
        while !(shutdown.is_cancelled() && self.tasks.is_empty()) {
            tokio::select! {
                Some(event) = events.next() => self.on_event(event),
                Some(ended) = self.tasks.join_next(), if !self.tasks.is_empty() => self.on_worker_end(ended),
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
            // The pod that served on a port before the agent stopped has it again, whichever comes first now.
            for pod in pods.iter().filter(|pod| phase(pod) == "Running" && pod.metadata.deletion_timestamp.is_none()) {
                for (_, container) in pod.spec.iter().flat_map(containers) {
                    if let Some(port) = port(container) {
                        let _ = self.node.ports.claim(port, &holder(pod, container));
                    }
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
        self.node.roster.put_pod(&id, pod.clone());
        if let Some(worker) = self.workers.get(&id) {
            worker.send_replace(Some(pod));
        } else if !self.node.shutdown.is_cancelled() {
            let rejected = self.rejection(&pod);
            let (sender, updates) = watch::channel(Some(pod.clone()));
            let worker = Worker::new(self.node.clone(), pod, updates, rejected);
            let uid = id.clone();
            // The future of a worker is large while it is being made; on the heap it is what it is.
            self.tasks.spawn(async move {
                worker.run().await;
                uid
            });
            self.workers.insert(id, sender);
        }
        self.count();
    }

    /// Why the node cannot take the pod. The scheduler counts too; this is for pods that it did not place.
    fn rejection(&self, pod: &Pod) -> Option<Failure> {
        let new = pod.status.as_ref().is_none_or(|status| status.start_time.is_none());
        let active = self.active();
        (new && !is_finished(pod) && active > usize::try_from(self.max_pods).unwrap_or(usize::MAX)).then(|| {
            info!(pod = full_name(pod), "the node is full");
            Failure {
                reason: reasons::OUT_OF_PODS.to_owned(),
                message: format!("Node takes {} pods and has them; raise --max-pods or add a node", self.max_pods),
            }
        })
    }

    fn active(&self) -> usize {
        self.node.roster.count_pods(|pod| !is_finished(pod))
    }

    fn count(&self) {
        metrics().pods.set(i64::try_from(self.active()).unwrap_or(i64::MAX));
    }

    fn drop_pod(&mut self, uid: &str) {
        self.node.roster.remove_pod(uid);
        if let Some(worker) = self.workers.get(uid) {
            worker.send_replace(None);
        }
        self.count();
    }

    fn on_worker_end(&mut self, ended: Result<String, tokio::task::JoinError>) {
        match ended {
            Ok(uid) => {
                self.workers.remove(&uid);
            }
            // A bug; the pod's other fellows live on.
            Err(error) => warn!("a pod's worker ended unexpectedly: {error}"),
        }
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
