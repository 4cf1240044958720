//! From an image name to verified content on this node: resolve, check type, signature and digests, store.

use crate::artifact::{Artifact, Digest, MAX_CONFIG, MAX_MANIFEST, MAX_MODULE};
use crate::error::PullError;
use crate::metrics::Metrics;
use crate::registry::{CredentialSource, FetchError, ImageName, PullPolicy, RegistryClient, RegistrySecret, Session};
use crate::signature::{self, SignedPayload, Verification};
use crate::store::Store;
use crate::{Image, SharedLocks};
use std::io;
use std::sync::Arc;
use std::time::Instant;
use tokio::sync::Semaphore;
use tokio::task::spawn_blocking;

pub struct Puller {
    pub client: RegistryClient,
    pub store: Arc<Store>,
    pub verification: Verification,
    pub credentials: Arc<dyn CredentialSource>,
    pub permits: Semaphore,
    pub locks: SharedLocks,
    pub metrics: Metrics,
}

/// What the node's own copy is worth.
enum Cached {
    Usable(Image),
    Missing,
    /// Complete, but no key that is trusted now signed it.
    Untrusted(String),
}

/// Why one attempt with one set of credentials failed.
enum Failure {
    Fetch(FetchError),
    Signature(String),
    Artifact(String),
    Store(io::Error),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Fetch(error)
    }
}

impl Puller {
    pub async fn pull(&self, image: &str, policy: PullPolicy, secrets: &[RegistrySecret]) -> Result<Image, PullError> {
        let started = Instant::now();
        let result = self.pull_any(image, policy, secrets).await;
        // A look at what is on the node is no pull that failed.
        if policy != PullPolicy::Never || result.is_ok() {
            self.metrics.pulled(&result, started.elapsed());
        }
        result
    }

    async fn pull_any(&self, image: &str, policy: PullPolicy, secrets: &[RegistrySecret]) -> Result<Image, PullError> {
        let name = ImageName::parse(image)
            .map_err(|cause| PullError::InvalidName { image: crate::artifact::shown(image), cause })?;
        if policy != PullPolicy::Always {
            if let Some(cached) = self.find_on_node(&name, policy).await? {
                return Ok(cached);
            }
            if policy == PullPolicy::Never {
                return Err(PullError::NeverPull { image: name.to_string() });
            }
        }
        // A name with a digest is locked before the registry is asked, so that a thousand pods with one image ask once.
        let _lock = match name.digest() {
            Some(digest) => Some(self.locks.lock(digest).await),
            None => None,
        };
        if policy != PullPolicy::Always
            && name.digest().is_some()
            && let Some(cached) = self.find_on_node(&name, policy).await?
        {
            return Ok(cached);
        }
        self.fetch_from_registry(&name, secrets).await
    }

    async fn find_on_node(&self, name: &ImageName, policy: PullPolicy) -> Result<Option<Image>, PullError> {
        let (store, wanted) = (self.store.clone(), name.clone());
        let digest = match name.digest() {
            Some(digest) => Some(digest.clone()),
            None => blocking(move || store.tagged(&wanted)).await,
        };
        let Some(digest) = digest else { return Ok(None) };
        match self.cached(name, &digest).await {
            Cached::Usable(image) => Ok(Some(image)),
            // The signature of a newly trusted key may be in the registry by now.
            Cached::Untrusted(cause) if policy == PullPolicy::Never => {
                Err(PullError::Signature { image: name.to_string(), cause })
            }
            Cached::Untrusted(_) | Cached::Missing => Ok(None),
        }
    }

    /// Looks at the node's own copy: every digest and the signature are checked again.
    async fn cached(&self, name: &ImageName, digest: &Digest) -> Cached {
        let (store, verification) = (self.store.clone(), self.verification.clone());
        let (name, digest) = (name.clone(), digest.clone());
        blocking(move || {
            let Some(manifest) = store.read(&digest, MAX_MANIFEST) else { return Cached::Missing };
            let Ok(artifact) = Artifact::parse(&manifest) else { return Cached::Missing };
            let config = store.read(&artifact.config.digest, MAX_CONFIG);
            if config.is_none_or(|config| artifact.check_config(&config).is_err())
                || !store.holds(&artifact.module.digest, artifact.module.size)
            {
                return Cached::Missing;
            }
            match check(&verification, &digest, &store.signatures(&digest)) {
                Ok(()) => Cached::Usable(image(&name, &digest, &artifact, true)),
                Err(cause) => Cached::Untrusted(cause),
            }
        })
        .await
    }

    async fn fetch_from_registry(&self, name: &ImageName, secrets: &[RegistrySecret]) -> Result<Image, PullError> {
        let given = RegistrySecret::fitting(secrets, name);
        let node = self.credentials.credentials(name.registry()).await;
        let attempts = given.into_iter().map(Some).chain(node.as_ref().map(Some)).chain([None]);
        let mut refusal = None;
        for credentials in attempts {
            let mut session = self.client.session(name, credentials);
            match self.attempt(name, &mut session).await {
                Ok(image) => return Ok(image),
                // The first refusal is the telling one: later attempts bring less.
                Err(Failure::Fetch(FetchError::Denied(cause))) => {
                    refusal.get_or_insert(FetchError::Denied(cause));
                }
                Err(Failure::Fetch(FetchError::NotFound(cause))) if refusal.is_some() => {
                    tracing::debug!(image = %name, cause, "not found either without credentials");
                }
                Err(failure) => return Err(failure.of(name)),
            }
        }
        let refusal = refusal.unwrap_or_else(|| FetchError::Denied("the registry refused access".into()));
        Err(Failure::Fetch(refusal).of(name))
    }

    async fn attempt(&self, name: &ImageName, session: &mut Session<'_>) -> Result<Image, Failure> {
        // A lock comes before a permit, always: those who wait for a lock with a permit in hand could wait for one who waits
        // for a permit. The semaphore is never closed.
        let permit = self.permits.acquire().await;
        let (manifest, digest) = session.manifest(name.wanted()).await?;
        drop(permit);
        let artifact = Artifact::parse(&manifest).map_err(Failure::Artifact)?;
        // Names by tag meet here once they are known to be the same manifest.
        let _lock = match name.digest() {
            Some(_) => None,
            None => Some(self.locks.lock(&digest).await),
        };
        let _permit = self.permits.acquire().await;
        self.verify(session, &digest).await?;
        let config = self.content(session, &artifact.config.digest, artifact.config.size).await?;
        artifact.check_config(&config).map_err(Failure::Artifact)?;
        self.module(session, &artifact).await?;
        let (store, name) = (self.store.clone(), name.clone());
        blocking(move || {
            store.write(&manifest).map_err(Failure::Store)?;
            if name.digest().is_none() {
                store.write_tag(&name, &digest).map_err(Failure::Store)?;
            }
            Ok(image(&name, &digest, &artifact, false))
        })
        .await
    }

    /// Checks the signature: those on the node first, then those in the registry.
    async fn verify(&self, session: &mut Session<'_>, digest: &Digest) -> Result<(), Failure> {
        if matches!(self.verification, Verification::AllowUnsigned) {
            return Ok(());
        }
        let (store, manifest) = (self.store.clone(), digest.clone());
        let known = blocking(move || store.signatures(&manifest)).await;
        if check(&self.verification, digest, &known).is_ok() {
            return Ok(());
        }
        let fetched = match session.manifest(&signature::tag(digest)).await {
            Ok((manifest, _)) => self.payloads(session, &manifest).await?,
            Err(FetchError::NotFound(_)) => Vec::new(),
            Err(error) => return Err(error.into()),
        };
        check(&self.verification, digest, &fetched).map_err(Failure::Signature)?;
        let (store, manifest) = (self.store.clone(), digest.clone());
        blocking(move || store.write_signatures(&manifest, &fetched)).await.map_err(Failure::Store)
    }

    async fn payloads(&self, session: &mut Session<'_>, manifest: &[u8]) -> Result<Vec<SignedPayload>, Failure> {
        let layers = signature::layers(manifest).map_err(Failure::Signature)?;
        let mut signatures = Vec::with_capacity(layers.len());
        for layer in layers {
            let payload = fetch(session, &layer.payload.digest, layer.payload.size).await?;
            signatures.push(SignedPayload::new(&payload, layer.signature));
        }
        Ok(signatures)
    }

    /// A small blob, from the node or the registry.
    async fn content(&self, session: &mut Session<'_>, digest: &Digest, size: u64) -> Result<Vec<u8>, Failure> {
        let (store, wanted) = (self.store.clone(), digest.clone());
        if let Some(content) = blocking(move || store.read(&wanted, size)).await {
            return Ok(content);
        }
        let content = fetch(session, digest, size).await?;
        let store = self.store.clone();
        blocking(move || store.write(&content).map(|()| content)).await.map_err(Failure::Store)
    }

    /// The module, streamed to disk.
    async fn module(&self, session: &mut Session<'_>, artifact: &Artifact) -> Result<(), Failure> {
        let (store, module) = (self.store.clone(), artifact.module.clone());
        if blocking(move || store.holds(&module.digest, module.size)).await {
            return Ok(());
        }
        let module = &artifact.module;
        let mut writer = self.store.writer().map_err(Failure::Store)?;
        session.blob(&module.digest, module.size.min(MAX_MODULE), |chunk| writer.write(chunk)).await?;
        writer.keep(&module.digest).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => Failure::Fetch(FetchError::Invalid(error.to_string())),
            _ => Failure::Store(error),
        })
    }
}

async fn fetch(session: &mut Session<'_>, digest: &Digest, size: u64) -> Result<Vec<u8>, FetchError> {
    let mut content = Vec::new();
    session
        .blob(digest, size, |chunk| {
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

fn check(verification: &Verification, digest: &Digest, signatures: &[SignedPayload]) -> Result<(), String> {
    match verification {
        Verification::Keys(keys) => signature::verify(digest, signatures, keys),
        Verification::AllowUnsigned => Ok(()),
    }
}

fn image(name: &ImageName, digest: &Digest, artifact: &Artifact, cached: bool) -> Image {
    Image {
        reference: name.pinned(digest),
        digest: digest.to_string(),
        layer: artifact.module.digest.to_string(),
        size: artifact.module.size,
        cached,
    }
}

impl Failure {
    fn of(self, name: &ImageName) -> PullError {
        use crate::artifact::cut;
        let image = name.to_string();
        match self {
            Self::Signature(cause) => PullError::Signature { image, cause: cut(&cause) },
            Self::Artifact(cause) => PullError::InvalidImage { image, cause: cut(&cause) },
            Self::Store(error) => {
                PullError::Pull { image, cause: format!("failed to store it: {error}"), permanent: false }
            }
            Self::Fetch(error) => PullError::Pull { image, cause: cut(&error), permanent: false },
        }
    }
}

/// Runs file work off the async threads. A panic in it is passed on.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match spawn_blocking(work).await {
        Ok(value) => value,
        Err(error) => match error.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            // The runtime is shutting down: nothing will look at the result.
            Err(_) => std::future::pending().await,
        },
    }
}
