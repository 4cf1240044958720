//! Joining the cluster: from a bootstrap token to a client certificate of the node's own, and staying joined.

use crate::backoff::Backoff;
use crate::certificates::{Credential, ServingCertificate, Store, Wanted, sleep_until, write_private};
use crate::cli::{Names, Options};
use crate::client::Connection;
use crate::events::{Recorder, Severity};
use crate::node;
use crate::reasons::event;
use anyhow::{Context, ensure};
use jiff::Timestamp;
use kube::config::{
    AuthInfo, Cluster, Context as KubeContext, KubeConfigOptions, Kubeconfig, NamedAuthInfo, NamedCluster, NamedContext,
};
use pem::Pem;
use std::convert::Infallible;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::watch;
use tracing::{info, warn};

/// How often it is told that nobody renews the client certificate. Events are kept for an hour, and looked at every day.
const TELL_AGAIN: Duration = Duration::from_secs(24 * 60 * 60);

/// The node's place in the cluster.
pub struct Membership {
    pub client: kube::Client,
    /// The API server.
    pub server: http::Uri,
    /// Certificates (DER) that the cluster's clients are checked with.
    pub client_ca: Vec<Vec<u8>>,
    connection: Connection,
    credential: Credential,
    files: Files,
}

/// Where membership is kept.
#[derive(Debug, Clone)]
struct Files {
    bootstrap: PathBuf,
    kubeconfig: PathBuf,
    store: Store,
    node_name: String,
}

/// Joins the cluster, or takes up the membership that is on disk. Tries until it succeeds: at a first boot the API
/// server may not be there yet, and the token may arrive later.
pub async fn join(options: &Options, names: &Names) -> Membership {
    let files = Files {
        bootstrap: options.bootstrap_file.clone(),
        kubeconfig: names.kubeconfig.clone(),
        store: Store::new(names.data_dir.join("pki").join("client.pem")),
        node_name: names.node_name.clone(),
    };
    let mut backoff = Backoff::api();
    loop {
        match try_join(&files).await {
            Ok(membership) => return membership,
            Err(error) => warn!("failed to join the cluster, trying again: {error:#}"),
        }
        tokio::time::sleep(backoff.jittered()).await;
    }
}

async fn try_join(files: &Files) -> anyhow::Result<Membership> {
    let credential = match files.current().await {
        Some(credential) => credential,
        None => files.bootstrap().await?,
    };
    let config = files.config().await?;
    let (client, connection) = Connection::open(&config)?;
    // The certificate may be from a cluster that is gone; only an answer tells.
    match client.apiserver_version().await {
        Ok(version) => info!(
            server = %config.cluster_url,
            version = version.git_version,
            "joined the cluster"
        ),
        Err(error) if crate::client::status_code(&error) == Some(401) => {
            files.forget();
            anyhow::bail!(
                "the API server does not accept the certificate in {}; bootstrapping again",
                files.store.path().display()
            );
        }
        Err(error) => {
            anyhow::bail!("no answer from {}: {}", config.cluster_url, crate::client::describe(&error))
        }
    }
    Ok(Membership {
        client,
        server: config.cluster_url.clone(),
        client_ca: config.root_cert.clone().unwrap_or_default(),
        connection,
        credential,
        files: files.clone(),
    })
}

impl Files {
    /// The client certificate on disk, when it is this node's, still valid, and of the cluster that the bootstrap
    /// file names.
    async fn current(&self) -> Option<Credential> {
        let credential = self.store.load()?;
        if !credential.satisfies(&Wanted::client(&self.node_name), Timestamp::now()) {
            return None;
        }
        let joined = load(&self.kubeconfig).await.ok()?;
        match load(&self.bootstrap).await {
            Ok(bootstrap) if !same_cluster(&bootstrap, &joined) => {
                info!(
                    server = %bootstrap.cluster_url,
                    "the bootstrap file names another cluster than the one that was joined"
                );
                None
            }
            // The token's file may be gone once the node has joined.
            _ => Some(credential),
        }
    }

    /// Has a client certificate signed with the bootstrap token, and writes the joined kubeconfig.
    async fn bootstrap(&self) -> anyhow::Result<Credential> {
        let config = load(&self.bootstrap).await?;
        ensure!(
            config.root_cert.is_some(),
            "bootstrap kubeconfig {} names no certificate authority",
            self.bootstrap.display()
        );
        let (client, _) = Connection::open(&config)?;
        // Before the certificate that it names, so that a crash between the two leaves nothing to be asked for again.
        let text = kubeconfig(&config, &self.node_name, self.store.path())?;
        write_private(&self.kubeconfig, text.as_bytes())?;
        self.store.obtain(&client, &Wanted::client(&self.node_name)).await.with_context(|| {
            format!(
                "failed to bootstrap with {} (when the token has expired, put a new one there)",
                self.bootstrap.display()
            )
        })
    }

    async fn config(&self) -> anyhow::Result<kube::Config> {
        load(&self.kubeconfig).await
    }

    fn forget(&self) {
        if let Err(error) = std::fs::remove_file(self.store.path()) {
            warn!(path = %self.store.path().display(), "failed to remove a refused certificate: {error}");
        }
    }
}

impl Membership {
    /// Renews the client certificate for as long as the agent runs, each time before it ends. One that is not renewed for long
    /// is told of while somebody can still do something: `expiring` has its end then.
    pub async fn keep(mut self, expiring: watch::Sender<Option<Timestamp>>, events: Recorder) {
        let wanted = Wanted::client(&self.files.node_name);
        loop {
            sleep_until(self.credential.renewal()).await;
            self.credential = tokio::select! {
                credential = self.renewed(&wanted) => credential,
                never = self.tell(&expiring, &events) => match never {},
            };
            expiring.send_if_modified(|expiring| expiring.take().is_some());
        }
    }

    async fn renewed(&self, wanted: &Wanted) -> Credential {
        let mut backoff = Backoff::api();
        loop {
            match self.renew(wanted).await {
                Ok(credential) => return credential,
                Err(error) => warn!(
                    not_after = %self.credential.not_after,
                    "failed to renew the client certificate, trying again: {error:#}"
                ),
            }
            tokio::time::sleep(backoff.jittered() * 4).await;
        }
    }

    async fn tell(&self, expiring: &watch::Sender<Option<Timestamp>>, events: &Recorder) -> Infallible {
        let end = self.credential.not_after;
        sleep_until(self.credential.overdue()).await;
        expiring.send_replace(Some(end));
        loop {
            let message = node::expiry(end);
            warn!("{message}");
            let node = node::reference(&self.files.node_name);
            events.record(node, Severity::Warning, event::CERTIFICATE_EXPIRING, message);
            tokio::time::sleep(TELL_AGAIN).await;
        }
    }

    async fn renew(&self, wanted: &Wanted) -> anyhow::Result<Credential> {
        let credential = if Timestamp::now() < self.credential.not_after {
            self.files.store.obtain(&self.client, wanted).await?
        } else {
            // The API server was away for the rest of the certificate's life.
            self.files.bootstrap().await?
        };
        self.connection.renew(&self.files.config().await?)?;
        Ok(credential)
    }
}

/// Keeps the certificate of the HTTPS API: from the files given, or signed by the cluster and renewed.
pub async fn keep_serving_certificate(
    client: kube::Client,
    options: Options,
    data_dir: PathBuf,
    wanted: Wanted,
    serving: Arc<ServingCertificate>,
) {
    if let (Some(certificate), Some(key)) = (&options.cert_file, &options.private_key_file) {
        return keep_given_certificate(certificate, key, &serving).await;
    }
    let store = Store::new(data_dir.join("pki").join("serving.pem"));
    // One that lacks a new name serves the old ones until its successor is signed.
    let mut current = store.load().filter(|credential| {
        let usable = credential.satisfies(&wanted.without_names(), Timestamp::now()) && serving.set(credential).is_ok();
        usable && credential.satisfies(&wanted, Timestamp::now())
    });
    let mut backoff = Backoff::api();
    loop {
        if let Some(credential) = &current {
            sleep_until(credential.renewal()).await;
        }
        match store.obtain(&client, &wanted).await {
            Ok(credential) => {
                if let Err(error) = serving.set(&credential) {
                    warn!("failed to use the new serving certificate: {error:#}");
                }
                current = Some(credential);
                backoff.reset();
            }
            Err(error) => {
                warn!("failed to get a serving certificate, trying again: {error:#}");
                tokio::time::sleep(backoff.jittered() * 4).await;
            }
        }
    }
}

/// Serves with the operator's own files and takes up their successors.
async fn keep_given_certificate(certificate: &Path, key: &Path, serving: &ServingCertificate) {
    /// Whoever renews these files does it days ahead.
    const LOOK: std::time::Duration = std::time::Duration::from_secs(60);
    let mut seen = String::new();
    loop {
        let read = || -> anyhow::Result<String> {
            let certificate = std::fs::read_to_string(certificate)
                .with_context(|| format!("failed to read {}", certificate.display()))?;
            let key = std::fs::read_to_string(key).with_context(|| format!("failed to read {}", key.display()))?;
            Ok(format!("{certificate}\n{key}"))
        };
        match read() {
            Ok(pem) if pem == seen => {}
            Ok(pem) => {
                match Credential::parse(&pem).and_then(|credential| serving.set(&credential)) {
                    Ok(()) => info!("serving certificate loaded"),
                    Err(error) => warn!("failed to use the serving certificate: {error:#}"),
                }
                seen = pem;
            }
            Err(error) => warn!("{error:#}"),
        }
        tokio::time::sleep(LOOK).await;
    }
}

async fn load(path: &Path) -> anyhow::Result<kube::Config> {
    let kubeconfig =
        Kubeconfig::read_from(path).with_context(|| format!("failed to read kubeconfig {}", path.display()))?;
    kube::Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
        .await
        .with_context(|| format!("failed to use kubeconfig {}", path.display()))
}

fn same_cluster(a: &kube::Config, b: &kube::Config) -> bool {
    a.cluster_url == b.cluster_url && a.root_cert == b.root_cert
}

/// A kubeconfig for the node itself. Its certificate and key are a path, so that a renewal does not touch it.
fn kubeconfig(config: &kube::Config, node_name: &str, credential: &Path) -> anyhow::Result<String> {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD as BASE64;
    let authority: Vec<Pem> =
        config.root_cert.iter().flatten().map(|der| Pem::new("CERTIFICATE", der.clone())).collect();
    let cluster = Cluster {
        server: Some(config.cluster_url.to_string().trim_end_matches('/').to_owned()),
        certificate_authority_data: Some(BASE64.encode(pem::encode_many(&authority))),
        tls_server_name: config.tls_server_name.clone(),
        ..Cluster::default()
    };
    let credential = std::path::absolute(credential)?.to_string_lossy().into_owned();
    let identity =
        AuthInfo { client_certificate: Some(credential.clone()), client_key: Some(credential), ..AuthInfo::default() };
    let user = format!("system:node:{node_name}");
    let context = KubeContext { cluster: "default".to_owned(), user: Some(user.clone()), ..KubeContext::default() };
    let kubeconfig = Kubeconfig {
        api_version: Some("v1".to_owned()),
        kind: Some("Config".to_owned()),
        clusters: vec![NamedCluster { name: "default".to_owned(), cluster: Some(cluster), ..NamedCluster::default() }],
        auth_infos: vec![NamedAuthInfo { name: user, auth_info: Some(identity), ..NamedAuthInfo::default() }],
        contexts: vec![NamedContext { name: "default".to_owned(), context: Some(context), ..NamedContext::default() }],
        current_context: Some("default".to_owned()),
        ..Kubeconfig::default()
    };
    // JSON is YAML.
    Ok(serde_json::to_string_pretty(&kubeconfig)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_joined_kubeconfig_names_the_same_cluster_and_the_credential_by_path() {
        let directory = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["ca".to_owned()]).unwrap().self_signed(&key).unwrap();
        let pem_path = directory.path().join("client.pem");
        std::fs::write(&pem_path, format!("{}{}", certificate.pem(), key.serialize_pem())).unwrap();
        let mut bootstrap = kube::Config::new("https://127.0.0.1:6443".parse().unwrap());
        bootstrap.root_cert = Some(vec![certificate.der().to_vec()]);
        let path = directory.path().join("kubeconfig");
        std::fs::write(&path, kubeconfig(&bootstrap, "wasm-1", &pem_path).unwrap()).unwrap();
        let joined = load(&path).await.unwrap();
        assert!(same_cluster(&bootstrap, &joined));
        assert_eq!(joined.auth_info.client_certificate.as_deref(), Some(pem_path.to_string_lossy().as_ref()));
        let mut other = bootstrap.clone();
        other.root_cert = Some(vec![vec![1, 2, 3]]);
        assert!(!same_cluster(&other, &joined));
    }
}
