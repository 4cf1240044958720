//! Who may use an image that is on the node.
//!
//! The rule is the kubelet's since Kubernetes 1.35 (KubeletEnsureSecretPulledImages, policy NeverVerifyPreloadedImages; every
//! image here was pulled by the node itself): a pod may use what was pulled without credentials or with the node's own, and
//! what was pulled from the same repository with credentials that the pod brings too. For every other pod the registry is
//! asked again. What is remembered of a credential is a salted hash of it and the Secret that it came from.

use crate::artifact::Digest;
use crate::credentials::{Login, RegistrySecret};
use crate::image_name::ImageName;
use crate::store::Store;
use hmac::{Hmac, KeyInit as _, Mac as _};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

/// Beyond so many, the registry is asked each time.
const MAX_REPOSITORIES: usize = 64;
const MAX_CREDENTIALS: usize = 100;

pub struct PullRecords {
    store: Arc<Store>,
    /// A record is read, changed and written by one at a time.
    writing: Mutex<()>,
}

/// How an image was got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PulledWith<'a> {
    /// Nothing, or the node's own credentials: every pod of the node may use it.
    NodeAccess,
    Secret(&'a RegistrySecret),
}

/// What is known of one manifest.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Record {
    /// By `registry/repository`: the same content in another repository is another image to whoever guards it.
    repositories: BTreeMap<String, Access>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Access {
    all_pods: bool,
    credentials: Vec<Credential>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Credential {
    source: Option<String>,
    salt: String,
    hash: String,
}

impl PullRecords {
    pub fn new(store: Arc<Store>) -> Self {
        Self { store, writing: Mutex::default() }
    }

    /// Whether this manifest was pulled from this repository before, so that it is no news that the repository has it.
    pub fn knows(&self, manifest: &Digest, image: &ImageName) -> bool {
        self.read(manifest).repositories.contains_key(&image.whole_repository())
    }

    /// Whether a pod that brings these secrets may use the image without asking its registry.
    pub fn allows(&self, manifest: &Digest, image: &ImageName, secrets: &[&RegistrySecret]) -> bool {
        let record = self.read(manifest);
        let Some(access) = record.repositories.get(&image.whole_repository()) else { return false };
        access.all_pods
            || secrets.iter().any(|secret| access.credentials.iter().any(|credential| credential.is_of(secret)))
    }

    pub fn add(&self, manifest: &Digest, image: &ImageName, with: PulledWith<'_>) -> io::Result<()> {
        let _writing = self.writing.lock();
        let mut record = self.read(manifest);
        let repository = image.whole_repository();
        if record.repositories.len() >= MAX_REPOSITORIES && !record.repositories.contains_key(&repository) {
            return Ok(());
        }
        let access = record.repositories.entry(repository).or_default();
        match with {
            _ if access.all_pods => return Ok(()),
            PulledWith::NodeAccess => *access = Access { all_pods: true, credentials: Vec::new() },
            PulledWith::Secret(secret) => {
                if access.credentials.iter().any(|credential| credential.hash_is_of(&secret.login)) {
                    return Ok(());
                }
                // One Secret has one credential for a repository at a time: a new one takes the old one's place.
                access
                    .credentials
                    .retain(|credential| credential.source.is_none() || credential.source != secret.source);
                if access.credentials.len() < MAX_CREDENTIALS {
                    access.credentials.push(Credential::of(secret)?);
                }
            }
        }
        self.store.write_pull_record(manifest, &serde_json::to_vec(&record)?)
    }

    /// One that is damaged counts as none: the registry is asked again.
    fn read(&self, manifest: &Digest) -> Record {
        self.store.pull_record(manifest).and_then(|content| serde_json::from_slice(&content).ok()).unwrap_or_default()
    }
}

impl Credential {
    fn of(secret: &RegistrySecret) -> io::Result<Self> {
        let mut salt = [0; 16];
        getrandom::fill(&mut salt).map_err(|error| io::Error::other(format!("no random numbers: {error}")))?;
        let salt = hex(&salt);
        let hash = hash(&salt, &secret.login)?;
        Ok(Self { source: secret.source.clone(), salt, hash })
    }

    /// The same login, or the same Secret with another one by now: whoever may read that may go on using the image.
    fn is_of(&self, secret: &RegistrySecret) -> bool {
        (self.source.is_some() && self.source == secret.source) || self.hash_is_of(&secret.login)
    }

    fn hash_is_of(&self, login: &Login) -> bool {
        hash(&self.salt, login).is_ok_and(|hash| hash == self.hash)
    }
}

fn hash(salt: &str, login: &Login) -> io::Result<String> {
    let parts = match login {
        Login::Password { username, password } => ["password", username, password],
        Login::IdentityToken(token) => ["identity", token, ""],
        Login::RegistryToken(token) => ["registry", token, ""],
    };
    let mut mac = Hmac::<Sha256>::new_from_slice(salt.as_bytes()).map_err(|_| io::Error::other("no HMAC"))?;
    // As JSON, so that no two logins are the same bytes.
    mac.update(&serde_json::to_vec(&parts)?);
    Ok(hex(&mac.finalize().into_bytes()))
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a String cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn records() -> (tempfile::TempDir, PullRecords) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("images")).unwrap();
        (directory, PullRecords::new(Arc::new(store)))
    }

    fn name(text: &str) -> ImageName {
        ImageName::parse(text).unwrap()
    }

    fn secret(password: &str, source: Option<&str>) -> RegistrySecret {
        let login = Login::Password { username: "user".into(), password: password.into() };
        RegistrySecret { registry: "host.io".into(), login, source: source.map(str::to_owned) }
    }

    #[test]
    fn what_was_pulled_with_a_secret_is_for_who_brings_its_login_or_the_secret_itself() {
        let (_directory, records) = records();
        let (manifest, image) = (Digest::of(b"m"), name("host.io/app:v1"));
        let owner = secret("word", Some("shop/pull/1"));
        assert!(!records.allows(&manifest, &image, &[&owner]), "nothing is known yet");
        records.add(&manifest, &image, PulledWith::Secret(&owner)).unwrap();
        for (bring, expected) in [
            (owner.clone(), true),
            (secret("word", Some("other/pull/2")), true),
            (secret("rotated", Some("shop/pull/1")), true),
            (secret("wrong", Some("other/pull/2")), false),
            (secret("wrong", None), false),
        ] {
            assert_eq!(records.allows(&manifest, &image, &[&bring]), expected, "{bring:?}");
        }
        assert!(!records.allows(&manifest, &image, &[]));
        assert!(records.allows(&manifest, &image, &[&secret("wrong", None), &owner]));
    }

    #[test]
    fn what_was_pulled_without_a_secret_is_for_everybody_whatever_comes_after() {
        let (_directory, records) = records();
        let (manifest, image) = (Digest::of(b"m"), name("host.io/app:v1"));
        records.add(&manifest, &image, PulledWith::Secret(&secret("word", None))).unwrap();
        records.add(&manifest, &image, PulledWith::NodeAccess).unwrap();
        records.add(&manifest, &image, PulledWith::Secret(&secret("other", None))).unwrap();
        assert!(records.allows(&manifest, &image, &[]));
    }

    #[test]
    fn another_repository_and_another_manifest_are_asked_for_by_themselves() {
        let (_directory, records) = records();
        let manifest = Digest::of(b"m");
        records.add(&manifest, &name("host.io/app:v1"), PulledWith::NodeAccess).unwrap();
        assert!(records.allows(&manifest, &name("HOST.io/app:v2"), &[]), "a tag is no other repository");
        for other in ["host.io/app2", "host.io/team/app", "other.io/app", "host.io:443/app"] {
            assert!(
                !records.knows(&manifest, &name(other)) && !records.allows(&manifest, &name(other), &[]),
                "{other}"
            );
        }
        assert!(!records.knows(&Digest::of(b"n"), &name("host.io/app:v1")));
    }

    #[test]
    fn a_record_is_bounded_holds_no_password_and_goes_with_the_manifest() {
        let (_directory, records) = records();
        let (manifest, image) = (Digest::of(b"m"), name("host.io/app"));
        for number in 0..2 * MAX_CREDENTIALS {
            let secret = secret(&format!("word-{number}"), Some(&format!("shop/pull/{number}")));
            records.add(&manifest, &image, PulledWith::Secret(&secret)).unwrap();
        }
        for number in 0..2 * MAX_REPOSITORIES {
            records.add(&manifest, &name(&format!("host.io/app-{number}")), PulledWith::NodeAccess).unwrap();
        }
        let record = records.read(&manifest);
        assert_eq!(record.repositories.len(), MAX_REPOSITORIES);
        assert_eq!(record.repositories["host.io/app"].credentials.len(), MAX_CREDENTIALS);
        let content = records.store.pull_record(&manifest).unwrap();
        assert!(!String::from_utf8(content).unwrap().contains("word"));
        records.store.write(b"m").unwrap();
        records.store.remove(&manifest, 1);
        assert!(!records.knows(&manifest, &image));
    }

    #[test]
    fn rotating_a_secret_leaves_one_entry_of_it() {
        let (_directory, records) = records();
        let (manifest, image) = (Digest::of(b"m"), name("host.io/app"));
        for password in ["one", "two", "three"] {
            records.add(&manifest, &image, PulledWith::Secret(&secret(password, Some("shop/pull/1")))).unwrap();
        }
        assert_eq!(records.read(&manifest).repositories["host.io/app"].credentials.len(), 1);
        assert!(!records.allows(&manifest, &image, &[&secret("one", None)]));
    }
}
