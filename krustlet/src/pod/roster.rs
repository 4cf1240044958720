//! Who is on the node now: its pods, and the guests that run in them. Written by the pods' workers, read by the API.
//!
//! kube's `reflector::Store` is keyed by namespace and name: a pod made anew under the same name would hide the one before
//! it, which may still be ending here. So pods are kept by UID.

use super::guest::Guest;
use crate::telemetry::metrics;
use crate::view::{ContainerUsage, View};
use k8s_openapi::api::core::v1::Pod;
use parking_lot::RwLock;
use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

#[derive(Default)]
pub struct Roster {
    /// By UID.
    pods: RwLock<HashMap<String, Arc<Pod>>>,
    /// By UID of the pod and name of the container.
    guests: RwLock<HashMap<(String, String), Guest>>,
}

impl Roster {
    /// Gives what was known of the pod before.
    pub fn put_pod(&self, uid: &str, pod: Arc<Pod>) -> Option<Arc<Pod>> {
        self.pods.write().insert(uid.to_owned(), pod)
    }

    pub fn pod(&self, uid: &str) -> Option<Arc<Pod>> {
        self.pods.read().get(uid).cloned()
    }

    pub fn remove_pod(&self, uid: &str) {
        self.pods.write().remove(uid);
    }

    pub fn has_pod(&self, uid: &str) -> bool {
        self.pods.read().contains_key(uid)
    }

    /// Pods for which `holds`.
    pub fn count_pods(&self, holds: impl Fn(&Pod) -> bool) -> usize {
        self.pods.read().values().filter(|pod| holds(pod)).count()
    }

    /// Enters a guest, for as long as the entry lives.
    pub fn enter(self: &Arc<Self>, uid: &str, container: &str, guest: Guest) -> Entry {
        let key = (uid.to_owned(), container.to_owned());
        self.guests.write().insert(key.clone(), guest);
        metrics().containers_running.inc();
        Entry { roster: self.clone(), key }
    }
}

/// A guest's place on the roster.
pub struct Entry {
    roster: Arc<Roster>,
    key: (String, String),
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.roster.guests.write().remove(&self.key);
        metrics().containers_running.dec();
    }
}

impl View for Roster {
    fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.read().values().cloned().collect()
    }

    fn usage(&self) -> Vec<ContainerUsage> {
        let guests = self.guests.read();
        guests
            .iter()
            .map(|((uid, container), guest)| ContainerUsage {
                pod_uid: uid.clone(),
                container: container.clone(),
                stats: guest.stats(),
            })
            .collect()
    }

    fn served(&self, uid: &str) -> Vec<SocketAddr> {
        let guests = self.guests.read();
        let of_pod = guests.iter().filter(|((pod, _), _)| pod == uid);
        of_pod.flat_map(|(_, guest)| guest.served().iter().copied()).collect()
    }
}
