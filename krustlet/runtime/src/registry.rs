//! The registry client: reads of manifests and blobs over OCI distribution.
//!
//! Every answer is read up to a limit, tokens live as long as one pull and are never shared between credentials, and
//! credentials never travel over plain http to a registry that is reached over https, nor to another host than the one that
//! they are for. Which registry is asked, a pod's author decides: see `egress_policy`.

use crate::artifact::{Digest, INDEX_TYPE, MANIFEST_TYPE, cut, shown};
use crate::challenge::Challenge;
use crate::credentials::{Login, RegistrySecret};
use crate::egress_policy::is_private_to_node;
use crate::image_name::ImageName;
use crate::pull_places::{Progress, PullLimits};
use bytes::Bytes;
use http::{HeaderMap, StatusCode, header};
use reqwest::Url;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use serde::Deserialize;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two reads of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
const MAX_REDIRECTS: usize = 5;
const MAX_TOKEN: u64 = 256 * 1024;
const MAX_ERROR_BODY: u64 = 16 * 1024;
/// Who asks, where a token service wants to know.
const CLIENT_ID: &str = "krustlet";

/// When an image is fetched from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Ask the registry each time which manifest the name stands for.
    Always,
    /// Ask only when the node has no copy that the pod may use.
    IfNotPresent,
    /// Use the copy on the node or fail.
    Never,
}

/// Why a registry did not give what was asked for.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    #[error("{0}")]
    NotFound(String),
    /// 401 or 403 with the credentials used.
    #[error("{0}")]
    Denied(String),
    /// The answer is not what it claims to be.
    #[error("{0}")]
    Invalid(String),
    /// The answer has more bytes than were asked for; the digest that the registry claims it has.
    #[error("{cause}")]
    TooLarge { cause: String, claimed: Option<Digest> },
    #[error("{0}")]
    Unavailable(String),
}

/// The registries that the node's operator named, `host[:port]` each. They may be at any address.
#[derive(Debug, Clone, Default)]
pub struct OperatorsRegistries {
    /// Reached over plain http.
    pub insecure: Vec<String>,
    /// May see the node's own credentials; on this machine's loopback interface they are reached over plain http.
    pub trusted: Vec<String>,
}

impl OperatorsRegistries {
    fn lists(&self, registry: &str) -> bool {
        self.trusts(registry) || contains(&self.insecure, registry)
    }

    pub fn trusts(&self, registry: &str) -> bool {
        contains(&self.trusted, registry)
    }

    fn is_plain(&self, registry: &str) -> bool {
        contains(&self.insecure, registry) || (self.trusts(registry) && is_loopback(registry))
    }
}

fn contains(list: &[String], registry: &str) -> bool {
    list.iter().any(|listed| listed.eq_ignore_ascii_case(registry))
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Talks to registries.
pub struct RegistryClient {
    /// For registries that any pod may name: https, and no address that only this node reaches.
    guarded: reqwest::Client,
    /// For registries that the operator named.
    open: reqwest::Client,
    /// For those of them that speak plain http; never through a proxy.
    plain: reqwest::Client,
    operators: OperatorsRegistries,
}

impl RegistryClient {
    pub fn new(operators: OperatorsRegistries) -> anyhow::Result<Self> {
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT)
                .user_agent(concat!("krustlet/", env!("CARGO_PKG_VERSION")))
                // They are followed here, where it is known what may go along.
                .redirect(reqwest::redirect::Policy::none())
        };
        let resolver = GuardedResolver { proxies: proxies() };
        Ok(Self {
            guarded: builder().https_only(true).dns_resolver(Arc::new(resolver)).build()?,
            open: builder().https_only(true).build()?,
            plain: builder().no_proxy().build()?,
            operators,
        })
    }

    /// Begins to read from one repository.
    pub fn session<'a>(&'a self, image: &'a ImageName, credentials: Option<&'a RegistrySecret>) -> Session<'a> {
        let registry = image.registry();
        let reach = if self.operators.is_plain(registry) {
            Reach::Plain
        } else if self.operators.lists(registry) {
            Reach::Open
        } else {
            Reach::Guarded
        };
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        Session {
            registry: self,
            reach,
            base: format!(
                "{}://{host}/v2/{}",
                if reach == Reach::Plain { "http" } else { "https" },
                image.repository()
            ),
            image,
            credentials,
            authorization: None,
            progress: None,
        }
    }
}

/// Resolves names, and fails for one that is an address of this node's only. A proxy is the operator's, wherever it is.
struct GuardedResolver {
    proxies: Vec<String>,
}

impl Resolve for GuardedResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let is_proxy = self.proxies.iter().any(|proxy| proxy.eq_ignore_ascii_case(name.as_str()));
        Box::pin(async move {
            let addresses: Vec<SocketAddr> = tokio::net::lookup_host((name.as_str(), 0)).await?.collect();
            // One bad address among good ones is refused too: which of them is taken, the client would decide.
            match addresses.iter().find(|address| is_private_to_node(address.ip())) {
                Some(address) if !is_proxy => Err(private(name.as_str(), address.ip()).into()),
                _ => Ok(Box::new(addresses.into_iter()) as Addrs),
            }
        })
    }
}

fn private(host: &str, address: IpAddr) -> String {
    format!(
        "{host} is {address}, an address of this node's own, where no registry is looked for unless the node's \
         --trusted-registries or --insecure-registries name it"
    )
}

/// The hosts of the proxies that the environment names.
fn proxies() -> Vec<String> {
    ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"]
        .iter()
        .filter_map(|name| std::env::var(name).ok())
        .filter_map(|proxy| Url::parse(&proxy).or_else(|_| Url::parse(&format!("http://{proxy}"))).ok())
        .filter_map(|proxy| proxy.host_str().map(str::to_owned))
        .collect()
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Reach {
    Guarded,
    Open,
    Plain,
}

/// What a registry lists as referrers of a manifest.
pub struct ReferrersPage {
    pub index: Vec<u8>,
    pub next: Option<Url>,
}

/// Reads from one repository with one set of credentials.
pub struct Session<'a> {
    registry: &'a RegistryClient,
    reach: Reach,
    base: String,
    image: &'a ImageName,
    credentials: Option<&'a RegistrySecret>,
    authorization: Option<String>,
    progress: Option<(Arc<Progress>, PullLimits)>,
}

impl Session<'_> {
    /// Tells how fast the answers come from now on.
    pub fn measure(&mut self, progress: Arc<Progress>, limits: PullLimits) {
        self.progress = Some((progress, limits));
    }

    /// Whether the registry gave its answers because of the credentials.
    pub fn was_authorized(&self) -> bool {
        self.credentials.is_some() && self.authorization.is_some()
    }

    /// The manifest with this tag or digest, and its digest computed from the bytes received.
    pub async fn manifest(&mut self, wanted: &str, limit: u64) -> Result<(Bytes, Digest), FetchError> {
        let content = self.document(wanted, MANIFEST_TYPE, limit).await?;
        let digest = Digest::of(&content);
        if wanted.starts_with("sha256:") && wanted != digest.as_str() {
            return Err(FetchError::Invalid(format!(
                "the registry answered with manifest {digest}, not with the {wanted} that the name asks for"
            )));
        }
        Ok((content.into(), digest))
    }

    /// The index with this tag.
    pub async fn index(&mut self, tag: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        self.document(tag, INDEX_TYPE, limit).await
    }

    async fn document(&mut self, wanted: &str, accept: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        let url = format!("{}/manifests/{wanted}", self.base);
        let response = self.open(&url, accept).await?;
        self.whole(response, &url, limit).await
    }

    /// A page of the referrers that the registry lists for a manifest: the first one, or the one that the page before named.
    /// None where the registry has no referrers API.
    pub async fn referrers(
        &mut self,
        subject: &Digest,
        page: Option<Url>,
        limit: u64,
    ) -> Result<Option<ReferrersPage>, FetchError> {
        let is_first = page.is_none();
        let url = page.map_or_else(|| format!("{}/referrers/{subject}", self.base), String::from);
        let response = self.answer(&url, INDEX_TYPE).await?;
        let status = response.status();
        let content_type = response.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
        let is_index =
            content_type.and_then(|value| value.split(';').next()).is_some_and(|found| found.trim() == INDEX_TYPE);
        // What registries without it answer; some have a page for people there.
        let has_none = [400, 404, 405, 406, 501].contains(&status.as_u16()) || (status.is_success() && !is_index);
        if is_first && has_none {
            return Ok(None);
        }
        if !status.is_success() {
            return Err(self.refusal(&url, response).await);
        }
        let next = self.next_page(response.headers());
        Ok(Some(ReferrersPage { index: self.whole(response, &url, limit).await?, next }))
    }

    /// Where the next page is, of this repository's referrers and nowhere else: the credentials go there.
    fn next_page(&self, headers: &HeaderMap) -> Option<Url> {
        let link = headers.get(header::LINK)?.to_str().ok()?;
        let (target, parameters) = link.trim().strip_prefix('<')?.split_once('>')?;
        if !parameters.contains("next") {
            return None;
        }
        let listing = Url::parse(&format!("{}/referrers/", self.base)).ok()?;
        let next = listing.join(target).ok()?;
        (next.origin() == listing.origin() && next.path().starts_with(listing.path())).then_some(next)
    }

    /// A small blob, of `size` bytes, in memory; Invalid where its content is another's.
    pub async fn whole_blob(&mut self, digest: &Digest, size: u64) -> Result<Vec<u8>, FetchError> {
        let mut content = Vec::new();
        self.blob(digest, size, |chunk| {
            content.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        let found = Digest::of(&content);
        if found != *digest {
            return Err(FetchError::Invalid(format!("blob {digest} was altered: the content's digest is {found}")));
        }
        Ok(content)
    }

    /// Passes a blob's bytes to `sink`. The caller checks the digest of what it was given.
    pub async fn blob(
        &mut self,
        digest: &Digest,
        size: u64,
        mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), FetchError> {
        let url = format!("{}/blobs/{digest}", self.base);
        let response = self.open(&url, "application/octet-stream").await?;
        let received = self.read(response, &url, size, &mut sink).await?;
        if received != size {
            return Err(FetchError::Invalid(format!(
                "blob {digest} ended after {received} bytes, the manifest says {size}"
            )));
        }
        Ok(())
    }

    /// The answer to come, whatever its status, with the authorization that the registry asks for.
    async fn answer(&mut self, url: &str, accept: &str) -> Result<reqwest::Response, FetchError> {
        let response = self.send(url, accept).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        self.authorize(response.headers()).await?;
        self.send(url, accept).await
    }

    async fn open(&mut self, url: &str, accept: &str) -> Result<reqwest::Response, FetchError> {
        let response = self.answer(url, accept).await?;
        if !response.status().is_success() {
            return Err(self.refusal(url, response).await);
        }
        Ok(response)
    }

    async fn whole(&self, response: reqwest::Response, url: &str, limit: u64) -> Result<Vec<u8>, FetchError> {
        let mut content = Vec::new();
        self.read(response, url, limit, &mut |chunk: &[u8]| {
            content.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        Ok(content)
    }

    /// Asks, and follows redirects: over https only when it began so, and with the authorization only to where it is for.
    async fn send(&self, url: &str, accept: &str) -> Result<reqwest::Response, FetchError> {
        let mut target = self.target(url)?;
        let origin = target.origin();
        for _ in 0..=MAX_REDIRECTS {
            let mut request = self.client().get(target.clone()).header(header::ACCEPT, format!("{accept}, */*"));
            if let Some(authorization) = self.authorization.as_ref().filter(|_| target.origin() == origin) {
                request = request.header(header::AUTHORIZATION, authorization);
            }
            let response = request.send().await.map_err(|error| unavailable(target.as_str(), &error))?;
            if !response.status().is_redirection() {
                return Ok(response);
            }
            let location = response.headers().get(header::LOCATION).and_then(|location| location.to_str().ok());
            let next = location.and_then(|location| target.join(location).ok());
            let Some(next) = next else {
                return Err(FetchError::Invalid(format!("{url} redirects to no URL")));
            };
            if target.scheme() == "https" && next.scheme() != "https" {
                return Err(FetchError::Denied(format!("{url} redirects from https to {}", next.scheme())));
            }
            target = self.target(next.as_str())?;
        }
        Err(FetchError::Invalid(format!("{url} redirects more than {MAX_REDIRECTS} times")))
    }

    fn client(&self) -> &reqwest::Client {
        match self.reach {
            Reach::Guarded => &self.registry.guarded,
            Reach::Open => &self.registry.open,
            Reach::Plain => &self.registry.plain,
        }
    }

    /// The URL, if it may be asked. Names are checked once they are resolved; literal addresses are never resolved.
    fn target(&self, url: &str) -> Result<Url, FetchError> {
        let mut target =
            Url::parse(url).map_err(|error| FetchError::Invalid(format!("{:?} is no URL: {error}", shown(url))))?;
        // What it says before an @ would be sent as a user name.
        let _ = target.set_username("");
        let _ = target.set_password(None);
        if self.reach == Reach::Guarded {
            // As a URL has it, in whatever way it is written: 0x7f.1 is 127.0.0.1.
            let literal = target
                .host_str()
                .and_then(|host| host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>().ok());
            if let Some(address) = literal.filter(|address| is_private_to_node(*address)) {
                let host = if url.starts_with(&self.base) { self.image.registry() } else { url };
                return Err(FetchError::Unavailable(private(&shown(host), address)));
            }
        }
        Ok(target)
    }

    /// Answers the challenge of a 401.
    async fn authorize(&mut self, headers: &HeaderMap) -> Result<(), FetchError> {
        let registry = self.image.registry();
        let denied = |cause: String| FetchError::Denied(format!("registry {registry} refused access: {cause}"));
        if self.authorization.is_some() {
            return Err(denied(format!("{} is not allowed to pull", self.identity())));
        }
        let login = self.credentials.map(|secret| &secret.login);
        let authorization = match (Challenge::choose(headers).map_err(denied)?, login) {
            (Challenge::Bearer { .. }, Some(Login::RegistryToken(token))) => format!("Bearer {token}"),
            (Challenge::Bearer { realm, service }, _) => {
                format!("Bearer {}", self.token(&realm, service.as_deref()).await?)
            }
            (Challenge::Basic, Some(Login::Password { username, password })) => {
                use base64::Engine as _;
                let pair = format!("{username}:{password}");
                format!("Basic {}", base64::engine::general_purpose::STANDARD.encode(pair))
            }
            (Challenge::Basic, Some(_)) => {
                return Err(denied("it asks for a user name, and there is a token only".into()));
            }
            (Challenge::Basic, None) => return Err(denied("it asks for a user name; add an imagePullSecret".into())),
        };
        self.authorization = Some(authorization);
        Ok(())
    }

    async fn token(&self, realm: &str, service: Option<&str>) -> Result<String, FetchError> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        let mut target = self.target(realm)?;
        if self.reach != Reach::Plain && target.scheme() != "https" {
            return Err(FetchError::Denied(format!(
                "the registry's token service {:?} is not reached over https",
                shown(realm)
            )));
        }
        let own = self.credentials.is_some_and(|secret| secret.source.is_none());
        if own && self.reach == Reach::Guarded && target.host_str() != self.host().as_deref() {
            return Err(FetchError::Denied(format!(
                "the registry sends the node's credentials to another host, {:?}",
                shown(realm)
            )));
        }
        let mut query = vec![("scope", format!("repository:{}:pull", self.image.repository()))];
        query.extend(service.map(|service| ("service", service.to_owned())));
        let request = match self.credentials.map(|secret| &secret.login) {
            // As docker does it: OAuth 2, RFC 6749 section 6.
            Some(Login::IdentityToken(token)) => {
                query.extend([
                    ("grant_type", "refresh_token".to_owned()),
                    ("client_id", CLIENT_ID.to_owned()),
                    ("refresh_token", token.clone()),
                ]);
                self.client().post(target).form(&query)
            }
            login => {
                target.query_pairs_mut().extend_pairs(&query);
                let request = self.client().get(target);
                match login {
                    Some(Login::Password { username, password }) => request.basic_auth(username, Some(password)),
                    _ => request,
                }
            }
        };
        let response = request.send().await.map_err(|error| unavailable(realm, &error))?;
        if !response.status().is_success() {
            return Err(self.refusal(realm, response).await);
        }
        let mut body = Vec::new();
        self.read(response, realm, MAX_TOKEN, &mut |chunk: &[u8]| {
            body.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        token
            .and_then(|token| token.token.or(token.access_token))
            .filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or_else(|| FetchError::Invalid(format!("the token service {:?} answered with no token", shown(realm))))
    }

    fn host(&self) -> Option<String> {
        Url::parse(&self.base).ok()?.host_str().map(str::to_owned)
    }

    fn identity(&self) -> String {
        self.credentials.map_or_else(|| "an anonymous user".to_owned(), |secret| secret.login.to_string())
    }

    /// The registry's own words on why it did not answer.
    async fn refusal(&self, url: &str, response: reqwest::Response) -> FetchError {
        #[derive(Deserialize)]
        struct Errors {
            errors: Vec<Message>,
        }
        #[derive(Deserialize)]
        struct Message {
            #[serde(default)]
            code: String,
            #[serde(default)]
            message: String,
        }
        let status = response.status();
        let mut body = Vec::new();
        let _ = self
            .read(response, url, MAX_ERROR_BODY, &mut |chunk: &[u8]| {
                body.extend_from_slice(chunk);
                Ok(())
            })
            .await;
        let detail = serde_json::from_slice::<Errors>(&body)
            .ok()
            .and_then(|errors| errors.errors.into_iter().next())
            .map(|error| format!(": {} {}", shown(&error.code), shown(&error.message)))
            .unwrap_or_default();
        match status {
            StatusCode::NOT_FOUND => FetchError::NotFound(format!("{url} not found{detail}")),
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => FetchError::Denied(format!(
                "registry {} refused access to {} ({status}{detail})",
                self.image.registry(),
                self.identity()
            )),
            _ => FetchError::Unavailable(format!("{} answered {status}{detail}", cut(&url))),
        }
    }

    async fn read(
        &self,
        mut response: reqwest::Response,
        url: &str,
        limit: u64,
        sink: &mut impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<u64, FetchError> {
        let claimed = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok());
        let claimed = claimed.and_then(|claimed| Digest::parse(claimed).ok());
        let too_large = || FetchError::TooLarge {
            cause: format!("{} answered with more than the {limit} bytes expected", cut(&url)),
            claimed: claimed.clone(),
        };
        if response.content_length().is_some_and(|length| length > limit) {
            return Err(too_large());
        }
        let mut received = 0;
        while let Some(chunk) = response.chunk().await.map_err(|error| unavailable(url, &error))? {
            let length = chunk.len() as u64;
            received += length;
            if received > limit {
                return Err(too_large());
            }
            if let Some((progress, limits)) = &self.progress {
                progress.received(length, limits);
            }
            sink(&chunk).map_err(|error| FetchError::Unavailable(format!("failed to store {url}: {error}")))?;
        }
        Ok(received)
    }
}

/// The innermost cause: reqwest's own message stops at "error sending request".
fn unavailable(url: &str, error: &reqwest::Error) -> FetchError {
    let mut cause: Option<&dyn std::error::Error> = std::error::Error::source(error);
    let mut text = String::new();
    while let Some(error) = cause {
        text = error.to_string();
        cause = error.source();
    }
    if text.is_empty() {
        text = error.to_string();
    }
    let url = url.split('?').next().unwrap_or(url);
    FetchError::Unavailable(format!("{} cannot be reached: {text}", cut(&url)))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn client() -> RegistryClient {
        let _ = rustls::crypto::ring::default_provider().install_default();
        let operators = OperatorsRegistries {
            insecure: vec!["plain.example:5000".into(), "127.0.0.1:1".into()],
            trusted: vec!["localhost:5000".into(), "registry.example".into()],
        };
        RegistryClient::new(operators).unwrap()
    }

    fn base(image: &str) -> String {
        let image = ImageName::parse(image).unwrap();
        client().session(&image, None).base
    }

    #[test]
    fn plain_http_is_for_what_the_operator_named() {
        for (image, expected) in [
            ("localhost:5000/app", "http://localhost:5000/v2/app"),
            ("LOCALHOST:5000/app", "http://localhost:5000/v2/app"),
            ("plain.example:5000/app", "http://plain.example:5000/v2/app"),
            ("127.0.0.1:1/app", "http://127.0.0.1:1/v2/app"),
            ("registry.example/app", "https://registry.example/v2/app"),
            ("localhost:5001/app", "https://localhost:5001/v2/app"),
            ("127.0.0.1:5000/app", "https://127.0.0.1:5000/v2/app"),
            ("app", "https://registry-1.docker.io/v2/library/app"),
        ] {
            assert_eq!(base(image), expected);
        }
    }

    async fn asked(image: &str) -> String {
        let image = ImageName::parse(image).unwrap();
        client().session(&image, None).manifest("latest", 1000).await.unwrap_err().to_string()
    }

    #[tokio::test]
    async fn no_pod_makes_the_node_ask_itself() {
        for image in [
            "127.0.0.1:5000/app",
            "127.9.9.9/app",
            "169.254.169.254/computemetadata/v1/instance",
            "0.0.0.0:10250/app",
            // As URLs have it.
            "127.1:80/app",
            "0x7f.1/app",
            "2130706433:80/app",
            "0177.0.0.1/app",
            // By name.
            "localhost:5001/app",
        ] {
            let error = asked(image).await;
            assert!(error.contains("of this node's own"), "{image}: {error}");
        }
    }

    #[tokio::test]
    async fn the_nodes_own_credentials_go_to_no_other_host() {
        let client = client();
        let image = ImageName::parse("eu.gcr.io/project/app").unwrap();
        let login = Login::Password { username: "oauth2accesstoken".into(), password: "word".into() };
        let node = RegistrySecret { registry: "eu.gcr.io".into(), login, source: None };
        let session = client.session(&image, Some(&node));
        for realm in
            ["https://token.example/token", "https://eu.gcr.io.example/token", "https://eu.gcr.io@host.example/"]
        {
            let error = session.token(realm, None).await.unwrap_err();
            assert!(matches!(&error, FetchError::Denied(cause) if cause.contains("another host")), "{error}");
        }
        let error = session.token("http://eu.gcr.io/token", None).await.unwrap_err();
        assert!(error.to_string().contains("not reached over https"), "{error}");
    }

    #[test]
    fn a_literal_address_is_refused_wherever_a_registry_sends_the_node() {
        let client = client();
        let image = ImageName::parse("registry.example.com/app").unwrap();
        let session = client.session(&image, None);
        for url in [
            "https://[::1]/token",
            "https://[::ffff:169.254.169.254]/x",
            "https://u:p@127.0.0.1/x",
            "https://[fe80::1]/",
        ] {
            assert!(session.target(url).is_err(), "{url}");
        }
        assert_eq!(session.target("https://u:p@host.example/x").unwrap().as_str(), "https://host.example/x");
        let named = ImageName::parse("localhost:5000/app").unwrap();
        assert!(client.session(&named, None).target("http://127.0.0.1/token").is_ok());
    }
}
