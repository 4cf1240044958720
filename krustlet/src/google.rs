//! Registry credentials from a VM's metadata server: the one module that knows Google.

use crate::http_client;
use crate::reach::Reach;
use anyhow::{Context, anyhow, ensure};
use futures::future::BoxFuture;
use http::{HeaderMap, HeaderValue};
use krustlet_runtime::{CredentialSource, Login, RegistrySecret};
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
    /// Registries that may see the token besides Google's.
    trusted: Vec<String>,
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
    pub fn new(trusted: Vec<String>) -> Self {
        let host = std::env::var("GCE_METADATA_HOST")
            .ok()
            .filter(|host| !host.is_empty())
            .unwrap_or_else(|| METADATA_HOST.to_owned());
        Self::at(host, trusted)
    }

    fn at(host: String, trusted: Vec<String>) -> Self {
        Self { host, trusted, token: Mutex::new(None) }
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
        let answer = http_client::get(&url, &headers, MAX_ANSWER, &Reach::ANYWHERE)
            .await
            .map_err(|error| anyhow!("no answer: {error}"))?;
        ensure!(answer.status.is_success(), "{} answered {}", self.host, answer.status);
        ensure!(!answer.truncated, "{} answered more than {MAX_ANSWER} bytes", self.host);
        serde_json::from_slice(&answer.body).context("the answer is no token")
    }
}

impl CredentialSource for MetadataServer {
    fn credentials<'a>(&'a self, registry: &'a str) -> BoxFuture<'a, Option<RegistrySecret>> {
        Box::pin(async move {
            // A pod names its registry; the node's token must not go to whatever it names.
            if !is_googles(registry) && !self.trusted.iter().any(|trusted| trusted.eq_ignore_ascii_case(registry)) {
                return None;
            }
            match self.token().await {
                Ok(token) => {
                    let login = Login::Password { username: USER.to_owned(), password: token };
                    Some(RegistrySecret { registry: registry.to_owned(), login, source: None })
                }
                Err(error) => {
                    warn!(registry, "failed to get a token from the metadata server, pulling anonymously: {error:#}");
                    None
                }
            }
        })
    }
}

/// Whether the host is one of Google's own, over https: the ports are Google's too.
fn is_googles(registry: &str) -> bool {
    registry == "gcr.io" || registry.ends_with(".gcr.io") || registry.ends_with("-docker.pkg.dev")
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[test]
    fn only_googles_own_hosts_are_googles() {
        for registry in ["europe-west1-docker.pkg.dev", "gcr.io", "eu.gcr.io"] {
            assert!(is_googles(registry), "{registry}");
        }
        for registry in [
            "registry.example.com",
            "gcr.io.example.com",
            "notgcr.io",
            "docker.pkg.dev",
            "pkg.dev.example.com:443",
            "gcr.io:8443",
            "10.0.0.1:5000",
            "127.0.0.1:5000",
            "[::1]:5000",
            "localhost:5000",
            "localhost",
        ] {
            assert!(!is_googles(registry), "{registry}");
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
        let source = MetadataServer::at(host, vec!["localhost:5000".to_owned()]);
        for registry in ["gcr.io", "eu.gcr.io", "localhost:5000"] {
            let secret = source.credentials(registry).await.unwrap();
            assert_eq!(secret.login, Login::Password { username: USER.into(), password: "secret".into() });
            assert_eq!(secret.source, None);
        }
        for registry in ["registry.example.com", "localhost:5001", "127.0.0.1:5000", "localhost"] {
            assert!(source.credentials(registry).await.is_none(), "{registry}");
        }
        assert!(server.await.unwrap().contains("metadata-flavor: google"));
    }
}
