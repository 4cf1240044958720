//! From an image name to verified content on this node: resolve, check type, signature and digests, store.

use crate::artifact::{Artifact, Descriptor, Digest, MAX_CONFIG, MAX_MANIFEST, MAX_MODULE, Refused};
use crate::credentials::{CredentialSource, RegistrySecret};
use crate::error::PullError;
use crate::image_name::ImageName;
use crate::metrics::Metrics;
use crate::provenance::{self, Builder};
use crate::pull_places::{Lost, Place, Places};
use crate::pull_records::{PullRecords, PulledWith};
use crate::registry::{FetchError, PullPolicy, RegistryClient, Session};
use crate::signature::{self, MAX_SIGNATURES, Signed, Verification};
use crate::signature_search::{self, NotSigned, Wanted};
use crate::store::Store;
use crate::{Image, SharedLocks};
use bytes::Bytes;
use parking_lot::RwLock;
use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::task::spawn_blocking;

/// A manifest up to this size is read before its signature is asked for: it tells at once what is no wasm artifact. One of a
/// wasm artifact has some hundreds of bytes.
const SMALL_MANIFEST: u64 = 64 * 1024;
/// Of a container image's config, to tell its platform.
const MAX_FOREIGN_CONFIG: u64 = 64 * 1024;
/// Credentials that are tried for one pull.
const MAX_LOGINS: usize = 16;

pub struct Puller {
    pub client: RegistryClient,
    pub store: Arc<Store>,
    pub records: PullRecords,
    pub verification: RwLock<Arc<Verification>>,
    pub credentials: Arc<dyn CredentialSource>,
    pub places: Places,
    /// By repository and digest. Not by digest alone: whoever names another's image at a slow registry would hold it up.
    pub locks: SharedLocks<(String, Digest)>,
    pub metrics: Metrics,
}

/// What the node's own copy is worth.
enum Cached {
    Usable(Image),
    Missing,
    /// Complete, but no key that is trusted now signed it, or nobody says that a builder who may has built it.
    Untrusted(String),
}

/// Why one attempt with one set of credentials failed.
enum Failure {
    Fetch(FetchError),
    Signature { cause: String, digest: Digest },
    Provenance { cause: String, digest: Digest },
    Artifact(Refused),
    Store(io::Error),
}

impl From<FetchError> for Failure {
    fn from(error: FetchError) -> Self {
        Self::Fetch(error)
    }
}

/// What a name stands for.
struct Resolved {
    digest: Digest,
    /// Where it is small.
    manifest: Option<(Bytes, Artifact)>,
}

impl Puller {
    pub async fn pull(
        &self,
        image: &str,
        policy: PullPolicy,
        secrets: &[RegistrySecret],
        builders: &[Builder],
    ) -> Result<Image, PullError> {
        let started = Instant::now();
        let result = self.pull_any(image, policy, secrets, builders).await;
        // A look at what is on the node is no pull that failed.
        if policy != PullPolicy::Never || result.is_ok() {
            self.metrics.pulled(&result, started.elapsed());
        }
        result
    }

    async fn pull_any(
        &self,
        image: &str,
        policy: PullPolicy,
        secrets: &[RegistrySecret],
        builders: &[Builder],
    ) -> Result<Image, PullError> {
        let name = ImageName::parse(image)
            .map_err(|cause| PullError::InvalidName { image: crate::artifact::shown(image), cause })?;
        let secrets = RegistrySecret::fitting(secrets, &name);
        if policy != PullPolicy::Always {
            if let Some(cached) = self.find_on_node(&name, policy, &secrets, builders).await? {
                return Ok(cached);
            }
            if policy == PullPolicy::Never {
                return Err(PullError::NeverPull { image: name.to_string() });
            }
        }
        // A name with a digest is locked before the registry is asked, so that a thousand pods with one image ask once.
        let _lock = match name.digest() {
            Some(digest) => Some(self.lock(&name, digest).await),
            None => None,
        };
        if policy != PullPolicy::Always
            && name.digest().is_some()
            && let Some(cached) = self.find_on_node(&name, policy, &secrets, builders).await?
        {
            return Ok(cached);
        }
        self.fetch_from_registry(&name, &secrets, builders).await
    }

    async fn lock(&self, name: &ImageName, digest: &Digest) -> tokio::sync::OwnedMutexGuard<()> {
        self.locks.lock(&(name.whole_repository(), digest.clone())).await
    }

    /// The node's own copy, if a pod with these secrets may use it.
    async fn find_on_node(
        &self,
        name: &ImageName,
        policy: PullPolicy,
        secrets: &[&RegistrySecret],
        builders: &[Builder],
    ) -> Result<Option<Image>, PullError> {
        let (store, wanted) = (self.store.clone(), name.clone());
        let digest = match name.digest() {
            Some(digest) => Some(digest.clone()),
            None => blocking(move || store.tagged(&wanted)).await,
        };
        let Some(digest) = digest else { return Ok(None) };
        // Whether it is here at all, is also no business of others.
        if !self.records.allows(&digest, name, secrets) {
            return Ok(None);
        }
        match self.cached(name, &digest, builders).await {
            Cached::Usable(image) => Ok(Some(image)),
            // The signature of a newly trusted key may be in the registry by now.
            Cached::Untrusted(cause) if policy == PullPolicy::Never => {
                let cause = format!("{cause}; with pull policy IfNotPresent or Always another one is looked for");
                Err(PullError::Signature { image: name.to_string(), cause })
            }
            Cached::Untrusted(_) | Cached::Missing => Ok(None),
        }
    }

    /// Looks at the node's own copy: every digest, the signature and who built it are checked again.
    async fn cached(&self, name: &ImageName, digest: &Digest, builders: &[Builder]) -> Cached {
        let (store, verification) = (self.store.clone(), self.verification.read().clone());
        let (name, digest, builders) = (name.clone(), digest.clone(), builders.to_vec());
        blocking(move || {
            let Some(manifest) = store.read(&digest, MAX_MANIFEST) else { return Cached::Missing };
            let Ok(artifact) = Artifact::parse(&manifest) else { return Cached::Missing };
            let config = store.read(&artifact.config.digest, MAX_CONFIG);
            if config.is_none_or(|config| artifact.check_config(&config).is_err())
                || !store.holds(&artifact.module.digest, artifact.module.size)
            {
                return Cached::Missing;
            }
            let checked = check(&verification, &digest, &store.signatures(&digest));
            match checked.and_then(|()| built_by(&verification, &digest, &store, &builders)) {
                Ok(()) => Cached::Usable(image(&name, &digest, &artifact, true)),
                Err(cause) => Cached::Untrusted(cause),
            }
        })
        .await
    }

    async fn fetch_from_registry(
        &self,
        name: &ImageName,
        secrets: &[&RegistrySecret],
        builders: &[Builder],
    ) -> Result<Image, PullError> {
        let node = self.credentials.credentials(name.registry()).await;
        let given = secrets.iter().take(MAX_LOGINS).copied();
        let attempts = given.map(Some).chain(node.as_ref().map(Some)).chain([None]);
        let mut refusal = None;
        for credentials in attempts {
            match self.attempt(name, credentials, builders).await {
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

    async fn attempt(
        &self,
        name: &ImageName,
        credentials: Option<&RegistrySecret>,
        builders: &[Builder],
    ) -> Result<Image, Failure> {
        let mut session = self.client.session(name, credentials);
        let limits = self.places.limits;
        // A lock comes before a place, always: those who wait for a lock with a place in hand could wait for one who waits
        // for a place.
        let began = Instant::now();
        let place = self.place(name, &mut session).await;
        let resolved = within(&place, limits.deadline, self.resolve(name, &mut session)).await?;
        drop(place);
        // Names by tag meet here once they are known to be the same manifest.
        let _lock = match name.digest() {
            Some(_) => None,
            None => Some(self.lock(name, &resolved.digest).await),
        };
        let place = self.place(name, &mut session).await;
        let digest = resolved.digest.clone();
        // Content that is here because another repository had it has to be shown by this one as well: to know a digest is no
        // right to what it stands for.
        let mine = self.records.knows(&digest, name);
        let left = limits.deadline.saturating_sub(began.elapsed());
        let (manifest, artifact) = within(&place, left, self.documents(&mut session, resolved, mine, builders)).await?;
        let time = limits.deadline_for(artifact.module.size);
        let fetched = within(&place, time, self.module(&mut session, &artifact, mine)).await?;
        let (store, tag) = (self.store.clone(), name.clone());
        let tagged = digest.clone();
        let known = blocking(move || {
            let known = store.read(&tagged, MAX_MANIFEST).is_some();
            store.write(&manifest)?;
            if tag.digest().is_none() {
                store.write_tag(&tag, &tagged)?;
            }
            Ok::<_, io::Error>(known)
        })
        .await
        .map_err(Failure::Store)?;
        let with = match credentials {
            Some(secret) if secret.source.is_some() && session.was_authorized() => PulledWith::Secret(secret),
            _ => PulledWith::NodeAccess,
        };
        self.records.add(&digest, name, with).map_err(Failure::Store)?;
        Ok(image(name, &digest, &artifact, known && !fetched))
    }

    /// A place to read from the name's registry, which the session's speed is measured for.
    async fn place(&self, name: &ImageName, session: &mut Session<'_>) -> Place<'_> {
        match self.places.take(name.registry()).await {
            Some(place) => {
                session.measure(place.progress.clone(), self.places.limits);
                place
            }
            // The runtime is shutting down: nothing will look at the result.
            None => std::future::pending().await,
        }
    }

    /// Asks what the name stands for, and looks at it when it is small.
    async fn resolve(&self, name: &ImageName, session: &mut Session<'_>) -> Result<Resolved, Failure> {
        match session.manifest(name.wanted(), SMALL_MANIFEST).await {
            Ok((manifest, digest)) => match Artifact::parse(&manifest) {
                Ok(artifact) => Ok(Resolved { digest, manifest: Some((manifest, artifact)) }),
                Err(refused) => Err(Failure::Artifact(self.with_platform(session, refused).await)),
            },
            Err(FetchError::TooLarge { cause, claimed }) => match name.digest().cloned().or(claimed) {
                Some(digest) => Ok(Resolved { digest, manifest: None }),
                None => Err(FetchError::Invalid(format!("{cause}, and the registry does not tell its digest")).into()),
            },
            Err(error) => Err(error.into()),
        }
    }

    /// The signature first, and what it is for after it.
    async fn documents(
        &self,
        session: &mut Session<'_>,
        resolved: Resolved,
        mine: bool,
        builders: &[Builder],
    ) -> Result<(Bytes, Artifact), Failure> {
        self.verify(session, &resolved.digest).await?;
        self.verify_builder(session, &resolved.digest, builders).await?;
        let (manifest, artifact) = match resolved.manifest {
            Some(small) => small,
            None => {
                let (manifest, _) = session.manifest(resolved.digest.as_str(), MAX_MANIFEST).await?;
                let artifact = Artifact::parse(&manifest).map_err(Failure::Artifact)?;
                (manifest, artifact)
            }
        };
        let config = self.config(session, &artifact.config, mine).await?;
        artifact.check_config(&config).map_err(Failure::Artifact)?;
        Ok((manifest, artifact))
    }

    /// Adds a container image's platform to the words that refuse it.
    async fn with_platform(&self, session: &mut Session<'_>, refused: Refused) -> Refused {
        let Some(config) = refused.container_config().filter(|config| config.size <= MAX_FOREIGN_CONFIG).cloned()
        else {
            return refused;
        };
        match session.whole_blob(&config.digest, config.size).await {
            Ok(config) => refused.with_container_config(&config),
            Err(_) => refused,
        }
    }

    /// Checks the signature: those on the node first, then those in the registry.
    async fn verify(&self, session: &mut Session<'_>, digest: &Digest) -> Result<(), Failure> {
        let verification = self.verification.read().clone();
        let Verification::Keys(keys) = &*verification else { return Ok(()) };
        let (store, manifest) = (self.store.clone(), digest.clone());
        let known = blocking(move || store.signatures(&manifest)).await;
        if signature::verify(digest, &known, keys).is_ok() {
            return Ok(());
        }
        match signature_search::find(session, digest, keys, Wanted::Signature).await {
            Ok(signed) => {
                let (store, manifest) = (self.store.clone(), digest.clone());
                blocking(move || store.write_signatures(&manifest, &[signed])).await.map_err(Failure::Store)
            }
            Err(NotSigned::Unknown(error)) => Err(error.into()),
            Err(NotSigned::Refused(cause)) => Err(Failure::Signature { cause, digest: digest.clone() }),
        }
    }

    /// Checks who built it, where that is asked for.
    async fn verify_builder(
        &self,
        session: &mut Session<'_>,
        digest: &Digest,
        builders: &[Builder],
    ) -> Result<(), Failure> {
        let verification = self.verification.read().clone();
        let Verification::Keys(keys) = &*verification else { return Ok(()) };
        let (store, manifest, named) = (self.store.clone(), digest.clone(), builders.to_vec());
        let trusted = verification.clone();
        if blocking(move || built_by(&trusted, &manifest, &store, &named)).await.is_ok() {
            return Ok(());
        }
        match signature_search::find(session, digest, keys, Wanted::Provenance(builders)).await {
            Ok(signed) => {
                let (store, manifest) = (self.store.clone(), digest.clone());
                // Another namespace may take another builder: the newest first, and no more than are looked at.
                blocking(move || {
                    let mut kept = store.provenance(&manifest);
                    kept.retain(|known| *known != signed);
                    kept.insert(0, signed);
                    kept.truncate(MAX_SIGNATURES);
                    store.write_provenance(&manifest, &kept)
                })
                .await
                .map_err(Failure::Store)
            }
            Err(NotSigned::Unknown(error)) => Err(error.into()),
            Err(NotSigned::Refused(cause)) => Err(Failure::Provenance { cause, digest: digest.clone() }),
        }
    }

    /// The config document, from the node or the registry.
    async fn config(&self, session: &mut Session<'_>, config: &Descriptor, mine: bool) -> Result<Vec<u8>, Failure> {
        if mine {
            let (store, wanted) = (self.store.clone(), config.clone());
            if let Some(content) = blocking(move || store.read(&wanted.digest, wanted.size)).await {
                return Ok(content);
            }
        }
        let content = session.whole_blob(&config.digest, config.size).await?;
        let store = self.store.clone();
        blocking(move || store.write(&content).map(|()| content)).await.map_err(Failure::Store)
    }

    /// The module, streamed to disk; whether it had to be fetched.
    async fn module(&self, session: &mut Session<'_>, artifact: &Artifact, mine: bool) -> Result<bool, Failure> {
        let module = &artifact.module;
        if mine {
            let (store, module) = (self.store.clone(), module.clone());
            if blocking(move || store.holds(&module.digest, module.size)).await {
                return Ok(false);
            }
        }
        let mut writer = self.store.writer().map_err(Failure::Store)?;
        session.blob(&module.digest, module.size.min(MAX_MODULE), |chunk| writer.write(chunk)).await?;
        writer.keep(&module.digest).map_err(|error| match error.kind() {
            io::ErrorKind::InvalidData => Failure::Fetch(FetchError::Invalid(error.to_string())),
            _ => Failure::Store(error),
        })?;
        Ok(true)
    }
}

/// Does what needs a place for as long as the pull has it.
async fn within<T>(
    place: &Place<'_>,
    time: Duration,
    work: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let lost = |cause: String| Err(Failure::Fetch(FetchError::Unavailable(cause)));
    tokio::select! {
        result = work => result,
        lost_as = place.lost() => lost(match lost_as {
            Lost::Evicted => "the registry is slow, and other pulls waited for its place; it is tried again".into(),
            Lost::TooSlow => "the registry is slower than this node waits for".into(),
        }),
        () = tokio::time::sleep(time) => lost(format!("the registry took longer than {} s", time.as_secs())),
    }
}

fn check(verification: &Verification, digest: &Digest, signatures: &[Signed]) -> Result<(), String> {
    match verification {
        Verification::Keys(keys) => signature::verify(digest, signatures, keys),
        Verification::AllowUnsigned => Ok(()),
    }
}

fn built_by(verification: &Verification, digest: &Digest, store: &Store, builders: &[Builder]) -> Result<(), String> {
    // The usual case reads nothing.
    let kept = if builders.is_empty() { Vec::new() } else { store.provenance(digest) };
    provenance::verify(verification, digest, &kept, builders)
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
            Self::Signature { cause, digest } => {
                let remedy = signature::remedy(&name.pinned(&digest));
                PullError::Signature { image, cause: format!("{}; {remedy}", cut(&cause)) }
            }
            Self::Provenance { cause, digest } => {
                let remedy = provenance::remedy(&name.pinned(&digest));
                PullError::Signature { image, cause: format!("{}; {remedy}", cut(&cause)) }
            }
            Self::Artifact(refused) => {
                let remedy = refused.remedy(&name.whole_repository(), name.tag());
                PullError::InvalidImage { image, cause: format!("{}; {remedy}", cut(&refused)) }
            }
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
