//! Lifecycle hooks: postStart and preStop, as httpGet or sleep.

use super::port;
use http_body_util::Empty;
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::TokioExecutor;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, LifecycleHandler};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use std::net::IpAddr;
use std::time::Duration;

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
            url(container, get, IpAddr::from([127, 0, 0, 1])).map_err(|cause| format!("{name}: {cause}"))?;
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
pub async fn run(container: &Container, handler: &LifecycleHandler, address: IpAddr) -> Result<(), String> {
    if let Some(sleep) = &handler.sleep {
        tokio::time::sleep(Duration::from_secs(u64::try_from(sleep.seconds).unwrap_or(0))).await;
    }
    let Some(get) = &handler.http_get else {
        return Ok(());
    };
    let url = url(container, get, address)?;
    let mut request = http::Request::get(&url);
    for header in get.http_headers.iter().flatten() {
        request = request.header(&header.name, &header.value);
    }
    let request = request
        .body(Empty::<bytes::Bytes>::new())
        .map_err(|error| format!("httpGet {url} is not a valid request: {error}"))?;
    let client: Client<HttpConnector, _> = Client::builder(TokioExecutor::new()).build_http();
    match client.request(request).await {
        Ok(response) if response.status().as_u16() < 400 => Ok(()),
        Ok(response) => Err(format!("httpGet {url} answered {}", response.status())),
        Err(error) => Err(format!("httpGet {url} failed: {error}")),
    }
}

fn url(container: &Container, get: &HTTPGetAction, address: IpAddr) -> Result<String, String> {
    if get.scheme.as_deref().is_some_and(|scheme| scheme != "HTTP") {
        return Err("httpGet: only scheme HTTP is supported".to_owned());
    }
    let number = match &get.port {
        IntOrString::Int(number) => u16::try_from(*number).ok(),
        IntOrString::String(name) => match name.parse() {
            Ok(number) => Some(number),
            Err(_) => named_port(container, name),
        },
    };
    let number = number.ok_or_else(|| format!("httpGet: the container has no port {:?}", get.port))?;
    let host = match get.host.as_deref().filter(|host| !host.is_empty()) {
        Some(host) => host.to_owned(),
        None if address.is_ipv6() => format!("[{address}]"),
        None => address.to_string(),
    };
    let path = get.path.as_deref().unwrap_or("/");
    Ok(format!("http://{host}:{number}/{}", path.trim_start_matches('/')))
}

/// A named port of the container, as it is reached on the node.
fn named_port(container: &Container, name: &str) -> Option<u16> {
    let found = container.ports.iter().flatten().find(|port| port.name.as_deref() == Some(name))?;
    let only = Container { ports: Some(vec![found.clone()]), ..Container::default() };
    port(&only)
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::{ContainerPort, ExecAction, Lifecycle, SleepAction};

    fn container(handler: LifecycleHandler) -> Container {
        Container {
            ports: Some(vec![ContainerPort {
                name: Some("http".into()),
                container_port: 8080,
                ..ContainerPort::default()
            }]),
            lifecycle: Some(Lifecycle { pre_stop: Some(handler), ..Lifecycle::default() }),
            ..Container::default()
        }
    }

    fn get(port: IntOrString) -> LifecycleHandler {
        let action = HTTPGetAction { path: Some("/bye".into()), port, ..HTTPGetAction::default() };
        LifecycleHandler { http_get: Some(action), ..LifecycleHandler::default() }
    }

    #[test]
    fn an_exec_hook_is_refused_with_a_way_out() {
        let handler = LifecycleHandler { exec: Some(ExecAction::default()), ..LifecycleHandler::default() };
        assert!(validate(&container(handler)).unwrap_err().contains("use httpGet"));
    }

    #[test]
    fn ports_are_found_by_number_and_by_name() {
        let address = IpAddr::from([127, 0, 0, 2]);
        for port in [IntOrString::Int(8080), IntOrString::String("http".into())] {
            let container = container(get(port));
            let action = pre_stop(&container).unwrap().http_get.clone().unwrap();
            assert_eq!(url(&container, &action, address).unwrap(), "http://127.0.0.2:8080/bye");
        }
        assert!(validate(&container(get(IntOrString::String("none".into())))).is_err());
    }

    #[tokio::test]
    async fn a_hook_whose_server_is_gone_fails_and_says_where() {
        let handler = get(IntOrString::Int(1));
        let error = run(&container(handler.clone()), &handler, IpAddr::from([127, 0, 0, 1])).await.unwrap_err();
        assert!(error.contains("http://127.0.0.1:1/bye"), "{error}");
        let sleep = LifecycleHandler { sleep: Some(SleepAction { seconds: 0 }), ..LifecycleHandler::default() };
        assert!(run(&container(sleep.clone()), &sleep, IpAddr::from([127, 0, 0, 1])).await.is_ok());
    }
}
