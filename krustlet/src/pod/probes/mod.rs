//! Startup, readiness and liveness probes: httpGet and tcpSocket, with the kubelet's timing.
//!
//! The [tracker] is the rule; here are the loop around it, for each probe one, and the two kinds of try.

mod tracker;

pub use tracker::{ProbeEvent, ProbeKind};

use super::http_get::HttpGet;
use super::ports;
use crate::addresses::PodAddress;
use crate::panics::message_of;
use crate::reach::Reach;
use crate::telemetry::{ProbeLabels, metrics};
use futures::FutureExt as _;
use k8s_openapi::api::core::v1::{Container, Probe};
use std::net::Ipv4Addr;
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};
use tracker::{Next, Tracker};

/// The kubelet's name for itself in a probe.
const USER_AGENT: &str = "kube-probe/1.37";

/// Whether there is anything to probe.
pub fn is_probed(container: &Container) -> bool {
    container.startup_probe.is_some() || container.readiness_probe.is_some() || container.liveness_probe.is_some()
}

/// Says why the container's probes cannot be done here, if they cannot.
pub fn validate(container: &Container) -> Result<(), String> {
    Plan::of(container, PodAddress::of_node(Ipv4Addr::UNSPECIFIED.into())).map(|_| ())
}

/// The grace period that the failed probe asks for in place of the pod's, in seconds.
pub fn termination_grace(container: &Container, kind: ProbeKind) -> Option<i64> {
    let probe = match kind {
        ProbeKind::Startup => &container.startup_probe,
        ProbeKind::Readiness => &container.readiness_probe,
        ProbeKind::Liveness => &container.liveness_probe,
    };
    probe.as_ref()?.termination_grace_period_seconds
}

/// Probes one running container for as long as it lives; dropping it ends that.
#[derive(Debug)]
pub struct Prober {
    task: Option<JoinHandle<()>>,
}

impl Drop for Prober {
    fn drop(&mut self) {
        if let Some(task) = &self.task {
            task.abort();
        }
    }
}

/// Starts probing a container that has just started at `address`. Events carry the container's name.
pub fn spawn(
    container: &Container,
    address: PodAddress,
    reach: Reach,
    events: mpsc::Sender<(String, ProbeEvent)>,
) -> Prober {
    let name = container.name.clone();
    let task = match Plan::of(container, address) {
        Ok(plan) if plan.is_empty() => None,
        Ok(plan) => Some(tokio::spawn(plan.run(reach, Events { name, events }))),
        Err(error) => {
            tracing::error!(container = name, error, "container cannot be probed");
            None
        }
    };
    Prober { task }
}

/// A container's probes, ready to be done.
struct Plan {
    startup: Option<Task>,
    readiness: Option<Task>,
    liveness: Option<Task>,
}

struct Task {
    action: Action,
    delay: Duration,
    period: Duration,
    timeout: Duration,
    tracker: Tracker,
}

#[derive(Debug, Clone)]
enum Action {
    Http(HttpGet),
    Tcp {
        host: String,
        port: u16,
    },
    #[cfg(test)]
    Bug,
}

impl Plan {
    fn of(container: &Container, address: PodAddress) -> Result<Self, String> {
        let task = |probe: &Option<Probe>, kind| {
            let task = probe.as_ref().map(|probe| Task::of(probe, kind, container, address)).transpose();
            task.map_err(|why| format!("container {}: {kind}Probe: {why}", container.name))
        };
        Ok(Self {
            startup: task(&container.startup_probe, ProbeKind::Startup)?,
            readiness: task(&container.readiness_probe, ProbeKind::Readiness)?,
            liveness: task(&container.liveness_probe, ProbeKind::Liveness)?,
        })
    }

    fn is_empty(&self) -> bool {
        self.startup.is_none() && self.readiness.is_none() && self.liveness.is_none()
    }

    async fn run(self, reach: Reach, events: Events) {
        let since = Instant::now();
        if let Some(startup) = self.startup {
            if !startup.run(since, &reach, &events).await {
                return;
            }
            if self.readiness.is_none() && !events.send(ProbeEvent::Ready(true)).await {
                return;
            }
        }
        let run = async |task: Option<Task>| match task {
            Some(task) => task.run(since, &reach, &events).await,
            None => true,
        };
        tokio::join!(run(self.readiness), run(self.liveness));
    }
}

struct Events {
    name: String,
    events: mpsc::Sender<(String, ProbeEvent)>,
}

impl Events {
    /// Whether anybody still listens.
    async fn send(&self, event: ProbeEvent) -> bool {
        self.events.send((self.name.clone(), event)).await.is_ok()
    }
}

impl Task {
    fn of(probe: &Probe, kind: ProbeKind, container: &Container, address: PodAddress) -> Result<Self, String> {
        let count = |value: Option<i32>, default: u32| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default);
        let seconds = |value, default| Duration::from_secs(u64::from(count(value, default)));
        Ok(Self {
            action: Action::of(probe, container, address)?,
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
            tracker: Tracker::new(
                kind,
                &container.name,
                count(probe.success_threshold, 1),
                count(probe.failure_threshold, 3),
            ),
        })
    }

    /// Tries until the probe has said all it has to say; whether the container is still to be probed by the others.
    async fn run(mut self, since: Instant, reach: &Reach, events: &Events) -> bool {
        tokio::time::sleep_until(since + self.delay).await;
        let mut ticks = tokio::time::interval(self.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let result = self.action.attempt(self.timeout, reach).await;
            count(self.tracker.kind, result.is_ok());
            let (said, next) = self.tracker.observe(result);
            for event in said {
                if !events.send(event).await {
                    return false;
                }
            }
            match next {
                Next::Again => {}
                Next::Passed => return true,
                Next::GaveUp => return false,
            }
        }
    }
}

fn count(kind: ProbeKind, success: bool) {
    let probe = match kind {
        ProbeKind::Startup => "startup",
        ProbeKind::Readiness => "readiness",
        ProbeKind::Liveness => "liveness",
    };
    let result = if success { "successful" } else { "failed" };
    metrics().probe_results.get_or_create(&ProbeLabels { probe, result }).inc();
}

impl Action {
    fn of(probe: &Probe, container: &Container, address: PodAddress) -> Result<Self, String> {
        if let Some(get) = &probe.http_get {
            Ok(Self::Http(HttpGet::of(get, container, address, USER_AGENT)?))
        } else if let Some(socket) = &probe.tcp_socket {
            let host = socket.host.clone().filter(|host| !host.is_empty()).unwrap_or_else(|| address.ip.to_string());
            Ok(Self::Tcp { host, port: ports::resolve(&socket.port, container, address)? })
        } else if probe.exec.is_some() {
            Err("exec is not supported: a WebAssembly module has no process to run a command in; use httpGet or tcpSocket"
                .into())
        } else if probe.grpc.is_some() {
            Err("grpc is not supported: wasi:http serves no gRPC health service; use httpGet or tcpSocket".into())
        } else {
            Err("it has no httpGet and no tcpSocket".into())
        }
    }

    async fn attempt(&self, timeout: Duration, reach: &Reach) -> Result<(), String> {
        let attempt = async {
            match self {
                Self::Http(get) => match get.send(reach).await {
                    Ok(status) if (200..400).contains(&status.as_u16()) => Ok(()),
                    Ok(status) => Err(format!("HTTP probe failed with statuscode: {}", status.as_u16())),
                    Err(error) => Err(format!("{get}: {error}")),
                },
                Self::Tcp { host, port } => match reach.connect(host, *port).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(format!("dial tcp {host}:{port}: {error}")),
                },
                #[cfg(test)]
                Self::Bug => std::panic::panic_any("not thought of"),
            }
        };
        match tokio::time::timeout(timeout, AssertUnwindSafe(attempt).catch_unwind()).await {
            Ok(Ok(result)) => result,
            // Without the probe, the container would stay for ever what it was told last.
            Ok(Err(panic)) => Err(format!("a bug in the node agent: {}", message_of(&*panic))),
            Err(_) => Err(match self {
                Self::Http(get) => format!("{get}: no answer within {timeout:?}"),
                Self::Tcp { host, port } => format!("dial tcp {host}:{port}: no answer within {timeout:?}"),
                #[cfg(test)]
                Self::Bug => String::new(),
            }),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::response::Redirect;
    use axum::routing::get as route;
    use http::{HeaderMap, StatusCode};
    use hyper_util::rt::TokioIo;
    use serde_json::{Value, json};
    use std::sync::Arc;

    fn container(probes: Value) -> Container {
        let mut container = probes;
        container["name"] = json!("app");
        serde_json::from_value(container).unwrap()
    }

    fn failed(kind: ProbeKind) -> ProbeEvent {
        ProbeEvent::Failed { kind, message: format!("Container app failed {kind} probe, will be restarted") }
    }

    #[test]
    fn exec_and_grpc_are_refused_with_a_reason() {
        let refused = |probes| validate(&container(probes)).unwrap_err();
        assert!(refused(json!({"livenessProbe": {"exec": {"command": ["true"]}}})).contains("no process"));
        assert!(refused(json!({"startupProbe": {"grpc": {"port": 1}}})).contains("gRPC"));
        let why = refused(json!({"readinessProbe": {"periodSeconds": 1}}));
        assert!(why.starts_with("container app: readinessProbe: "), "{why}");
        assert!(validate(&container(json!({}))).is_ok());
    }

    #[tokio::test]
    async fn a_try_that_panics_has_failed_and_the_probe_goes_on() {
        let (sender, mut events) = mpsc::channel(8);
        let probes = json!({"livenessProbe": {"tcpSocket": {"port": 1}, "periodSeconds": 1, "failureThreshold": 2}});
        let mut plan = Plan::of(&container(probes), PodAddress::of_node("127.0.0.1".parse().unwrap())).unwrap();
        plan.liveness.as_mut().unwrap().action = Action::Bug;
        let probing = tokio::spawn(plan.run(Reach::ANYWHERE, Events { name: "app".into(), events: sender }));
        let mut said = Vec::new();
        while let Some((_, event)) = events.recv().await {
            said.push(event);
            if said.last() == Some(&failed(ProbeKind::Liveness)) {
                break;
            }
        }
        assert!(format!("{said:?}").contains("a bug in the node agent: not thought of"), "{said:?}");
        probing.abort();
    }

    /// A server whose paths answer as they are called.
    async fn server() -> u16 {
        let app = Router::new()
            .route("/ok", route(async || "fine"))
            .route("/large", route(async || "x".repeat(1 << 20)))
            .route("/broken", route(async || StatusCode::INTERNAL_SERVER_ERROR))
            .route("/here", route(async || Redirect::temporary("ok")))
            .route("/nowhere", route(async || Redirect::temporary("/broken")))
            .route("/disguised", route(async || Redirect::temporary("/broken?next=http://elsewhere.invalid/")))
            .route("/circle", route(async || Redirect::temporary("/circle")))
            .route("/elsewhere", route(async || Redirect::temporary("http://example.invalid/")))
            .route("/unchanged", route(async || StatusCode::NOT_MODIFIED))
            .route("/never", route(std::future::pending::<()>))
            .route(
                "/host",
                route(
                    async |headers: HeaderMap| {
                        if headers["host"] == "shop.example" { StatusCode::OK } else { StatusCode::BAD_REQUEST }
                    },
                ),
            );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move { axum::serve(listener, app).await });
        port
    }

    async fn attempt(probe: Value) -> Result<(), String> {
        let container = container(json!({"livenessProbe": probe}));
        let address = PodAddress::of_node("127.0.0.1".parse().unwrap());
        let action = Action::of(container.liveness_probe.as_ref().unwrap(), &container, address).unwrap();
        action.attempt(Duration::from_secs(1), &Reach::ANYWHERE).await
    }

    #[tokio::test]
    async fn http_answers_from_200_to_399_pass() {
        let port = server().await;
        let get = |path: &str| attempt(json!({"httpGet": {"path": path, "port": port}}));
        for path in ["/ok", "/large", "/here", "/elsewhere", "/unchanged"] {
            assert_eq!(get(path).await, Ok(()), "{path}");
        }
        assert_eq!(get("/broken").await.unwrap_err(), "HTTP probe failed with statuscode: 500");
        assert_eq!(get("/disguised").await.unwrap_err(), "HTTP probe failed with statuscode: 500");
        assert_eq!(get("/nowhere").await.unwrap_err(), "HTTP probe failed with statuscode: 500");
        assert!(get("/circle").await.unwrap_err().contains("10 redirects"));
        assert!(get("/never").await.unwrap_err().contains("no answer within 1s"));
        let host = json!([{"name": "Host", "value": "shop.example"}]);
        assert_eq!(attempt(json!({"httpGet": {"path": "/host", "port": port, "httpHeaders": host}})).await, Ok(()));
    }

    #[tokio::test]
    async fn a_certificate_need_not_be_known() {
        let rcgen::CertifiedKey { cert, signing_key } =
            rcgen::generate_simple_self_signed(["somebody.example".to_owned()]).unwrap();
        let key = rustls::pki_types::PrivateKeyDer::Pkcs8(signing_key.serialize_der().into());
        let config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![cert.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        tokio::spawn(async move {
            let (stream, _) = listener.accept().await.unwrap();
            let stream = TokioIo::new(acceptor.accept(stream).await.unwrap());
            let app = Router::new().route("/", route(async || "fine"));
            let service = hyper_util::service::TowerToHyperService::new(app);
            hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await.unwrap();
        });
        assert_eq!(attempt(json!({"httpGet": {"port": port, "scheme": "HTTPS"}})).await, Ok(()));
    }

    #[tokio::test]
    async fn a_tcp_probe_only_connects() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let probe = json!({"tcpSocket": {"port": port}});
        assert_eq!(attempt(probe.clone()).await, Ok(()));
        drop(listener);
        assert!(attempt(probe).await.unwrap_err().starts_with("dial tcp 127.0.0.1:"));
    }

    /// All events until the prober ends by itself.
    async fn events(probes: Value) -> Vec<ProbeEvent> {
        let (sender, mut receiver) = mpsc::channel(16);
        let _prober =
            spawn(&container(probes), PodAddress::of_node("127.0.0.1".parse().unwrap()), Reach::ANYWHERE, sender);
        let mut events = Vec::new();
        while let Some((name, event)) = receiver.recv().await {
            assert_eq!(name, "app");
            events.push(event);
        }
        events
    }

    #[tokio::test]
    async fn startup_gates_the_other_probes() {
        let port = server().await;
        let get = |path: &str| json!({"httpGet": {"path": path, "port": port}, "failureThreshold": 1});
        let (sender, mut receiver) = mpsc::channel(16);
        let probes = json!({"startupProbe": get("/ok"), "readinessProbe": get("/ok"), "livenessProbe": get("/ok")});
        let prober =
            spawn(&container(probes), PodAddress::of_node("127.0.0.1".parse().unwrap()), Reach::ANYWHERE, sender);
        assert_eq!(receiver.recv().await.unwrap().1, ProbeEvent::Started);
        assert_eq!(receiver.recv().await.unwrap().1, ProbeEvent::Ready(true));
        drop(prober);
        assert_eq!(receiver.recv().await, None, "a dropped prober ends");

        let seen = events(json!({"startupProbe": get("/broken"), "readinessProbe": get("/ok")})).await;
        assert!(matches!(seen[0], ProbeEvent::Unhealthy { kind: ProbeKind::Startup, .. }));
        assert_eq!(seen[1..], [failed(ProbeKind::Startup)]);
    }

    #[tokio::test]
    async fn a_started_container_without_a_readiness_probe_is_ready() {
        let port = server().await;
        let seen = events(json!({"startupProbe": {"tcpSocket": {"port": port}}})).await;
        assert_eq!(seen, [ProbeEvent::Started, ProbeEvent::Ready(true)]);
    }

    #[tokio::test]
    async fn a_container_without_probes_costs_nothing() {
        let (sender, mut receiver) = mpsc::channel(1);
        let prober =
            spawn(&container(json!({})), PodAddress::of_node("127.0.0.1".parse().unwrap()), Reach::ANYWHERE, sender);
        assert!(prober.task.is_none());
        assert_eq!(receiver.recv().await, None);
    }

    #[test]
    fn a_failed_probe_may_bring_its_own_grace_period() {
        let probe = json!({"tcpSocket": {"port": 1}, "terminationGracePeriodSeconds": 5});
        let container = container(json!({"livenessProbe": probe, "startupProbe": {"tcpSocket": {"port": 1}}}));
        assert_eq!(termination_grace(&container, ProbeKind::Liveness), Some(5));
        assert_eq!(termination_grace(&container, ProbeKind::Startup), None);
    }
}
