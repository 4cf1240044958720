//! Which ports a container is served on, and where one of its ports is found by number or name. There is no pod network: a
//! containerPort is a port of the node's address, the hostPort in its place where it has one.

use k8s_openapi::api::core::v1::{Container, ContainerPort};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;

/// The ports of the node that the container is served on, each once, in the order of the spec.
pub fn served(container: &Container) -> Vec<u16> {
    let mut numbers = Vec::new();
    for number in container.ports.iter().flatten().filter(|port| is_tcp(port)).filter_map(on_node) {
        if !numbers.contains(&number) {
            numbers.push(number);
        }
    }
    numbers
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

/// Where the node has the port that the container's spec calls by this number or name; only TCP ports count.
pub fn resolve(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let declared = |is_it: &dyn Fn(&ContainerPort) -> bool| {
        container.ports.iter().flatten().filter(|port| is_tcp(port)).find(|port| is_it(port))
    };
    let named = match port {
        IntOrString::Int(_) => None,
        IntOrString::String(name) => declared(&|port| port.name.as_ref() == Some(name)),
    };
    if let Some(port) = named {
        return on_node(port).ok_or_else(|| format!("{} is not a port", port.container_port));
    }
    let number = match port {
        IntOrString::Int(number) => *number,
        IntOrString::String(name) => {
            name.parse().map_err(|_| format!("the container has no TCP port named {name:?}"))?
        }
    };
    let number_on_node = match declared(&|port| port.container_port == number) {
        Some(port) => on_node(port),
        None => valid(number),
    };
    number_on_node.ok_or_else(|| format!("{number} is not a port"))
}

fn is_tcp(port: &ContainerPort) -> bool {
    matches!(port.protocol.as_deref(), None | Some("" | "TCP"))
}

fn on_node(port: &ContainerPort) -> Option<u16> {
    valid(port.host_port.filter(|port| *port > 0).unwrap_or(port.container_port))
}

fn valid(number: i32) -> Option<u16> {
    u16::try_from(number).ok().filter(|number| *number > 0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn container(ports: Value) -> Container {
        serde_json::from_value(json!({"name": "web", "ports": ports})).unwrap()
    }

    #[test]
    fn every_tcp_port_is_served_once_where_the_node_has_it() {
        let container = container(json!([
            {"containerPort": 53, "protocol": "UDP"},
            {"containerPort": 8080},
            {"containerPort": 80, "hostPort": 9080, "protocol": "TCP"},
            {"containerPort": 9080},
            {"containerPort": 7, "protocol": "SCTP"},
        ]));
        assert_eq!(served(&container), [8080, 9080]);
        let said = unserved(&container);
        assert_eq!(said.len(), 2);
        assert!(said[0].contains("53") && said[0].contains("UDP"), "{said:?}");
        assert!(said[1].contains('7') && said[1].contains("SCTP"), "{said:?}");
    }

    #[test]
    fn what_is_no_port_is_not_served() {
        assert!(served(&container(json!([{"containerPort": 0}, {"containerPort": 70000}]))).is_empty());
        assert!(served(&Container::default()).is_empty());
    }

    #[test]
    fn a_port_is_a_number_or_the_name_of_one() {
        let container = container(json!([
            {"name": "web", "containerPort": 8080, "protocol": "UDP"},
            {"name": "dns", "containerPort": 53, "protocol": "UDP"},
            {"name": "web", "containerPort": 8081},
            {"containerPort": 80, "hostPort": 9080}
        ]));
        let number = |port: Value| resolve(&serde_json::from_value(port).unwrap(), &container).ok();
        assert_eq!(number(json!(81)), Some(81));
        assert_eq!(number(json!("81")), Some(81));
        assert_eq!(number(json!("web")), Some(8081), "the one of TCP");
        assert_eq!(number(json!(80)), Some(9080), "where it is on the node");
        assert_eq!(number(json!("80")), Some(9080), "a number as text");
        for bad in [json!("none"), json!("dns"), json!(0), json!(-1), json!(70000)] {
            assert_eq!(number(bad.clone()), None, "{bad}");
        }
    }
}
