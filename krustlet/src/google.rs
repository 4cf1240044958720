//! Registry credentials from a VM's metadata server: the one module that knows Google.

use crate::http_client;
use anyhow::{Context, anyhow, ensure};
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue};
use krustlet_runtime::{CredentialSource, RegistrySecret};
use std::net::IpAddr;
use std::time::{Duration, Instant};
use tokio::sync::Mutex;
use tracing::warn;
use url::Url;

/// The host that Google's own client libraries ask, unless `GCE_METADATA_HOST` names another.
const METADATA_HOST: &str = "metadata.google.internal";
const TOKEN_PATH: &str = "/computeMetadata/v1/instance/service-accounts/default/token";

/// The user that Artifact Registry expects an access token from.
const USER: &str = "oauth2accesstoken";

/// A token has some hundred bytes.
const MAX_ANSWER: usize = 64 * 1024;
const TIMEOUT: Duration = Duration::from_secs(5);
/// A token is asked for anew so long before it ends.
const MARGIN: Duration = Duration::from_secs(60);

/// The access token of the VM's service account, kept until shortly before it ends.
pub struct MetadataServer {
    host: String,
    token: Mutex<Option<Token>>,
}

struct Token {
    value: String,
    until: Instant,
}

#[derive(serde::Deserialize)]
struct Answer {
    access_token: String,
    expires_in: u64,
}

impl MetadataServer {
    pub fn new() -> Self {
        let host = std::env::var("GCE_METADATA_HOST")
            .ok()
            .filter(|host| !host.is_empty())
            .unwrap_or_else(|| METADATA_HOST.to_owned());
        Self::at(host)
    }

    fn at(host: String) -> Self {
        Self { host, token: Mutex::new(None) }
    }

    async fn token(&self) -> anyhow::Result<String> {
        let mut kept = self.token.lock().await;
        if let Some(token) = kept.as_ref()
            && Instant::now() < token.until
        {
            return Ok(token.value.clone());
        }
        let answer = tokio::time::timeout(TIMEOUT, self.ask())
            .await
            .with_context(|| format!("no answer from {} within {TIMEOUT:?}", self.host))??;
        let life = Duration::from_secs(answer.expires_in).saturating_sub(MARGIN);
        *kept = Some(Token { value: answer.access_token.clone(), until: Instant::now() + life });
        Ok(answer.access_token)
    }

    async fn ask(&self) -> anyhow::Result<Answer> {
        let url = Url::parse(&format!("http://{}{TOKEN_PATH}", self.host))?;
        let headers = HeaderMap::from_iter([(
            http::HeaderName::from_static("metadata-flavor"),
            HeaderValue::from_static("Google"),
        )]);
        let answer =
            http_client::get(&url, &headers, MAX_ANSWER).await.map_err(|error| anyhow!("no answer: {error}"))?;
        ensure!(answer.status.is_success(), "{} answered {}", self.host, answer.status);
        ensure!(!answer.truncated, "{} answered more than {MAX_ANSWER} bytes", self.host);
        serde_json::from_slice(&answer.body).context("the answer is no token")
    }
}

impl CredentialSource for MetadataServer {
    fn credentials<'a>(&'a self, registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>> {
        Box::pin(async move {
            // A pod names its registry; the node's token must not go to whatever it names.
            if !is_trusted(registry) {
                return None;
            }
            match self.token().await {
                Ok(token) => {
                    Some(RegistrySecret { registry: registry.to_owned(), username: USER.to_owned(), password: token })
                }
                Err(error) => {
                    warn!(registry, "failed to get a token from the metadata server, pulling anonymously: {error:#}");
                    None
                }
            }
        })
    }
}

/// Google's own registries, and one on this machine.
fn is_trusted(registry: &str) -> bool {
    let host = match registry.rsplit_once(':') {
        Some((host, port)) if port.bytes().all(|c| c.is_ascii_digit()) => host,
        _ => registry,
    };
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "gcr.io"
        || host.ends_with(".gcr.io")
        || host.ends_with("-docker.pkg.dev")
        || host == "localhost"
        || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn the_token_goes_to_google_and_to_this_machine_only() {
        for registry in
            ["europe-west1-docker.pkg.dev", "gcr.io", "eu.gcr.io", "127.0.0.1:5000", "[::1]:5000", "localhost:5000"]
        {
            assert!(is_trusted(registry), "{registry}");
        }
        for registry in
            ["registry.example.com", "gcr.io.example.com", "notgcr.io", "pkg.dev.example.com:443", "10.0.0.1:5000"]
        {
            assert!(!is_trusted(registry), "{registry}");
        }
    }

    #[tokio::test]
    async fn a_token_is_asked_for_once_while_it_lives() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let host = listener.local_addr().unwrap().to_string();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            let mut request = vec![0; 2048];
            let length = stream.read(&mut request).await.unwrap();
            let body = r#"{"access_token":"secret","expires_in":3600,"token_type":"Bearer"}"#;
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            stream.write_all(answer.as_bytes()).await.unwrap();
            String::from_utf8_lossy(&request[..length]).to_lowercase()
        });
        let source = MetadataServer::at(host);
        for _ in 0..3 {
            let secret = source.credentials("gcr.io").await.unwrap();
            assert_eq!((secret.username.as_str(), secret.password.as_str()), (USER, "secret"));
        }
        assert!(source.credentials("registry.example.com").await.is_none());
        assert!(server.await.unwrap().contains("metadata-flavor: google"));
    }
}
