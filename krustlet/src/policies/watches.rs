//! Follows NetworkPolicies and, where the policies of this node's pods go by them, the cluster's pods and namespaces.

use super::peers::{self, PeerPod, Peers};
use super::rules::Policy;
use super::selector::Labels;
use super::{CLUSTER_ROLE, Known, Needs, NetworkPolicies, Standing, Untold};
use crate::backoff::Backoff;
use crate::client::{describe, status_code};
use crate::events::Recorder;
use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use k8s_openapi::api::core::v1::Namespace;
use k8s_openapi::api::networking::v1::NetworkPolicy;
use kube::Resource;
use kube::api::{Api, PartialObjectMeta};
use kube::runtime::WatchStreamExt as _;
use kube::runtime::watcher::{self, Event, watcher};
use serde::de::DeserializeOwned;
use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::sync::Arc;
use std::time::Duration;
use tracing::{debug, info, warn};

/// How often what the node may not read is asked for again.
const REFUSED: Duration = Duration::from_secs(20);
/// Objects that are read at once: of a pod, which is large, little is kept.
const PAGE: u32 = 200;

/// Follows all of it; never ends.
pub async fn keep(policies: NetworkPolicies, client: kube::Client, events: Recorder) {
    let mut keeper = Keeper::new(policies.clone(), client);
    let mut untold = Untold::new(policies.clone(), events);
    loop {
        let is_other = tokio::select! {
            Some(event) = keeper.policies.next() => keeper.on_policy(event),
            event = next(&mut keeper.pods) => { keeper.on_pod(event); false }
            event = next(&mut keeper.namespaces) => { keeper.on_namespace(event); false }
            () = policies.0.pods_changed.notified() => true,
        };
        if is_other {
            let needs = untold.review();
            keeper.follow(needs);
        }
    }
}

type Events<K> = BoxStream<'static, watcher::Result<Event<K>>>;

struct Keeper {
    known: NetworkPolicies,
    client: kube::Client,
    policies: Events<NetworkPolicy>,
    pods: Option<Events<PeerPod>>,
    namespaces: Option<Events<PartialObjectMeta<Namespace>>>,
    /// Lists that are being received.
    listed_policies: Vec<Policy>,
    listed_pods: Peers,
    listed_namespaces: HashMap<String, Labels>,
    /// What the API server does not let the node read, or does not answer to, by kind.
    refused: BTreeMap<&'static str, String>,
    is_listed: bool,
}

/// The next event of a watch; never where there is none.
async fn next<K: Send>(events: &mut Option<Events<K>>) -> watcher::Result<Event<K>> {
    match events {
        // A watch does not end.
        Some(events) => match events.next().await {
            Some(event) => event,
            None => std::future::pending().await,
        },
        None => std::future::pending().await,
    }
}

/// A watch that begins after a while.
fn follow<K>(api: Api<K>, after: Duration) -> Events<K>
where
    K: Resource + Clone + DeserializeOwned + fmt::Debug + Send + 'static,
{
    let begin = async move {
        tokio::time::sleep(after).await;
        watcher(api, watcher::Config::default().page_size(PAGE)).backoff(Backoff::api())
    };
    stream::once(begin).flatten().boxed()
}

fn policies(client: kube::Client, after: Duration) -> Events<NetworkPolicy> {
    follow(Api::all(client), after)
}

fn pods(client: kube::Client, after: Duration) -> Events<PeerPod> {
    follow(Api::all_with(client, &peers::resource()), after)
}

fn namespaces(client: kube::Client, after: Duration) -> Events<PartialObjectMeta<Namespace>> {
    follow(Api::all(client), after)
}

impl Keeper {
    fn new(known: NetworkPolicies, client: kube::Client) -> Self {
        Self {
            known,
            policies: self::policies(client.clone(), Duration::ZERO),
            client,
            pods: None,
            namespaces: None,
            listed_policies: Vec::new(),
            listed_pods: Peers::default(),
            listed_namespaces: HashMap::new(),
            refused: BTreeMap::new(),
            is_listed: false,
        }
    }

    /// Begins to follow what is needed, and ends with what is not.
    fn follow(&mut self, needs: Needs) {
        if needs.pods && self.pods.is_none() {
            info!("a policy goes by which pods connect: following the pods of the cluster");
            self.pods = Some(pods(self.client.clone(), Duration::ZERO));
        } else if !needs.pods && self.pods.take().is_some() {
            info!("no policy goes by which pods connect any more");
            self.listed_pods = Peers::default();
            self.known.change(|known| known.peers = None);
            self.heard("pods", None);
        }
        if needs.namespaces && self.namespaces.is_none() {
            self.namespaces = Some(namespaces(self.client.clone(), Duration::ZERO));
        } else if !needs.namespaces && self.namespaces.take().is_some() {
            self.listed_namespaces = HashMap::new();
            self.known.change(|known| known.namespaces = None);
            self.heard("namespaces", None);
        }
    }

    /// Whether the policies are others than before.
    fn on_policy(&mut self, event: watcher::Result<Event<NetworkPolicy>>) -> bool {
        let Some(event) = self.ok("networkpolicies", event) else { return false };
        match event {
            Event::Init => self.listed_policies.clear(),
            Event::InitApply(policy) => self.listed_policies.push(Policy::of(&policy)),
            Event::InitDone => {
                let mut policies = BTreeMap::<String, Vec<Arc<Policy>>>::new();
                for policy in std::mem::take(&mut self.listed_policies) {
                    policies.entry(policy.namespace.clone()).or_default().push(Arc::new(policy));
                }
                self.is_listed = true;
                self.known.change(|known| known.policies = policies);
                self.heard("networkpolicies", None);
                return true;
            }
            Event::Apply(policy) => {
                let policy = Policy::of(&policy);
                self.known.change(|known| {
                    remove(known, &policy.namespace, &policy.name);
                    known.policies.entry(policy.namespace.clone()).or_default().push(Arc::new(policy));
                });
                return true;
            }
            Event::Delete(policy) => {
                let policy = Policy::of(&policy);
                self.known.change(|known| remove(known, &policy.namespace, &policy.name));
                return true;
            }
        }
        false
    }

    fn on_pod(&mut self, event: watcher::Result<Event<PeerPod>>) {
        let Some(event) = self.ok("pods", event) else { return };
        match event {
            Event::Init => self.listed_pods = Peers::default(),
            Event::InitApply(pod) => _ = self.listed_pods.put(&pod),
            Event::InitDone => {
                let peers = std::mem::take(&mut self.listed_pods);
                self.known.change(|known| known.peers = Some(peers));
                self.heard("pods", None);
            }
            Event::Apply(pod) => self.change_peers(|peers| peers.put(&pod)),
            Event::Delete(pod) => {
                self.change_peers(|peers| peers.remove(pod.metadata.uid.as_deref().unwrap_or_default()))
            }
        }
    }

    fn change_peers(&self, change: impl FnOnce(&mut Peers) -> bool) {
        let has_changed = self.known.0.known.write().peers.as_mut().is_some_and(change);
        if has_changed {
            self.known.bump();
        }
    }

    fn on_namespace(&mut self, event: watcher::Result<Event<PartialObjectMeta<Namespace>>>) {
        let Some(event) = self.ok("namespaces", event) else { return };
        let named = |namespace: &PartialObjectMeta<Namespace>| {
            let labels = Labels::of(namespace.metadata.labels.as_ref());
            (namespace.metadata.name.clone().unwrap_or_default(), labels)
        };
        match event {
            Event::Init => self.listed_namespaces.clear(),
            Event::InitApply(namespace) => self.listed_namespaces.extend([named(&namespace)]),
            Event::InitDone => {
                let namespaces = std::mem::take(&mut self.listed_namespaces);
                self.known.change(|known| known.namespaces = Some(namespaces));
                self.heard("namespaces", None);
            }
            Event::Apply(namespace) => {
                self.known.change(|known| known.namespaces.get_or_insert_default().extend([named(&namespace)]));
            }
            Event::Delete(namespace) => {
                let (name, _) = named(&namespace);
                self.known.change(|known| _ = known.namespaces.as_mut().and_then(|all| all.remove(&name)));
            }
        }
    }

    /// The event, if the watch has one; what it fails of is taken note of.
    fn ok<K>(&mut self, kind: &'static str, event: watcher::Result<Event<K>>) -> Option<Event<K>> {
        match event {
            Ok(event) => Some(event),
            Err(error) => {
                self.heard(kind, Some(&error));
                if refusal(&error).is_some() {
                    // From the list on: a watch that goes on would not say so.
                    let client = self.client.clone();
                    match kind {
                        "networkpolicies" => self.policies = policies(client, REFUSED),
                        "pods" => self.pods = Some(pods(client, REFUSED)),
                        _ => self.namespaces = Some(namespaces(client, REFUSED)),
                    }
                }
                None
            }
        }
    }

    /// Takes note of how a watch goes.
    fn heard(&mut self, kind: &'static str, error: Option<&watcher::Error>) {
        let mut waits_because = None;
        match error {
            None => {
                if self.refused.remove(kind).is_some() {
                    info!("the node may read {kind} now");
                }
            }
            Some(error) => match refusal(error) {
                // It has been told, and nobody can do anything about it from here.
                Some(why) if self.refused.get(kind) == Some(&why) => return,
                Some(why) => {
                    warn!("NetworkPolicies are not kept: the node may not read {kind}: {why}");
                    self.refused.insert(kind, why);
                }
                None => {
                    debug!("the watch on {kind} failed, trying again; what was known holds: {error}");
                    waits_because = Some(error.to_string());
                }
            },
        }
        let standing = if !self.refused.is_empty() {
            let kinds: Vec<&str> = self.refused.keys().copied().collect();
            Standing::NotKept(format!(
                "the node may not list and watch {}; bind the ClusterRole {CLUSTER_ROLE} to the group system:nodes",
                kinds.join(", ")
            ))
        } else if self.is_listed {
            Standing::Kept
        } else {
            Standing::Asking(waits_because)
        };
        self.known.stand(standing);
    }
}

fn remove(known: &mut Known, namespace: &str, name: &str) {
    if let Some(policies) = known.policies.get_mut(namespace) {
        policies.retain(|policy| policy.name != name);
        if policies.is_empty() {
            known.policies.remove(namespace);
        }
    }
}

/// What the API server says where it does not let the node read something, or does not have it.
fn refusal(error: &watcher::Error) -> Option<String> {
    let error = match error {
        watcher::Error::InitialListFailed(error)
        | watcher::Error::WatchStartFailed(error)
        | watcher::Error::WatchFailed(error) => error,
        watcher::Error::WatchError(_) | watcher::Error::NoResourceVersion => return None,
    };
    matches!(status_code(error), Some(403 | 404)).then(|| describe(error))
}
