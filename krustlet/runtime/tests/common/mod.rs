//! What the tests share: a registry in memory, a signer, a runtime in a directory of its own, and a small HTTP client.
#![allow(dead_code, clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use base64::Engine as _;
use bytes::Bytes;
use http_body_util::{BodyExt as _, Full, StreamBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode, header};
use hyper_util::rt::TokioIo;
use krustlet_runtime::{
    Compiler, ContainerSpec, CredentialSource, EgressConfig, HttpServer, Image, LogFile, LogLimits, Module,
    NoCredentials, OperatorsRegistries, PublicKey, PullLimits, PullPolicy, Runtime, RuntimeConfig, Verification,
};
use p256::ecdsa::signature::Signer as _;
use p256::pkcs8::EncodePublicKey as _;
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;

pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";

pub fn digest(content: &[u8]) -> String {
    let hex: String = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{hex}")
}

/// The component of `guest.wat`, which answers with `version` (7 characters).
pub fn http_guest(version: &str) -> Vec<u8> {
    assert_eq!(version.len(), 7);
    wat::parse_str(include_str!("../guest.wat").replace("VERSION", version)).unwrap()
}

/// A registry that holds one repository, `app`, and can misbehave.
#[derive(Clone)]
pub struct Registry {
    pub address: SocketAddr,
    state: Arc<Mutex<State>>,
}

/// A page of a list of referrers, and where the next one is.
pub type Listed = (Vec<u8>, Option<String>);

#[derive(Default)]
pub struct State {
    pub blobs: HashMap<String, Vec<u8>>,
    pub manifests: HashMap<String, Vec<u8>>,
    pub hits: HashMap<String, usize>,
    /// User name and password that the token service wants.
    pub login: Option<(String, String)>,
    /// Answers 503 to everything.
    pub down: bool,
    /// Answers every manifest with bytes without end.
    pub endless: bool,
    /// Lets as many requests through as it has permits.
    pub gate: Option<Arc<Semaphore>>,
    /// Announces 4 MiB for each manifest and sends one byte of it, and another one after each such time.
    pub trickle: Option<Duration>,
    /// By path of the repository's referrers API, where it has one: the page, and where its Link goes.
    pub referrers: Option<HashMap<String, Listed>>,
    /// Where blobs are.
    pub blobs_at: Option<String>,
    /// The token service, if it is not this registry's own.
    pub realm: Option<String>,
    /// What each request brought: its path, and its Authorization header.
    pub brought: Vec<(String, Option<String>)>,
    /// The forms that were sent to the token service.
    pub forms: Vec<String>,
}

impl Registry {
    pub async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let registry = Self { address: listener.local_addr().unwrap(), state: Arc::default() };
        let served = registry.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let registry = served.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| registry.clone().answer(request));
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        registry
    }

    pub fn state<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        change(&mut self.state.lock().unwrap())
    }

    pub fn hits(&self, path: &str) -> usize {
        self.state(|state| state.hits.iter().filter(|(hit, _)| hit.contains(path)).map(|(_, count)| count).sum())
    }

    /// Pushes a module as a wasm artifact; gives the manifest's digest.
    pub fn push(&self, tag: &str, module: &[u8]) -> String {
        let config = json!({"architecture": "wasm", "os": "wasip2", "layerDigests": [digest(module)]}).to_string();
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.wasm.config.v0+json", "digest": digest(config.as_bytes()),
                       "size": config.len()},
            "layers": [{"mediaType": "application/wasm", "digest": digest(module), "size": module.len()}],
        });
        self.state(|state| {
            state.blobs.insert(digest(config.as_bytes()), config.into_bytes());
            state.blobs.insert(digest(module), module.to_vec());
        });
        self.push_manifest(tag, &manifest)
    }

    pub fn push_manifest(&self, tag: &str, manifest: &Value) -> String {
        let manifest = manifest.to_string().into_bytes();
        let digest = digest(&manifest);
        self.state(|state| {
            state.manifests.insert(tag.to_owned(), manifest.clone());
            state.manifests.insert(digest.clone(), manifest);
        });
        digest
    }

    /// Adds a signature to those of a manifest.
    pub fn sign(&self, manifest: &str, signer: &Signer, signed: &str) {
        let payload =
            json!({"critical": {"identity": {"docker-reference": "app"}, "type": "cosign container image signature",
            "image": {"docker-manifest-digest": signed}}, "optional": null})
            .to_string()
            .into_bytes();
        let layer = json!({"mediaType": "application/vnd.dev.cosign.simplesigning.v1+json", "digest": digest(&payload),
            "size": payload.len(), "annotations": {"dev.cosignproject.cosign/signature": signer.sign(&payload)}});
        let tag = format!("{}.sig", manifest.replace(':', "-"));
        let mut document = self
            .state(|state| state.manifests.get(&tag).map(|known| serde_json::from_slice::<Value>(known).unwrap()))
            .unwrap_or_else(|| json!({"schemaVersion": 2, "layers": []}));
        document["layers"].as_array_mut().unwrap().push(layer);
        self.state(|state| state.blobs.insert(digest(&payload), payload));
        self.push_manifest(&tag, &document);
    }

    /// A bundle over `signed`, in what refers to `manifest`; gives that one's digest.
    pub fn push_bundle(&self, manifest: &str, signer: &Signer, signed: &str) -> String {
        self.push_referrer(manifest, &signer.bundle(signed), |_| {})
    }

    pub fn push_referrer(&self, manifest: &str, bundle: &Value, change: impl FnOnce(&mut Value)) -> String {
        let bundle = bundle.to_string().into_bytes();
        let mut document = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "artifactType": BUNDLE,
            "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest(b"{}"), "size": 2},
            "layers": [{"mediaType": BUNDLE, "digest": digest(&bundle), "size": bundle.len()}],
            "subject": {"mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": manifest, "size": 7},
        });
        change(&mut document);
        self.state(|state| state.blobs.insert(digest(&bundle), bundle));
        let document = document.to_string().into_bytes();
        let referrer = digest(&document);
        self.state(|state| state.manifests.insert(referrer.clone(), document));
        referrer
    }

    /// Lists these as a manifest's referrers, at the tag that stands in for a referrers API.
    pub fn list_referrers(&self, manifest: &str, referrers: &[String]) {
        let entries: Vec<Value> = referrers.iter().map(|referrer| json!({"digest": referrer})).collect();
        self.push_manifest(&manifest.replace(':', "-"), &json!({"schemaVersion": 2, "manifests": entries}));
    }

    pub fn image(&self, wanted: &str) -> String {
        let separator = if wanted.starts_with("sha256:") { '@' } else { ':' };
        format!("{}/app{separator}{wanted}", self.address)
    }

    async fn answer(
        self,
        request: Request<Incoming>,
    ) -> Result<Response<http_body_util::combinators::BoxBody<Bytes, Infallible>>, Infallible> {
        let (head, body) = request.into_parts();
        let form = String::from_utf8_lossy(&body.collect().await.unwrap().to_bytes()).into_owned();
        let request = Request::from_parts(head, ());
        let path = request.uri().path().to_owned();
        let authorization =
            request.headers().get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
        let whole = |status: StatusCode, body: Vec<u8>| {
            Response::builder().status(status).body(Full::new(Bytes::from(body)).boxed()).unwrap()
        };
        let gate = self.state(|state| {
            *state.hits.entry(path.clone()).or_default() += 1;
            state.brought.push((path.clone(), authorization.clone()));
            if !form.is_empty() {
                state.forms.push(form);
            }
            state.gate.clone()
        });
        if let Some(gate) = gate {
            gate.acquire().await.unwrap().forget();
        }
        let state = self.state.lock().unwrap();
        if state.down {
            return Ok(whole(StatusCode::SERVICE_UNAVAILABLE, Vec::new()));
        }
        if let Some((user, password)) = &state.login {
            let basic = base64::engine::general_purpose::STANDARD.encode(format!("{user}:{password}"));
            if path == "/token" {
                let refresh = format!("refresh_token={password}");
                let allowed = authorization == Some(format!("Basic {basic}"))
                    || state.forms.last().is_some_and(|form| form.split('&').any(|field| field == refresh));
                return Ok(match allowed {
                    true => whole(StatusCode::OK, br#"{"token": "ticket"}"#.to_vec()),
                    false => whole(StatusCode::UNAUTHORIZED, Vec::new()),
                });
            }
            if authorization.as_deref() != Some("Bearer ticket") {
                let mut response = whole(StatusCode::UNAUTHORIZED, Vec::new());
                let own = format!("http://{}/token", self.address);
                let realm = state.realm.as_ref().unwrap_or(&own);
                let challenge = format!(r#"Bearer realm="{realm}",service="registry""#);
                response.headers_mut().insert(header::WWW_AUTHENTICATE, challenge.parse().unwrap());
                return Ok(response);
            }
        }
        if state.endless && path.contains("/manifests/") {
            let chunks = futures::stream::repeat_with(|| Ok(Frame::data(Bytes::from(vec![b' '; 64 * 1024]))));
            return Ok(Response::new(StreamBody::new(chunks).boxed()));
        }
        if let Some(pause) = state.trickle.filter(|_| path.contains("/manifests/")) {
            let byte = move |first: bool| async move {
                if !first {
                    tokio::time::sleep(pause).await;
                }
                Some((Ok(Frame::data(Bytes::from_static(b" "))), false))
            };
            let mut response = Response::new(StreamBody::new(futures::stream::unfold(true, byte)).boxed());
            response.headers_mut().insert(header::CONTENT_LENGTH, (60 << 10).into());
            return Ok(response);
        }
        if let Some(location) = state.blobs_at.as_ref().filter(|_| path.contains("/blobs/")) {
            let mut response = whole(StatusCode::TEMPORARY_REDIRECT, Vec::new());
            response.headers_mut().insert(header::LOCATION, format!("{location}{path}").parse().unwrap());
            return Ok(response);
        }
        if let Some(pages) = state.referrers.as_ref().filter(|_| path.starts_with("/v2/app/referrers/")) {
            let none = (br#"{"manifests": []}"#.to_vec(), None);
            let wanted = request.uri().path_and_query().unwrap().as_str().rsplit_once('/').unwrap().1;
            let (page, link) = pages.get(wanted).unwrap_or(&none);
            let mut response = whole(StatusCode::OK, page.clone());
            let index = "application/vnd.oci.image.index.v1+json";
            response.headers_mut().insert(header::CONTENT_TYPE, index.parse().unwrap());
            if let Some(link) = link {
                response.headers_mut().insert(header::LINK, format!("<{link}>; rel=\"next\"").parse().unwrap());
            }
            return Ok(response);
        }
        let found = match path.strip_prefix("/v2/app/").and_then(|rest| rest.split_once('/')) {
            Some(("manifests", wanted)) => state.manifests.get(wanted),
            Some(("blobs", wanted)) => state.blobs.get(wanted),
            _ => None,
        };
        Ok(match found {
            Some(content) => {
                let mut response = whole(StatusCode::OK, content.clone());
                response.headers_mut().insert("docker-content-digest", digest(content).parse().unwrap());
                response
            }
            None => {
                whole(StatusCode::NOT_FOUND, br#"{"errors": [{"code": "NAME_UNKNOWN", "message": "no"}]}"#.to_vec())
            }
        })
    }
}

/// A server that guests call: it answers everything alike and keeps the paths that it was asked for.
pub struct Upstream {
    pub address: SocketAddr,
    asked: Arc<Mutex<Vec<String>>>,
    connections: Arc<AtomicUsize>,
}

impl Upstream {
    pub async fn start(status: u16, location: Option<String>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let asked = Arc::<Mutex<Vec<String>>>::default();
        let (told, connections) = (asked.clone(), Arc::<AtomicUsize>::default());
        let counted = connections.clone();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                counted.fetch_add(1, Ordering::SeqCst);
                let (told, location) = (told.clone(), location.clone());
                let service = service_fn(move |request: Request<Incoming>| {
                    told.lock().unwrap().push(request.uri().to_string());
                    let mut response = Response::builder().status(status);
                    if let Some(location) = &location {
                        response = response.header(header::LOCATION, location);
                    }
                    std::future::ready(response.body(Full::<Bytes>::default()))
                });
                tokio::spawn(
                    hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
                );
            }
        });
        Self { address, asked, connections }
    }

    /// Connections that were ever made to it.
    pub fn connections(&self) -> usize {
        self.connections.load(Ordering::SeqCst)
    }

    pub fn asked(&self) -> Vec<String> {
        self.asked.lock().unwrap().clone()
    }
}

pub struct Signer(p256::ecdsa::SigningKey);

impl Signer {
    pub fn new(seed: u8) -> Self {
        Self(p256::ecdsa::SigningKey::from_slice(&[seed; 32]).unwrap())
    }

    pub fn public_key(&self) -> PublicKey {
        let key = p256::ecdsa::VerifyingKey::from(&self.0);
        PublicKey::from_pem(&key.to_public_key_pem(Default::default()).unwrap()).unwrap()
    }

    /// As cosign 3 makes one.
    pub fn bundle(&self, signed: &str) -> Value {
        let kind = "application/vnd.in-toto+json";
        let statement = json!({"_type": "https://in-toto.io/Statement/v1",
            "subject": [{"digest": {"sha256": signed.trim_start_matches("sha256:")}}],
            "predicateType": "https://sigstore.dev/cosign/sign/v1", "predicate": {}})
        .to_string();
        let message = format!("DSSEv1 {} {kind} {} {statement}", kind.len(), statement.len());
        json!({
            "mediaType": BUNDLE,
            "verificationMaterial": {"publicKey": {"hint": ""}},
            "dsseEnvelope": {
                "payload": base64::engine::general_purpose::STANDARD.encode(&statement),
                "payloadType": kind,
                "signatures": [{"sig": self.sign(message.as_bytes())}],
            },
        })
    }

    fn sign(&self, payload: &[u8]) -> String {
        let signature: p256::ecdsa::Signature = self.0.sign(payload);
        base64::engine::general_purpose::STANDARD.encode(signature.to_der().as_bytes())
    }
}

/// A runtime with its data in a temporary directory.
pub struct Node {
    pub runtime: Runtime,
    pub metrics: prometheus_client::registry::Registry,
    pub directory: Arc<tempfile::TempDir>,
    pub registry: Registry,
}

impl Node {
    pub async fn trusting_anyone() -> Self {
        Self::with(Verification::AllowUnsigned, Arc::new(NoCredentials)).await
    }

    pub async fn with(verification: Verification, credentials: Arc<dyn CredentialSource>) -> Self {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        Self::again(directory, Registry::start().await, verification, credentials)
    }

    /// One that trusts anyone and is otherwise what `change` makes of it.
    pub async fn configured(change: impl FnOnce(&mut RuntimeConfig)) -> Self {
        let directory = Arc::new(tempfile::tempdir().unwrap());
        let credentials = Arc::new(NoCredentials);
        Self::make(directory, &[&Registry::start().await], Verification::AllowUnsigned, credentials, limits(), change)
    }

    /// A runtime on the data that another one left.
    pub fn again(
        directory: Arc<tempfile::TempDir>,
        registry: Registry,
        verification: Verification,
        credentials: Arc<dyn CredentialSource>,
    ) -> Self {
        Self::make(directory, &[&registry], verification, credentials, limits(), |_| {})
    }

    /// A runtime whose operator named these registries, the node's own first.
    pub fn limited(
        directory: Arc<tempfile::TempDir>,
        registries: &[&Registry],
        verification: Verification,
        credentials: Arc<dyn CredentialSource>,
        pull_limits: PullLimits,
    ) -> Self {
        Self::make(directory, registries, verification, credentials, pull_limits, |_| {})
    }

    fn make(
        directory: Arc<tempfile::TempDir>,
        registries: &[&Registry],
        verification: Verification,
        credentials: Arc<dyn CredentialSource>,
        pull_limits: PullLimits,
        change: impl FnOnce(&mut RuntimeConfig),
    ) -> Self {
        let mut metrics = prometheus_client::registry::Registry::default();
        let insecure = registries.iter().map(|registry| registry.address.to_string()).collect();
        let mut config = RuntimeConfig {
            data_dir: directory.path().to_owned(),
            verification,
            credentials,
            registries: OperatorsRegistries { insecure, trusted: Vec::new() },
            max_concurrent_compiles: 1,
            pull_limits,
            compiler: Compiler { program: env!("CARGO_BIN_EXE_krustlet-compile").into(), arguments: Vec::new() },
            // The servers that guests call in these tests are here.
            egress: EgressConfig { networks: vec!["127.0.0.1/32".parse().unwrap()], ..EgressConfig::default() },
            guest_memory: None,
            max_pods: 100,
        };
        change(&mut config);
        let runtime = Runtime::new(config, &mut metrics).unwrap();
        Self { runtime, metrics, directory, registry: registries[0].clone() }
    }

    pub async fn image(&self, module: &[u8]) -> Image {
        let manifest = self.registry.push("latest", module);
        self.runtime.pull(&self.registry.image(&manifest), PullPolicy::IfNotPresent, &[]).await.unwrap()
    }

    pub async fn module(&self, module: &[u8]) -> Module {
        let image = self.image(module).await;
        self.runtime.load(&image).await.unwrap()
    }

    pub async fn wat(&self, text: &str) -> Module {
        self.module(&wat::parse_str(text).unwrap()).await
    }

    pub fn spec(&self, name: &str) -> ContainerSpec {
        let path = self.directory.path().join("logs").join(name).join("0.log");
        ContainerSpec::new(format!("default/pod/{name}"), LogFile::create(path, LogLimits::default()).unwrap())
    }

    /// The value of a counter or gauge, 0 when it is not there yet.
    pub fn metric(&self, name: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.metrics).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ').map(str::to_owned));
        line.map_or(0, |value| value.parse().unwrap())
    }
}

/// Serves the component of `guest.wat` in a container that `change` makes.
pub async fn served(node: &Node, change: impl FnOnce(&mut ContainerSpec)) -> (HttpServer, ContainerSpec) {
    let module = node.module(&http_guest("version")).await;
    let mut spec = node.spec("app");
    change(&mut spec);
    (node.runtime.serve(&module, spec.clone(), &[any_port()]).await.unwrap(), spec)
}

pub fn limits() -> PullLimits {
    PullLimits { places: 4, ..PullLimits::default() }
}

/// The text of the log's lines, after their time stamps.
pub fn logged(spec: &ContainerSpec) -> Vec<String> {
    let content = std::fs::read_to_string(spec.log.path()).unwrap();
    content.lines().map(|line| line.split_once(' ').unwrap().1.to_owned()).collect()
}

pub fn any_port() -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], 0))
}

#[derive(Debug)]
pub struct Reply {
    pub status: u16,
    pub headers: hyper::HeaderMap,
    pub body: String,
}

/// A connection that is kept alive.
pub struct Client(hyper::client::conn::http1::SendRequest<Full<Bytes>>);

impl Client {
    pub async fn connect(address: SocketAddr) -> Self {
        let stream = TcpStream::connect(address).await.unwrap();
        let (sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        Self(sender)
    }

    /// The error is hyper's: the connection broke before the answer was whole.
    pub async fn get(&mut self, path: &str) -> Result<Reply, hyper::Error> {
        let request =
            Request::get(path).header(header::HOST, "guest.test").body(Full::default()).expect("a valid request");
        self.0.ready().await?;
        let (head, body) = self.0.send_request(request).await?.into_parts();
        let body = body.collect().await?.to_bytes();
        Ok(Reply {
            status: head.status.as_u16(),
            headers: head.headers,
            body: String::from_utf8_lossy(&body).into_owned(),
        })
    }
}

pub async fn get(address: SocketAddr, path: &str) -> Reply {
    Client::connect(address).await.get(path).await.unwrap()
}

/// Waits until something is so, for at most ten seconds.
pub async fn until(what: &str, condition: impl Fn() -> bool) {
    for _ in 0..10_000 {
        if condition() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    panic!("waited ten seconds until {what}");
}
