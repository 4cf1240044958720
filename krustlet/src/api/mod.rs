//! The node's HTTPS API, as far as a kubelet's makes sense for wasm: logs, port-forward, pods, stats, metrics, health.
//!
//! Every request, whatever its path, passes [`auth`] first.

mod auth;
mod connections;
mod forward;
mod stats;

use crate::disk::Disk;
use crate::logs;
use crate::telemetry::{ApiLabels, metrics};
use crate::view::View;
use auth::{ClusterReviewer, Gate, Reviewer, User};
use axum::body::Body;
use axum::extract::{Path, Query, Request, State};
use axum::middleware::{Next, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, get};
use axum::{Json, Router};
use connections::{Connection, Connections};
use http::{StatusCode, header};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::service::Service;
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::Pod;
use prometheus_client::registry::Registry;
use rustls::RootCertStore;
use rustls::server::{ResolvesServerCert, ServerConfig, WebPkiClientVerifier};
use serde_json::{Value, json};
use std::path::PathBuf;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

/// Connections at once. Where one more comes, one is closed on which nobody has authenticated, or that is idle. An API server keeps a handful.
const MAX_CONNECTIONS: usize = 256;
/// Requests at once on one connection.
const MAX_STREAMS: u32 = 128;
/// Logs that are read or followed at once; one more is asked to come back.
const MAX_LOGS: usize = 128;
/// Bytes of a request's headers; a token may be some thousands.
const MAX_HEADERS: u32 = 64 * 1024;
/// A client that takes longer for its TLS handshake is cut off.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// A connection without a request is closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(90);
/// Between two looks at whether a connection is idle, or its client still there.
const KEEP_ALIVE: Duration = Duration::from_secs(30);
/// What is left of the requests at a shutdown is cut after this.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(5);

pub struct Context {
    pub client: kube::Client,
    pub node_name: String,
    /// Logs are in `<data_dir>/logs/NAMESPACE_NAME_UID/CONTAINER/RESTART.log`.
    pub data_dir: PathBuf,
    pub disk: Disk,
    pub view: Arc<dyn View>,
    pub registry: Arc<Registry>,
}

/// TLS with the serving certificate that `resolver` has at the moment. Clients may show a certificate of `client_ca`; one
/// of another issuer is refused, none at all is not.
pub fn server_tls(resolver: Arc<dyn ResolvesServerCert>, client_ca: RootCertStore) -> anyhow::Result<ServerConfig> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(client_ca), provider.clone())
        .allow_unauthenticated()
        .build()?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()?
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(resolver);
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(config)
}

/// Answers on `listener` until the shutdown, and then ends what is left within a few seconds.
pub async fn serve(
    context: Context,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    shutdown: CancellationToken,
) -> anyhow::Result<()> {
    let reviewer = ClusterReviewer { client: context.client.clone(), node_name: context.node_name.clone() };
    serve_reviewed(context, Arc::new(reviewer), listener, tls, shutdown).await;
    Ok(())
}

async fn serve_reviewed(
    context: Context,
    reviewer: Arc<dyn Reviewer>,
    listener: TcpListener,
    tls: Arc<ServerConfig>,
    shutdown: CancellationToken,
) {
    let app = TowerToHyperService::new(router(context, reviewer, shutdown.clone()));
    let acceptor = TlsAcceptor::from(tls);
    let connections = Connections::default();
    let mut tasks = JoinSet::new();
    loop {
        // One place is kept free for who comes next.
        let full = tasks.len() >= MAX_CONNECTIONS && !connections.close_one();
        let accepted = tokio::select! {
            () = shutdown.cancelled() => break,
            Some(_) = tasks.join_next(), if !tasks.is_empty() => continue,
            accepted = listener.accept(), if !full => accepted,
        };
        match accepted {
            Ok((stream, _)) => {
                let state = connections.add();
                tasks.spawn(connection(app.clone(), acceptor.clone(), stream, state, shutdown.clone()));
            }
            Err(error) => {
                // Such as too many open files: it passes, and asking again at once would only burn CPU.
                tracing::warn!(%error, "connection to the node's API not accepted");
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        }
    }
    let all = async { while tasks.join_next().await.is_some() {} };
    // What is still there afterwards is aborted when the set is dropped.
    let _ = tokio::time::timeout(SHUTDOWN_GRACE, all).await;
}

type App = TowerToHyperService<Router>;

async fn connection(
    app: App,
    acceptor: TlsAcceptor,
    stream: TcpStream,
    state: Connection,
    shutdown: CancellationToken,
) {
    let handshake = tokio::select! {
        handshake = tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)) => handshake,
        () = state.closed() => return,
    };
    let stream = match handshake {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%error, "TLS handshake failed"),
        Err(_) => return tracing::debug!("TLS handshake took too long"),
    };
    let state = Arc::new(state);
    let certificate = stream.get_ref().1.peer_certificates().and_then(|chain| chain.first());
    let caller = Caller(certificate.and_then(|certificate| User::of_certificate(certificate)));
    let service = {
        let state = state.clone();
        hyper::service::service_fn(move |mut request: hyper::Request<Incoming>| {
            let under_way = state.request();
            request.extensions_mut().insert(caller.clone());
            request.extensions_mut().insert(state.clone());
            let answer = app.call(request);
            async move {
                let answer: Response = answer.await?;
                // A request is not over before the last byte of its answer, which for a log may be long.
                let answer = answer.map(|body| {
                    Body::new(body.map_frame(move |frame| {
                        let _ = &under_way;
                        frame
                    }))
                });
                Ok::<_, std::convert::Infallible>(answer)
            }
        })
    };
    let mut builder = Builder::new(TokioExecutor::new());
    builder.http1().timer(TokioTimer::new()).header_read_timeout(KEEP_ALIVE).max_buf_size(MAX_HEADERS as usize);
    builder
        .http2()
        .timer(TokioTimer::new())
        .keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_streams(MAX_STREAMS)
        .max_header_list_size(MAX_HEADERS);
    let mut connection = pin!(builder.serve_connection_with_upgrades(TokioIo::new(stream), service));
    let mut ending = false;
    loop {
        tokio::select! {
            ended = connection.as_mut() => {
                if let Err(error) = ended {
                    tracing::debug!(error, "connection to the node's API broke");
                }
                return;
            }
            () = state.closed() => return tracing::debug!("connection closed: there are too many"),
            () = shutdown.cancelled(), if !ending => {
                ending = true;
                connection.as_mut().graceful_shutdown();
            }
            () = tokio::time::sleep(KEEP_ALIVE), if !ending => {
                if state.is_idle(IDLE_TIMEOUT) {
                    ending = true;
                    connection.as_mut().graceful_shutdown();
                }
            }
        }
    }
}

/// The user of the connection's client certificate, if it showed one.
#[derive(Debug, Clone, Default)]
struct Caller(Option<User>);

struct Api {
    view: Arc<dyn View>,
    registry: Arc<Registry>,
    data_dir: PathBuf,
    stats: stats::Stats,
    gate: Gate,
    log_slots: Arc<Semaphore>,
    forwards: forward::Places,
    shutdown: CancellationToken,
}

fn router(context: Context, reviewer: Arc<dyn Reviewer>, shutdown: CancellationToken) -> Router {
    let api = Arc::new(Api {
        stats: stats::Stats::new(context.node_name, context.data_dir.clone(), context.disk),
        view: context.view,
        registry: context.registry,
        data_dir: context.data_dir,
        gate: Gate::new(reviewer),
        log_slots: Arc::new(Semaphore::new(MAX_LOGS)),
        forwards: forward::Places::default(),
        shutdown,
    });
    let no_process = |what: &str| {
        let why = format!("{what} is not supported by this node: a WebAssembly module has no process to enter\n");
        any(async move || (StatusCode::NOT_IMPLEMENTED, why))
    };
    Router::new()
        .route("/healthz", get(async || "ok"))
        .route("/pods", get(pods))
        .route("/pods/", get(pods))
        .route("/runningpods", get(running_pods))
        .route("/runningpods/", get(running_pods))
        .route("/stats/summary", get(summary))
        .route("/metrics", get(agent_metrics))
        .route("/metrics/resource", get(resource_metrics))
        .route("/containerLogs/{namespace}/{pod}/{container}", get(container_logs))
        .route("/exec/{*target}", no_process("exec"))
        .route("/attach/{*target}", no_process("attach"))
        .route("/run/{*target}", no_process("run"))
        .route("/portForward/{namespace}/{pod}", any(forward::port_forward))
        .fallback(async || (StatusCode::NOT_FOUND, "404 page not found\n"))
        .layer(from_fn_with_state(api.clone(), admit))
        .with_state(api)
}

/// The way to every handler, also to the one for unknown paths.
async fn admit(State(api): State<Arc<Api>>, request: Request, next: Next) -> Response {
    let endpoint = endpoint(request.uri().path());
    let caller = request.extensions().get::<Caller>().cloned().unwrap_or_default();
    let (method, path, headers) = (request.method(), request.uri().path(), request.headers());
    let answer = match api.gate.check(caller.0.as_ref(), method, path, headers).await {
        Ok(()) => {
            // Not before: a certificate of the cluster is no right to this node.
            if let Some(connection) = request.extensions().get::<Arc<Connection>>() {
                connection.authenticated();
            }
            next.run(request).await
        }
        Err(refusal) => refusal,
    };
    metrics().api_requests.get_or_create(&ApiLabels { endpoint, code: answer.status().as_u16() }).inc();
    answer
}

/// The path's first part where it is one of ours, so that nobody can make up a label.
fn endpoint(path: &str) -> &'static str {
    const KNOWN: [&str; 10] =
        ["healthz", "pods", "runningpods", "stats", "metrics", "containerLogs", "exec", "attach", "run", "portForward"];
    let first = path.trim_start_matches('/').split('/').next().unwrap_or_default();
    KNOWN.iter().find(|known| **known == first).unwrap_or(&"other")
}

fn pod_list(pods: impl Iterator<Item = Value>) -> Json<Value> {
    Json(json!({"kind": "PodList", "apiVersion": "v1", "metadata": {}, "items": pods.collect::<Value>()}))
}

async fn pods(State(api): State<Arc<Api>>) -> Json<Value> {
    pod_list(api.view.pods().iter().map(|pod| json!(**pod)))
}

/// Only what runs, and of that only what identifies it.
async fn running_pods(State(api): State<Arc<Api>>) -> Json<Value> {
    let usage = api.view.usage();
    let pods = api.view.pods();
    let running = pods.iter().filter_map(|pod| {
        let uid = pod.metadata.uid.as_deref()?;
        let names = usage.iter().filter(|used| used.pod_uid == uid).map(|used| used.container.as_str());
        let names: Vec<&str> = names.collect();
        let containers =
            pod.spec.as_ref()?.containers.iter().filter(|container| names.contains(&container.name.as_str()));
        let containers: Vec<Value> =
            containers.map(|container| json!({"name": container.name, "image": container.image})).collect();
        let metadata = json!({"name": pod.metadata.name, "namespace": pod.metadata.namespace, "uid": uid});
        (!containers.is_empty())
            .then(|| json!({"metadata": metadata, "spec": {"containers": containers}, "status": {}}))
    });
    pod_list(running)
}

async fn summary(State(api): State<Arc<Api>>) -> Response {
    let report = move || api.stats.summary(&api.view.pods(), &api.view.usage());
    match tokio::task::spawn_blocking(report).await {
        Ok(summary) => Json(summary).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to read the stats: {error}\n")).into_response()
        }
    }
}

async fn resource_metrics(State(api): State<Arc<Api>>) -> Response {
    let report = move || api.stats.resource_metrics(&api.view.pods(), &api.view.usage());
    match tokio::task::spawn_blocking(report).await {
        Ok(text) => ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], text).into_response(),
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to read the stats: {error}\n")).into_response()
        }
    }
}

async fn agent_metrics(State(api): State<Arc<Api>>) -> Response {
    let mut text = String::new();
    match prometheus_client::encoding::text::encode(&mut text, &api.registry) {
        Ok(()) => {
            let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
            ([(header::CONTENT_TYPE, kind)], text).into_response()
        }
        Err(error) => {
            (StatusCode::INTERNAL_SERVER_ERROR, format!("failed to write the metrics: {error}\n")).into_response()
        }
    }
}

async fn container_logs(
    State(api): State<Arc<Api>>,
    Path((namespace, pod_name, container)): Path<(String, String, String)>,
    Query(query): Query<Vec<(String, String)>>,
) -> Response {
    let bad = |status: StatusCode, message: String| (status, message).into_response();
    let options = match logs::Options::parse(&query, Timestamp::now()) {
        Ok(options) => options,
        Err(logs::BadOptions::Unreadable) => {
            return bad(StatusCode::BAD_REQUEST, "{\"message\": \"Unable to decode query.\"}".into());
        }
        Err(logs::BadOptions::Invalid) => {
            return bad(StatusCode::UNPROCESSABLE_ENTITY, "{\"message\": \"Invalid request.\"}".into());
        }
    };
    let named = |pod: &Arc<Pod>| {
        pod.metadata.namespace.as_ref() == Some(&namespace) && pod.metadata.name.as_ref() == Some(&pod_name)
    };
    // The old pod of the name may still be ending; the younger one is meant.
    let found = api.view.pods().into_iter().filter(named).max_by_key(|pod| pod.metadata.creation_timestamp.clone());
    let Some(pod) = found else {
        return bad(StatusCode::NOT_FOUND, format!("pod {pod_name:?} does not exist\n"));
    };
    let known = |spec: &k8s_openapi::api::core::v1::PodSpec| {
        spec.init_containers.iter().flatten().chain(&spec.containers).any(|known| known.name == container)
    };
    // Of the pod's own containers only, because the name becomes part of a path.
    if !pod.spec.as_ref().is_some_and(known) {
        return bad(StatusCode::NOT_FOUND, format!("container {container:?} not found in pod {pod_name:?}\n"));
    }
    let run = match logs::run_of(&pod, &container, options.previous) {
        Ok(run) => run,
        Err(message) => return bad(StatusCode::BAD_REQUEST, message),
    };
    let path = logs::file(&api.data_dir, &pod, &container, run);
    if !logs::exists(&path) {
        let message = format!("the log of container {container:?} in pod {pod_name:?} is not on this node any more\n");
        return bad(StatusCode::BAD_REQUEST, message);
    }
    let Ok(slot) = api.log_slots.clone().try_acquire_owned() else {
        let message = format!("{MAX_LOGS} logs are being read already, try again later\n");
        return bad(StatusCode::SERVICE_UNAVAILABLE, message);
    };
    let uid = pod.metadata.uid.clone();
    let view = api.view.clone();
    let running = move || {
        let pods = view.pods();
        let pod = pods.iter().find(|pod| pod.metadata.uid == uid);
        pod.is_some_and(|pod| logs::running(pod, &container, run))
    };
    let shutdown = api.shutdown.clone();
    let (sender, receiver) = mpsc::channel(4);
    tokio::spawn(async move {
        let _slot = slot;
        let _follower = options.follow.then(Follower::new);
        tokio::select! {
            () = logs::send(path, options, running, sender) => {}
            () = shutdown.cancelled() => {}
        }
    });
    let stream = futures::stream::unfold(receiver, async |mut receiver| {
        let part = receiver.recv().await?;
        Some((part, receiver))
    });
    ([(header::CONTENT_TYPE, "text/plain; charset=utf-8")], Body::from_stream(stream)).into_response()
}

/// Counts a client that follows a log.
struct Follower;

impl Follower {
    fn new() -> Self {
        metrics().log_followers.inc();
        Self
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        metrics().log_followers.dec();
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use crate::view::ContainerUsage;
    use auth::tests::FakeReviewer;
    use http::Method;
    use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair};
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
    use rustls::server::ClientHello;
    use rustls::sign::CertifiedKey;
    use std::sync::RwLock;
    use std::sync::atomic::Ordering;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    /// A node with one pod, `shop/web`, whose container `app` has restarted once.
    struct Node {
        pods: RwLock<Vec<Arc<Pod>>>,
        _dir: tempfile::TempDir,
        logs: PathBuf,
    }

    impl View for Node {
        fn pods(&self) -> Vec<Arc<Pod>> {
            self.pods.read().unwrap().clone()
        }

        fn usage(&self) -> Vec<ContainerUsage> {
            let stats = krustlet_runtime::Stats::default();
            vec![ContainerUsage { pod_uid: "u-1".into(), container: "app".into(), stats }]
        }

        fn served(&self, _: &str) -> Vec<std::net::SocketAddr> {
            Vec::new()
        }
    }

    fn web(state: Value) -> Vec<Arc<Pod>> {
        let pod = json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u-1"},
            "spec": {"containers": [{"name": "app", "image": "i@sha256:0"}, {"name": "new"}]},
            "status": {"containerStatuses": [
                {
                    "name": "app", "image": "", "imageID": "", "ready": true, "restartCount": 1, "state": state,
                    "lastState": {"terminated": {"exitCode": 1}},
                },
                {
                    "name": "new", "image": "", "imageID": "", "ready": false, "restartCount": 0,
                    "state": {"waiting": {"reason": "ErrImagePull"}},
                },
            ]},
        });
        vec![Arc::new(serde_json::from_value(pod).unwrap())]
    }

    fn node() -> (Arc<Node>, Context) {
        let dir = tempfile::tempdir().unwrap();
        let logs = dir.path().join("logs/shop_web_u-1/app");
        std::fs::create_dir_all(&logs).unwrap();
        std::fs::write(logs.join("0.log"), "2026-01-01T00:00:00Z stderr F crashed\n").unwrap();
        std::fs::write(logs.join("1.log"), "2026-01-01T00:00:01Z stdout F one\n2026-01-01T00:00:02Z stdout F two\n")
            .unwrap();
        let data_dir = dir.path().to_owned();
        let node = Arc::new(Node { pods: RwLock::new(web(json!({"running": {}}))), _dir: dir, logs });
        let mut registry = Registry::default();
        metrics().register(&mut registry);
        let context = Context {
            client: kube::Client::new(Router::new(), "default"),
            node_name: "node-1".into(),
            data_dir,
            disk: Disk::with(crate::disk::Figures::default()),
            view: node.clone(),
            registry: Arc::new(registry),
        };
        (node, context)
    }

    /// The API as a client with every right sees it, so that the tests here are about the handlers.
    struct Client {
        app: App,
        node: Arc<Node>,
    }

    impl Client {
        fn new() -> Self {
            let (node, context) = node();
            let app = TowerToHyperService::new(router(context, Arc::new(Everything), CancellationToken::new()));
            Self { app, node }
        }

        async fn request(&self, method: Method, path: &str) -> Response {
            let mut request = Request::new(Body::empty());
            *request.method_mut() = method;
            *request.uri_mut() = path.parse().unwrap();
            request.extensions_mut().insert(Caller(Some(User::default())));
            self.app.call(request).await.unwrap()
        }

        async fn get(&self, path: &str) -> (u16, String) {
            let response = self.request(Method::GET, path).await;
            (response.status().as_u16(), text(response.into_body()).await)
        }

        async fn json(&self, path: &str) -> Value {
            serde_json::from_str(&self.get(path).await.1).unwrap()
        }
    }

    struct Everything;

    impl Reviewer for Everything {
        fn authenticate<'a>(&'a self, _: &'a str) -> futures::future::BoxFuture<'a, anyhow::Result<Option<User>>> {
            Box::pin(async { Ok(None) })
        }

        fn authorize<'a>(
            &'a self,
            _: &'a User,
            _: auth::Access,
        ) -> futures::future::BoxFuture<'a, anyhow::Result<bool>> {
            Box::pin(async { Ok(true) })
        }
    }

    async fn text(body: Body) -> String {
        String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
    }

    #[tokio::test]
    async fn pods_are_listed_with_their_status() {
        let client = Client::new();
        let list = client.json("/pods").await;
        assert_eq!((&list["kind"], &list["apiVersion"]), (&json!("PodList"), &json!("v1")));
        assert_eq!(list["items"][0]["metadata"]["name"], "web");
        assert_eq!(list["items"][0]["status"]["containerStatuses"][0]["restartCount"], 1);
        let running = client.json("/runningpods/").await;
        assert_eq!(running["items"][0]["spec"]["containers"], json!([{"name": "app", "image": "i@sha256:0"}]));
    }

    #[tokio::test]
    async fn health_stats_and_metrics_are_told() {
        let client = Client::new();
        assert_eq!(client.get("/healthz").await, (200, "ok".into()));
        assert_eq!(client.json("/stats/summary").await["node"]["nodeName"], "node-1");
        assert!(
            client.get("/metrics/resource").await.1.contains("container_memory_working_set_bytes{container=\"app\"")
        );
        let (status, metrics) = client.get("/metrics").await;
        assert_eq!(status, 200);
        assert!(metrics.contains("krustlet_api_requests_total{endpoint=\"healthz\",code=\"200\"}"), "{metrics}");
        assert_eq!(client.get("/nothing").await.0, 404);
    }

    #[tokio::test]
    async fn what_needs_a_process_is_not_implemented_and_says_why() {
        let client = Client::new();
        for method in [Method::GET, Method::POST] {
            for what in ["exec", "attach", "run"] {
                let response = client.request(method.clone(), &format!("/{what}/shop/web/app?command=ls")).await;
                assert_eq!(response.status(), StatusCode::NOT_IMPLEMENTED);
                assert!(text(response.into_body()).await.contains("is not supported by this node: a"));
            }
        }
    }

    #[tokio::test]
    async fn logs_are_those_of_the_run_that_is_meant() {
        let client = Client::new();
        assert_eq!(client.get("/containerLogs/shop/web/app").await, (200, "one\ntwo\n".into()));
        assert_eq!(client.get("/containerLogs/shop/web/app?tailLines=1").await, (200, "two\n".into()));
        let timed = client.get("/containerLogs/shop/web/app?timestamps=true&limitBytes=24").await.1;
        assert_eq!(timed, "2026-01-01T00:00:01Z one");
        assert_eq!(client.get("/containerLogs/shop/web/app?sinceTime=2026-01-01T00:00:02Z").await.1, "two\n");
        assert_eq!(client.get("/containerLogs/shop/web/app?previous=true").await, (200, "crashed\n".into()));
        std::fs::remove_file(client.node.logs.join("0.log")).unwrap();
        let (status, why) = client.get("/containerLogs/shop/web/app?previous=true").await;
        assert!(status == 400 && why.contains("not on this node any more"), "{why}");
    }

    #[tokio::test]
    async fn logs_that_cannot_be_had_are_refused_with_the_reason() {
        let client = Client::new();
        for (path, status, why) in [
            ("shop/none/app", 404, "pod \"none\" does not exist"),
            ("other/web/app", 404, "pod \"web\" does not exist"),
            ("shop/web/none", 404, "container \"none\" not found in pod \"web\""),
            ("shop/web/..%2F..", 404, "not found in pod"),
            ("shop/web/new", 400, "container \"new\" in pod \"web\" is waiting to start: ErrImagePull"),
            ("shop/web/new?previous=1", 400, "previous terminated container \"new\" in pod \"web\" not found"),
            ("shop/web/app?tailLines=x", 400, "Unable to decode query."),
            ("shop/web/app?tailLines=-1", 422, "Invalid request."),
        ] {
            let (got, text) = client.get(&format!("/containerLogs/{path}")).await;
            assert!(got == status && text.contains(why), "{path}: {got} {text}");
        }
    }

    #[tokio::test]
    async fn no_query_and_no_path_is_too_much() {
        let client = Client::new();
        let long = "9".repeat(40);
        let largest = i64::MAX.to_string();
        let mut paths = vec![
            format!("shop/web/app?container={}", "x".repeat(30_000)),
            format!("shop/web/app?{}", "a=b&".repeat(10_000)),
            format!("{}/web/app", "n".repeat(30_000)),
            "shop/web/app?tailLines=1&tailLines=2&%00=%ff".to_owned(),
            "shop/web/app?sinceTime=9999-12-31T23:59:60Z".to_owned(),
            "shop/web/app?sinceTime=-9999-01-01T00:00:00Z".to_owned(),
            "shop/web/..%2f..%2f..%2fpki".to_owned(),
            "shop/web/%2e%2e".to_owned(),
            "shop/web/app%00".to_owned(),
            "..%2f..%2f/web/app".to_owned(),
            "shop/web/app/..%2f..%2f1.log".to_owned(),
        ];
        for option in ["tailLines", "limitBytes", "sinceSeconds"] {
            for value in ["0", "-0", "1e9", "0x10", "", "%2b1", largest.as_str(), long.as_str(), "-9223372036854775808"]
            {
                paths.push(format!("shop/web/app?{option}={value}"));
            }
        }
        for path in paths {
            let (status, text) = client.get(&format!("/containerLogs/{path}")).await;
            let path: String = path.chars().take(80).collect();
            assert!(matches!(status, 200 | 400 | 404 | 422), "{path}: {status} {text}");
            assert!(!text.contains("PRIVATE") && !text.contains("crashed"), "{path}: {text}");
        }
    }

    #[tokio::test]
    async fn a_followed_log_ends_with_the_container() {
        let client = Client::new();
        let response = client.request(Method::GET, "/containerLogs/shop/web/app?follow=true").await;
        let mut body = response.into_body();
        let first = body.frame().await.unwrap().unwrap().into_data().unwrap();
        assert_eq!(&first[..], b"one\ntwo\n");
        *client.node.pods.write().unwrap() = web(json!({"terminated": {"exitCode": 0}}));
        assert!(body.frame().await.is_none());
    }

    #[tokio::test]
    async fn the_number_of_logs_that_are_read_at_once_is_bounded() {
        let client = Client::new();
        let mut followers = Vec::new();
        for _ in 0..MAX_LOGS {
            let response = client.request(Method::GET, "/containerLogs/shop/web/app?follow=true").await;
            assert_eq!(response.status(), StatusCode::OK);
            followers.push(response);
        }
        assert_eq!(client.get("/containerLogs/shop/web/app").await.0, 503);
        drop(followers);
        // The slots come back as the followers notice that their clients have gone.
        while client.get("/containerLogs/shop/web/app").await.0 != 200 {
            tokio::task::yield_now().await;
        }
    }

    /// A cluster's CA, and what it signs.
    struct Ca(CertifiedIssuer<'static, KeyPair>);

    impl Ca {
        fn new() -> Self {
            let mut parameters = CertificateParams::default();
            parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
            Self(CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap())
        }

        fn issue(
            &self,
            name: &str,
            usage: ExtendedKeyUsagePurpose,
        ) -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
            let mut parameters = CertificateParams::new(["localhost".to_owned()]).unwrap();
            parameters.distinguished_name.push(DnType::CommonName, name);
            parameters.extended_key_usages = vec![usage];
            let key = KeyPair::generate().unwrap();
            let certificate = parameters.signed_by(&key, &self.0).unwrap();
            (certificate.der().clone(), PrivateKeyDer::Pkcs8(key.serialize_der().into()))
        }

        fn roots(&self) -> RootCertStore {
            let mut roots = RootCertStore::empty();
            roots.add(self.0.der().clone()).unwrap();
            roots
        }
    }

    #[derive(Debug)]
    struct Fixed(Arc<CertifiedKey>);

    impl ResolvesServerCert for Fixed {
        fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
            Some(self.0.clone())
        }
    }

    /// A served node, by its address and its CA.
    struct Served {
        ca: Ca,
        address: std::net::SocketAddr,
        shutdown: CancellationToken,
        task: tokio::task::JoinHandle<()>,
        reviewer: Arc<FakeReviewer>,
    }

    impl Served {
        async fn new() -> Self {
            let ca = Ca::new();
            let provider = rustls::crypto::ring::default_provider();
            let (certificate, key) = ca.issue("system:node:node-1", ExtendedKeyUsagePurpose::ServerAuth);
            let key = CertifiedKey::from_der(vec![certificate], key, &provider).unwrap();
            let tls = Arc::new(server_tls(Arc::new(Fixed(Arc::new(key))), ca.roots()).unwrap());
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            let shutdown = CancellationToken::new();
            let reviewer = Arc::new(FakeReviewer::default());
            let (_, context) = node();
            let task = tokio::spawn(serve_reviewed(context, reviewer.clone(), listener, tls, shutdown.clone()));
            Self { ca, address, shutdown, task, reviewer }
        }

        async fn connect(
            &self,
            identity: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
        ) -> std::io::Result<tokio_rustls::client::TlsStream<TcpStream>> {
            let provider = Arc::new(rustls::crypto::ring::default_provider());
            let builder = rustls::ClientConfig::builder_with_provider(provider)
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(self.ca.roots());
            let config = match identity {
                Some((certificate, key)) => builder.with_client_auth_cert(vec![certificate], key).unwrap(),
                None => builder.with_no_client_auth(),
            };
            let connector = tokio_rustls::TlsConnector::from(Arc::new(config));
            let stream = TcpStream::connect(self.address).await?;
            connector.connect(ServerName::try_from("localhost").unwrap(), stream).await
        }

        /// The raw answer to a request on a connection of its own, or why there is none.
        async fn raw(
            &self,
            request: &str,
            identity: Option<(CertificateDer<'static>, PrivateKeyDer<'static>)>,
        ) -> std::io::Result<String> {
            let mut stream = self.connect(identity).await?;
            stream.write_all(request.as_bytes()).await?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer).await?;
            Ok(answer)
        }

        async fn get(&self, path: &str, token: Option<&str>, user: Option<&str>) -> u16 {
            let token = token.map(|token| format!("Authorization: Bearer {token}\r\n")).unwrap_or_default();
            let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\n{token}Connection: close\r\n\r\n");
            let identity = user.map(|user| self.ca.issue(user, ExtendedKeyUsagePurpose::ClientAuth));
            let answer = self.raw(&request, identity).await.unwrap();
            answer.split(' ').nth(1).unwrap().parse().unwrap()
        }
    }

    #[tokio::test]
    async fn every_path_asks_who_and_whether() {
        let served = Served::new().await;
        let paths = [
            "/pods",
            "/runningpods/",
            "/healthz",
            "/stats/summary",
            "/metrics",
            "/metrics/resource",
            "/nothing",
            "/",
            "/containerLogs/shop/web/app",
            "/exec/shop/web/app",
            "/attach/a/b/c",
            "/run/a/b/c",
            "/portForward/a/b",
        ];
        for path in paths {
            assert_eq!(served.get(path, None, None).await, 401, "{path}");
            assert_eq!(served.get(path, Some("nobody"), None).await, 403, "{path}");
            assert_eq!(served.get(path, None, Some("nobody")).await, 403, "{path}");
        }
        assert_eq!(served.get("/containerLogs/shop/web/app", Some("admin"), None).await, 200);
        assert_eq!(served.get("/containerLogs/shop/web/app", None, Some("admin")).await, 200);
        assert_eq!(served.get("/exec/shop/web/app", Some("admin"), None).await, 501);
    }

    /// Routes and rights are decided on the same path: no spelling of one that is allowed leads to one that is not.
    #[tokio::test]
    async fn a_right_to_metrics_opens_no_log_however_its_path_is_spelled() {
        let served = Served::new().await;
        let log = "containerLogs/shop/web/app";
        for path in [
            format!("/metrics/../{log}"),
            format!("/metrics/%2e%2e/{log}"),
            format!("/metrics/..%2f{log}"),
            format!("/metrics//{log}"),
            format!("//{log}"),
            format!("/metrics;/../{log}"),
            format!("/metrics?x=/../{log}"),
            format!("/metrics%3f/../{log}"),
            format!("/./{log}"),
            format!("http://node/metrics/../{log}"),
            "/%63ontainerLogs/shop/web/app".to_owned(),
            "/metrics/../pods".to_owned(),
        ] {
            let token = "Authorization: Bearer metrics\r\n";
            let request = format!("GET {path} HTTP/1.1\r\nHost: node\r\n{token}Connection: close\r\n\r\n");
            let answer = served.raw(&request, None).await.unwrap();
            assert!(!answer.contains("two\n") && !answer.contains("PodList"), "{path}: {answer}");
        }
    }

    #[tokio::test]
    async fn nothing_is_upgraded_and_a_body_is_not_waited_for() {
        let served = Served::new().await;
        let upgrade =
            "Upgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        for head in [
            format!("GET /exec/shop/web/app HTTP/1.1\r\n{upgrade}Connection: Upgrade\r\n"),
            "POST /exec/shop/web/app HTTP/1.1\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n".to_owned(),
            "POST /run/shop/web/app HTTP/1.1\r\nConnection: close\r\nContent-Length: 999999999\r\n".to_owned(),
            "POST /run/shop/web/app HTTP/1.1\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n".to_owned(),
        ] {
            let request = format!("{head}Host: node\r\nAuthorization: Bearer admin\r\n\r\n");
            let mut stream = served.connect(None).await.unwrap();
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 501", "{head}");
        }
    }

    #[tokio::test]
    async fn a_certificate_of_another_issuer_is_no_certificate() {
        let served = Served::new().await;
        let forged = Ca::new().issue("admin", ExtendedKeyUsagePurpose::ClientAuth);
        let request = "GET /pods HTTP/1.1\r\nHost: node\r\nConnection: close\r\n\r\n";
        assert!(served.raw(request, Some(forged)).await.is_err());
        let wrong_usage = served.ca.issue("admin", ExtendedKeyUsagePurpose::ServerAuth);
        assert!(served.raw(request, Some(wrong_usage)).await.is_err());
    }

    #[tokio::test]
    async fn an_outage_of_the_api_server_is_told_to_token_callers() {
        let served = Served::new().await;
        served.reviewer.away.store(true, Ordering::SeqCst);
        assert_eq!(served.get("/pods", Some("admin"), None).await, 503);
        assert_eq!(served.get("/pods", None, Some("admin")).await, 500);
    }

    #[tokio::test]
    async fn headers_without_end_are_refused() {
        let served = Served::new().await;
        let request = format!("GET /pods HTTP/1.1\r\nX: {}\r\n\r\n", "x".repeat(2 * MAX_HEADERS as usize));
        let answer = served.raw(&request, None).await;
        assert!(answer.is_err() || answer.unwrap().starts_with("HTTP/1.1 431"));
    }

    #[tokio::test]
    async fn connections_held_open_by_the_unauthenticated_keep_nobody_out() {
        let served = Served::new().await;
        let follow =
            "GET /containerLogs/shop/web/app?follow=true HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer admin\r\n\r\n";
        let mut known = served.connect(None).await.unwrap();
        known.write_all(follow.as_bytes()).await.unwrap();
        known.read_exact(&mut [0; 1]).await.unwrap();
        let mut held = Vec::new();
        // A certificate of the cluster is no right to this node.
        let identity = |number: usize| {
            number.is_multiple_of(16).then(|| served.ca.issue("nobody", ExtendedKeyUsagePurpose::ClientAuth))
        };
        for number in 0..MAX_CONNECTIONS + 50 {
            // Some have not even begun their handshake.
            held.push(if number % 8 == 0 {
                Ok(served.connect(identity(number)).await.unwrap())
            } else {
                Err(TcpStream::connect(served.address).await.unwrap())
            });
        }
        assert_eq!(served.get("/pods", Some("admin"), None).await, 200);
        assert_eq!(served.get("/pods", None, Some("admin")).await, 200);
        // The oldest went, and who is known stayed.
        let Ok(oldest) = &mut held[0] else { panic!() };
        assert_eq!(oldest.read(&mut [0; 1]).await.ok().unwrap_or_default(), 0);
        served.shutdown.cancel();
        let mut rest = String::new();
        known.read_to_string(&mut rest).await.unwrap();
        assert!(rest.ends_with("0\r\n\r\n"), "{rest}");
    }

    #[tokio::test]
    async fn a_shutdown_ends_also_what_is_followed() {
        let served = Served::new().await;
        let request =
            "GET /containerLogs/shop/web/app?follow=true HTTP/1.1\r\nHost: node\r\nAuthorization: Bearer admin\r\n\r\n";
        let mut stream = served.connect(None).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        while !answer.contains("two\n") {
            let mut part = [0; 1024];
            let size = stream.read(&mut part).await.unwrap();
            assert!(size > 0, "ended too soon: {answer}");
            answer.push_str(std::str::from_utf8(&part[..size]).unwrap());
        }
        served.shutdown.cancel();
        stream.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("0\r\n\r\n"), "the last chunk was sent: {answer}");
        served.task.await.unwrap();
    }

    #[test]
    fn nobody_can_make_up_an_endpoint() {
        assert_eq!(endpoint("/stats/summary"), "stats");
        assert_eq!(endpoint("/containerLogs/a/b/c"), "containerLogs");
        assert_eq!(endpoint("/whatever/x"), "other");
    }
}
