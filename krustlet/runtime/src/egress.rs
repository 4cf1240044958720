//! A guest's way out: HTTP requests to the hosts that its pod lists, at addresses that the node permits.
//!
//! A connection is made to exactly the address that was judged, and its name is not resolved again for it. Connections are
//! kept for the next request of the same container and of no other.

use crate::allowed_hosts::{AllowedHost, Host, Target};
use crate::egress_policy::{EgressPolicy, Refused};
use crate::gate::{Gate, Verdict};
use crate::guest::ContainerSpec;
use crate::limits::size_of_fields;
use crate::logs::{LogFile, LogStream};
use crate::memory::{Budget, Reservation};
use crate::name_service::Names;
use crate::shares::{Share, Taken};
use crate::source;
use crate::tenants::Tenant;
use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::BodyExt as _;
use hyper::body::{Body, Frame, Incoming, SizeHint};
use hyper_util::client::legacy::connect::{Connected, Connection};
use hyper_util::client::legacy::{self, Client};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use std::error::Error as StdError;
use std::fmt;
use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, ToSocketAddrs as _};
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, Sleep};
use tokio_rustls::TlsConnector;
use wasmtime_wasi_http::{Error as HttpError, RequestOptions, WasiBody, WasiHttpHooks};

/// Requests that the guests of one container may have open at once.
const MAX_REQUESTS: usize = 256;
/// Connections that one container may have, idle ones included: each is one of the node's file descriptors.
const MAX_CONNECTIONS: usize = 256;
/// Idle connections that are kept for one host.
const MAX_IDLE: usize = 16;
/// Shorter than most servers keep an idle connection, so that it is seldom closed under a request.
const IDLE_TIMEOUT: Duration = Duration::from_secs(15);
/// What an open request makes the node hold beside its headers: its answer's head, and what of their bodies is on the way.
const OPEN_REQUEST: u64 = 128 * 1024;
/// What the head of an answer may take.
const MAX_HEAD: usize = 64 * 1024;
/// Chunks of a body that wait for the other side; with their size, what a slow one can make the node hold.
pub const BODY_CHUNKS: usize = 4;
pub const BODY_CHUNK_SIZE: usize = 64 * 1024;

/// What a node lets its guests reach, whatever they ask for.
#[derive(Debug, Default)]
pub struct EgressConfig {
    /// Networks that are open though the node would refuse them.
    pub networks: Vec<ipnet::IpNet>,
    /// Addresses that lead to this node, beside those of its interfaces.
    pub node_addresses: Vec<IpAddr>,
    /// Certificate authorities in PEM that guests trust beside the public ones.
    pub ca_bundle: Option<String>,
}

/// A node's part in it: what all of its containers share.
pub struct Egress {
    pub policy: Arc<EgressPolicy>,
    pub names: Arc<Names>,
    roots: RootCertStore,
    tls: Arc<ClientConfig>,
    resolve: Arc<Resolve>,
}

/// Gives the addresses of a host and port. May block.
type Resolve = dyn Fn(&str, u16) -> io::Result<Vec<SocketAddr>> + Send + Sync;

impl Egress {
    /// Fails when the bundle holds no usable certificate.
    pub fn new(config: EgressConfig) -> Result<Self, String> {
        let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
        if let Some(bundle) = &config.ca_bundle {
            add_bundle(&mut roots, bundle)?;
        }
        let tls = Arc::new(client_config(roots.clone()));
        let policy = Arc::new(EgressPolicy::new(config.networks, config.node_addresses));
        let resolve = Arc::new(|host: &str, port| (host, port).to_socket_addrs().map(Vec::from_iter));
        Ok(Self { policy, names: Arc::default(), roots, tls, resolve })
    }

    /// TLS as a container with this bundle of its own speaks it.
    fn tls(&self, ca_bundle: Option<&str>) -> Result<Arc<ClientConfig>, String> {
        let Some(bundle) = ca_bundle else { return Ok(self.tls.clone()) };
        let mut roots = self.roots.clone();
        add_bundle(&mut roots, bundle)?;
        Ok(Arc::new(client_config(roots)))
    }
}

fn add_bundle(roots: &mut RootCertStore, bundle: &str) -> Result<(), String> {
    let mut found = 0;
    for certificate in CertificateDer::pem_slice_iter(bundle.as_bytes()) {
        let certificate = certificate.map_err(|error| format!("the CA bundle is not PEM: {error}"))?;
        roots.add(certificate).map_err(|error| format!("the CA bundle holds an unusable certificate: {error}"))?;
        found += 1;
    }
    if found == 0 {
        return Err("the CA bundle holds no certificate".into());
    }
    Ok(())
}

fn client_config(roots: RootCertStore) -> ClientConfig {
    let mut config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    config
}

/// One container's way out. Clones share its connections.
#[derive(Clone)]
pub struct Outbound(Arc<Inner>);

struct Inner {
    allowed: Vec<AllowedHost>,
    /// No wait is longer than the request that the guest itself is answering.
    timeout: Duration,
    open: Arc<Semaphore>,
    memory: Arc<Budget>,
    client: Client<Connector, WasiBody>,
    /// For what the node's name service resolves: each endpoint has connections of its own, so that requests are spread.
    to_endpoints: OnceLock<Client<Connector, WasiBody>>,
    connecting: Arc<Connecting>,
    log: LogFile,
}

impl Outbound {
    /// The error says which entry, or what of the bundle, is not usable.
    pub fn new(
        egress: &Arc<Egress>,
        memory: &Arc<Budget>,
        tenant: &Tenant,
        spec: &ContainerSpec,
    ) -> Result<Self, String> {
        let (timeout, log) = (spec.request_timeout, spec.log.clone());
        let allowed = spec.allowed_hosts.iter().map(|entry| AllowedHost::parse(entry)).collect::<Result<_, _>>()?;
        let connecting = Arc::new(Connecting {
            tls: egress.tls(spec.ca_bundle.as_deref())?.into(),
            egress: egress.clone(),
            source: spec.source,
            gate: spec.gate.clone(),
            timeout,
            connections: Arc::new(Semaphore::new(MAX_CONNECTIONS)),
            descriptors: tenant.descriptors.clone(),
            lookups: tenant.lookups.clone(),
        });
        let client = client(Connector { connecting: connecting.clone(), to_endpoints: false });
        let to_endpoints = OnceLock::new();
        let (open, memory) = (Arc::new(Semaphore::new(MAX_REQUESTS)), memory.clone());
        Ok(Self(Arc::new(Inner { allowed, timeout, open, memory, client, to_endpoints, connecting, log })))
    }

    /// Tells a refusal where `kubectl logs` shows it.
    fn deny(&self, what: &impl fmt::Display, why: &impl fmt::Display) {
        self.0.log.write_line(LogStream::Stderr, &format!("krustlet: denied a request to {what}: {why}"));
    }

    fn admit(&self, request: &http::Request<WasiBody>) -> Result<(Target, Open), HttpError> {
        let uri = request.uri();
        let target = Target::of(uri).map_err(|cause| {
            let authority = uri.authority().map_or("no host", |authority| authority.as_str());
            self.deny(&authority, &cause);
            HttpError::HttpRequestDenied
        })?;
        if !self.0.allowed.iter().any(|allowed| allowed.allows(&target)) {
            self.deny(&target, &"its host is not among the pod's allowed hosts");
            return Err(HttpError::HttpRequestDenied);
        }
        let size = OPEN_REQUEST + size_of_fields(request.headers());
        let permit = self.0.open.clone().try_acquire_owned().map_err(|_| HttpError::ConnectionLimitReached)?;
        let memory = self.0.memory.reserve(size).map_err(|_| HttpError::ConnectionLimitReached)?;
        Ok((target, Open { _permit: permit, _memory: memory }))
    }

    /// Sends the request, to the endpoint that the node's name service has for its host if it knows it.
    async fn exchange(
        &self,
        mut request: http::Request<WasiBody>,
        target: &Target,
    ) -> Result<http::Response<Incoming>, Failed> {
        let endpoint = match &target.host {
            Host::Name(name) if !target.tls => self.0.connecting.egress.names.endpoint(name, target.port),
            _ => None,
        };
        let Some(endpoint) = endpoint else { return Ok(self.0.client.request(request).await?) };
        // A pod that calls ever other names does not hold up the others, which ask the same API server.
        let lookup = self.0.connecting.lookups.acquire().await;
        let endpoint = endpoint.await.map_err(Failed::Name)?;
        drop(lookup);
        to_endpoint(&mut request, endpoint).map_err(|error| Failed::Name(error.to_string()))?;
        let connector = || Connector { connecting: self.0.connecting.clone(), to_endpoints: true };
        Ok(self.0.to_endpoints.get_or_init(|| client(connector())).request(request).await?)
    }

    async fn send(self, request: http::Request<WasiBody>, options: RequestOptions, target: Target, open: Open) -> Sent {
        let limit = |wanted: Option<Duration>| wanted.unwrap_or(self.0.timeout).min(self.0.timeout);
        // A connection that is there already needs no time to connect, so that both waits are one.
        let first_byte = limit(options.connect_timeout).saturating_add(limit(options.first_byte_timeout));
        let answer = tokio::time::timeout(first_byte.min(self.0.timeout), self.exchange(request, &target));
        let response = match answer.await {
            Err(_) => return Err(HttpError::ConnectionReadTimeout),
            Ok(Err(Failed::Name(why))) => {
                self.0.log.write_line(LogStream::Stderr, &format!("krustlet: failed to resolve {target}: {why}"));
                return Err(HttpError::DnsError { rcode: Some(why), info_code: None });
            }
            Ok(Err(Failed::Request(error))) => {
                let failure = failure_of(&error);
                if let Some(refused) = refusal_in(&error) {
                    self.deny(&target, refused);
                }
                return Err(failure);
            }
            Ok(Ok(response)) => response,
        };
        let between = limit(options.between_bytes_timeout);
        let response = response.map(|body| AnswerBody { body, between, deadline: None, _open: open }.boxed_unsync());
        Ok((response, Box::new(std::future::ready(Ok(())))))
    }
}

/// Why there is no answer.
enum Failed {
    Name(String),
    Request(legacy::Error),
}

impl From<legacy::Error> for Failed {
    fn from(error: legacy::Error) -> Self {
        Self::Request(error)
    }
}

/// Has the request go to the endpoint, and its host still be what the guest calls it.
fn to_endpoint(request: &mut http::Request<WasiBody>, endpoint: SocketAddr) -> Result<(), http::Error> {
    let mut uri = request.uri().clone().into_parts();
    let authority = uri.authority.replace(endpoint.to_string().parse().map_err(http::Error::from)?);
    if let Some(authority) = authority
        && !request.headers().contains_key(http::header::HOST)
    {
        let host = http::HeaderValue::from_str(authority.as_str())?;
        request.headers_mut().insert(http::header::HOST, host);
    }
    *request.uri_mut() = http::Uri::from_parts(uri)?;
    Ok(())
}

fn client(connector: Connector) -> Client<Connector, WasiBody> {
    Client::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(MAX_IDLE)
        .http1_max_buf_size(MAX_HEAD)
        .build(connector)
}

/// What an open request holds of its container's.
struct Open {
    _permit: OwnedSemaphorePermit,
    _memory: Reservation,
}

pub type Completion = Box<dyn Future<Output = Result<(), HttpError>> + Send>;
pub type Sent = Result<(http::Response<WasiBody>, Completion), HttpError>;

impl WasiHttpHooks for Outbound {
    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _processed: Completion,
    ) -> Box<dyn Future<Output = Sent> + Send> {
        match self.admit(&request) {
            Ok((target, open)) => Box::new(self.clone().send(request, options.unwrap_or_default(), target, open)),
            Err(error) => Box::new(std::future::ready(Err(error))),
        }
    }

    fn p2_outgoing_body_buffer_chunks(&mut self) -> usize {
        BODY_CHUNKS
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_CHUNK_SIZE
    }
}

/// What an answer brings. It counts as an open request until it is dropped.
struct AnswerBody {
    body: Incoming,
    between: Duration,
    /// Made when the body is first waited for.
    deadline: Option<Pin<Box<Sleep>>>,
    _open: Open,
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = HttpError;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, HttpError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(context) {
            self.deadline = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(HttpError::Hyper)));
        }
        let until = Instant::now() + self.between;
        let deadline = self.deadline.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        deadline.as_mut().poll(context).map(|()| Some(Err(HttpError::ConnectionReadTimeout)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// Why a connection could not be made.
#[derive(Debug, thiserror::Error)]
enum ConnectError {
    #[error(transparent)]
    Refused(#[from] RefusedAddress),
    #[error("a policy does not let the pod connect to {0}")]
    Denied(SocketAddr),
    #[error("{0}")]
    Url(String),
    #[error("failed to resolve the name: {0}")]
    Lookup(io::Error),
    #[error("failed to connect: {0}")]
    Connect(io::Error),
    #[error("TLS failed: {0}")]
    Tls(io::Error),
    #[error("it took too long to connect")]
    Timeout,
    #[error("the container has too many connections")]
    Limit,
}

/// What the policy said, and of which address if it was not of a name.
#[derive(Debug)]
struct RefusedAddress {
    address: Option<IpAddr>,
    reason: Refused,
}

impl fmt::Display for RefusedAddress {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.address {
            Some(address) => write!(formatter, "{address}")?,
            None => write!(formatter, "it")?,
        }
        write!(formatter, " is {}, which this node does not open to guests", self.reason)
    }
}

impl StdError for RefusedAddress {}

/// The first error of a kind in a chain of causes.
fn find<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    std::iter::successors(Some(error), |error| (**error).source()).find_map(|error| error.downcast_ref())
}

fn refusal_in(error: &legacy::Error) -> Option<&ConnectError> {
    find::<ConnectError>(error).filter(|error| matches!(error, ConnectError::Refused(_) | ConnectError::Denied(_)))
}

/// A failure in the terms that wasi:http has for it.
fn failure_of(error: &legacy::Error) -> HttpError {
    if let Some(error) = find::<ConnectError>(error) {
        return match error {
            ConnectError::Refused(_) | ConnectError::Denied(_) => HttpError::DestinationIpProhibited,
            ConnectError::Url(_) => HttpError::HttpRequestUriInvalid,
            ConnectError::Lookup(error) => HttpError::DnsError { rcode: Some(error.to_string()), info_code: None },
            ConnectError::Connect(error) => match error.kind() {
                io::ErrorKind::ConnectionRefused => HttpError::ConnectionRefused,
                io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
                    HttpError::DestinationIpUnroutable
                }
                _ => HttpError::DestinationUnavailable,
            },
            ConnectError::Tls(error) => match error.get_ref().and_then(|error| error.downcast_ref::<rustls::Error>()) {
                Some(rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented) => {
                    HttpError::TlsCertificateError
                }
                _ => HttpError::TlsProtocolError,
            },
            ConnectError::Timeout => HttpError::ConnectionTimeout,
            ConnectError::Limit => HttpError::ConnectionLimitReached,
        };
    }
    // The guest's own body broke off.
    if let Some(HttpError::HttpRequestBodySize(size)) = find::<HttpError>(error) {
        return HttpError::HttpRequestBodySize(*size);
    }
    match find::<hyper::Error>(error) {
        Some(error) if error.is_timeout() => HttpError::HttpResponseTimeout,
        Some(error) if error.is_incomplete_message() => HttpError::HttpResponseIncomplete,
        Some(error) if error.is_parse_too_large() => HttpError::HttpResponseHeaderSectionSize(None),
        Some(error) if error.is_closed() || error.is_canceled() => HttpError::ConnectionTerminated,
        Some(_) => HttpError::HttpProtocolError,
        None => HttpError::InternalError(Some(error.to_string())),
    }
}

/// Makes a container's connections.
#[derive(Clone)]
struct Connector {
    connecting: Arc<Connecting>,
    /// What it connects to was given by the node's name service, and not by the guest.
    to_endpoints: bool,
}

struct Connecting {
    egress: Arc<Egress>,
    /// Its pod's own address.
    source: Option<Ipv4Addr>,
    gate: Option<Arc<dyn Gate>>,
    tls: TlsConnector,
    timeout: Duration,
    connections: Arc<Semaphore>,
    /// The pod's, of which connections are some.
    descriptors: Arc<Share>,
    /// The same.
    lookups: Arc<Semaphore>,
}

impl tower_service::Service<http::Uri> for Connector {
    type Response = OpenConnection;
    type Error = ConnectError;
    type Future = BoxFuture<'static, Result<OpenConnection, ConnectError>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ConnectError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, uri: http::Uri) -> Self::Future {
        let Self { connecting, to_endpoints } = self.clone();
        Box::pin(async move {
            match tokio::time::timeout(connecting.timeout, connecting.connect(&uri, to_endpoints)).await {
                Ok(result) => result,
                Err(_) => Err(ConnectError::Timeout),
            }
        })
    }
}

impl Connecting {
    async fn connect(&self, uri: &http::Uri, to_endpoints: bool) -> Result<OpenConnection, ConnectError> {
        let target = Target::of(uri).map_err(ConnectError::Url)?;
        // Idle ones give up their place in a while, which is waited for.
        let permit = self.connections.clone().acquire_owned().await.map_err(|_| ConnectError::Limit)?;
        let descriptor = self.descriptors.acquire(1).await;
        let addresses = self.addresses(&target).await?;
        let (stream, way) = self.connect_to(&addresses, to_endpoints).await?;
        // A request must not wait for the acknowledgement of its own beginning.
        let _ = stream.set_nodelay(true);
        let stream: Box<dyn Stream> = if target.tls {
            let name = match target.host {
                Host::Address(address) => ServerName::from(address),
                Host::Name(name) => ServerName::try_from(name).map_err(|error| ConnectError::Url(error.to_string()))?,
            };
            Box::new(self.tls.connect(name, stream).await.map_err(ConnectError::Tls)?)
        } else {
            Box::new(stream)
        };
        Ok(OpenConnection { stream: TokioIo::new(stream), way, _permit: permit, _descriptor: descriptor })
    }

    /// The addresses of a host: once resolved, they are all that is connected to.
    async fn addresses(&self, target: &Target) -> Result<Vec<SocketAddr>, ConnectError> {
        let name = match &target.host {
            Host::Address(address) => return Ok(vec![SocketAddr::new(*address, target.port)]),
            Host::Name(name) => name.clone(),
        };
        self.egress.policy.permits_name(&name).map_err(|reason| RefusedAddress { address: None, reason })?;
        let permit = self.lookups.clone().acquire_owned().await.map_err(|_| ConnectError::Limit)?;
        let (resolve, port) = (self.egress.resolve.clone(), target.port);
        let lookup = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            resolve(&name, port)
        });
        lookup.await.map_err(io::Error::other).flatten().map_err(ConnectError::Lookup)
    }

    /// Connects to the first address that is permitted and answers.
    async fn connect_to(&self, addresses: &[SocketAddr], to_endpoints: bool) -> Result<(TcpStream, Way), ConnectError> {
        let mut refused = None;
        let mut permitted = Vec::new();
        for address in addresses {
            match self.egress.policy.permits(address.ip()) {
                Ok(()) => permitted.push(*address),
                // Whoever may write EndpointSlices chooses the address, but not what listens there: at this very address and
                // port nobody but a container.
                Err(Refused::Node | Refused::Loopback) if to_endpoints && self.egress.names.serves(address) => {
                    permitted.push(*address);
                }
                Err(reason) => refused = Some(RefusedAddress { address: Some(address.ip()), reason }),
            }
        }
        if let (Some(refused), true) = (refused, permitted.is_empty()) {
            return Err(refused.into());
        }
        // One that does not answer must not use up the time of those after it.
        let share = self.timeout / u32::try_from(permitted.len().max(1)).unwrap_or(u32::MAX);
        let mut failed = ConnectError::Lookup(io::Error::new(io::ErrorKind::NotFound, "the name has no address"));
        for address in permitted {
            let way = Way::new(self.gate.clone(), address);
            let connecting = async {
                if !way.is_permitted().await {
                    return Err(ConnectError::Denied(address));
                }
                source::connect(self.source, address).await.map_err(ConnectError::Connect)
            };
            match tokio::time::timeout(share, connecting).await {
                Ok(Ok(stream)) => return Ok((stream, way)),
                Ok(Err(error)) => failed = error,
                Err(_) => failed = ConnectError::Timeout,
            }
        }
        Err(failed)
    }
}

/// Where a connection leads, and as of which version of its container's gate that is permitted.
struct Way {
    to: SocketAddr,
    gate: Option<Arc<dyn Gate>>,
    version: u64,
}

impl Way {
    fn new(gate: Option<Arc<dyn Gate>>, to: SocketAddr) -> Self {
        let version = gate.as_ref().map_or(0, |gate| gate.version());
        Self { to, gate, version }
    }

    async fn is_permitted(&self) -> bool {
        match self.gate.as_ref().map(|gate| gate.permits(self.to)) {
            None | Some(Verdict::Admitted) => true,
            Some(Verdict::Denied) => false,
            Some(Verdict::Pending(verdict)) => verdict.await,
        }
    }

    /// Fails when it was permitted and is not any more: a connection that is kept for the next request is judged again.
    fn check(&mut self) -> io::Result<()> {
        let Some(gate) = &self.gate else { return Ok(()) };
        let version = gate.version();
        if version != self.version {
            if !matches!(gate.permits(self.to), Verdict::Admitted) {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, ConnectError::Denied(self.to)));
            }
            self.version = version;
        }
        Ok(())
    }
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

/// A connection, which holds its place among the container's until it is closed.
struct OpenConnection {
    stream: TokioIo<Box<dyn Stream>>,
    way: Way,
    _permit: OwnedSemaphorePermit,
    _descriptor: Taken,
}

impl Connection for OpenConnection {
    fn connected(&self) -> Connected {
        Connected::new()
    }
}

impl hyper::rt::Read for OpenConnection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: hyper::rt::ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        hyper::rt::Read::poll_read(Pin::new(&mut self.stream), context, buffer)
    }
}

impl hyper::rt::Write for OpenConnection {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.way.check()?;
        hyper::rt::Write::poll_write(Pin::new(&mut self.stream), context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        hyper::rt::Write::poll_flush(Pin::new(&mut self.stream), context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        hyper::rt::Write::poll_shutdown(Pin::new(&mut self.stream), context)
    }

    fn is_write_vectored(&self) -> bool {
        hyper::rt::Write::is_write_vectored(&self.stream)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.way.check()?;
        hyper::rt::Write::poll_write_vectored(Pin::new(&mut self.stream), context, bytes)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::logs::LogLimits;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

    struct Fixture {
        directory: tempfile::TempDir,
        egress: Egress,
        tenant: Arc<Tenant>,
    }

    impl Fixture {
        fn new(networks: &[&str]) -> Self {
            let _ = rustls::crypto::ring::default_provider().install_default();
            let networks = networks.iter().map(|network| network.parse().unwrap()).collect();
            let egress = Egress::new(EgressConfig { networks, ..EgressConfig::default() }).unwrap();
            let tenant = crate::tenants::Tenants::new(100, 2, 1, None, 0).of("default/pod/container");
            Self { directory: tempfile::tempdir().unwrap(), egress, tenant }
        }

        fn outbound(self, allowed: &str, ca_bundle: Option<&str>) -> (Outbound, impl Fn() -> String) {
            let path = self.directory.path().join("0.log");
            let log = LogFile::create(path.clone(), LogLimits::default()).unwrap();
            let egress = Arc::new(self.egress);
            let budget = Budget::node(u64::MAX);
            let spec = ContainerSpec {
                allowed_hosts: vec![allowed.to_owned()],
                ca_bundle: ca_bundle.map(str::to_owned),
                request_timeout: Duration::from_secs(10),
                ..ContainerSpec::new("default/pod/container", log)
            };
            let outbound = Outbound::new(&egress, &budget, &self.tenant, &spec).unwrap();
            let directory = self.directory;
            (outbound, move || std::fs::read_to_string(directory.path().join("0.log")).unwrap())
        }
    }

    async fn send(outbound: &mut Outbound, uri: &str) -> Result<String, HttpError> {
        let body = http_body_util::Empty::<Bytes>::new().map_err(|never| match never {}).boxed_unsync();
        let request = http::Request::get(uri).body(body).unwrap();
        let answer = Pin::from(outbound.send_request(request, None, Box::new(std::future::ready(Ok(()))))).await;
        let (response, _) = answer?;
        Ok(String::from_utf8(response.into_body().collect().await?.to_bytes().to_vec()).unwrap())
    }

    /// A server that answers one request on each connection that it accepts, and counts them.
    async fn server() -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let connections = Arc::<AtomicUsize>::default();
        let counted = connections.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::SeqCst);
                let _ = stream.read(&mut [0; 4096]).await;
                let _ = stream.write_all(ANSWER).await;
            }
        });
        (address, connections)
    }

    /// A server that answers any number of requests on a connection, and counts them.
    async fn keeping_server() -> (SocketAddr, Arc<AtomicUsize>) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let requests = Arc::<AtomicUsize>::default();
        let counted = requests.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let counted = counted.clone();
                tokio::spawn(async move {
                    while stream.read(&mut [0; 4096]).await.is_ok_and(|read| read > 0) {
                        counted.fetch_add(1, Ordering::SeqCst);
                        let _ = stream.write_all(ANSWER).await;
                    }
                });
            }
        });
        (address, requests)
    }

    #[tokio::test]
    async fn a_name_that_resolves_differently_the_second_time_leads_nowhere_else() {
        let (address, connections) = server().await;
        let mut fixture = Fixture::new(&["127.0.0.1/32"]);
        let asked = Arc::<AtomicUsize>::default();
        let counted = asked.clone();
        // At first what is open, then what is not: what was judged is what is connected to, each time.
        fixture.egress.resolve = Arc::new(move |_, port| {
            let first = counted.fetch_add(1, Ordering::SeqCst) == 0;
            Ok(vec![if first { address } else { SocketAddr::from(([127, 0, 0, 2], port)) }])
        });
        let (mut outbound, log) = fixture.outbound("rebinding.example", None);
        let uri = format!("http://rebinding.example:{}/", address.port());
        assert_eq!(send(&mut outbound, &uri).await.unwrap(), "ok");
        assert_eq!(asked.load(Ordering::SeqCst), 1, "it is resolved once for a connection");
        // The server has closed its connection, so that another is made.
        let answer = loop {
            match send(&mut outbound, &uri).await {
                Err(HttpError::DestinationIpProhibited) => break Ok(()),
                Ok(answer) => break Err(answer),
                Err(_) => {}
            }
        };
        assert_eq!(answer, Ok(()));
        assert!(log().contains("127.0.0.2 is a loopback address of the node"), "{}", log());
        assert_eq!(connections.load(Ordering::SeqCst), 1);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn the_containers_of_a_pod_together_resolve_so_many_names_at_once() {
        let (asked, (release, released)) = (Arc::<AtomicUsize>::default(), std::sync::mpsc::channel::<()>());
        let (counted, released) = (asked.clone(), parking_lot::Mutex::new(released));
        let resolve: Arc<Resolve> = Arc::new(move |_: &str, _| {
            counted.fetch_add(1, Ordering::SeqCst);
            let _ = released.lock().recv();
            Err(io::ErrorKind::NotFound.into())
        });
        let tenant = Fixture::new(&[]).tenant;
        let containers: Vec<_> = (0..2)
            .map(|_| {
                let mut fixture = Fixture::new(&[]);
                (fixture.tenant, fixture.egress.resolve) = (tenant.clone(), resolve.clone());
                fixture.outbound("*.example", None).0
            })
            .collect();
        let most = tenant.lookups.available_permits();
        let requests: Vec<_> = (0..2 * most)
            .map(|number| {
                let mut outbound = containers.get(number % 2).unwrap().clone();
                tokio::spawn(async move { send(&mut outbound, &format!("http://n{number}.example/")).await })
            })
            .collect();
        while asked.load(Ordering::SeqCst) < most {
            tokio::task::yield_now().await;
        }
        assert_eq!(tenant.lookups.available_permits(), 0);
        assert_eq!(asked.load(Ordering::SeqCst), most);
        drop(release);
        for request in requests {
            assert!(matches!(request.await.unwrap(), Err(HttpError::DnsError { .. })));
        }
    }

    #[tokio::test]
    async fn of_several_addresses_only_those_that_are_permitted_are_tried() {
        let (address, connections) = server().await;
        let mut fixture = Fixture::new(&["127.0.0.1/32"]);
        fixture.egress.resolve = Arc::new(move |_, port| {
            let refused = ["127.0.0.3", "169.254.169.254", "::1", "::ffff:127.0.0.4"];
            let refused = refused.iter().map(|refused| SocketAddr::new(refused.parse().unwrap(), port));
            Ok(refused.chain([address]).collect())
        });
        let (mut outbound, _) = fixture.outbound("*.example", None);
        assert_eq!(send(&mut outbound, &format!("http://many.example:{}/", address.port())).await.unwrap(), "ok");
        assert_eq!(connections.load(Ordering::SeqCst), 1);
    }

    /// Gives its endpoints in turn to whoever calls `app.shop.svc`.
    struct Endpoints(Vec<SocketAddr>, AtomicUsize);

    impl crate::NameService for Endpoints {
        fn endpoint(&self, name: &str, _: u16) -> Option<BoxFuture<'static, Result<SocketAddr, String>>> {
            let call = self.1.fetch_add(1, Ordering::SeqCst);
            let endpoint = self.0.get(call % self.0.len().max(1)).copied().ok_or_else(|| "nobody is there".to_owned());
            (name == "app.shop.svc").then(|| Box::pin(std::future::ready(endpoint)) as BoxFuture<'static, _>)
        }
    }

    fn naming(fixture: &Fixture, endpoints: Vec<SocketAddr>) {
        fixture.egress.names.set(Arc::new(Endpoints(endpoints, AtomicUsize::new(0))));
    }

    #[tokio::test]
    async fn requests_to_a_name_that_the_node_knows_are_spread_over_its_endpoints() {
        let (one, two) = (keeping_server().await, keeping_server().await);
        let fixture = Fixture::new(&["127.0.0.1/32"]);
        naming(&fixture, vec![one.0, two.0]);
        let (mut outbound, _) = fixture.outbound("app.shop.svc:80", None);
        for _ in 0..4 {
            assert_eq!(send(&mut outbound, "http://app.shop.svc/").await.unwrap(), "ok");
        }
        assert_eq!((one.1.load(Ordering::SeqCst), two.1.load(Ordering::SeqCst)), (2, 2));
        assert!(matches!(send(&mut outbound, "http://other.shop.svc/").await, Err(HttpError::HttpRequestDenied)));
    }

    #[tokio::test]
    async fn an_endpoint_on_the_node_is_open_only_while_a_container_of_the_node_listens_there() {
        let (address, connections) = server().await;
        let fixture = Fixture::new(&[]);
        naming(&fixture, vec![address]);
        let names = fixture.egress.names.clone();
        let (mut outbound, log) = fixture.outbound("*.shop.svc", None);
        assert!(matches!(send(&mut outbound, "http://app.shop.svc/").await, Err(HttpError::DestinationIpProhibited)));
        assert!(log().contains("a loopback address of the node"), "{}", log());
        let note = names.note(vec![address]);
        assert_eq!(send(&mut outbound, "http://app.shop.svc/").await.unwrap(), "ok");
        drop(note);
        assert!(!names.serves(&address));
        assert_eq!(connections.load(Ordering::SeqCst), 1);
    }

    /// Whoever may write the EndpointSlices of a namespace points a Service of it anywhere.
    #[tokio::test]
    async fn an_endpoint_leads_nowhere_that_its_address_itself_would_not() {
        let (beside, connections) = server().await;
        let other_port = SocketAddr::new(beside.ip(), beside.port() ^ 1);
        let mapped = SocketAddr::new("::ffff:127.0.0.1".parse().unwrap(), beside.port());
        let api_server: SocketAddr = "203.0.113.7:443".parse().unwrap();
        let others = ["169.254.169.254:80", "[::ffff:169.254.169.254]:80", "[fd20:ce::254]:80", "169.254.1.1:80"];
        let others = others.map(|address| address.parse().unwrap()).into_iter();
        let others =
            others.chain(["0.0.0.0:80", "[::]:80", "[64:ff9b::7f00:1]:80"].map(|address| address.parse().unwrap()));
        for endpoint in others.chain([api_server, beside, mapped]) {
            let fixture = Fixture::new(&[]);
            fixture.egress.policy.add_api_server("api.example", [api_server.ip()]);
            naming(&fixture, vec![endpoint]);
            // Nor does it help that a container listens on another port of the address.
            let _note = fixture.egress.names.note(vec![other_port]);
            let (mut outbound, _) = fixture.outbound("app.shop.svc", None);
            let answer = send(&mut outbound, "http://app.shop.svc/").await;
            assert!(matches!(answer, Err(HttpError::DestinationIpProhibited)), "{endpoint}: {answer:?}");
        }
        assert_eq!(connections.load(Ordering::SeqCst), 0);
    }

    #[tokio::test]
    async fn a_guest_that_names_an_endpoint_itself_is_refused_and_one_without_endpoints_is_told_why() {
        let (address, connections) = server().await;
        let fixture = Fixture::new(&[]);
        naming(&fixture, Vec::new());
        let _note = fixture.egress.names.note(vec![address]);
        let (mut outbound, log) = fixture.outbound("127.0.0.1", None);
        let direct = send(&mut outbound, &format!("http://{address}/")).await;
        assert!(matches!(direct, Err(HttpError::DestinationIpProhibited)));
        assert_eq!(connections.load(Ordering::SeqCst), 0);
        assert!(log().contains("127.0.0.1"));
        let fixture = Fixture::new(&[]);
        naming(&fixture, Vec::new());
        let (mut outbound, log) = fixture.outbound("app.shop.svc", None);
        assert!(matches!(send(&mut outbound, "http://app.shop.svc/").await, Err(HttpError::DnsError { .. })));
        assert!(log().contains("failed to resolve http://app.shop.svc:80: nobody is there"), "{}", log());
    }

    #[tokio::test]
    async fn a_container_may_have_so_many_requests_open_and_no_more_until_one_ends() {
        let (address, _) = server().await;
        let (mut outbound, _) = Fixture::new(&["127.0.0.1/32"]).outbound("127.0.0.1", None);
        let uri = format!("http://{address}/");
        let all = outbound.0.open.clone().try_acquire_many_owned(MAX_REQUESTS as u32).unwrap();
        assert!(matches!(send(&mut outbound, &uri).await, Err(HttpError::ConnectionLimitReached)));
        drop(all);
        assert_eq!(send(&mut outbound, &uri).await.unwrap(), "ok");
        assert_eq!(outbound.0.open.available_permits(), MAX_REQUESTS);
        assert_eq!(outbound.0.memory.used(), 0);
    }

    #[tokio::test]
    async fn https_to_a_private_authority_needs_its_certificate_in_the_bundle() {
        let mut authority = rcgen::CertificateParams::new(Vec::new()).unwrap();
        authority.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let authority = rcgen::CertifiedIssuer::self_signed(authority, rcgen::KeyPair::generate().unwrap()).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["internal.example".to_owned()])
            .unwrap()
            .signed_by(&key, &authority)
            .unwrap();
        let fixture = || {
            let mut fixture = Fixture::new(&["127.0.0.1/32"]);
            fixture.egress.resolve = Arc::new(|_, port| Ok(vec![SocketAddr::from(([127, 0, 0, 1], port))]));
            fixture
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let _ = rustls::crypto::ring::default_provider().install_default();
        let key = rustls::pki_types::PrivateKeyDer::try_from(key.serialize_der()).unwrap();
        let config = rustls::ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], key)
            .unwrap();
        let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(config));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                if let Ok(mut stream) = acceptor.accept(stream).await {
                    let _ = stream.read(&mut [0; 4096]).await;
                    let _ = stream.write_all(ANSWER).await;
                    let _ = stream.shutdown().await;
                }
            }
        });
        let uri = format!("https://internal.example:{port}/");
        let (mut without, _) = fixture().outbound("internal.example", None);
        assert!(matches!(send(&mut without, &uri).await, Err(HttpError::TlsCertificateError)));
        let (mut with, _) = fixture().outbound("internal.example", Some(&authority.pem()));
        assert_eq!(send(&mut with, &uri).await.unwrap(), "ok");
        // The bundle makes no other name trusted.
        let (mut other, _) = fixture().outbound("other.example", Some(&authority.pem()));
        let uri = format!("https://other.example:{port}/");
        assert!(matches!(send(&mut other, &uri).await, Err(HttpError::TlsCertificateError)));
    }
}
