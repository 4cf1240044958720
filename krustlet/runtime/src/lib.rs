//! Pulls, verifies, compiles and runs WebAssembly. Knows OCI and wasm, and no Kubernetes.
//!
//! A name becomes an [`Image`] (`pull`: digests, artifact type and signature checked), an image a [`Module`] (`load`:
//! compiled once, cached on disk), a module an [`HttpServer`] (`serve`) or an [`Execution`] (`run`).

mod admission;
mod allowed_hosts;
mod answer;
mod artifact;
mod authority;
mod bundle;
mod challenge;
mod command;
mod compile;
mod connection;
mod cpu;
mod credentials;
mod egress;
mod egress_policy;
mod engine;
mod entry;
mod error;
mod executor;
mod files;
#[cfg(any(test, feature = "fuzzing"))]
pub mod fuzzing;
mod garbage;
mod gate;
mod guest;
mod handler;
mod http;
mod image_name;
mod imports;
mod instance_size;
mod limits;
mod linkers;
mod logs;
mod memory;
mod metrics;
mod module;
mod mounts;
mod name_service;
mod open;
mod precompiled;
mod preview_1;
mod provenance;
mod public_key;
mod pull;
mod pull_places;
mod pull_records;
mod registry;
mod sandbox;
mod shares;
mod signature;
mod signature_search;
mod source;
mod stack;
mod store;
mod tenants;
#[cfg(test)]
mod testing;
mod trusted;
mod yield_points;

pub use command::{Execution, Exit, ExitReason};
pub use compile::{Compiler, main as compiler_main};
pub use credentials::{CredentialSource, DockerConfig, Login, NoCredentials, RegistrySecret};
pub use egress::EgressConfig;
pub use egress_policy::{EgressPolicy, Refused};
pub use error::{LoadError, PullError, StartError};
pub use garbage::Freed;
pub use gate::{Gate, Verdict};
pub use guest::{ContainerSpec, HeldMemory, PodMemory, Stats};
pub use http::HttpServer;
pub use ipnet::{IpNet, Ipv4Net};
pub use logs::{LogFile, LogLimits, LogStream};
pub use module::{Kind, Module};
pub use mounts::Mount;
pub use name_service::NameService;
pub use provenance::Builder;
pub use public_key::PublicKey;
pub use pull_places::PullLimits;
pub use registry::{OperatorsRegistries, PullPolicy};
pub use signature::Verification;

use anyhow::Context as _;
use connection::Limits;
use egress::Egress;
use executor::Executor;
use image_name::ImageName;
use memory::{Budget, Scope};
use metrics::Metrics;
use module::Loader;
use parking_lot::{Mutex, RwLock};
use precompiled::Cache;
use pull::Puller;
use pull_places::Places;
use pull_records::PullRecords;
use registry::RegistryClient;
use std::collections::HashMap;
use std::fmt;
use std::hash::Hash;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Weak};
use std::time::SystemTime;
use store::Store;
use tokio::sync::OwnedMutexGuard;

/// The wasmtime release that guests run on; part of the compile cache's key.
pub const WASMTIME_VERSION: &str = wasmtime_environ::VERSION;

pub struct RuntimeConfig {
    /// Holds `images/` and `precompiled/`, readable by this user alone.
    pub data_dir: PathBuf,
    pub verification: Verification,
    pub credentials: Arc<dyn CredentialSource>,
    pub registries: OperatorsRegistries,
    /// The program that compiles modules.
    pub compiler: Compiler,
    pub max_concurrent_compiles: usize,
    pub pull_limits: PullLimits,
    pub egress: EgressConfig,
    /// Bytes that all guests may make the node hold together; what the machine can spare without it.
    pub guest_memory: Option<u64>,
    /// Pods that may run at a time: each is guaranteed its part of what the node has.
    pub max_pods: usize,
}

/// A verified image on this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// `repository@sha256:…`
    pub reference: String,
    /// The manifest's digest.
    pub digest: String,
    /// The module layer's digest.
    pub layer: String,
    /// Bytes of the module.
    pub size: u64,
    /// Whether it was on the node already.
    pub cached: bool,
}

/// The wasm side of a node; clones share everything.
#[derive(Clone)]
pub struct Runtime(Arc<Inner>);

struct Inner {
    executor: Arc<Executor>,
    puller: Puller,
    loader: Arc<Loader>,
    metrics: Metrics,
    /// Budgets of pods, by UID, for as long as a container has one.
    pods: Mutex<HashMap<String, Weak<Budget>>>,
}

impl fmt::Debug for Runtime {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("Runtime")
    }
}

impl Runtime {
    /// Makes the engine and opens the stores under `data_dir`; metrics are registered as `krustlet_…`.
    pub fn new(config: RuntimeConfig, registry: &mut prometheus_client::registry::Registry) -> anyhow::Result<Self> {
        // Another part of the process may have chosen a provider before.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let images = config.data_dir.join("images");
        let context = format!("failed to open the image store {}", images.display());
        let store = Arc::new(Store::open(images).context(context)?);
        let egress = Arc::new(Egress::new(config.egress).map_err(|cause| anyhow::anyhow!(cause))?);
        let executor = Executor::new(egress, config.guest_memory, config.max_pods);
        let executor = Arc::new(executor.map_err(|error| anyhow::anyhow!("{error:#}"))?);
        let cache = Arc::new(Cache::open(config.data_dir.join("precompiled"), &executor.engine)?);
        let metrics = Metrics::register(registry);
        let puller = Puller {
            client: RegistryClient::new(config.registries).context("failed to make the registry client")?,
            records: PullRecords::new(store.clone()),
            store: store.clone(),
            verification: RwLock::new(Arc::new(config.verification)),
            credentials: config.credentials,
            places: Places::new(config.pull_limits),
            locks: SharedLocks::default(),
            metrics: metrics.clone(),
        };
        let compiles = config.max_concurrent_compiles;
        let loader = Loader::new(executor.clone(), store, cache, metrics.clone(), config.compiler, compiles);
        let loader = loader.map_err(|error| anyhow::anyhow!("{error:#}"))?;
        Ok(Self(Arc::new(Inner { executor, puller, loader: Arc::new(loader), metrics, pods: Mutex::default() })))
    }

    /// A container's limit in bytes where its pod sets none.
    pub fn default_memory_limit(&self) -> u64 {
        self.0.executor.default_memory
    }

    /// What all guests together may make the node hold, and what they do.
    pub fn guest_memory(&self) -> (u64, u64) {
        let node = &self.0.executor.memory;
        (node.limit(), node.used())
    }

    /// What the containers of a pod may make the node hold together. The pod's containers that are alive have the same one.
    pub fn pod_memory(&self, uid: &str, limit: u64) -> PodMemory {
        let mut pods = self.0.pods.lock();
        if let Some(budget) = pods.get(uid).and_then(Weak::upgrade) {
            budget.set_limit(limit);
            return PodMemory(budget);
        }
        pods.retain(|_, budget| budget.strong_count() > 0);
        let budget = Budget::within(&self.0.executor.memory, Scope::Pod, limit);
        pods.insert(uid.to_owned(), Arc::downgrade(&budget));
        PodMemory(budget)
    }

    /// Keeps guests from the API server from now on, as it is named and where it is.
    pub fn refuse_api_server(&self, name: &str, addresses: impl IntoIterator<Item = IpAddr>) {
        self.0.executor.egress.policy.add_api_server(name, addresses);
    }

    /// What guests may connect to, now and as it is later.
    pub fn egress_policy(&self) -> Arc<EgressPolicy> {
        self.0.executor.egress.policy.clone()
    }

    /// Has guests' requests to the names that the service knows go where it says. Once for the life of the runtime.
    pub fn resolve_names(&self, service: Arc<dyn NameService>) {
        self.0.executor.egress.names.set(service);
    }

    /// Who may sign what is pulled from now on, also what is on the node already.
    pub fn verify_by(&self, verification: Verification) {
        *self.0.puller.verification.write() = Arc::new(verification);
    }

    /// By what images are judged now. Another `Arc` than before is another judgement.
    pub fn verification(&self) -> Arc<Verification> {
        self.0.puller.verification.read().clone()
    }

    /// Has the image on this node, its digests, type and signature checked. One pull a digest, however many ask.
    pub async fn pull(&self, image: &str, policy: PullPolicy, secrets: &[RegistrySecret]) -> Result<Image, PullError> {
        self.pull_built_by(image, policy, secrets, &[]).await
    }

    /// The same of an image that one of `builders` built, where there are any.
    pub async fn pull_built_by(
        &self,
        image: &str,
        policy: PullPolicy,
        secrets: &[RegistrySecret],
        builders: &[Builder],
    ) -> Result<Image, PullError> {
        self.0.puller.pull(image, policy, secrets, builders).await
    }

    /// Compiles the image's module, once a digest however many ask, or takes it from the cache.
    pub async fn load(&self, image: &Image) -> Result<Module, LoadError> {
        self.0.loader.load(&image.layer).await
    }

    /// Frees `wanted` bytes of disk, if there are so many: images go that have none of these names, those first that were
    /// not used for longest. Their compiled code goes with them.
    pub async fn free_disk(&self, in_use: &[String], wanted: u64) -> Freed {
        let names: Vec<ImageName> = in_use.iter().filter_map(|name| ImageName::parse(name).ok()).collect();
        let (store, cache) = (self.0.puller.store.clone(), self.0.loader.cache.clone());
        let work = move || {
            let in_use =
                names.iter().filter_map(|name| name.digest().cloned().or_else(|| store.tagged(name))).collect();
            garbage::free(&store, &cache, &in_use, wanted, SystemTime::now())
        };
        let freed = tokio::task::spawn_blocking(work).await.unwrap_or_default();
        self.0.metrics.removed(freed.images);
        freed
    }

    /// Serves an `HttpProxy` module on all of the addresses.
    pub async fn serve(
        &self,
        module: &Module,
        spec: ContainerSpec,
        addresses: &[SocketAddr],
    ) -> Result<HttpServer, StartError> {
        HttpServer::start(&self.0.executor, &self.0.metrics, module, spec, addresses, Limits::default())
    }

    /// Starts a `Command` or `CoreModule`.
    pub async fn run(&self, module: &Module, spec: ContainerSpec) -> Result<Execution, StartError> {
        Execution::start(&self.0.executor, &self.0.metrics, module, spec)
    }

    /// Gives the end of a container whose guest was not to run.
    pub fn complete(&self, spec: ContainerSpec) -> Result<Execution, StartError> {
        Execution::completed(&self.0.executor, spec)
    }
}

/// One lock a key, so that what many ask for at once is done once.
struct SharedLocks<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for SharedLocks<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Clone + Eq + Hash> SharedLocks<K> {
    async fn lock(&self, key: &K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock();
            match locks.get(key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    locks.retain(|_, lock| lock.strong_count() > 0);
                    let lock = Arc::default();
                    locks.insert(key.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}
