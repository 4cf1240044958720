//! The agent's one HTTP client beside those of Kubernetes and the registries: for probes, hooks and the metadata server.
//! A request has a connection of its own, and an answer is read up to a limit.

use crate::reach::Reach;
use bytes::Bytes;
use futures::future::{Either, select};
use http::{HeaderMap, HeaderValue, Request, StatusCode, header};
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use std::fmt::{Display, Formatter};
use std::pin::pin;
use std::sync::{Arc, OnceLock};
use tokio::io::{AsyncRead, AsyncWrite};
use url::{Host, Url};

/// As the kubelet, and Go's client.
const MAX_REDIRECTS: usize = 10;

#[derive(Debug)]
pub struct Answer {
    pub status: StatusCode,
    pub headers: HeaderMap,
    /// No more of it than was asked for.
    pub body: Bytes,
    /// Whether there is more of it.
    pub truncated: bool,
}

#[derive(Debug)]
pub enum Error {
    /// TLS was asked for, and the other side speaks without it.
    NoTls,
    TooManyRedirects,
    Other(Box<dyn std::error::Error + Send + Sync>),
}

impl Display for Error {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoTls => f.write_str("server gave HTTP response to HTTPS client"),
            Self::TooManyRedirects => write!(f, "stopped after {MAX_REDIRECTS} redirects"),
            Self::Other(cause) => {
                write!(f, "{cause}")?;
                // hyper's own words leave out what happened.
                let mut source = cause.source();
                while let Some(inner) = source {
                    write!(f, ": {inner}")?;
                    source = inner.source();
                }
                Ok(())
            }
        }
    }
}

// No std::error::Error itself, so that every such error becomes one.
impl<E: std::error::Error + Send + Sync + 'static> From<E> for Error {
    fn from(error: E) -> Self {
        Self::Other(error.into())
    }
}

/// GETs the URL, and follows redirects as the kubelet does: on the same host only. The answer of one that leads elsewhere is
/// given as it is. Takes as long as the other side takes: the caller sets the limit.
pub async fn get_on_host(url: &Url, headers: &HeaderMap, max_body: usize, reach: &Reach) -> Result<Answer, Error> {
    let mut at = url.clone();
    let mut headers = headers.clone();
    for _ in 0..MAX_REDIRECTS {
        let answer = get(&at, &headers, max_body, reach).await?;
        let Some(location) = redirection(&answer) else { return Ok(answer) };
        let next = target(&at, &location)?;
        if next.host() != url.host() {
            tracing::warn!(url = %at, to = %next, "not following a redirect to another host");
            return Ok(answer);
        }
        // The Host that the caller chose is for where the caller sent it.
        if Url::parse(&location).is_ok() {
            headers.remove(header::HOST);
        }
        at = next;
    }
    Err(Error::TooManyRedirects)
}

fn redirection(answer: &Answer) -> Option<String> {
    let followed = matches!(answer.status.as_u16(), 301 | 302 | 303 | 307 | 308);
    let location = answer.headers.get(header::LOCATION).filter(|location| followed && !location.is_empty())?;
    Some(String::from_utf8_lossy(location.as_bytes()).into_owned())
}

/// Where a Location leads, seen from the URL that gave it.
fn target(from: &Url, location: &str) -> Result<Url, Error> {
    let unusable =
        |why: &dyn Display| Error::Other(format!("redirected to {location:?}, which is no URL: {why}").into());
    if location.chars().any(char::is_control) {
        return Err(unusable(&"it has control characters"));
    }
    // A browser takes a backslash for a slash, and what was a path for a host; RFC 3986 knows it not at all.
    let mut next = from.join(&location.replace('\\', "%5C")).map_err(|error| unusable(&error))?;
    next.set_fragment(None);
    Ok(next)
}

/// One request on a connection of its own. Any certificate is taken, as by the kubelet.
pub async fn get(url: &Url, headers: &HeaderMap, max_body: usize, reach: &Reach) -> Result<Answer, Error> {
    let https = match url.scheme() {
        "http" => false,
        "https" => true,
        other => return Err(Error::Other(format!("unsupported protocol scheme {other:?}").into())),
    };
    let host = url.host().ok_or_else(|| Error::Other("the URL has no host".into()))?;
    let port = url.port_or_known_default().unwrap_or(if https { 443 } else { 80 });
    let stream = match &host {
        Host::Domain(name) => reach.connect(name, port).await?,
        Host::Ipv4(address) => reach.connect(&address.to_string(), port).await?,
        Host::Ipv6(address) => reach.connect(&address.to_string(), port).await?,
    };
    if !https {
        return request(url, headers, stream, max_body).await;
    }
    let name = match host {
        Host::Domain(name) => ServerName::try_from(name.to_owned())?,
        Host::Ipv4(address) => ServerName::from(std::net::IpAddr::from(address)),
        Host::Ipv6(address) => ServerName::from(std::net::IpAddr::from(address)),
    };
    match connector()?.connect(name, stream).await {
        Ok(stream) => request(url, headers, stream, max_body).await,
        Err(error) => {
            let cause = error.get_ref().and_then(|inner| inner.downcast_ref::<rustls::Error>());
            let no_tls =
                matches!(cause, Some(rustls::Error::InvalidMessage(rustls::InvalidMessage::InvalidContentType)));
            Err(if no_tls { Error::NoTls } else { error.into() })
        }
    }
}

async fn request<S>(url: &Url, headers: &HeaderMap, stream: S, max_body: usize) -> Result<Answer, Error>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await?;
    let path = &url[url::Position::BeforePath..url::Position::AfterQuery];
    let mut request = Request::get(path).body(Empty::<Bytes>::new())?;
    *request.headers_mut() = headers.clone();
    if !headers.contains_key(header::HOST) {
        let authority = &url[url::Position::BeforeHost..url::Position::AfterPort];
        request.headers_mut().insert(header::HOST, HeaderValue::from_str(authority)?);
    }
    request.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    let answer = async move {
        let mut response = sender.send_request(request).await?;
        let mut body = Vec::new();
        let mut truncated = false;
        while !truncated && let Some(frame) = response.frame().await {
            if let Some(data) = frame?.data_ref() {
                let room = max_body - body.len();
                body.extend(data.iter().take(room));
                truncated = data.len() > room;
            }
        }
        let (head, _) = response.into_parts();
        Ok(Answer { status: head.status, headers: head.headers, body: body.into(), truncated })
    };
    // The connection has to be driven for the answer to come; it may end first, with the answer already read.
    match select(pin!(answer), pin!(connection)).await {
        Either::Left((answer, _)) => answer,
        Either::Right((_, answer)) => answer.await,
    }
}

fn connector() -> Result<tokio_rustls::TlsConnector, Error> {
    static CONFIG: OnceLock<Result<Arc<ClientConfig>, rustls::Error>> = OnceLock::new();
    let config = CONFIG.get_or_init(|| {
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider.clone())
            .with_safe_default_protocol_versions()?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(AnyCertificate(provider)))
            .with_no_client_auth();
        Ok(Arc::new(config))
    });
    Ok(tokio_rustls::TlsConnector::from(config.clone()?))
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
mod tests {
    use super::*;
    use axum::Router;
    use axum::response::Redirect;
    use axum::routing::get as route;
    use std::sync::atomic::{AtomicUsize, Ordering};

    /// Where a Location leads from http://127.0.0.1:80/a/b?c.
    fn leads(location: &str) -> Option<String> {
        target(&Url::parse("http://127.0.0.1:80/a/b?c").unwrap(), location).ok().map(|url| url.to_string())
    }

    #[test]
    fn a_location_is_resolved_against_the_url_that_gave_it() {
        for (location, expected) in [
            ("ok", "http://127.0.0.1/a/ok"),
            ("/ok", "http://127.0.0.1/ok"),
            ("../ok", "http://127.0.0.1/ok"),
            ("?x", "http://127.0.0.1/a/b?x"),
            ("/x?next=http://elsewhere.example/", "http://127.0.0.1/x?next=http://elsewhere.example/"),
            ("x?next=//elsewhere.example/", "http://127.0.0.1/a/x?next=//elsewhere.example/"),
            ("//elsewhere.example/x", "http://elsewhere.example/x"),
            ("https://127.0.0.1:8443/x", "https://127.0.0.1:8443/x"),
            ("http://elsewhere.example#@127.0.0.1/", "http://elsewhere.example/"),
            ("http://127.0.0.1@elsewhere.example/", "http://127.0.0.1@elsewhere.example/"),
            ("/\\elsewhere.example/x", "http://127.0.0.1/%5Celsewhere.example/x"),
        ] {
            assert_eq!(leads(location).as_deref(), Some(expected), "{location}");
        }
        assert_eq!(leads("http://["), None);
        assert_eq!(leads("/\t/elsewhere.example"), None);
    }

    async fn server() -> (Url, Arc<AtomicUsize>) {
        let asked = Arc::new(AtomicUsize::new(0));
        let count = asked.clone();
        let app = Router::new()
            .route("/large", route(async || "x".repeat(1 << 20)))
            .route("/here", route(async || Redirect::temporary("/x?next=http://elsewhere.invalid/")))
            .route("/x", route(async || (StatusCode::INTERNAL_SERVER_ERROR, "broken")))
            .route("/elsewhere", route(async || Redirect::temporary("http://elsewhere.invalid/")))
            .route("/unlocated", route(async || StatusCode::FOUND))
            .route(
                "/circle",
                route(async move || {
                    count.fetch_add(1, Ordering::SeqCst);
                    Redirect::temporary("/circle")
                }),
            );
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        tokio::spawn(async move { axum::serve(listener, app).await });
        (Url::parse(&url).unwrap(), asked)
    }

    #[tokio::test]
    async fn redirects_are_followed_on_the_same_host_and_no_further() {
        let (url, asked) = server().await;
        let get =
            async |path: &str| get_on_host(&url.join(path).unwrap(), &HeaderMap::new(), 100, &Reach::ANYWHERE).await;
        assert_eq!(get("/here").await.unwrap().status, 500);
        assert_eq!(get("/elsewhere").await.unwrap().status, 307);
        assert_eq!(get("/unlocated").await.unwrap().status, 302);
        assert!(matches!(get("/circle").await, Err(Error::TooManyRedirects)));
        assert_eq!(asked.load(Ordering::SeqCst), MAX_REDIRECTS);
    }

    #[tokio::test]
    async fn a_body_is_read_up_to_the_limit() {
        let (url, _) = server().await;
        let large = get(&url.join("/large").unwrap(), &HeaderMap::new(), 100, &Reach::ANYWHERE).await.unwrap();
        assert_eq!((large.body.len(), large.truncated), (100, true));
        let small = get(&url.join("/x").unwrap(), &HeaderMap::new(), 6, &Reach::ANYWHERE).await.unwrap();
        assert_eq!((&small.body[..], small.truncated), (&b"broken"[..], false));
    }

    #[tokio::test]
    async fn a_server_without_tls_is_told_from_one_that_fails() {
        let (mut url, _) = server().await;
        url.set_scheme("https").unwrap();
        assert!(matches!(get(&url, &HeaderMap::new(), 0, &Reach::ANYWHERE).await, Err(Error::NoTls)));
        let closed = Url::parse("https://127.0.0.1:1/").unwrap();
        assert!(matches!(get(&closed, &HeaderMap::new(), 0, &Reach::ANYWHERE).await, Err(Error::Other(_))));
    }
}
