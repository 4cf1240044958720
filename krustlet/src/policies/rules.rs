//! What NetworkPolicies allow: the judgement alone, without a cluster or a clock.
//!
//! https://kubernetes.io/docs/concepts/services-networking/network-policies/: a pod that no policy selects is open; one that
//! some select takes what any of them allows, and nothing else; the same of what it connects to.

use super::selector::{Labelled, Selector};
use k8s_openapi::api::networking::v1::{IPBlock, NetworkPolicy, NetworkPolicyPeer, NetworkPolicyPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use krustlet_runtime::IpNet;
use std::net::IpAddr;
use std::ops::RangeInclusive;

/// One NetworkPolicy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Policy {
    pub namespace: String,
    pub name: String,
    selector: Selector,
    /// None where it says nothing of what comes in.
    ingress: Option<Vec<Rule>>,
    /// None where it says nothing of what goes out.
    egress: Option<Vec<Rule>>,
}

/// Which way a connection is made, as the pod that policies select sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Rule {
    /// None: everybody.
    peers: Option<Vec<Peer>>,
    /// None: every port. Those of other protocols than TCP are left out: a list of them alone has no port.
    ports: Option<Vec<Ports>>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Peer {
    Block {
        network: IpNet,
        except: Vec<IpNet>,
    },
    /// Pods by their own labels, in the namespaces of such labels or, without a selector, in the policy's.
    Pods {
        namespaces: Option<Selector>,
        pods: Option<Selector>,
    },
    /// One that this agent cannot read.
    Nobody,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Ports {
    Any,
    Numbers(RangeInclusive<i32>),
    Named(String),
}

/// A port of the pod that is connected to, as its container declares it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Port {
    pub number: u16,
    pub name: Option<String>,
}

/// Who connects, or is connected to.
pub struct Remote<'a> {
    pub ip: IpAddr,
    /// The pod whose address that is, if it is one's.
    pub pod: Option<RemotePod<'a>>,
}

pub struct RemotePod<'a> {
    pub namespace: &'a str,
    pub labels: &'a dyn Labelled,
    /// None while they are not known.
    pub namespace_labels: Option<&'a dyn Labelled>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Judgement {
    Admitted,
    Denied,
    /// It depends on which pod that is, and that is not known.
    Unknown,
}

/// Whether the connection to one of the ports is allowed, by the policies that select the pod.
pub fn judge<'a>(
    policies: impl Iterator<Item = &'a Policy>,
    direction: Direction,
    remote: &Remote<'_>,
    ports: &[Port],
) -> Judgement {
    let mut judgement = Judgement::Admitted;
    for policy in policies {
        let Some(rules) = policy.rules(direction) else { continue };
        if judgement == Judgement::Admitted {
            judgement = Judgement::Denied;
        }
        for rule in rules.iter().filter(|rule| rule.has(ports)) {
            match rule.judge(remote, &policy.namespace) {
                Judgement::Admitted => return Judgement::Admitted,
                Judgement::Unknown => judgement = Judgement::Unknown,
                Judgement::Denied => {}
            }
        }
    }
    judgement
}

impl Policy {
    pub fn of(policy: &NetworkPolicy) -> Self {
        let spec = policy.spec.clone().unwrap_or_default();
        let ingress = spec.ingress.iter().flatten().map(|rule| Rule::of(rule.from.as_deref(), rule.ports.as_deref()));
        let egress = spec.egress.iter().flatten().map(|rule| Rule::of(rule.to.as_deref(), rule.ports.as_deref()));
        let (ingress, egress): (Vec<Rule>, Vec<Rule>) = (ingress.collect(), egress.collect());
        // Without types it is of ingress, and of egress where it has a rule for it.
        let types = spec.policy_types.filter(|types| !types.is_empty());
        let is_of = |wanted: &str, default: bool| {
            types.as_ref().map_or(default, |types| types.iter().any(|found| found == wanted))
        };
        Self {
            namespace: policy.metadata.namespace.clone().unwrap_or_default(),
            name: policy.metadata.name.clone().unwrap_or_default(),
            selector: spec.pod_selector.as_ref().map_or_else(|| Selector::of(&Default::default()), Selector::of),
            ingress: is_of("Ingress", true).then_some(ingress),
            egress: is_of("Egress", !egress.is_empty()).then_some(egress),
        }
    }

    /// Whether it is about the pod of these labels, in its own namespace.
    pub fn selects(&self, labels: &dyn Labelled) -> bool {
        self.selector.selects(labels)
    }

    pub fn is_of(&self, direction: Direction) -> bool {
        self.rules(direction).is_some()
    }

    /// Whether it goes by which pods are at the other end.
    pub fn names_pods(&self) -> bool {
        self.peers().any(|peer| matches!(peer, Peer::Pods { .. }))
    }

    /// Whether it goes by their namespaces' labels.
    pub fn names_namespaces(&self) -> bool {
        self.peers().any(|peer| matches!(peer, Peer::Pods { namespaces: Some(_), .. }))
    }

    /// Whether it goes by what a pod that is connected to calls its ports.
    pub fn names_ports_of_others(&self) -> bool {
        let ports = self.egress.iter().flatten().flat_map(|rule| rule.ports.iter().flatten());
        ports.into_iter().any(|port| matches!(port, Ports::Named(_)))
    }

    fn rules(&self, direction: Direction) -> Option<&Vec<Rule>> {
        match direction {
            Direction::Ingress => self.ingress.as_ref(),
            Direction::Egress => self.egress.as_ref(),
        }
    }

    fn peers(&self) -> impl Iterator<Item = &Peer> {
        let rules = self.ingress.iter().chain(&self.egress).flatten();
        rules.flat_map(|rule| rule.peers.iter().flatten())
    }
}

impl Rule {
    fn of(peers: Option<&[NetworkPolicyPeer]>, ports: Option<&[NetworkPolicyPort]>) -> Self {
        let peers = peers.filter(|peers| !peers.is_empty());
        let ports = ports.filter(|ports| !ports.is_empty());
        Self {
            peers: peers.map(|peers| peers.iter().map(Peer::of).collect()),
            ports: ports.map(|ports| ports.iter().filter_map(Ports::of).collect()),
        }
    }

    fn has(&self, ports: &[Port]) -> bool {
        let Some(allowed) = &self.ports else { return true };
        ports.iter().any(|port| allowed.iter().any(|allowed| allowed.has(port)))
    }

    fn judge(&self, remote: &Remote<'_>, namespace: &str) -> Judgement {
        let Some(peers) = &self.peers else { return Judgement::Admitted };
        let mut judgement = Judgement::Denied;
        for peer in peers {
            match peer.judge(remote, namespace) {
                Judgement::Admitted => return Judgement::Admitted,
                Judgement::Unknown => judgement = Judgement::Unknown,
                Judgement::Denied => {}
            }
        }
        judgement
    }
}

impl Peer {
    fn of(peer: &NetworkPolicyPeer) -> Self {
        match peer {
            NetworkPolicyPeer { ip_block: Some(block), namespace_selector: None, pod_selector: None } => {
                Self::of_block(block).unwrap_or(Self::Nobody)
            }
            NetworkPolicyPeer { ip_block: None, namespace_selector: None, pod_selector: None } => Self::Nobody,
            NetworkPolicyPeer { ip_block: None, namespace_selector, pod_selector } => Self::Pods {
                namespaces: namespace_selector.as_ref().map(Selector::of),
                pods: pod_selector.as_ref().map(Selector::of),
            },
            // The API server takes no such thing.
            _ => Self::Nobody,
        }
    }

    /// None where it cannot be read: who wrote an exception wanted it kept.
    fn of_block(block: &IPBlock) -> Option<Self> {
        let except = block.except.iter().flatten().map(|network| network.parse().ok());
        Some(Self::Block { network: block.cidr.parse().ok()?, except: except.collect::<Option<_>>()? })
    }

    fn judge(&self, remote: &Remote<'_>, namespace: &str) -> Judgement {
        let is_admitted = match self {
            Self::Block { network, except } => {
                network.contains(&remote.ip) && !except.iter().any(|network| network.contains(&remote.ip))
            }
            Self::Pods { namespaces, pods } => {
                let Some(pod) = &remote.pod else { return Judgement::Unknown };
                let is_of_namespace = match (namespaces, pod.namespace_labels) {
                    (None, _) => pod.namespace == namespace,
                    (Some(selector), Some(labels)) => selector.selects(labels),
                    (Some(_), None) => return Judgement::Unknown,
                };
                is_of_namespace && pods.as_ref().is_none_or(|selector| selector.selects(pod.labels))
            }
            Self::Nobody => false,
        };
        if is_admitted { Judgement::Admitted } else { Judgement::Denied }
    }
}

impl Ports {
    /// None for what is no port of TCP.
    fn of(port: &NetworkPolicyPort) -> Option<Self> {
        if !matches!(port.protocol.as_deref(), None | Some("" | "TCP")) {
            return None;
        }
        Some(match &port.port {
            None => Self::Any,
            Some(IntOrString::Int(first)) => Self::Numbers(*first..=port.end_port.unwrap_or(*first)),
            Some(IntOrString::String(name)) => Self::Named(name.clone()),
        })
    }

    fn has(&self, port: &Port) -> bool {
        match self {
            Self::Any => true,
            Self::Numbers(range) => range.contains(&i32::from(port.number)),
            Self::Named(name) => port.name.as_ref() == Some(name),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::indexing_slicing)]
mod tests {
    use super::super::selector::Labels;
    use super::*;
    use rand::rngs::StdRng;
    use rand::seq::IndexedRandom as _;
    use rand::{RngExt as _, SeedableRng as _};
    use serde_json::{Value, json};
    use std::collections::BTreeMap;
    use std::slice::from_ref;

    type Map = BTreeMap<String, String>;

    fn labels(text: &str) -> Map {
        text.split_whitespace().filter_map(|pair| pair.split_once('=')).map(|(k, v)| (k.into(), v.into())).collect()
    }

    fn policy(spec: Value) -> Policy {
        Policy::of(
            &serde_json::from_value(json!({"metadata": {"namespace": "shop", "name": "p"}, "spec": spec})).unwrap(),
        )
    }

    /// The judgement on `IP[ NAMESPACE/LABELS]` that connects to port 8080, called http, of a pod of namespace shop; a
    /// namespace has the label `team`, which is its own name.
    fn judged(specs: &[Value], source: &str) -> Judgement {
        let policies: Vec<Policy> = specs.iter().cloned().map(policy).collect();
        let (ip, pod) = source.split_once(' ').map_or((source, None), |(ip, pod)| (ip, pod.split_once('/')));
        let of_pod = pod.map(|(namespace, own)| {
            (namespace, Labels::of(Some(&labels(own))), Labels::of(Some(&labels(&format!("team={namespace}")))))
        });
        let pod = of_pod.as_ref().map(|(namespace, labels, of_namespace)| RemotePod {
            namespace,
            labels,
            namespace_labels: Some(of_namespace),
        });
        let ports = [Port { number: 8080, name: Some("http".to_owned()) }];
        let remote = Remote { ip: ip.parse().unwrap(), pod };
        let judgement = judge(policies.iter(), Direction::Ingress, &remote, &ports);
        // What goes out is judged alike.
        let turned = specs.iter().cloned().map(turned).map(policy).collect::<Vec<_>>();
        assert_eq!(judge(turned.iter(), Direction::Egress, &remote, &ports), judgement, "{turned:?}");
        judgement
    }

    /// The same policy of what goes out.
    fn turned(spec: Value) -> Value {
        let is_of = |wanted: &str| match spec["policyTypes"].as_array() {
            Some(types) => types.contains(&json!(wanted)),
            None => wanted == "Ingress",
        };
        let types: Vec<&str> = [("Ingress", "Egress"), ("Egress", "Ingress")]
            .into_iter()
            .filter_map(|(from, to)| is_of(from).then_some(to))
            .collect();
        let rules = spec["ingress"].as_array().cloned().unwrap_or_default();
        let rules: Vec<Value> = rules.iter().map(|rule| json!({"to": rule["from"], "ports": rule["ports"]})).collect();
        json!({"podSelector": {}, "policyTypes": types, "egress": rules})
    }

    fn is_admitted(specs: &[Value], source: &str) -> bool {
        judged(specs, source) == Judgement::Admitted
    }

    fn from(peers: Value) -> Value {
        json!({"podSelector": {}, "ingress": [{"from": peers}]})
    }

    #[test]
    fn without_a_policy_everybody_is_let_in_and_with_an_empty_one_nobody() {
        assert!(is_admitted(&[], "10.0.0.1"));
        assert!(!is_admitted(&[json!({"podSelector": {}})], "10.0.0.1 shop/app=web"));
        assert!(!is_admitted(&[json!({"podSelector": {}, "ingress": []})], "10.0.0.1"));
        assert!(is_admitted(&[json!({"podSelector": {}, "ingress": [{}]})], "10.0.0.1"), "a rule for all");
        assert!(
            is_admitted(&[json!({"podSelector": {}}), json!({"podSelector": {}, "ingress": [{}]})], "10.0.0.1"),
            "any"
        );
    }

    #[test]
    fn the_types_of_a_policy_say_what_it_is_about() {
        let types =
            |types: Value, egress: Value| policy(json!({"podSelector": {}, "policyTypes": types, "egress": egress}));
        for (types, ingress, egress) in [
            (types(json!(null), json!(null)), true, false),
            (types(json!([]), json!([])), true, false),
            (types(json!(null), json!([{}])), true, true),
            (types(json!(["Egress"]), json!(null)), false, true),
            (types(json!(["Ingress"]), json!([{}])), true, false),
            (types(json!(["Ingress", "Egress"]), json!(null)), true, true),
        ] {
            let found = (types.is_of(Direction::Ingress), types.is_of(Direction::Egress));
            assert_eq!(found, (ingress, egress), "{types:?}");
        }
        assert!(is_admitted(&[json!({"podSelector": {}, "policyTypes": ["Egress"]})], "10.0.0.1"));
    }

    #[test]
    fn pods_are_let_in_by_their_labels_in_the_policys_namespace_and_by_their_namespaces() {
        let same = from(json!([{"podSelector": {"matchLabels": {"app": "web"}}}]));
        assert!(is_admitted(from_ref(&same), "10.0.0.1 shop/app=web"));
        assert!(!is_admitted(from_ref(&same), "10.0.0.1 shop/app=db"));
        assert!(!is_admitted(&[same], "10.0.0.1 other/app=web"), "another namespace");
        let team = json!({"namespaceSelector": {"matchLabels": {"team": "front"}}});
        assert!(is_admitted(&[from(json!([team.clone()]))], "10.0.0.1 front/app=db"));
        assert!(!is_admitted(&[from(json!([team]))], "10.0.0.1 shop/app=db"), "its own is none of them");
        let both = json!([{"namespaceSelector": {"matchLabels": {"team": "front"}}, "podSelector": {"matchLabels": {"app": "web"}}}]);
        let either = json!([{"namespaceSelector": {"matchLabels": {"team": "front"}}}, {"podSelector": {"matchLabels": {"app": "web"}}}]);
        for (source, by_both, by_either) in [
            ("10.0.0.1 front/app=web", true, true),
            ("10.0.0.1 front/app=db", false, true),
            ("10.0.0.1 shop/app=web", false, true),
            ("10.0.0.1 shop/app=db", false, false),
        ] {
            assert_eq!(is_admitted(&[from(both.clone())], source), by_both, "{source}");
            assert_eq!(is_admitted(&[from(either.clone())], source), by_either, "{source}");
        }
        let all = from(json!([{"namespaceSelector": {}}]));
        assert!(is_admitted(from_ref(&all), "10.0.0.1 any/"));
        assert_eq!(judged(&[all], "10.0.0.1"), Judgement::Unknown, "no pod that is known");
    }

    #[test]
    fn networks_are_let_in_but_for_their_exceptions_and_what_cannot_be_read_lets_nobody_in() {
        let block = |cidr: &str, except: Value| from(json!([{"ipBlock": {"cidr": cidr, "except": except}}]));
        assert!(is_admitted(&[block("10.0.0.0/8", json!(["10.1.0.0/16"]))], "10.2.0.1"));
        assert_eq!(judged(&[block("10.0.0.0/8", json!(["10.1.0.0/16"]))], "10.1.0.1"), Judgement::Denied);
        assert_eq!(judged(&[block("10.0.0.0/8", json!(null))], "11.0.0.1"), Judgement::Denied);
        assert!(is_admitted(&[block("fd00::/8", json!(["fd00:1::/32"]))], "fd00:2::1"));
        assert!(!is_admitted(&[block("fd00::/8", json!(["fd00:1::/32"]))], "fd00:1::1"));
        assert!(!is_admitted(&[block("fd00::/8", json!(null))], "10.0.0.1"), "the other family");
        assert!(!is_admitted(&[block("everything", json!(null))], "10.0.0.1"));
        assert!(!is_admitted(&[block("0.0.0.0/0", json!(["nobody"]))], "10.0.0.1"));
        assert!(!is_admitted(&[from(json!([{}]))], "10.0.0.1 shop/app=web"));
    }

    #[test]
    fn ports_are_numbers_ranges_and_names_of_tcp() {
        let ports = |ports: Value| json!({"podSelector": {}, "ingress": [{"ports": ports}]});
        for (allowed, admitted) in [
            (json!(null), true),
            (json!([]), true),
            (json!([{}]), true),
            (json!([{"protocol": "TCP"}]), true),
            (json!([{"port": 8080}]), true),
            (json!([{"port": 8081}]), false),
            (json!([{"port": 8000, "endPort": 8080}]), true),
            (json!([{"port": 8081, "endPort": 9000}]), false),
            (json!([{"port": "http"}]), true),
            (json!([{"port": "metrics"}]), false),
            (json!([{"port": "8080"}]), false),
            (json!([{"port": 8080, "protocol": "UDP"}]), false),
            (json!([{"protocol": "SCTP"}]), false),
            (json!([{"port": 53, "protocol": "UDP"}, {"port": 8080}]), true),
        ] {
            assert_eq!(is_admitted(&[ports(allowed.clone())], "10.0.0.1"), admitted, "{allowed}");
        }
    }

    #[test]
    fn what_depends_on_a_pod_that_is_not_known_is_so_for_the_port_that_it_is_about_alone() {
        let rule = |port: u16| json!({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": port}]}]});
        assert_eq!(judged(&[rule(8080)], "10.0.0.1"), Judgement::Unknown);
        assert_eq!(judged(&[rule(8081)], "10.0.0.1"), Judgement::Denied);
        let block = from(json!([{"ipBlock": {"cidr": "10.0.0.0/8"}}]));
        assert_eq!(judged(&[rule(8080), block.clone()], "10.0.0.1"), Judgement::Admitted);
        assert_eq!(judged(&[block, rule(8080)], "11.0.0.1"), Judgement::Unknown);
    }

    /// The API's text once more, on its objects as they are, and as slowly as it likes.
    mod as_written {
        use super::*;

        pub fn selects(selector: &Value, labels: &Map) -> bool {
            let of_labels = selector["matchLabels"].as_object().into_iter().flatten();
            let mut holds: Vec<bool> =
                of_labels.map(|(key, value)| labels.get(key).map(String::as_str) == value.as_str()).collect();
            for expression in selector["matchExpressions"].as_array().into_iter().flatten() {
                let found = labels.get(expression["key"].as_str().unwrap());
                let is_among =
                    found.is_some_and(|found| expression["values"].as_array().unwrap().contains(&json!(found)));
                holds.push(match expression["operator"].as_str().unwrap() {
                    "In" => is_among,
                    "NotIn" => !is_among,
                    "Exists" => found.is_some(),
                    _ => found.is_none(),
                });
            }
            !holds.contains(&false)
        }

        pub fn is_admitted(specs: &[Value], ip: IpAddr, pod: Option<(&str, &Map, &Map)>, port: &Port) -> bool {
            let of_ingress = specs.iter().filter(|spec| {
                spec["policyTypes"].is_null() || spec["policyTypes"].as_array().unwrap().contains(&json!("Ingress"))
            });
            let of_ingress: Vec<&Value> = of_ingress.collect();
            if of_ingress.is_empty() {
                return true;
            }
            let rules = of_ingress.iter().flat_map(|spec| spec["ingress"].as_array().into_iter().flatten());
            rules.into_iter().any(|rule| {
                let list = |name: &str| rule[name].as_array().cloned().unwrap_or_default();
                let (peers, ports) = (list("from"), list("ports"));
                let of_peer = peers.is_empty() || peers.iter().any(|peer| is_peer(peer, ip, pod));
                let of_port = ports.is_empty() || ports.iter().any(|allowed| is_port(allowed, port));
                of_peer && of_port
            })
        }

        fn is_peer(peer: &Value, ip: IpAddr, pod: Option<(&str, &Map, &Map)>) -> bool {
            if let Some(block) = peer.get("ipBlock") {
                let within = |network: &Value| network.as_str().unwrap().parse::<IpNet>().unwrap().contains(&ip);
                return within(&block["cidr"]) && !block["except"].as_array().unwrap().iter().any(within);
            }
            let Some((namespace, labels, of_namespace)) = pod else { return false };
            match (peer.get("namespaceSelector"), peer.get("podSelector")) {
                (Some(namespaces), Some(pods)) => selects(namespaces, of_namespace) && selects(pods, labels),
                (Some(namespaces), None) => selects(namespaces, of_namespace),
                (None, Some(pods)) => namespace == "shop" && selects(pods, labels),
                (None, None) => unreachable!(),
            }
        }

        fn is_port(allowed: &Value, port: &Port) -> bool {
            let is_tcp = allowed["protocol"].is_null() || allowed["protocol"] == "TCP";
            is_tcp
                && match (allowed["port"].as_u64(), allowed["port"].as_str()) {
                    (None, None) => true,
                    (_, Some(name)) => port.name.as_deref() == Some(name),
                    (Some(first), None) => {
                        let last = allowed["endPort"].as_u64().unwrap_or(first);
                        (first..=last).contains(&u64::from(port.number))
                    }
                }
        }
    }

    #[test]
    fn any_policies_say_of_any_connection_what_the_api_says_of_it() {
        let mut admitted = 0;
        for seed in 0..20_000 {
            let mut dice = StdRng::seed_from_u64(seed);
            let specs: Vec<Value> = (0..dice.random_range(0..3)).map(|_| any_policy(&mut dice)).collect();
            let ip: IpAddr =
                ["10.0.0.1", "10.1.0.1", "11.0.0.1", "fd00::1"].choose(&mut dice).unwrap().parse().unwrap();
            let namespace = *["shop", "front"].choose(&mut dice).unwrap();
            let (own, of_namespace) = (any_labels(&mut dice), any_labels(&mut dice));
            let is_pod = dice.random_bool(0.8);
            let port = Port {
                number: *[80, 8080].choose(&mut dice).unwrap(),
                name: [None, Some("http".to_owned())].choose(&mut dice).unwrap().clone(),
            };
            let wanted = as_written::is_admitted(&specs, ip, is_pod.then_some((namespace, &own, &of_namespace)), &port);
            let policies: Vec<Policy> = specs.iter().cloned().map(policy).collect();
            let (own, of_namespace) = (Labels::of(Some(&own)), Labels::of(Some(&of_namespace)));
            let pod = RemotePod { namespace, labels: &own, namespace_labels: Some(&of_namespace) };
            let remote = Remote { ip, pod: is_pod.then_some(pod) };
            let judgement = judge(policies.iter(), Direction::Ingress, &remote, &[port]);
            assert_eq!(judgement == Judgement::Admitted, wanted, "seed {seed}: {}", json!(specs));
            assert!(!is_pod || judgement != Judgement::Unknown, "seed {seed}");
            admitted += usize::from(wanted);
        }
        assert!((4_000..16_000).contains(&admitted), "{admitted} is no mixture");
    }

    fn any_labels(dice: &mut StdRng) -> Map {
        let keys = ["app", "tier"].into_iter().filter(|_| dice.random()).map(str::to_owned).collect::<Vec<_>>();
        keys.into_iter().map(|key| (key, ["a", "b"].choose(dice).unwrap().to_string())).collect()
    }

    fn any_selector(dice: &mut StdRng) -> Value {
        let mut selector = json!({});
        if dice.random() {
            selector["matchLabels"] = json!(any_labels(dice));
        }
        if dice.random_bool(0.3) {
            let operator = ["In", "NotIn", "Exists", "DoesNotExist"].choose(dice).unwrap();
            let key = ["app", "tier"].choose(dice).unwrap();
            selector["matchExpressions"] = json!([{"key": key, "operator": operator, "values": ["a"]}]);
        }
        selector
    }

    fn any_peer(dice: &mut StdRng) -> Value {
        match dice.random_range(0..4) {
            0 => {
                let (cidr, except) =
                    *[("10.0.0.0/8", "10.1.0.0/16"), ("0.0.0.0/0", "11.0.0.0/8"), ("fd00::/8", "fd00::/16")]
                        .choose(dice)
                        .unwrap();
                let except: Vec<&str> = Some(except).into_iter().filter(|_| dice.random()).collect();
                json!({"ipBlock": {"cidr": cidr, "except": except}})
            }
            1 => json!({"podSelector": any_selector(dice)}),
            2 => json!({"namespaceSelector": any_selector(dice)}),
            _ => json!({"podSelector": any_selector(dice), "namespaceSelector": any_selector(dice)}),
        }
    }

    fn any_port(dice: &mut StdRng) -> Value {
        let mut port = [json!({}), json!({"port": 80}), json!({"port": "http"}), json!({"port": 80, "endPort": 8080})]
            .choose(dice)
            .unwrap()
            .clone();
        if dice.random_bool(0.3) {
            port["protocol"] = json!(["TCP", "UDP"].choose(dice).unwrap());
        }
        port
    }

    fn any_policy(dice: &mut StdRng) -> Value {
        let rules: Vec<Value> = (0..dice.random_range(0..3))
            .map(|_| {
                let peers: Vec<Value> = (0..dice.random_range(0..3)).map(|_| any_peer(dice)).collect();
                let ports: Vec<Value> = (0..dice.random_range(0..3)).map(|_| any_port(dice)).collect();
                json!({"from": peers, "ports": ports})
            })
            .collect();
        let mut spec = json!({"podSelector": {}, "ingress": rules});
        if dice.random_bool(0.2) {
            spec["policyTypes"] =
                [json!(["Ingress"]), json!(["Egress"]), json!(["Ingress", "Egress"])].choose(dice).unwrap().clone();
        }
        spec
    }
}
