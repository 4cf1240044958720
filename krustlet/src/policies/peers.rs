//! Which pods of the cluster have which addresses, as far as a policy has to know: address, namespace and labels, and no more,
//! since there may be tens of thousands.

use super::selector::Labels;
use k8s_openapi::api::core::v1::Pod;
use kube::api::{ApiResource, Object};
use serde::Deserialize;
use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;

/// A pod as it is read for this: without its containers.
pub type PeerPod = Object<Spec, Status>;

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Spec {
    host_network: Option<bool>,
}

#[derive(Debug, Clone, Default, Deserialize)]
pub struct Status {
    phase: Option<String>,
    #[serde(rename = "hostIP")]
    host_ip: Option<String>,
    #[serde(rename = "podIP")]
    pod_ip: Option<String>,
    #[serde(rename = "podIPs")]
    pod_ips: Option<Vec<Ip>>,
}

#[derive(Debug, Clone, Deserialize)]
struct Ip {
    ip: String,
}

pub fn resource() -> ApiResource {
    ApiResource::erase::<Pod>(&())
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    pub namespace: Arc<str>,
    pub labels: Labels,
    uid: Box<str>,
}

#[derive(Debug, Default)]
pub struct Peers {
    by_address: HashMap<IpAddr, Peer>,
    /// By UID.
    addresses: HashMap<Box<str>, Box<[IpAddr]>>,
    namespaces: HashSet<Arc<str>>,
}

impl Peers {
    pub fn at(&self, address: IpAddr) -> Option<&Peer> {
        self.by_address.get(&address)
    }

    /// Takes in what the API shows of a pod; whether that is anything new.
    pub fn put(&mut self, pod: &PeerPod) -> bool {
        let uid = pod.metadata.uid.as_deref().unwrap_or_default();
        let addresses = addresses(pod);
        let before = self.addresses.get(uid).map_or(&[][..], |before| before);
        let namespace = pod.metadata.namespace.as_deref().unwrap_or_default();
        let labels = Labels::of(pod.metadata.labels.as_ref());
        let is_known = |address: &IpAddr| {
            self.by_address.get(address).is_some_and(|peer| &*peer.uid == uid && peer.labels == labels)
        };
        if before == addresses && addresses.iter().all(is_known) {
            return false;
        }
        self.remove(uid);
        if !addresses.is_empty() {
            let namespace = self.namespace(namespace);
            for address in &addresses {
                // Who has it last has it: an address is given again once it is free.
                let peer = Peer { namespace: namespace.clone(), labels: labels.clone(), uid: uid.into() };
                self.by_address.insert(*address, peer);
            }
            self.addresses.insert(uid.into(), addresses.into());
        }
        true
    }

    /// Whether it was known.
    pub fn remove(&mut self, uid: &str) -> bool {
        let Some(addresses) = self.addresses.remove(uid) else { return false };
        for address in addresses {
            if self.by_address.get(&address).is_some_and(|peer| &*peer.uid == uid) {
                self.by_address.remove(&address);
            }
        }
        true
    }

    fn namespace(&mut self, name: &str) -> Arc<str> {
        if let Some(known) = self.namespaces.get(name) {
            return known.clone();
        }
        let name: Arc<str> = name.into();
        self.namespaces.insert(name.clone());
        name
    }
}

/// The addresses that are this pod's and nobody else's: not those that its node has too, and none of one that has ended.
fn addresses(pod: &PeerPod) -> Vec<IpAddr> {
    let Some(status) = &pod.status else { return Vec::new() };
    if pod.spec.host_network == Some(true) || matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
        return Vec::new();
    }
    let of_node = status.host_ip.as_deref();
    let listed = status.pod_ips.iter().flatten().map(|found| found.ip.as_str());
    let all = status.pod_ip.as_deref().into_iter().chain(listed).filter(|ip| Some(*ip) != of_node);
    let mut addresses: Vec<IpAddr> =
        all.filter_map(|ip| ip.parse::<IpAddr>().ok()).map(|ip| ip.to_canonical()).collect();
    addresses.sort_unstable();
    addresses.dedup();
    addresses
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::selector::Labelled as _;
    use super::*;
    use serde_json::{Value, json};

    fn pod(uid: &str, app: &str, status: Value, host_network: bool) -> PeerPod {
        serde_json::from_value(json!({
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": uid, "namespace": "shop", "uid": uid, "labels": {"app": app}},
            "spec": {"hostNetwork": host_network, "containers": [{"name": "web"}], "nodeName": "node"},
            "status": status,
        }))
        .unwrap()
    }

    fn running(ip: &str) -> Value {
        json!({"phase": "Running", "hostIP": "10.9.0.1", "podIP": ip, "podIPs": [{"ip": ip}, {"ip": "fd00::7"}]})
    }

    fn app(peers: &Peers, ip: &str) -> Option<String> {
        peers.at(ip.parse().unwrap()).and_then(|peer| peer.labels.label("app").map(str::to_owned))
    }

    #[test]
    fn a_pod_is_known_at_each_of_its_addresses_until_it_has_ended_or_is_gone() {
        let mut peers = Peers::default();
        assert!(peers.put(&pod("a", "web", running("10.0.0.1"), false)));
        assert!(!peers.put(&pod("a", "web", running("10.0.0.1"), false)), "nothing new");
        assert_eq!((app(&peers, "10.0.0.1"), app(&peers, "fd00::7")), (Some("web".into()), Some("web".into())));
        assert!(peers.put(&pod("a", "db", running("10.0.0.1"), false)));
        assert_eq!(app(&peers, "10.0.0.1").as_deref(), Some("db"));
        assert!(peers.put(&pod("a", "db", json!({"phase": "Failed", "podIP": "10.0.0.1"}), false)));
        assert_eq!(app(&peers, "10.0.0.1"), None);
        assert!(!peers.remove("a"));
        assert!(peers.put(&pod("b", "web", running("10.0.0.2"), false)) && peers.remove("b"));
        assert!(peers.by_address.is_empty() && peers.addresses.is_empty());
    }

    #[test]
    fn an_address_that_is_given_again_is_the_last_ones() {
        let mut peers = Peers::default();
        peers.put(&pod("a", "old", running("10.0.0.1"), false));
        peers.put(&pod("b", "new", running("10.0.0.1"), false));
        assert!(peers.remove("a"));
        assert_eq!(app(&peers, "10.0.0.1").as_deref(), Some("new"));
    }

    #[test]
    fn a_nodes_address_is_no_pods() {
        let mut peers = Peers::default();
        peers.put(&pod("a", "web", json!({"phase": "Running", "hostIP": "10.9.0.1", "podIP": "10.9.0.1"}), false));
        peers.put(&pod("b", "web", running("10.0.0.1"), true));
        peers.put(&pod("c", "web", json!({"phase": "Pending"}), false));
        assert!(peers.by_address.is_empty());
    }

    #[test]
    fn fifty_thousand_pods_are_a_few_megabytes() {
        let mut peers = Peers::default();
        let name = "x".repeat(30);
        for number in 0..50_000_u32 {
            let uid = format!("{number:036}");
            let ip = std::net::Ipv4Addr::from(0x0a00_0000 + number).to_string();
            let labels = json!({"app.kubernetes.io/name": name, "pod-template-hash": "5d59d67564", "app": name});
            peers.put(
                &serde_json::from_value(json!({
                    "metadata": {"uid": uid, "namespace": "shop", "labels": labels},
                    "spec": {},
                    "status": {"phase": "Running", "hostIP": "10.9.0.1", "podIP": ip},
                }))
                .unwrap(),
            );
        }
        let size = |peer: &Peer| size_of::<(IpAddr, Peer)>() + peer.uid.len() + peer.labels.size();
        let of_addresses: usize = peers.by_address.values().map(size).sum();
        let of_uids = peers.addresses.len() * (size_of::<(Box<str>, Box<[IpAddr]>)>() + 36 + size_of::<IpAddr>());
        // A map is half empty at worst.
        let total = 2 * (of_addresses + of_uids);
        assert!(total < 48 << 20, "{total}");
    }
}
