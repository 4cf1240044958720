//! Where a container is served, and where one of its ports is found by number or name. A containerPort is a port of the pod's
//! own address, and its hostPort one of the node's besides. A pod without an address of its own has the node's: there the
//! hostPort is in the containerPort's place.

use crate::addresses::PodAddress;
use k8s_openapi::api::core::v1::{Container, ContainerPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::net::{IpAddr, SocketAddr};

/// What the container is served on, each once, in the order of the spec.
pub fn served(container: &Container, address: PodAddress, node: IpAddr) -> Vec<SocketAddr> {
    let mut served = Vec::new();
    for (socket, _) in declared(container, address, node) {
        if !served.contains(&socket) {
            served.push(socket);
        }
    }
    served
}

/// Each TCP port with what it is served on.
pub fn declared(
    container: &Container,
    address: PodAddress,
    node: IpAddr,
) -> impl Iterator<Item = (SocketAddr, &ContainerPort)> {
    container.ports.iter().flatten().filter(|port| is_tcp(port)).flat_map(move |port| {
        let own = number_at(port, address).map(|number| SocketAddr::new(address.ip, number));
        let on_host = port.host_port.and_then(valid).filter(|_| address.is_own);
        let on_host = on_host.map(|number| SocketAddr::new(node, number));
        own.into_iter().chain(on_host).map(move |socket| (socket, port))
    })
}

/// What is to be said of each port that is not served.
pub fn unserved(container: &Container) -> Vec<String> {
    let others = container.ports.iter().flatten().filter(|port| !is_tcp(port));
    others
        .map(|port| {
            let protocol = port.protocol.as_deref().unwrap_or_default();
            format!(
                "containerPort {} is not served: a guest answers HTTP over TCP, not {protocol}",
                port.container_port
            )
        })
        .collect()
}

/// Where the address has the port that the container's spec calls by this number or name; only TCP ports count.
pub fn resolve(port: &IntOrString, container: &Container, address: PodAddress) -> Result<u16, String> {
    let declared = |is_it: &dyn Fn(&ContainerPort) -> bool| {
        container.ports.iter().flatten().filter(|port| is_tcp(port)).find(|port| is_it(port))
    };
    let named = match port {
        IntOrString::Int(_) => None,
        IntOrString::String(name) => declared(&|port| port.name.as_ref() == Some(name)),
    };
    if let Some(port) = named {
        return number_at(port, address).ok_or_else(|| format!("{} is not a port", port.container_port));
    }
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            name.parse().map_err(|_| format!("the container has no TCP port named {name:?}"))?
        }
    };
    let found = match declared(&|port| port.container_port == number) {
        Some(port) => number_at(port, address),
        None => valid(number),
    };
    found.ok_or_else(|| format!("{number} is not a port"))
}

pub fn is_tcp(port: &ContainerPort) -> bool {
    matches!(port.protocol.as_deref(), None | Some("" | "TCP"))
}

fn number_at(port: &ContainerPort, address: PodAddress) -> Option<u16> {
    let host_port = port.host_port.filter(|port| *port > 0 && !address.is_own);
    valid(host_port.unwrap_or(port.container_port))
}

fn valid(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::net::Ipv4Addr;

    fn container(ports: Value) -> Container {
        serde_json::from_value(json!({"name": "web", "ports": ports})).unwrap()
    }

    const NODE: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1));
    const OWN: PodAddress = PodAddress { ip: IpAddr::V4(Ipv4Addr::new(10, 1, 0, 2)), is_own: true };

    fn sockets(container: &Container, address: PodAddress) -> Vec<String> {
        served(container, address, NODE).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn every_tcp_port_is_served_once_on_the_pods_address_and_each_host_port_on_the_nodes() {
        let container = container(json!([
            {"containerPort": 53, "protocol": "UDP"},
            {"containerPort": 8080},
            {"containerPort": 80, "hostPort": 9080, "protocol": "TCP"},
            {"containerPort": 9080},
            {"containerPort": 7, "protocol": "SCTP"},
        ]));
        assert_eq!(sockets(&container, PodAddress::of_node(NODE)), ["10.0.0.1:8080", "10.0.0.1:9080"]);
        let own = ["10.1.0.2:8080", "10.1.0.2:80", "10.0.0.1:9080", "10.1.0.2:9080"];
        assert_eq!(sockets(&container, OWN), own);
        let said = unserved(&container);
        assert_eq!(said.len(), 2);
        assert!(said[0].contains("53") && said[0].contains("UDP"), "{said:?}");
        assert!(said[1].contains('7') && said[1].contains("SCTP"), "{said:?}");
    }

    #[test]
    fn what_is_no_port_is_not_served() {
        for address in [PodAddress::of_node(NODE), OWN] {
            assert!(sockets(&container(json!([{"containerPort": 0}, {"containerPort": 70000}])), address).is_empty());
            assert!(sockets(&Container::default(), address).is_empty());
        }
    }

    #[test]
    fn a_port_is_a_number_or_the_name_of_one() {
        let container = container(json!([
            {"name": "web", "containerPort": 8080, "protocol": "UDP"},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            {"name": "web", "containerPort": 8081},
            {"containerPort": 80, "hostPort": 9080}
        ]));
        let node = PodAddress::of_node(NODE);
        let number_at =
            |port: Value, address| resolve(&serde_json::from_value(port).unwrap(), &container, address).ok();
        let number = |port: Value| number_at(port, node);
        assert_eq!(number(json!(81)), Some(81));
        assert_eq!(number(json!("81")), Some(81));
        assert_eq!(number(json!("web")), Some(8081), "the one of TCP");
        assert_eq!(number(json!(80)), Some(9080), "where it is on the node");
        assert_eq!(number(json!("80")), Some(9080), "a number as text");
        assert_eq!((number_at(json!(80), OWN), number_at(json!("web"), OWN)), (Some(80), Some(8081)));
        for bad in [json!("none"), json!("dns"), json!(0), json!(-1), json!(70000)] {
            assert_eq!(number(bad.clone()), None, "{bad}");
            assert_eq!(number_at(bad.clone(), OWN), None, "{bad}");
        }
    }
}
