//! The connection to the API server: a kube client whose certificate can be exchanged while it is in use.

use anyhow::Context as _;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_rustls::{FixedServerNameResolver, HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::{Body, ClientBuilder, ConfigExt};
use parking_lot::RwLock;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tower::BoxError;

/// A request without an answer for this long has failed. Well below the 40 s after which a silent node counts as
/// lost, so that there is time for more than one try.
const RESPONSE_TIMEOUT: Duration = Duration::from_secs(10);

/// A connection that answers no ping within interval and timeout is dead; watches on it end and start again.
const PING_INTERVAL: Duration = Duration::from_secs(10);
const PING_TIMEOUT: Duration = Duration::from_secs(5);

type Transport = HttpClient<HttpsConnector<HttpConnector>, Body>;

/// The transport below a [`kube::Client`]. Clones share it.
#[derive(Clone)]
pub struct Connection {
    transport: Arc<RwLock<Transport>>,
}

impl Connection {
    /// A client for the API server that `config` names, and the handle to exchange its certificate with.
    pub fn open(config: &kube::Config) -> anyhow::Result<(kube::Client, Self)> {
        let connection = Self { transport: Arc::new(RwLock::new(transport(config)?)) };
        let namespace = config.default_namespace.clone();
        let base_uri = config.base_uri_layer();
        let client = match config.auth_layer()? {
            Some(auth) => {
                ClientBuilder::new(connection.clone(), namespace).with_layer(&auth).with_layer(&base_uri).build()
            }
            None => ClientBuilder::new(connection.clone(), namespace).with_layer(&base_uri).build(),
        };
        Ok((client, connection))
    }

    /// Sends every request from now on over new connections with the certificate of `config`. Watches that are under
    /// way end with the old connection in their own time.
    pub fn renew(&self, config: &kube::Config) -> anyhow::Result<()> {
        let transport = transport(config)?;
        *self.transport.write() = transport;
        Ok(())
    }
}

fn transport(config: &kube::Config) -> anyhow::Result<Transport> {
    let tls = config.rustls_client_config().context("failed to set up TLS to the API server")?;
    let mut connector = HttpConnector::new();
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(RESPONSE_TIMEOUT));
    let mut builder = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http();
    if let Some(name) = &config.tls_server_name {
        let name = rustls::pki_types::ServerName::try_from(name.clone())
            .with_context(|| format!("tls-server-name {name:?} is not a server name"))?;
        builder = builder.with_server_name_resolver(FixedServerNameResolver::new(name));
    }
    // One HTTP/2 connection carries all requests of a thousand pods; the ping finds out when it is dead.
    let connector = builder.enable_all_versions().wrap_connector(connector);
    Ok(HttpClient::builder(TokioExecutor::new())
        .timer(TokioTimer::new())
        .pool_timer(TokioTimer::new())
        .http2_keep_alive_interval(PING_INTERVAL)
        .http2_keep_alive_timeout(PING_TIMEOUT)
        .build(connector))
}

impl tower::Service<Request<Body>> for Connection {
    type Response = Response<Incoming>;
    type Error = BoxError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let transport = self.transport.read().clone();
        Box::pin(async move {
            match tokio::time::timeout(RESPONSE_TIMEOUT, transport.request(request)).await {
                Ok(answer) => answer.map_err(BoxError::from),
                Err(_) => Err(BoxError::from(format!(
                    "no answer from the API server within {} s",
                    RESPONSE_TIMEOUT.as_secs()
                ))),
            }
        })
    }
}

/// The HTTP status of an error that the API server answered with.
pub fn status_code(error: &kube::Error) -> Option<u16> {
    match error {
        kube::Error::Api(status) => Some(status.code),
        _ => None,
    }
}

/// What an operator reads about a failed call: the server's own words, or the innermost cause of a failed connection.
pub fn describe(error: &kube::Error) -> String {
    match error {
        kube::Error::Api(status) => format!("{} ({})", status.message, status.code),
        other => {
            let mut cause: &dyn std::error::Error = other;
            while let Some(source) = cause.source() {
                cause = source;
            }
            cause.to_string()
        }
    }
}
