//! The registry client: image names, credentials, and reads of manifests and blobs over OCI distribution.
//!
//! Every answer is read up to a limit, tokens live as long as one pull and are never shared between credentials, and
//! credentials never travel over plain http to a registry that is reached over https.

use crate::artifact::{Digest, MANIFEST_TYPE, MAX_MANIFEST, shown};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use bytes::Bytes;
use futures::future::BoxFuture;
use http::StatusCode;
use oci_spec::distribution::Reference;
use serde::Deserialize;
use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two reads of an answer.
const READ_TIMEOUT: Duration = Duration::from_secs(30);
/// Bytes a second that an answer must come in at, on average; a registry that trickles would keep others from being asked.
const SLOWEST: u64 = 1024;
const MAX_REDIRECTS: usize = 5;
const MAX_TOKEN: u64 = 256 * 1024;
const MAX_ERROR_BODY: u64 = 16 * 1024;

/// When an image is fetched from its registry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// Ask the registry each time which manifest the name stands for.
    Always,
    /// Ask only when the node has no copy.
    IfNotPresent,
    /// Use the copy on the node or fail.
    Never,
}

/// A user name and password for one registry.
#[derive(Clone, PartialEq, Eq)]
pub struct RegistrySecret {
    /// Who may see this secret: `host[:port][/path]`, as in the keys of a Docker config file.
    pub registry: String,
    pub username: String,
    pub password: String,
}

impl fmt::Debug for RegistrySecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "RegistrySecret({} as {})", self.registry, self.username)
    }
}

/// Where credentials come from when a pull brings none that fits.
pub trait CredentialSource: Send + Sync + 'static {
    /// Credentials for `registry` (`host[:port]`), or none for an anonymous pull.
    fn credentials<'a>(&'a self, registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>>;
}

/// A source that has none: every pull without a secret is anonymous.
#[derive(Debug, Clone, Copy, Default)]
pub struct NoCredentials;

impl CredentialSource for NoCredentials {
    fn credentials<'a>(&'a self, _registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>> {
        Box::pin(std::future::ready(None))
    }
}

impl RegistrySecret {
    /// The secrets in a `.dockerconfigjson` (`{"auths": {…}}`) or an old-style `.dockercfg` document.
    pub fn from_docker_config(document: &[u8]) -> Result<Vec<Self>, String> {
        #[derive(Deserialize)]
        struct Entry {
            auth: Option<String>,
            username: Option<String>,
            password: Option<String>,
        }
        #[derive(Deserialize)]
        struct Config {
            auths: BTreeMap<String, Entry>,
        }
        let entries = serde_json::from_slice::<Config>(document)
            .map(|config| config.auths)
            .or_else(|_| serde_json::from_slice::<BTreeMap<String, Entry>>(document))
            .map_err(|_| "no Docker config: expected {\"auths\": {\"host\": {\"auth\": …}}}".to_owned())?;
        entries
            .into_iter()
            .map(|(registry, entry)| {
                let decoded = entry.auth.filter(|auth| !auth.is_empty()).and_then(|auth| {
                    let text = String::from_utf8(BASE64.decode(auth.trim()).ok()?).ok()?;
                    text.split_once(':').map(|(username, password)| (username.to_owned(), password.to_owned()))
                });
                let (username, password) = decoded
                    .or_else(|| entry.username.zip(entry.password))
                    .ok_or_else(|| format!("the entry for {:?} holds no user name and password", shown(&registry)))?;
                Ok(Self { registry, username, password })
            })
            .collect()
    }

    /// How well this secret fits, as the length of its matching path; none if it is for another registry.
    fn matches(&self, image: &ImageName) -> Option<usize> {
        let key = self.registry.trim_start_matches("https://").trim_start_matches("http://").trim_end_matches('/');
        let (host, path) = key.split_once('/').unwrap_or((key, ""));
        let host = if matches!(host, "index.docker.io" | "registry-1.docker.io") { "docker.io" } else { host };
        let path = if matches!(path, "v1" | "v2") { "" } else { path };
        let repository = image.repository();
        let inside = path.is_empty()
            || repository == path
            || repository.strip_prefix(path).is_some_and(|rest| rest.starts_with('/'));
        (host == image.registry() && inside).then_some(path.len())
    }

    /// The secrets that fit, the most specific first.
    pub(crate) fn fitting<'a>(secrets: &'a [Self], image: &ImageName) -> Vec<&'a Self> {
        let mut fitting: Vec<_> =
            secrets.iter().filter_map(|secret| secret.matches(image).map(|length| (length, secret))).collect();
        fitting.sort_by_key(|(length, _)| std::cmp::Reverse(*length));
        fitting.into_iter().map(|(_, secret)| secret).collect()
    }
}

/// An image name, taken apart.
#[derive(Debug, Clone)]
pub struct ImageName {
    reference: Reference,
    digest: Option<Digest>,
}

impl ImageName {
    pub fn parse(image: &str) -> Result<Self, String> {
        if image.len() > 1024 {
            return Err("it is longer than 1024 characters".into());
        }
        let reference: Reference = image.parse().map_err(|error| format!("{error}"))?;
        let digest = reference.digest().map(Digest::parse).transpose()?;
        Ok(Self { reference, digest })
    }

    pub fn registry(&self) -> &str {
        self.reference.registry()
    }

    pub fn repository(&self) -> &str {
        self.reference.repository()
    }

    /// The digest in the name. It wins over a tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// `registry/repository@digest`.
    pub fn pinned(&self, digest: &Digest) -> String {
        format!("{}/{}@{digest}", self.registry(), self.repository())
    }

    /// What to ask the registry for.
    pub fn wanted(&self) -> &str {
        self.digest.as_ref().map(Digest::as_str).or_else(|| self.reference.tag()).unwrap_or("latest")
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}", self.reference)
    }
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
    #[error("{0}")]
    Unavailable(String),
}

/// Talks to registries.
pub struct RegistryClient {
    https: reqwest::Client,
    /// Used for loopback and listed registries only, and never through a proxy.
    plain: reqwest::Client,
    insecure: Vec<String>,
}

impl RegistryClient {
    pub fn new(insecure: Vec<String>) -> anyhow::Result<Self> {
        let builder = || {
            reqwest::Client::builder()
                .connect_timeout(CONNECT_TIMEOUT)
                .read_timeout(READ_TIMEOUT)
                .user_agent(concat!("krustlet/", env!("CARGO_PKG_VERSION")))
                .redirect(reqwest::redirect::Policy::custom(|attempt| {
                    let from_https = attempt.previous().last().is_some_and(|url| url.scheme() == "https");
                    if from_https && attempt.url().scheme() != "https" {
                        attempt.error("redirected from https to http")
                    } else if attempt.previous().len() > MAX_REDIRECTS {
                        attempt.error("redirected too often")
                    } else {
                        attempt.follow()
                    }
                }))
        };
        Ok(Self { https: builder().build()?, plain: builder().no_proxy().build()?, insecure })
    }

    /// Begins to read from one repository.
    pub fn session<'a>(&'a self, image: &'a ImageName, credentials: Option<&'a RegistrySecret>) -> Session<'a> {
        let registry = image.registry();
        let plain = is_loopback(registry) || self.insecure.iter().any(|listed| listed == registry);
        let host = if registry == "docker.io" { "registry-1.docker.io" } else { registry };
        Session {
            client: if plain { &self.plain } else { &self.https },
            base: format!("{}://{host}/v2/{}", if plain { "http" } else { "https" }, image.repository()),
            image,
            plain,
            credentials,
            authorization: None,
        }
    }
}

fn is_loopback(registry: &str) -> bool {
    let host = registry.rsplit_once(':').map_or(registry, |(host, _)| host);
    host == "localhost" || host.parse::<std::net::IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Reads from one repository with one set of credentials.
pub struct Session<'a> {
    client: &'a reqwest::Client,
    base: String,
    image: &'a ImageName,
    plain: bool,
    credentials: Option<&'a RegistrySecret>,
    authorization: Option<String>,
}

impl Session<'_> {
    /// The manifest with this tag or digest, and its digest computed from the bytes received.
    pub async fn manifest(&mut self, wanted: &str) -> Result<(Bytes, Digest), FetchError> {
        let url = format!("{}/manifests/{wanted}", self.base);
        let mut content = Vec::new();
        self.get(&url, MAX_MANIFEST, |chunk| {
            content.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        let digest = Digest::of(&content);
        if wanted.starts_with("sha256:") && wanted != digest.as_str() {
            return Err(FetchError::Invalid(format!(
                "the registry answered with manifest {digest}, not with the {wanted} that the name asks for"
            )));
        }
        Ok((content.into(), digest))
    }

    /// Passes a blob's bytes to `sink`. The caller checks the digest of what it was given.
    pub async fn blob(
        &mut self,
        digest: &Digest,
        size: u64,
        sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<(), FetchError> {
        let url = format!("{}/blobs/{digest}", self.base);
        let received = self.get(&url, size, sink).await?;
        if received != size {
            return Err(FetchError::Invalid(format!(
                "blob {digest} ended after {received} bytes, the manifest says {size}"
            )));
        }
        Ok(())
    }

    async fn get(
        &mut self,
        url: &str,
        limit: u64,
        mut sink: impl FnMut(&[u8]) -> std::io::Result<()>,
    ) -> Result<u64, FetchError> {
        let mut response = self.send(url).await?;
        if response.status() == StatusCode::UNAUTHORIZED {
            self.authorize(&response).await?;
            response = self.send(url).await?;
        }
        if !response.status().is_success() {
            return Err(self.refusal(url, response).await);
        }
        read(response, url, limit, &mut sink).await
    }

    async fn send(&self, url: &str) -> Result<reqwest::Response, FetchError> {
        let mut request = self.client.get(url).header(http::header::ACCEPT, format!("{MANIFEST_TYPE}, */*"));
        if let Some(authorization) = &self.authorization {
            request = request.header(http::header::AUTHORIZATION, authorization);
        }
        request.send().await.map_err(|error| unavailable(url, &error))
    }

    /// Answers the challenge of a 401.
    async fn authorize(&mut self, response: &reqwest::Response) -> Result<(), FetchError> {
        let registry = self.image.registry();
        let denied = |cause: String| FetchError::Denied(format!("registry {registry} refused access: {cause}"));
        if self.authorization.is_some() {
            return Err(denied(format!("{} is not allowed to pull", self.identity())));
        }
        let headers = response.headers().get_all(http::header::WWW_AUTHENTICATE);
        let challenges: Vec<(String, BTreeMap<String, String>)> = headers
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| http_auth::ChallengeParser::new(value).filter_map(Result::ok).collect::<Vec<_>>())
            .map(|challenge| {
                let parameters = challenge
                    .params
                    .iter()
                    .map(|(name, value)| (name.to_ascii_lowercase(), value.to_unescaped()))
                    .collect();
                (challenge.scheme.to_ascii_lowercase(), parameters)
            })
            .collect();
        if let Some((_, parameters)) = challenges.iter().find(|(scheme, _)| scheme == "bearer") {
            let realm = parameters.get("realm").ok_or_else(|| denied("its challenge names no realm".into()))?;
            let token = self.token(realm, parameters.get("service")).await?;
            self.authorization = Some(format!("Bearer {token}"));
            return Ok(());
        }
        match (challenges.iter().any(|(scheme, _)| scheme == "basic"), self.credentials) {
            (true, Some(secret)) => {
                let pair = BASE64.encode(format!("{}:{}", secret.username, secret.password));
                self.authorization = Some(format!("Basic {pair}"));
                Ok(())
            }
            (true, None) => Err(denied("it asks for a user name; add an imagePullSecret".into())),
            (false, _) => Err(denied("it names no way of authentication that this node knows".into())),
        }
    }

    async fn token(&self, realm: &str, service: Option<&String>) -> Result<String, FetchError> {
        #[derive(Deserialize)]
        struct Token {
            token: Option<String>,
            access_token: Option<String>,
        }
        if !self.plain && !realm.starts_with("https://") {
            return Err(FetchError::Denied(format!(
                "the registry's token service {:?} is not reached over https",
                shown(realm)
            )));
        }
        let mut query = vec![("scope", format!("repository:{}:pull", self.image.repository()))];
        query.extend(service.map(|service| ("service", service.clone())));
        let mut request = self.client.get(realm).query(&query);
        if let Some(secret) = self.credentials {
            request = request.basic_auth(&secret.username, Some(&secret.password));
        }
        let response = request.send().await.map_err(|error| unavailable(realm, &error))?;
        if !response.status().is_success() {
            return Err(self.refusal(realm, response).await);
        }
        let mut body = Vec::new();
        read(response, realm, MAX_TOKEN, &mut |chunk: &[u8]| {
            body.extend_from_slice(chunk);
            Ok(())
        })
        .await?;
        let token: Option<Token> = serde_json::from_slice(&body).ok();
        token
            .and_then(|token| token.token.or(token.access_token))
            .filter(|token| token.bytes().all(|byte| byte.is_ascii_graphic()))
            .ok_or_else(|| FetchError::Invalid(format!("the token service {realm} answered with no token")))
    }

    fn identity(&self) -> String {
        self.credentials.map_or_else(|| "an anonymous user".to_owned(), |secret| format!("user {:?}", secret.username))
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
        let _ = read(response, url, MAX_ERROR_BODY, &mut |chunk: &[u8]| {
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
            _ => FetchError::Unavailable(format!("{url} answered {status}{detail}")),
        }
    }
}

async fn read(
    mut response: reqwest::Response,
    url: &str,
    limit: u64,
    sink: &mut impl FnMut(&[u8]) -> std::io::Result<()>,
) -> Result<u64, FetchError> {
    let mut received = 0;
    let began = Instant::now();
    while let Some(chunk) = response.chunk().await.map_err(|error| unavailable(url, &error))? {
        received += chunk.len() as u64;
        if received > limit {
            return Err(FetchError::Invalid(format!("{url} answered with more than the {limit} bytes expected")));
        }
        if is_too_slow(received, began.elapsed()) {
            return Err(FetchError::Unavailable(format!("{url} gave {received} bytes in {:?}", began.elapsed())));
        }
        sink(&chunk).map_err(|error| FetchError::Unavailable(format!("failed to store {url}: {error}")))?;
    }
    Ok(received)
}

fn is_too_slow(received: u64, elapsed: Duration) -> bool {
    elapsed > READ_TIMEOUT + Duration::from_secs(received / SLOWEST)
}

/// The whole chain of causes: reqwest's own message stops at "error sending request".
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
    FetchError::Unavailable(format!("{url} cannot be reached: {text}"))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn secret(registry: &str) -> RegistrySecret {
        RegistrySecret { registry: registry.into(), username: "user".into(), password: "word".into() }
    }

    #[test]
    fn names_with_tag_digest_and_neither_are_taken_apart() {
        let digest = Digest::of(b"x");
        let name = ImageName::parse(&format!("127.0.0.1:5000/a/b:v1@{digest}")).unwrap();
        assert_eq!((name.registry(), name.repository(), name.wanted()), ("127.0.0.1:5000", "a/b", digest.as_str()));
        assert_eq!(name.pinned(&digest), format!("127.0.0.1:5000/a/b@{digest}"));
        assert_eq!(ImageName::parse("host/app").unwrap().wanted(), "latest");
        assert_eq!(ImageName::parse("host.io/app:v2").unwrap().wanted(), "v2");
    }

    #[test]
    fn names_that_are_none_are_refused() {
        for name in ["", "UPPER/Case", "a b", "host/app@sha256:12", "host/app@sha512:00", &"x".repeat(2000)] {
            assert!(ImageName::parse(name).is_err(), "{name}");
        }
        assert!(ImageName::parse(&format!("host/app@sha256:{}", "A".repeat(64))).is_err());
    }

    #[test]
    fn a_secret_is_shown_to_its_own_registry_only_and_the_most_specific_one_first() {
        let name = ImageName::parse("registry.example:5000/team/app:v1").unwrap();
        let secrets = [
            secret("other.example"),
            secret("registry.example"),
            secret("https://registry.example:5000/"),
            secret("registry.example:5000/team"),
            secret("registry.example:5000/te"),
        ];
        let fitting: Vec<_> =
            RegistrySecret::fitting(&secrets, &name).iter().map(|secret| secret.registry.as_str()).collect();
        assert_eq!(fitting, ["registry.example:5000/team", "https://registry.example:5000/"]);
        let hub = ImageName::parse("library/app").unwrap();
        assert_eq!(RegistrySecret::fitting(&[secret("https://index.docker.io/v1/")], &hub).len(), 1);
    }

    #[test]
    fn docker_config_documents_of_both_kinds_are_read() {
        let auth = BASE64.encode("user:pass:word");
        let new = format!(r#"{{"auths": {{"host:1": {{"auth": "{auth}"}}}}}}"#);
        let old = r#"{"host:1": {"username": "user", "password": "pass:word"}}"#;
        for document in [new.as_str(), old] {
            let secrets = RegistrySecret::from_docker_config(document.as_bytes()).unwrap();
            let expected =
                RegistrySecret { registry: "host:1".into(), username: "user".into(), password: "pass:word".into() };
            assert_eq!(secrets, [expected]);
        }
        for garbage in ["", "[]", r#"{"auths": {"host": {}}}"#] {
            assert!(RegistrySecret::from_docker_config(garbage.as_bytes()).is_err());
        }
    }

    #[test]
    fn a_password_is_not_printed() {
        assert!(!format!("{:?}", secret("host")).contains("word"));
    }

    #[test]
    fn a_registry_that_trickles_is_given_up() {
        let seconds = Duration::from_secs;
        assert!(!is_too_slow(0, seconds(29)));
        assert!(is_too_slow(60, seconds(60)));
        assert!(!is_too_slow(64 * 1024, seconds(60)));
        assert!(is_too_slow(1024 * 1024, seconds(2000)));
    }

    #[test]
    fn plain_http_is_for_loopback() {
        for host in ["localhost", "localhost:5000", "127.0.0.1:1", "127.8.9.1"] {
            assert!(is_loopback(host), "{host}");
        }
        for host in ["example.com", "localhost.example.com", "10.0.0.1:5000", "127.0.0.1.example.com"] {
            assert!(!is_loopback(host), "{host}");
        }
    }
}
