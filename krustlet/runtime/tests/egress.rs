//! What guests reach over HTTP, from outside: the hosts that their pod lists, at the addresses that the node permits.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{Node, Upstream, any_port, get, http_guest, logged, served, until};
use krustlet_runtime::{EgressConfig, HttpServer};
use std::time::Duration;
use tokio::io::AsyncReadExt as _;
use tokio::net::TcpListener;

/// wasi:http's error codes.
const REQUEST_DENIED: &str = "15";
const IP_PROHIBITED: &str = "04";

/// The status that a guest got from this authority, or the number of its error.
async fn fetched(server: &HttpServer, authority: &str) -> Result<u16, String> {
    let reply = get(server.local_addr(), &format!("/o{authority}/path?query")).await;
    if reply.status == 502 { Err(reply.body) } else { Ok(reply.status) }
}

#[tokio::test]
async fn a_guest_reaches_the_hosts_of_its_list_and_no_others() {
    let node = Node::trusting_anyone().await;
    let (listed, other) = (Upstream::start(207, None).await, Upstream::start(207, None).await);
    let (server, _) = served(&node, |spec| spec.allowed_hosts = vec![listed.address.to_string()]).await;
    assert_eq!(fetched(&server, &listed.address.to_string()).await, Ok(207));
    assert_eq!(listed.asked(), ["/path?query"]);
    let port = listed.address.port();
    // The same server under another name, with a user, and without its port; and another server.
    for authority in [
        format!("localhost:{port}"),
        format!("user@127.0.0.1:{port}"),
        format!("127.0.0.2:{port}"),
        "127.0.0.1".into(),
        other.address.to_string(),
    ] {
        assert_eq!(fetched(&server, &authority).await, Err(REQUEST_DENIED.into()), "{authority}");
    }
    let (closed, _) = served(&node, |_| {}).await;
    assert_eq!(fetched(&closed, &listed.address.to_string()).await, Err(REQUEST_DENIED.into()));
    assert_eq!((listed.asked().len(), other.asked().len()), (1, 0));
}

#[tokio::test]
async fn a_host_without_a_port_stands_for_all_of_its_ports() {
    let node = Node::trusting_anyone().await;
    let (one, two) = (Upstream::start(201, None).await, Upstream::start(202, None).await);
    let (server, _) = served(&node, |spec| spec.allowed_hosts = vec!["LOCALHOST".into()]).await;
    assert_eq!(fetched(&server, &format!("localhost:{}", one.address.port())).await, Ok(201));
    assert_eq!(fetched(&server, &format!("LocalHost:{}", two.address.port())).await, Ok(202));
    assert_eq!(fetched(&server, &one.address.to_string()).await, Err(REQUEST_DENIED.into()));
}

#[tokio::test]
async fn a_redirect_is_given_to_the_guest_and_leads_nowhere_that_is_not_listed() {
    let node = Node::trusting_anyone().await;
    let secret = Upstream::start(200, None).await;
    let listed = Upstream::start(302, Some(format!("http://{}/secret", secret.address))).await;
    let (server, _) = served(&node, |spec| spec.allowed_hosts = vec![listed.address.to_string()]).await;
    assert_eq!(fetched(&server, &listed.address.to_string()).await, Ok(302));
    assert_eq!(fetched(&server, &secret.address.to_string()).await, Err(REQUEST_DENIED.into()));
    assert!(secret.asked().is_empty());
}

#[tokio::test]
async fn a_server_that_never_answers_costs_the_request_and_no_more() {
    let node = Node::trusting_anyone().await;
    let silent = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let authority = silent.local_addr().unwrap().to_string();
    let (server, _) = served(&node, |spec| {
        spec.allowed_hosts = vec![authority.clone()];
        spec.request_timeout = Duration::from_millis(100);
    })
    .await;
    // Either the guest is told that its own request took too long, or the client that the guest did.
    let status = get(server.local_addr(), &format!("/o{authority}/")).await.status;
    assert!([502, 504].contains(&status), "{status}");
    until("none is in flight", || server.stats().in_flight == 0).await;
    let (mut stream, _) = silent.accept().await.unwrap();
    let mut sent = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut sent)).await;
    assert!(closed.is_ok(), "the guest's connection is still open");
}

/// A node that opens nothing to its guests.
async fn closed_node() -> Node {
    Node::configured(|config| config.egress = EgressConfig::default()).await
}

#[tokio::test]
async fn what_is_on_the_node_itself_is_refused_though_the_pod_lists_it_and_the_log_says_so() {
    let node = closed_node().await;
    let upstream = Upstream::start(200, None).await;
    let port = upstream.address.port();
    let (server, spec) = served(&node, |spec| {
        spec.allowed_hosts =
            ["127.0.0.1", "localhost", "127.0.0.2", "0.0.0.0", "[::1]", "[::ffff:127.0.0.1]", "169.254.169.254"]
                .map(str::to_owned)
                .to_vec();
        spec.allowed_hosts.push("metadata.google.internal".into());
    })
    .await;
    for host in [
        "127.0.0.1",
        "localhost",
        "LocalHost.",
        "127.0.0.2",
        "0.0.0.0",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[::ffff:7f00:1]",
        "169.254.169.254",
        "metadata.google.internal",
    ] {
        assert_eq!(fetched(&server, &format!("{host}:{port}")).await, Err(IP_PROHIBITED.into()), "{host}");
        let line = logged(&spec).pop().unwrap();
        assert!(
            line.contains("krustlet: denied a request to http://") && line.contains(&format!(":{port}: ")),
            "{line}"
        );
        assert!(line.contains("which this node does not open to guests"), "{line}");
    }
    assert!(upstream.asked().is_empty());
    assert_eq!(upstream.connections(), 0, "not even a connection is made");
}

#[tokio::test]
async fn a_request_to_a_host_that_is_not_listed_is_told_in_the_log_too() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.allowed_hosts = vec!["example.com".into()]).await;
    assert_eq!(fetched(&server, "other.example").await, Err(REQUEST_DENIED.into()));
    let line = logged(&spec).pop().unwrap();
    assert!(line.contains("denied a request to http://other.example:80") && line.contains("allowed hosts"), "{line}");
}

#[tokio::test]
async fn the_api_server_is_refused_also_in_a_network_that_is_open() {
    let node = Node::configured(|config| config.egress.networks = vec!["127.0.0.0/8".parse().unwrap()]).await;
    let upstream = Upstream::start(200, None).await;
    let (server, _) = served(&node, |spec| spec.allowed_hosts = vec!["127.0.0.1".into()]).await;
    let authority = upstream.address.to_string();
    assert_eq!(fetched(&server, &authority).await, Ok(200));
    node.runtime.refuse_api_server("api.test", [upstream.address.ip()]);
    // A connection of before is not used for it either, once it is closed; a new container has none.
    let (server, spec) = served(&node, |spec| spec.allowed_hosts = vec!["127.0.0.1".into()]).await;
    assert_eq!(fetched(&server, &authority).await, Err(IP_PROHIBITED.into()));
    assert!(logged(&spec).last().unwrap().contains("the API server"));
}

#[tokio::test]
async fn a_connection_is_used_again_by_the_requests_of_its_container_and_by_no_other() {
    let node = Node::trusting_anyone().await;
    let upstream = Upstream::start(200, None).await;
    let authority = upstream.address.to_string();
    let (one, _) = served(&node, |spec| spec.allowed_hosts = vec![authority.clone()]).await;
    for _ in 0..10 {
        assert_eq!(fetched(&one, &authority).await, Ok(200));
    }
    assert_eq!(upstream.connections(), 1);
    let (two, _) = served(&node, |spec| spec.allowed_hosts = vec![authority.clone()]).await;
    assert_eq!(fetched(&two, &authority).await, Ok(200));
    assert_eq!((upstream.connections(), upstream.asked().len()), (2, 11));
}

#[tokio::test]
async fn entries_and_bundles_that_mean_nothing_are_refused_before_anything_is_served() {
    let node = Node::trusting_anyone().await;
    let module = node.module(&http_guest("version")).await;
    for (host, bundle, reason) in [
        ("*", None, "wildcard"),
        ("https://example.com", None, "scheme"),
        ("127.1", None, "four decimal"),
        ("example.com", Some("no pem"), "no certificate"),
    ] {
        let mut spec = node.spec("app");
        spec.allowed_hosts = vec![host.into()];
        spec.ca_bundle = bundle.map(str::to_owned);
        let error = node.runtime.serve(&module, spec, &[any_port()]).await.unwrap_err();
        assert_eq!((error.reason(), error.is_permanent()), ("CreateContainerConfigError", true));
        assert!(error.to_string().contains(reason), "{error}");
    }
}
