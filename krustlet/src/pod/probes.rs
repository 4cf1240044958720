//! Startup, readiness and liveness probes: httpGet and tcpSocket, with the kubelet's timing and thresholds.
//!
//! [`Tracker`] is the rule (results in, events out); around it stands a loop for each probe, and the two kinds of try.

use crate::telemetry::{ProbeLabels, metrics};
use futures::future::{Either, select};
use http::{HeaderMap, HeaderName, HeaderValue, Request, StatusCode, Uri, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use k8s_openapi::api::core::v1::{Container, HTTPGetAction, Probe};
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use std::fmt::{Display, Formatter};
use std::net::{IpAddr, Ipv4Addr};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio::time::{Instant, MissedTickBehavior};

/// A probe's answer is read up to here and no further.
const MAX_BODY: usize = 10 * 1024;
const MAX_REDIRECTS: usize = 10;
const USER_AGENT: &str = "kube-probe/1.37";

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ProbeKind {
    Startup,
    Readiness,
    Liveness,
}

impl Display for ProbeKind {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Startup => "startup",
            Self::Readiness => "readiness",
            Self::Liveness => "liveness",
        })
    }
}

/// What a container's probes make of it. A container without a startup probe counts as started at once, and one without
/// a readiness probe as ready once it is started; nothing is sent for that unless a startup probe held it up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ProbeEvent {
    Started,
    Ready(bool),
    /// The startup or liveness probe failed as often as it may: the container is to be restarted. The probe stops.
    Failed {
        kind: ProbeKind,
        message: String,
    },
    /// One try failed: the text of an Event with reason Unhealthy.
    Unhealthy {
        kind: ProbeKind,
        message: String,
    },
}

/// Says why the container's probes cannot be done here, if they cannot.
pub fn validate(container: &Container) -> Result<(), String> {
    Plan::of(container, IpAddr::V4(Ipv4Addr::UNSPECIFIED)).map(|_| ())
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
pub fn spawn(container: &Container, address: IpAddr, events: mpsc::Sender<(String, ProbeEvent)>) -> Prober {
    let name = container.name.clone();
    let task = match Plan::of(container, address) {
        Ok(plan) if plan.is_empty() => None,
        Ok(plan) => Some(tokio::spawn(plan.run(Events { name, events }))),
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
    Http { url: Uri, headers: HeaderMap },
    Tcp { host: String, port: u16 },
}

impl Plan {
    fn of(container: &Container, address: IpAddr) -> Result<Self, String> {
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

    async fn run(self, events: Events) {
        let since = Instant::now();
        if let Some(startup) = self.startup {
            if !startup.run(since, &events).await {
                return;
            }
            if self.readiness.is_none() && !events.send(ProbeEvent::Ready(true)).await {
                return;
            }
        }
        let run = async |task: Option<Task>| match task {
            Some(task) => task.run(since, &events).await,
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
    fn of(probe: &Probe, kind: ProbeKind, container: &Container, address: IpAddr) -> Result<Self, String> {
        let count = |value: Option<i32>, default: u32| value.and_then(|v| u32::try_from(v).ok()).unwrap_or(default);
        let seconds = |value, default| Duration::from_secs(u64::from(count(value, default)));
        Ok(Self {
            action: Action::of(probe, container, address)?,
            delay: seconds(probe.initial_delay_seconds, 0),
            period: seconds(probe.period_seconds, 10).max(Duration::from_secs(1)),
            timeout: seconds(probe.timeout_seconds, 1).max(Duration::from_secs(1)),
            tracker: Tracker {
                kind,
                container: container.name.clone(),
                success_threshold: count(probe.success_threshold, 1).max(1),
                failure_threshold: count(probe.failure_threshold, 3).max(1),
                last: None,
                run: 0,
                ready: false,
            },
        })
    }

    /// Tries until the probe has said all it has to say; whether the container is still to be probed by the others.
    async fn run(mut self, since: Instant, events: &Events) -> bool {
        let connector = self.action.connector();
        tokio::time::sleep_until(since + self.delay).await;
        let mut ticks = tokio::time::interval(self.period);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            ticks.tick().await;
            let result = match &connector {
                Ok(connector) => self.action.attempt(connector.as_ref(), self.timeout).await,
                Err(error) => Err(error.clone()),
            };
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

/// The state of one probe: how often in a row it gave the same result, and what was made of it.
#[derive(Debug)]
struct Tracker {
    kind: ProbeKind,
    container: String,
    success_threshold: u32,
    failure_threshold: u32,
    last: Option<bool>,
    run: u32,
    ready: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Next {
    Again,
    /// The startup probe has done its work.
    Passed,
    /// The container is to be restarted.
    GaveUp,
}

impl Tracker {
    fn observe(&mut self, result: Result<(), String>) -> (Vec<ProbeEvent>, Next) {
        let kind = self.kind;
        let success = result.is_ok();
        self.run = if self.last == Some(success) { self.run.saturating_add(1) } else { 1 };
        self.last = Some(success);
        let mut events = Vec::new();
        if let Err(cause) = &result {
            let word = match kind {
                ProbeKind::Startup => "Startup",
                ProbeKind::Readiness => "Readiness",
                ProbeKind::Liveness => "Liveness",
            };
            events.push(ProbeEvent::Unhealthy { kind, message: format!("{word} probe failed: {cause}") });
        }
        let threshold = if success { self.success_threshold } else { self.failure_threshold };
        if self.run < threshold {
            return (events, Next::Again);
        }
        match (kind, success) {
            (ProbeKind::Startup, true) => {
                events.push(ProbeEvent::Started);
                return (events, Next::Passed);
            }
            (ProbeKind::Readiness, ready) => {
                if self.ready != ready {
                    self.ready = ready;
                    events.push(ProbeEvent::Ready(ready));
                }
            }
            (ProbeKind::Liveness, true) => {}
            (ProbeKind::Startup | ProbeKind::Liveness, false) => {
                let message = format!("Container {} failed {kind} probe, will be restarted", self.container);
                events.push(ProbeEvent::Failed { kind, message });
                return (events, Next::GaveUp);
            }
        }
        (events, Next::Again)
    }
}

impl Action {
    fn of(probe: &Probe, container: &Container, address: IpAddr) -> Result<Self, String> {
        let host =
            |host: &Option<String>| host.clone().filter(|h| !h.is_empty()).unwrap_or_else(|| address.to_string());
        if let Some(get) = &probe.http_get {
            let url = url(get, &host(&get.host), resolve(&get.port, container)?)?;
            Ok(Self::Http { url, headers: headers(get)? })
        } else if let Some(socket) = &probe.tcp_socket {
            Ok(Self::Tcp { host: host(&socket.host), port: resolve(&socket.port, container)? })
        } else if probe.exec.is_some() {
            Err("exec is not supported: a WebAssembly module has no process to run a command in; use httpGet or tcpSocket"
                .into())
        } else if probe.grpc.is_some() {
            Err("grpc is not supported: wasi:http serves no gRPC health service; use httpGet or tcpSocket".into())
        } else {
            Err("it has no httpGet and no tcpSocket".into())
        }
    }

    /// What an https probe needs: TLS that takes any certificate, as the kubelet does.
    fn connector(&self) -> Result<Option<tokio_rustls::TlsConnector>, String> {
        if !matches!(self, Self::Http { .. }) {
            return Ok(None);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()
            .map_err(|error| format!("failed to set up TLS: {error}"))?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
            .with_no_client_auth();
        Ok(Some(tokio_rustls::TlsConnector::from(Arc::new(config))))
    }

    async fn attempt(&self, tls: Option<&tokio_rustls::TlsConnector>, timeout: Duration) -> Result<(), String> {
        let attempt = async {
            match self {
                Self::Http { url, headers } => get(url, headers, tls).await,
                Self::Tcp { host, port } => match TcpStream::connect((host.as_str(), *port)).await {
                    Ok(_) => Ok(()),
                    Err(error) => Err(format!("dial tcp {host}:{port}: {error}")),
                },
            }
        };
        match tokio::time::timeout(timeout, attempt).await {
            Ok(result) => result,
            Err(_) => Err(match self {
                Self::Http { url, .. } => format!("Get {url:?}: no answer within {timeout:?}", url = url.to_string()),
                Self::Tcp { host, port } => format!("dial tcp {host}:{port}: no answer within {timeout:?}"),
            }),
        }
    }
}

/// The port to try. There is no pod network: a container's port is one of the node, the hostPort where it has one.
fn resolve(port: &IntOrString, container: &Container) -> Result<u16, String> {
    let mut ports = container.ports.iter().flatten();
    let (declared, number) = match port {
        IntOrString::Int(number) => (ports.find(|port| port.container_port == *number), Some(*number)),
        IntOrString::String(name) => (ports.find(|port| port.name.as_ref() == Some(name)), name.parse().ok()),
    };
    let on_node = declared.map(|port| port.host_port.filter(|port| *port > 0).unwrap_or(port.container_port));
    let number = on_node.or(number).ok_or_else(|| format!("the container has no port named {port:?}"))?;
    u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(|| format!("{number} is not a port"))
}

fn url(get: &HTTPGetAction, host: &str, port: u16) -> Result<Uri, String> {
    let scheme = get.scheme.as_deref().filter(|scheme| !scheme.is_empty()).unwrap_or("HTTP").to_ascii_lowercase();
    if scheme != "http" && scheme != "https" {
        return Err(format!("scheme {scheme:?} is neither HTTP nor HTTPS"));
    }
    if !matches!(get.protocol.as_deref(), None | Some("" | "HTTP1")) {
        return Err(format!("protocol {:?} is not supported", get.protocol.as_deref().unwrap_or_default()));
    }
    let path = get.path.as_deref().unwrap_or_default();
    let path = path.split('#').next().unwrap_or_default();
    let slash = if path.starts_with('/') { "" } else { "/" };
    let host = if host.contains(':') { format!("[{host}]") } else { host.to_owned() };
    let text = format!("{scheme}://{host}:{port}{slash}{path}").replace(' ', "%20");
    text.parse().map_err(|error| format!("{text:?} is not a URL: {error}"))
}

fn headers(get: &HTTPGetAction) -> Result<HeaderMap, String> {
    let mut headers = HeaderMap::new();
    for given in get.http_headers.iter().flatten() {
        let name: HeaderName = given.name.parse().map_err(|_| format!("{:?} is not a header name", given.name))?;
        let value = HeaderValue::from_str(&given.value).map_err(|_| format!("{name}: the value is not allowed"))?;
        headers.append(name, value);
    }
    headers.entry(header::USER_AGENT).or_insert(HeaderValue::from_static(USER_AGENT));
    match headers.get(header::ACCEPT) {
        None => _ = headers.insert(header::ACCEPT, HeaderValue::from_static("*/*")),
        // As the kubelet reads it, an empty value asks to send none.
        Some(value) if value.is_empty() => _ = headers.remove(header::ACCEPT),
        Some(_) => {}
    }
    Ok(headers)
}

/// GETs the URL; redirects are followed on the same host. One that leads elsewhere is a success with a warning.
async fn get(url: &Uri, headers: &HeaderMap, tls: Option<&tokio_rustls::TlsConnector>) -> Result<(), String> {
    let mut at = url.clone();
    for _ in 0..=MAX_REDIRECTS {
        let failed = |error: &dyn Display| format!("Get {:?}: {error}", at.to_string());
        let (status, location) = exchange(&at, headers, tls).await.map_err(|error| failed(&error))?;
        if status.is_success() {
            return Ok(());
        }
        if !status.is_redirection() {
            return Err(format!("HTTP probe failed with statuscode: {}", status.as_u16()));
        }
        let followed = matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308);
        let next = location.filter(|_| followed).map(|location| target(&at, &location)).transpose()?;
        match next {
            Some(next) if next.host() == url.host() => at = next,
            next => {
                let to = next.map(|next| next.to_string());
                tracing::warn!(url = %at, status = status.as_u16(), to, "probe stopped at a redirect and counts as passed");
                return Ok(());
            }
        }
    }
    Err(format!("Get {:?}: stopped after {MAX_REDIRECTS} redirects", url.to_string()))
}

/// Where a Location header leads.
fn target(from: &Uri, location: &str) -> Result<Uri, String> {
    let scheme = from.scheme_str().unwrap_or("http");
    let authority = from.authority().map(|authority| authority.as_str()).unwrap_or_default();
    let text = if location.contains("://") {
        location.to_owned()
    } else if location.starts_with("//") {
        format!("{scheme}:{location}")
    } else if location.starts_with('/') {
        format!("{scheme}://{authority}{location}")
    } else {
        let directory = from.path().rsplit_once('/').map_or("", |(directory, _)| directory);
        format!("{scheme}://{authority}{directory}/{location}")
    };
    text.parse().map_err(|error| format!("redirected to {text:?}, which is not a URL: {error}"))
}

type Failure = Box<dyn std::error::Error + Send + Sync>;

/// One request on a connection of its own.
async fn exchange(
    url: &Uri,
    headers: &HeaderMap,
    tls: Option<&tokio_rustls::TlsConnector>,
) -> Result<(StatusCode, Option<String>), Failure> {
    let host = url.host().ok_or("no host")?.trim_matches(['[', ']']);
    let https = url.scheme_str() == Some("https");
    let port = url.port_u16().unwrap_or(if https { 443 } else { 80 });
    let stream = TcpStream::connect((host, port)).await?;
    match tls.filter(|_| https) {
        Some(tls) => {
            let name = ServerName::try_from(host.to_owned())?;
            request(url, headers, tls.connect(name, stream).await?).await
        }
        None => request(url, headers, stream).await,
    }
}

async fn request<S>(url: &Uri, headers: &HeaderMap, stream: S) -> Result<(StatusCode, Option<String>), Failure>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let path = url.path_and_query().map_or("/", |path| path.as_str());
    let mut request = Request::get(path).body(Empty::<bytes::Bytes>::new())?;
    *request.headers_mut() = headers.clone();
    if let (None, Some(authority)) = (headers.get(header::HOST), url.authority()) {
        request.headers_mut().insert(header::HOST, HeaderValue::from_str(authority.as_str())?);
    }
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    let answer = async move {
        let mut response = sender.send_request(request).await?;
        let mut read = 0;
        while let Some(frame) = response.frame().await {
            read += frame?.data_ref().map_or(0, bytes::Bytes::len);
            if read > MAX_BODY {
                break;
            }
        }
        let location = response.headers().get(header::LOCATION).and_then(|value| value.to_str().ok());
        Ok((response.status(), location.map(str::to_owned)))
    };
    // The connection has to be driven for the answer to come; it may end first, with the answer already read.
    match select(pin!(answer), pin!(connection)).await {
        Either::Left((answer, _)) => answer,
        Either::Right((_, answer)) => answer.await,
    }
}

/// Takes any certificate, but checks that the server holds its key.
#[derive(Debug)]
struct AnyCertificate(Arc<CryptoProvider>);

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls12_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        rustls::crypto::verify_tls13_signature(message, cert, dss, &self.0.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use axum::Router;
    use axum::response::Redirect;
    use axum::routing::get as route;
    use serde_json::{Value, json};

    fn container(probes: Value) -> Container {
        let mut container = probes;
        container["name"] = json!("app");
        serde_json::from_value(container).unwrap()
    }

    fn tracker(kind: ProbeKind, success_threshold: u32, failure_threshold: u32) -> Tracker {
        Tracker {
            kind,
            container: "app".into(),
            success_threshold,
            failure_threshold,
            last: None,
            run: 0,
            ready: false,
        }
    }

    /// What a sequence of tries (`+` and `-`) says, Unhealthy left out.
    fn told(mut tracker: Tracker, tries: &str) -> Vec<(usize, ProbeEvent)> {
        let mut told = Vec::new();
        for (number, result) in tries.chars().enumerate() {
            let result = if result == '+' { Ok(()) } else { Err("broken".to_owned()) };
            let (events, next) = tracker.observe(result);
            let told_now = events.into_iter().filter(|event| !matches!(event, ProbeEvent::Unhealthy { .. }));
            told.extend(told_now.map(|event| (number, event)));
            if next != Next::Again {
                break;
            }
        }
        told
    }

    fn failed(kind: ProbeKind) -> ProbeEvent {
        ProbeEvent::Failed { kind, message: format!("Container app failed {kind} probe, will be restarted") }
    }

    #[test]
    fn readiness_changes_only_when_a_threshold_is_reached_in_a_row() {
        let tries = "+-+++--+---+--";
        let expected = [(4, ProbeEvent::Ready(true)), (10, ProbeEvent::Ready(false))];
        assert_eq!(told(tracker(ProbeKind::Readiness, 3, 3), tries), expected);
    }

    #[test]
    fn a_container_is_ready_at_the_first_success() {
        assert_eq!(told(tracker(ProbeKind::Readiness, 1, 3), "+++"), [(0, ProbeEvent::Ready(true))]);
    }

    #[test]
    fn a_container_that_was_never_ready_is_not_told_to_be_unready() {
        assert_eq!(told(tracker(ProbeKind::Readiness, 1, 1), "---"), []);
    }

    #[test]
    fn liveness_gives_up_after_as_many_failures_in_a_row_as_it_may_have() {
        let expected = [(6, failed(ProbeKind::Liveness))];
        assert_eq!(told(tracker(ProbeKind::Liveness, 1, 3), "--+-----"), [(5, failed(ProbeKind::Liveness))]);
        assert_eq!(told(tracker(ProbeKind::Liveness, 1, 3), "--+-+-"), []);
        assert_eq!(told(tracker(ProbeKind::Liveness, 1, 1), "++++++-"), expected);
    }

    #[test]
    fn startup_passes_once_or_gives_up() {
        assert_eq!(told(tracker(ProbeKind::Startup, 1, 3), "--++"), [(2, ProbeEvent::Started)]);
        assert_eq!(told(tracker(ProbeKind::Startup, 1, 2), "--+"), [(1, failed(ProbeKind::Startup))]);
    }

    #[test]
    fn every_failed_try_is_told_as_unhealthy() {
        let (events, next) = tracker(ProbeKind::Liveness, 1, 3).observe(Err("statuscode: 500".into()));
        let message = "Liveness probe failed: statuscode: 500".to_owned();
        assert_eq!(events, [ProbeEvent::Unhealthy { kind: ProbeKind::Liveness, message }]);
        assert_eq!(next, Next::Again);
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

    #[test]
    fn a_port_is_a_number_or_the_name_of_one() {
        let ports = json!([{"name": "web", "containerPort": 8080}, {"containerPort": 80, "hostPort": 9080}]);
        let container = container(json!({"ports": ports}));
        let number = |port: Value| resolve(&serde_json::from_value(port).unwrap(), &container).ok();
        assert_eq!(number(json!(81)), Some(81));
        assert_eq!(number(json!("81")), Some(81));
        assert_eq!(number(json!("web")), Some(8080));
        assert_eq!(number(json!(80)), Some(9080), "where it is on the node");
        for bad in [json!("none"), json!(0), json!(-1), json!(70000)] {
            assert_eq!(number(bad.clone()), None, "{bad}");
        }
    }

    #[test]
    fn urls_are_put_together_as_the_kubelet_does() {
        let url = |get: Value, address: &str| {
            let mut get = get;
            get["port"] = json!(8080);
            let container = container(json!({"livenessProbe": {"httpGet": get}}));
            match Action::of(container.liveness_probe.as_ref().unwrap(), &container, address.parse().unwrap()) {
                Ok(Action::Http { url, .. }) => url.to_string(),
                other => panic!("{other:?}"),
            }
        };
        assert_eq!(url(json!({}), "10.0.0.1"), "http://10.0.0.1:8080/");
        assert_eq!(
            url(json!({"path": "healthz?full=1#x", "scheme": "HTTPS"}), "::1"),
            "https://[::1]:8080/healthz?full=1"
        );
        assert_eq!(url(json!({"path": "/a b", "host": "example.org"}), "10.0.0.1"), "http://example.org:8080/a%20b");
    }

    #[test]
    fn default_headers_can_be_replaced_and_an_empty_accept_takes_it_away() {
        let headers_of = |given: Value| {
            let get: HTTPGetAction = serde_json::from_value(json!({"port": 1, "httpHeaders": given})).unwrap();
            headers(&get)
        };
        let plain = headers_of(json!([])).unwrap();
        assert_eq!((plain["user-agent"].to_str().unwrap(), plain["accept"].to_str().unwrap()), (USER_AGENT, "*/*"));
        let own =
            json!([{"name": "Accept", "value": ""}, {"name": "X-A", "value": "1"}, {"name": "x-a", "value": "2"}]);
        let own = headers_of(own).unwrap();
        assert!(!own.contains_key("accept"));
        assert_eq!(own.get_all("x-a").iter().count(), 2);
        assert!(headers_of(json!([{"name": "a b", "value": ""}])).is_err());
    }

    /// A server whose paths answer as they are called.
    async fn server() -> u16 {
        let app = Router::new()
            .route("/ok", route(async || "fine"))
            .route("/large", route(async || "x".repeat(1 << 20)))
            .route("/broken", route(async || StatusCode::INTERNAL_SERVER_ERROR))
            .route("/here", route(async || Redirect::temporary("ok")))
            .route("/nowhere", route(async || Redirect::temporary("/broken")))
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
        let address = "127.0.0.1".parse().unwrap();
        let action = Action::of(container.liveness_probe.as_ref().unwrap(), &container, address).unwrap();
        let connector = action.connector().unwrap();
        action.attempt(connector.as_ref(), Duration::from_secs(1)).await
    }

    #[tokio::test]
    async fn http_answers_from_200_to_399_pass() {
        let port = server().await;
        let get = |path: &str| attempt(json!({"httpGet": {"path": path, "port": port}}));
        for path in ["/ok", "/large", "/here", "/elsewhere", "/unchanged"] {
            assert_eq!(get(path).await, Ok(()), "{path}");
        }
        assert_eq!(get("/broken").await.unwrap_err(), "HTTP probe failed with statuscode: 500");
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
        let _prober = spawn(&container(probes), "127.0.0.1".parse().unwrap(), sender);
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
        let prober = spawn(&container(probes), "127.0.0.1".parse().unwrap(), sender);
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
        let prober = spawn(&container(json!({})), "127.0.0.1".parse().unwrap(), sender);
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
