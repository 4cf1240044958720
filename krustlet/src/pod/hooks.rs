//! Lifecycle hooks: postStart and preStop, as httpGet or sleep.

use super::http_get::HttpGet;
use crate::addresses::PodAddress;
use crate::http_client::Error;
use crate::reach::Reach;
use k8s_openapi::api::core::v1::{Container, LifecycleHandler};
use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

/// The kubelet's name for itself in a hook.
const USER_AGENT: &str = "kube-lifecycle/1.37";
/// To see whether the hooks can be done, any address will do.
const ANY: PodAddress = PodAddress { ip: IpAddr::V4(Ipv4Addr::UNSPECIFIED), is_own: false };

/// Says why the container's hooks cannot be done here, if they cannot.
pub fn validate(container: &Container) -> Result<(), String> {
    let Some(lifecycle) = &container.lifecycle else {
        return Ok(());
    };
    for (name, handler) in [("postStart", &lifecycle.post_start), ("preStop", &lifecycle.pre_stop)] {
        let Some(handler) = handler else { continue };
        if handler.exec.is_some() {
            return Err(format!("{name}: exec is not supported: a wasm guest has no processes; use httpGet or sleep"));
        }
        if handler.tcp_socket.is_some() {
            return Err(format!("{name}: tcpSocket is not supported; use httpGet or sleep"));
        }
        if let Some(get) = &handler.http_get {
            HttpGet::of(get, container, ANY, USER_AGENT).map_err(|cause| format!("{name}: httpGet: {cause}"))?;
        }
    }
    Ok(())
}

pub fn post_start(container: &Container) -> Option<&LifecycleHandler> {
    container.lifecycle.as_ref()?.post_start.as_ref()
}

pub fn pre_stop(container: &Container) -> Option<&LifecycleHandler> {
    container.lifecycle.as_ref()?.pre_stop.as_ref()
}

/// Does what the hook says. Takes as long as the other side takes: the caller sets the limit.
pub async fn run(
    container: &Container,
    handler: &LifecycleHandler,
    address: PodAddress,
    reach: &Reach,
) -> Result<(), String> {
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
    }
    let Some(get) = &handler.http_get else {
        return Ok(());
    };
    let get = HttpGet::of(get, container, address, USER_AGENT)?;
    let answer = match get.send(reach).await {
        // As the kubelet, for what was written when it did not know https here.
        Err(Error::NoTls) => get.in_clear().send(reach).await,
        answer => answer,
    };
    match answer {
        // Whatever it is: the kubelet takes the request for the action, and looks at no status.
        Ok(_) => Ok(()),
        Err(error) => Err(format!("{get}: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn container(handler: Value) -> Container {
        serde_json::from_value(json!({
            "name": "web",
            "ports": [{"name": "http", "containerPort": 8080}, {"containerPort": 80, "hostPort": 9080}],
            "lifecycle": {"preStop": handler},
        }))
        .unwrap()
    }

    #[test]
    fn an_exec_hook_is_refused_with_a_way_out() {
        assert!(validate(&container(json!({"exec": {"command": ["true"]}}))).unwrap_err().contains("use httpGet"));
    }

    #[test]
    fn what_is_no_request_is_refused_before_the_start() {
        for get in [
            json!({"port": "none"}),
            json!({"port": 80, "scheme": "GOPHER"}),
            json!({"port": 80, "httpHeaders": [{"name": "a b", "value": ""}]}),
        ] {
            let why = validate(&container(json!({"httpGet": get}))).unwrap_err();
            assert!(why.starts_with("preStop: httpGet: "), "{why}");
        }
    }

    #[tokio::test]
    async fn a_hook_asks_where_the_node_has_the_port() {
        for (port, expected) in [(json!(8080), 8080), (json!("http"), 8080), (json!(80), 9080), (json!("80"), 9080)] {
            let container = container(json!({"httpGet": {"path": "/bye", "port": port}}));
            let hook = pre_stop(&container).unwrap();
            // Nobody listens there.
            let error = run(&container, hook, PodAddress::of_node([127, 255, 255, 253].into()), &Reach::ANYWHERE)
                .await
                .unwrap_err();
            assert!(error.contains(&format!("http://127.255.255.253:{expected}/bye")), "{error}");
        }
    }

    #[tokio::test]
    async fn an_https_hook_is_taken_and_repeated_in_clear_where_nobody_speaks_tls() {
        let app = axum::Router::new().route("/bye", axum::routing::get(async || "bye"));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, app).await });
        let bye = |path: &str| container(json!({"httpGet": {"path": path, "port": port, "scheme": "HTTPS"}}));
        let address = PodAddress::of_node([127, 0, 0, 1].into());
        let container = bye("/bye");
        assert_eq!(run(&container, pre_stop(&container).unwrap(), address, &Reach::ANYWHERE).await, Ok(()));
        let container = bye("/nothing");
        assert_eq!(
            run(&container, pre_stop(&container).unwrap(), address, &Reach::ANYWHERE).await,
            Ok(()),
            "whatever the answer is"
        );
    }

    #[tokio::test]
    async fn a_hook_may_sleep() {
        let container = container(json!({"sleep": {"seconds": 0}}));
        assert_eq!(run(&container, pre_stop(&container).unwrap(), ANY, &Reach::ANYWHERE).await, Ok(()));
    }
}
