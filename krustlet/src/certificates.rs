//! Certificates that the cluster signs for this node: requesting, keeping, checking and renewing them.
//!
//! A certificate and its key live in one file, replaced by a rename, so that a crash leaves the old pair or the new
//! one, never a mixture. The key of a request that is under way is kept beside it, so that a crash between the request
//! and its approval is continued and not begun again.

use crate::backoff::{Backoff, jitter};
use crate::client::{describe, status_code};
use anyhow::{Context, bail, ensure};
use futures::StreamExt;
use jiff::Timestamp;
use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use kube::api::{Api, ObjectMeta, PostParams};
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use parking_lot::RwLock;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair, PublicKeyData, SanType};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::sign::CertifiedKey;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tracing::{info, warn};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// Share of its life after which a certificate is renewed, and how much that may vary from node to node.
const RENEW_AFTER: f64 = 0.8;
const RENEW_JITTER: f64 = 0.06;
/// Share of its life after which one that is still not renewed is told of: of a year, six weeks before its end.
const TELL_AFTER: f64 = 0.88;
/// Whoever denied a request needs time to think again, and not a new request every moment.
const AFTER_DENIAL: Duration = Duration::from_secs(60);

/// What a certificate is for; decides its signer and its usages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Purpose {
    /// The node's identity towards the API server.
    Client,
    /// The agent's HTTPS API.
    Serving,
}

impl Purpose {
    fn signer(self) -> &'static str {
        match self {
            Self::Client => "kubernetes.io/kube-apiserver-client-kubelet",
            Self::Serving => "kubernetes.io/kubelet-serving",
        }
    }

    fn usages(self) -> [&'static str; 2] {
        match self {
            Self::Client => ["digital signature", "client auth"],
            Self::Serving => ["digital signature", "server auth"],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Client => "client",
            Self::Serving => "serving",
        }
    }
}

/// The certificate that a node wants.
#[derive(Debug, Clone)]
pub struct Wanted {
    pub purpose: Purpose,
    pub node_name: String,
    /// Subject alternative names; empty for a client certificate.
    pub dns_names: Vec<String>,
    pub addresses: Vec<IpAddr>,
}

impl Wanted {
    pub fn client(node_name: &str) -> Self {
        Self { purpose: Purpose::Client, node_name: node_name.to_owned(), dns_names: Vec::new(), addresses: Vec::new() }
    }

    /// The names are those that a client may call the node by: its DNS name, its node name and its addresses.
    pub fn serving(node_name: &str, hostname: &str, addresses: &[IpAddr]) -> Self {
        let mut dns_names = vec![hostname.to_owned()];
        if node_name != hostname {
            dns_names.push(node_name.to_owned());
        }
        let mut unique = Vec::new();
        for address in addresses {
            if !unique.contains(address) {
                unique.push(*address);
            }
        }
        Self { purpose: Purpose::Serving, node_name: node_name.to_owned(), dns_names, addresses: unique }
    }

    /// The same for whatever names.
    pub fn without_names(&self) -> Self {
        Self { dns_names: Vec::new(), addresses: Vec::new(), ..self.clone() }
    }

    fn common_name(&self) -> String {
        format!("system:node:{}", self.node_name)
    }

    fn request(&self, key: &KeyPair) -> anyhow::Result<String> {
        let mut name = DistinguishedName::new();
        name.push(DnType::OrganizationName, "system:nodes");
        name.push(DnType::CommonName, self.common_name());
        let mut params = CertificateParams::default();
        params.distinguished_name = name;
        for dns in &self.dns_names {
            let dns = dns.as_str().try_into().with_context(|| format!("{dns:?} is not a DNS name"))?;
            params.subject_alt_names.push(SanType::DnsName(dns));
        }
        for address in &self.addresses {
            params.subject_alt_names.push(SanType::IpAddress(*address));
        }
        Ok(params.serialize_request(key)?.pem()?)
    }
}

/// A certificate with its key, checked against each other.
#[derive(Debug, Clone)]
pub struct Credential {
    /// Certificate chain, then private key.
    pub pem: String,
    pub not_after: Timestamp,
    /// Since when this node has it. Signers date certificates back, some by more than their whole life.
    since: Timestamp,
    common_name: String,
    dns_names: Vec<String>,
    addresses: Vec<IpAddr>,
}

impl Credential {
    /// Reads a certificate chain and its key from PEM; fails when they do not belong together.
    pub fn parse(pem: &str) -> anyhow::Result<Self> {
        let leaf = CertificateDer::from_pem_slice(pem.as_bytes()).context("failed to read the certificate")?;
        let key = PrivateKeyDer::from_pem_slice(pem.as_bytes()).context("failed to read the private key")?;
        let key = KeyPair::try_from(&key).context("failed to use the private key")?;
        let (_, certificate) = X509Certificate::from_der(&leaf).context("failed to parse the certificate")?;
        ensure!(
            certificate.public_key().subject_public_key.data.as_ref() == key.der_bytes(),
            "certificate and private key do not belong together"
        );
        let mut dns_names = Vec::new();
        let mut addresses = Vec::new();
        if let Ok(Some(names)) = certificate.subject_alternative_name() {
            for name in &names.value.general_names {
                match name {
                    GeneralName::DNSName(name) => dns_names.push((*name).to_owned()),
                    GeneralName::IPAddress(bytes) => addresses.extend(ip_address(bytes)),
                    _ => {}
                }
            }
        }
        let common_name = certificate
            .subject()
            .iter_common_name()
            .filter_map(|name| name.as_str().ok())
            .map(str::to_owned)
            .next()
            .unwrap_or_default();
        let validity = certificate.validity();
        Ok(Self {
            pem: pem.to_owned(),
            since: Timestamp::from_second(validity.not_before.timestamp())?,
            not_after: Timestamp::from_second(validity.not_after.timestamp())?,
            common_name,
            dns_names,
            addresses,
        })
    }

    /// Whether this is the certificate that is wanted, and still valid.
    pub fn satisfies(&self, wanted: &Wanted, now: Timestamp) -> bool {
        self.common_name == wanted.common_name()
            && now < self.not_after
            && wanted.dns_names.iter().all(|name| self.dns_names.contains(name))
            && wanted.addresses.iter().all(|address| self.addresses.contains(address))
    }

    /// The same, had since `since`.
    fn had_since(mut self, since: Timestamp) -> Self {
        self.since = self.since.max(since.min(self.not_after));
        self
    }

    /// When to ask for the next one.
    pub fn renewal(&self) -> Timestamp {
        self.after(jitter(self.life().mul_f64(RENEW_AFTER), RENEW_JITTER))
    }

    /// When its renewal is late.
    pub fn overdue(&self) -> Timestamp {
        self.after(self.life().mul_f64(TELL_AFTER))
    }

    fn life(&self) -> Duration {
        Duration::try_from(self.not_after.duration_since(self.since)).unwrap_or_default()
    }

    fn after(&self, time: Duration) -> Timestamp {
        self.since.checked_add(time).unwrap_or(self.not_after)
    }

    /// As rustls serves it.
    pub fn certified_key(&self) -> anyhow::Result<CertifiedKey> {
        let chain = CertificateDer::pem_slice_iter(self.pem.as_bytes())
            .collect::<Result<Vec<_>, _>>()
            .context("failed to read the certificate chain")?;
        let key = PrivateKeyDer::from_pem_slice(self.pem.as_bytes()).context("failed to read the private key")?;
        let key = rustls::crypto::ring::sign::any_supported_type(&key)?;
        Ok(CertifiedKey::new(chain, key))
    }
}

/// A certificate on disk, and the request for its successor.
#[derive(Debug, Clone)]
pub struct Store {
    path: PathBuf,
}

impl Store {
    /// The pair is kept at `path`.
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The pair on disk; none when there is none or it is damaged.
    pub fn load(&self) -> Option<Credential> {
        let pem = std::fs::read_to_string(&self.path).ok()?;
        match Credential::parse(&pem) {
            Ok(credential) => {
                let written = std::fs::metadata(&self.path).and_then(|file| file.modified()).ok();
                let written =
                    written.and_then(|time| Timestamp::try_from(time).ok()).map(|time| time.min(Timestamp::now()));
                Some(match written {
                    Some(time) => credential.had_since(time),
                    None => credential,
                })
            }
            Err(error) => {
                warn!(path = %self.path.display(), "ignoring a damaged certificate: {error:#}");
                None
            }
        }
    }

    /// Requests the certificate, waits until it is approved and signed, and keeps it. Waits as long as it takes; fails
    /// when the API server refuses the request or somebody denies it.
    pub async fn obtain(&self, client: &kube::Client, wanted: &Wanted) -> anyhow::Result<Credential> {
        let pending = self.path.with_extension("pending.key");
        let key = pending_key(&pending)?;
        let answer = sign(client, wanted, &key).await;
        let credential = match answer {
            Ok(chain) => Credential::parse(&format!("{}\n{}", chain.trim_end(), key.serialize_pem())),
            Err(Refusal::Denied(cause)) => {
                warn!("{cause}; asking again in {} s", AFTER_DENIAL.as_secs());
                discard(&pending);
                tokio::time::sleep(AFTER_DENIAL).await;
                Err(anyhow::anyhow!(cause))
            }
            Err(Refusal::Failed(cause)) => return Err(cause),
        };
        // Signed or denied: that request is over, and the next one is made with a new key.
        let credential = match credential {
            Ok(credential) if credential.satisfies(wanted, Timestamp::now()) => credential.had_since(Timestamp::now()),
            Ok(_) => {
                discard(&pending);
                bail!("the cluster signed a {} certificate for other names than were asked for", wanted.purpose.name());
            }
            Err(error) => {
                discard(&pending);
                return Err(error);
            }
        };
        write_private(&self.path, credential.pem.as_bytes())?;
        discard(&pending);
        info!(
            purpose = wanted.purpose.name(),
            not_after = %credential.not_after,
            "certificate signed"
        );
        Ok(credential)
    }
}

enum Refusal {
    /// This request will never be signed.
    Denied(String),
    /// Not now.
    Failed(anyhow::Error),
}

/// Has `key` certified: creates the request when there is none and waits for its end.
async fn sign(client: &kube::Client, wanted: &Wanted, key: &KeyPair) -> Result<String, Refusal> {
    let api: Api<CertificateSigningRequest> = Api::all(client.clone());
    let name = request_name(wanted, key);
    let request = CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(wanted.request(key).map_err(Refusal::Failed)?.into_bytes()),
            signer_name: wanted.purpose.signer().to_owned(),
            usages: Some(wanted.purpose.usages().map(str::to_owned).to_vec()),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    create(&api, &request).await?;
    let selector = watcher::Config::default().fields(&format!("metadata.name={name}"));
    let mut events = pin!(watcher(api.clone(), selector).backoff(Backoff::api()));
    let mut present = true;
    let mut complained = false;
    while let Some(event) = events.next().await {
        match event {
            Ok(Event::Init) => present = false,
            Ok(Event::InitApply(current) | Event::Apply(current)) => {
                present = true;
                if let Some(outcome) = outcome(&current) {
                    return outcome.map_err(Refusal::Denied);
                }
                if !complained {
                    complained = true;
                    info!(
                        request = name,
                        "waiting for the certificate request to be approved: kubectl certificate approve {name}"
                    );
                }
            }
            // Requests that nobody approves are collected after a day; ask again.
            Ok(Event::InitDone) if present => {}
            Ok(Event::InitDone | Event::Delete(_)) => create(&api, &request).await?,
            Err(watcher::Error::InitialListFailed(error) | watcher::Error::WatchStartFailed(error))
                if matches!(status_code(&error), Some(401 | 403)) =>
            {
                return Err(Refusal::Failed(anyhow::anyhow!(
                    "failed to follow certificate request {name}: {}",
                    describe(&error)
                )));
            }
            Err(_) => {}
        }
    }
    Err(Refusal::Failed(anyhow::anyhow!("the watch on certificate request {name} ended")))
}

async fn create(api: &Api<CertificateSigningRequest>, request: &CertificateSigningRequest) -> Result<(), Refusal> {
    match api.create(&PostParams::default(), request).await {
        Ok(_) => Ok(()),
        // Ours, from before a crash: only this key has this name.
        Err(error) if status_code(&error) == Some(409) => Ok(()),
        Err(error) => {
            Err(Refusal::Failed(anyhow::anyhow!("failed to create a certificate request: {}", describe(&error))))
        }
    }
}

/// The signed chain, the reason why there will be none, or nothing yet.
fn outcome(request: &CertificateSigningRequest) -> Option<Result<String, String>> {
    let status = request.status.as_ref()?;
    let name = request.metadata.name.as_deref().unwrap_or_default();
    for condition in status.conditions.iter().flatten() {
        if matches!(condition.type_.as_str(), "Denied" | "Failed") && condition.status == "True" {
            return Some(Err(format!(
                "certificate request {name} was {}: {}",
                condition.type_.to_lowercase(),
                condition.message.as_deref().unwrap_or("no reason given")
            )));
        }
    }
    let chain = status.certificate.as_ref().filter(|c| !c.0.is_empty())?;
    match String::from_utf8(chain.0.clone()) {
        Ok(chain) => Some(Ok(chain)),
        Err(_) => Some(Err(format!("certificate request {name} holds no PEM"))),
    }
}

/// Derived from the key and the names, so that asking again after a crash finds the request that was made before it.
fn request_name(wanted: &Wanted, key: &KeyPair) -> String {
    use std::fmt::Write as _;
    // The first byte of the point is its form.
    let mut name = format!("krustlet-{}-", wanted.purpose.name());
    for byte in key.der_bytes().iter().skip(1).take(16) {
        let _ = write!(name, "{byte:02x}");
    }
    let mut names = 0u32;
    for byte in format!("{:?}{:?}{}", wanted.dns_names, wanted.addresses, wanted.node_name).bytes() {
        names = names.wrapping_mul(31).wrapping_add(u32::from(byte));
    }
    let _ = write!(name, "-{names:08x}");
    name
}

fn pending_key(path: &Path) -> anyhow::Result<KeyPair> {
    if let Ok(pem) = std::fs::read_to_string(path) {
        match KeyPair::from_pem(&pem) {
            Ok(key) => return Ok(key),
            Err(error) => warn!(path = %path.display(), "ignoring a damaged key: {error}"),
        }
    }
    let key = KeyPair::generate()?;
    write_private(path, key.serialize_pem().as_bytes())?;
    Ok(key)
}

fn discard(path: &Path) {
    if let Err(error) = std::fs::remove_file(path)
        && error.kind() != std::io::ErrorKind::NotFound
    {
        warn!(path = %path.display(), "failed to remove a used key: {error}");
    }
}

/// Replaces `path` in one step; its content reaches the disk before its name does, and only this user may read it.
pub fn write_private(path: &Path, content: &[u8]) -> anyhow::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    let directory = path.parent().with_context(|| format!("{} has no directory", path.display()))?;
    let write = || -> std::io::Result<()> {
        std::fs::create_dir_all(directory)?;
        let mut name = path.file_name().unwrap_or_default().to_owned();
        name.push(".new");
        let temporary = directory.join(name);
        let _ = std::fs::remove_file(&temporary);
        let mut file = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        std::fs::rename(&temporary, path)?;
        std::fs::File::open(directory)?.sync_all()
    };
    write().with_context(|| format!("failed to write {}", path.display()))
}

fn ip_address(bytes: &[u8]) -> Option<IpAddr> {
    if let Ok(v4) = <[u8; 4]>::try_from(bytes) {
        return Some(IpAddr::from(v4));
    }
    <[u8; 16]>::try_from(bytes).ok().map(IpAddr::from)
}

/// The certificate that the HTTPS API answers with, exchanged while it runs. Handshakes fail as long as there is none.
#[derive(Debug, Default)]
pub struct ServingCertificate {
    current: RwLock<Option<Arc<CertifiedKey>>>,
}

impl ServingCertificate {
    pub fn set(&self, credential: &Credential) -> anyhow::Result<()> {
        let key = Arc::new(credential.certified_key()?);
        *self.current.write() = Some(key);
        Ok(())
    }
}

impl rustls::server::ResolvesServerCert for ServingCertificate {
    fn resolve(&self, _: rustls::server::ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.current.read().clone()
    }
}

/// Waits until `instant`. By the wall clock, looked at once a minute, so that a machine that slept is not late.
pub async fn sleep_until(instant: Timestamp) {
    loop {
        let left = instant.duration_since(Timestamp::now());
        let Ok(left) = Duration::try_from(left) else {
            return;
        };
        if left.is_zero() {
            return;
        }
        tokio::time::sleep(left.min(Duration::from_secs(60))).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::certificates::v1::{CertificateSigningRequestCondition, CertificateSigningRequestStatus};

    fn wanted() -> Wanted {
        Wanted::serving(
            "wasm-1",
            "wasm-1.c.project.internal",
            &["10.0.0.2".parse().unwrap(), "10.0.0.2".parse().unwrap()],
        )
    }

    fn self_signed(wanted: &Wanted, key: &KeyPair) -> String {
        let mut name = DistinguishedName::new();
        name.push(DnType::CommonName, wanted.common_name());
        let mut params = CertificateParams::new(wanted.dns_names.clone()).unwrap();
        for address in &wanted.addresses {
            params.subject_alt_names.push(SanType::IpAddress(*address));
        }
        params.distinguished_name = name;
        params.self_signed(key).unwrap().pem()
    }

    #[test]
    fn a_serving_certificate_names_each_host_and_address_once() {
        let wanted = wanted();
        assert_eq!(wanted.dns_names, ["wasm-1.c.project.internal", "wasm-1"]);
        assert_eq!(wanted.addresses.len(), 1);
        assert_eq!(Wanted::serving("n", "n", &[]).dns_names, ["n"]);
    }

    #[test]
    fn a_pair_is_read_back_and_checked_against_what_is_wanted() {
        let key = KeyPair::generate().unwrap();
        let pem = format!("{}\n{}", self_signed(&wanted(), &key), key.serialize_pem());
        let credential = Credential::parse(&pem).unwrap();
        assert!(credential.satisfies(&wanted(), Timestamp::now()));
        assert!(credential.certified_key().is_ok());
        let moved = Wanted::serving("wasm-1", "wasm-1.c.project.internal", &["10.0.0.3".parse().unwrap()]);
        assert!(!credential.satisfies(&moved, Timestamp::now()));
        assert!(credential.satisfies(&moved.without_names(), Timestamp::now()));
        assert!(!credential.satisfies(&wanted(), credential.not_after));
    }

    #[test]
    fn a_certificate_is_renewed_late_in_the_life_that_it_has_here_however_far_it_is_dated_back() {
        let key = KeyPair::generate().unwrap();
        let pem = format!("{}\n{}", self_signed(&wanted(), &key), key.serialize_pem());
        let mut credential = Credential::parse(&pem).unwrap();
        let now: Timestamp = "2026-01-01T00:05:00Z".parse().unwrap();
        credential.since = "2026-01-01T00:00:00Z".parse().unwrap();
        credential.not_after = "2026-01-01T00:06:00Z".parse().unwrap();
        let left = credential.had_since(now).renewal().duration_since(now).as_secs_f64();
        assert!((45.0..=51.0).contains(&left), "{left}");
    }

    #[test]
    fn a_certificate_for_another_key_is_refused() {
        let key = KeyPair::generate().unwrap();
        let other = KeyPair::generate().unwrap();
        let pem = format!("{}\n{}", self_signed(&wanted(), &key), other.serialize_pem());
        assert!(Credential::parse(&pem).is_err());
    }

    #[test]
    fn a_request_keeps_its_name_over_a_crash_and_changes_it_with_key_or_names() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("client.pending.key");
        let first = pending_key(&path).unwrap();
        let again = pending_key(&path).unwrap();
        assert_eq!(request_name(&wanted(), &first), request_name(&wanted(), &again));
        let client = Wanted::client("wasm-1");
        assert_ne!(request_name(&client, &first), request_name(&wanted(), &first));
        discard(&path);
        let fresh = pending_key(&path).unwrap();
        assert_ne!(request_name(&wanted(), &first), request_name(&wanted(), &fresh));
    }

    #[test]
    fn keys_are_readable_by_their_user_alone() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pki").join("client.pem");
        write_private(&path, b"old").unwrap();
        write_private(&path, b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"new");
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_denied_request_is_over_and_an_approved_one_without_certificate_is_not() {
        let with = |type_: &str, certificate: Option<&str>| CertificateSigningRequest {
            status: Some(CertificateSigningRequestStatus {
                certificate: certificate.map(|c| ByteString(c.as_bytes().to_vec())),
                conditions: Some(vec![CertificateSigningRequestCondition {
                    type_: type_.into(),
                    status: "True".into(),
                    message: Some("because".into()),
                    ..CertificateSigningRequestCondition::default()
                }]),
            }),
            ..CertificateSigningRequest::default()
        };
        assert!(outcome(&with("Approved", None)).is_none());
        assert!(matches!(outcome(&with("Approved", Some("PEM"))), Some(Ok(pem)) if pem == "PEM"));
        assert!(matches!(outcome(&with("Denied", None)), Some(Err(why)) if why.contains("because")));
    }
}
