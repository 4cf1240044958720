//! From a container's specification to a running guest: image, module, volumes and environment at once, then the start.

use super::context::NodeContext;
use super::environment::{self, ContainerEnvironment};
use super::failure::Failure;
use super::fields::PodFacts;
use super::guest::{Guest, GuestKind};
use super::lifecycle::Launched;
use super::limits::{self, Limits};
use super::sources::{ConfigError, Wanted};
use super::volumes::{Mounts, PodVolumes};
use super::{Role, annotation, full_name, hooks, images, namespace, ports, probes, uid};
use crate::addresses::PodAddress;
use crate::events::Severity;
use crate::logs;
use crate::policies::Standing;
use crate::ports::{Holder, Refused};
use crate::reasons::event;
use k8s_openapi::api::core::v1::{Container, Pod};
use krustlet_runtime::{ContainerSpec, HeldMemory, HttpServer, Image, Kind, LogFile, LogLimits, Module, PodMemory};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, OnceCell};

/// The key that a bundle has in the ConfigMaps of the field.
const DEFAULT_CA_KEY: &str = "ca.crt";
/// ConfigMaps and Secrets, of up to a mebibyte each, that a container refers to without waiting for the others of its pod.
const FEW_OBJECTS: usize = 4;
/// How long a pod waits for the NetworkPolicies before it says so.
const UNSAID: Duration = Duration::from_secs(2);
/// What any container may have, without its being counted.
const ORDINARY: usize = 16 * 1024;

/// What one try to start a container goes by.
pub struct Start {
    pub node: Arc<NodeContext>,
    pub pod: Arc<Pod>,
    pub container: Container,
    pub role: Role,
    pub address: PodAddress,
    pub facts: PodFacts,
    pub volumes: Arc<OnceCell<PodVolumes>>,
    /// Held by the container of the pod that reads many objects: they are all in memory at once.
    pub reading: Arc<Mutex<()>>,
}

/// All that a start needs.
pub struct Prepared {
    start: Start,
    image: Image,
    module: Module,
    limits: Limits,
    environment: ContainerEnvironment,
    mounts: Mounts,
    ca_bundle: Option<String>,
    /// What environment and bundle take of the pod's memory.
    held: Vec<HeldMemory>,
}

/// A guest that was started, and its log.
pub struct Started {
    pub guest: Guest,
    pub log: LogFile,
    pub launched: Launched,
}

impl Start {
    /// Fetches everything that a start needs, at the same time.
    pub async fn prepare(self) -> Result<Prepared, Failure> {
        limits::check_counts(&self.pod).map_err(Failure::configuration)?;
        probes::validate(&self.container).map_err(Failure::configuration)?;
        hooks::validate(&self.container).map_err(Failure::configuration)?;
        let limits = Limits::of(&self.pod, &self.container).map_err(Failure::configuration)?;
        let node = &self.node;
        // What was changed before this start is what the container gets.
        let begin = Instant::now();
        let mut verification = node.runtime.verification();
        let volumes = async {
            let dir = node.pod_dir(&self.pod).join("volumes");
            let prepare = || PodVolumes::prepare(&node.objects, &self.pod, &self.facts, &dir, &node.host_paths, begin);
            self.volumes.get_or_try_init(prepare).await.map_err(|error| Failure::volumes(&error))
        };
        let environment = async {
            let _reading = match Wanted::by_environment(&self.container).count() {
                0..=FEW_OBJECTS => None,
                _ => Some(self.reading.lock().await),
            };
            environment::resolve(&node.objects, &self.pod, &self.container, &self.facts, begin)
                .await
                .map_err(|error| Failure::configuration(error.to_string()))
                .and_then(|environment| Ok((self.hold(environment.size(), "environment")?, environment)))
        };
        let ca_bundle = async {
            let bundle = self.ca_bundle(begin).await?;
            // As text, and as what is made of it.
            let size = bundle.as_ref().map_or(0, |bundle| 2 * bundle.len());
            Ok::<_, Failure>((self.hold(size, "bundle of certificate authorities")?, bundle))
        };
        // None is cut short by another's failure: what was pulled stays pulled.
        let (module, volumes, environment, ca_bundle, ()) =
            tokio::join!(self.module(), volumes, environment, ca_bundle, self.policies());
        volumes?;
        let ((of_environment, environment), (of_bundle, ca_bundle)) = (environment?, ca_bundle?);
        let (mut image, mut module) = module?;
        if module.kind() == Kind::HttpProxy && self.role == Role::Init && !limits.prepare_only {
            return Err(Failure::container(
                "an init container runs to completion, and this component serves HTTP; give it restartPolicy Always or \
                 put it under containers",
            ));
        }
        let (mounts, environment) = self.mounts(environment).await.map_err(|error| Failure::volumes(&error))?;
        // Keys that were taken meanwhile are those that this start is judged by.
        while !Arc::ptr_eq(&verification, &node.runtime.verification()) {
            verification = node.runtime.verification();
            (image, module) = self.module().await?;
        }
        let held = vec![of_environment, of_bundle];
        Ok(Prepared { image, module, limits, environment, mounts, ca_bundle, held, start: self })
    }

    /// Nobody is let in before it is known who may be.
    async fn policies(&self) {
        let node = &self.node;
        let known = node.policies.known_for(&self.pod);
        tokio::pin!(known);
        if tokio::time::timeout(UNSAID, &mut known).await.is_ok() {
            return;
        }
        let mut message =
            "waits until the NetworkPolicies, and who they let in, were read from the API server".to_owned();
        if let Standing::Asking(Some(why)) = &*node.policies.standing().borrow() {
            message += &format!(": {why}");
        }
        node.events.pod(&self.pod, None, Severity::Warning, event::POLICIES_UNKNOWN, message);
        known.await;
    }

    fn pod_memory(&self) -> PodMemory {
        let runtime = &self.node.runtime;
        let memory = limits::pod_memory(&self.pod, runtime.default_memory_limit());
        runtime.pod_memory(uid(&self.pod), memory)
    }

    /// Counts what the agent keeps for a container as its pod's memory: a pod may have many, and each of these be large.
    fn hold(&self, size: usize, what: &str) -> Result<HeldMemory, Failure> {
        let size = if size > ORDINARY { size as u64 } else { 0 };
        self.pod_memory().hold(size).map_err(|cause| {
            Failure::configuration(format!("the pod has no memory for the container's {what}: {cause}"))
        })
    }

    /// The container's directories, opened now and once: what happens to their paths later changes nothing.
    async fn mounts(&self, environment: ContainerEnvironment) -> Result<(Mounts, ContainerEnvironment), ConfigError> {
        let (volumes, container) = (self.volumes.clone(), self.container.clone());
        let open = move || {
            let mounts = volumes.get().map(|volumes| volumes.mounts(&container, &environment)).transpose()?;
            Ok((mounts.unwrap_or_default(), environment))
        };
        let failed = |error| ConfigError::Missing(format!("failed to open the container's directories: {error}"));
        tokio::task::spawn_blocking(open).await.map_err(failed)?
    }

    /// The certificate authorities that the pod names.
    async fn ca_bundle(&self, begin: Instant) -> Result<Option<String>, Failure> {
        let annotations = self.pod.metadata.annotations.as_ref();
        let Some(source) = annotations.and_then(|all| all.get(annotation::CA_BUNDLE)) else { return Ok(None) };
        let (name, key) = source.trim().split_once('/').unwrap_or((source.trim(), DEFAULT_CA_KEY));
        let mut wanted = Wanted::default();
        wanted.config_maps.insert(name.to_owned());
        let sources = self.node.objects.read(namespace(&self.pod), &wanted, begin).await;
        let found = sources.and_then(|sources| sources.config_map(name, false).map(|found| found.cloned()));
        // The API server gives a node what its pods refer to, and an annotation is no reference.
        let bundle = found.map_err(|error| {
            Failure::configuration(format!(
                "annotation {}: {error}; the ConfigMap must be among the pod's volumes too",
                annotation::CA_BUNDLE
            ))
        })?;
        match bundle.and_then(|map| map.data).and_then(|mut data| data.remove(key)) {
            Some(bundle) => Ok(Some(bundle)),
            None => Err(Failure::configuration(format!(
                "annotation {}: ConfigMap {name} has no key {key}",
                annotation::CA_BUNDLE
            ))),
        }
    }

    async fn module(&self) -> Result<(Image, Module), Failure> {
        let node = &self.node;
        let image = images::get(node, &self.pod, &self.container).await.map_err(|error| Failure::pull(&error))?;
        let module = node.runtime.load(&image).await.map_err(|error| Failure::load(&error))?;
        Ok((image, module))
    }
}

impl Prepared {
    pub fn kind(&self) -> GuestKind {
        match self.module.kind() {
            Kind::HttpProxy if !self.limits.prepare_only => GuestKind::Server,
            _ => GuestKind::Command,
        }
    }

    /// Starts the guest: run number `attempt`, 0 for the first.
    pub async fn launch(self, attempt: i32) -> Result<Started, Failure> {
        let Start { node, pod, container, .. } = &self.start;
        let ports = match self.kind() {
            GuestKind::Server => Some(self.claim_ports()?),
            GuestKind::Command => None,
        };
        let file = logs::file(&node.data_dir, pod, &container.name, attempt);
        let log = logs::remove_old(&file, attempt)
            .and_then(|()| LogFile::create(file, LogLimits::default()))
            .map_err(|error| Failure::container(format!("failed to open the container's log: {error}")))?;
        let mut launched = Launched {
            kind: self.kind(),
            image: self.image.reference.clone(),
            addresses: Vec::new(),
            unserved: Vec::new(),
        };
        let runtime = node.runtime.clone();
        let guest = if let Some(addresses) = ports {
            launched.addresses.clone_from(&addresses);
            launched.unserved = ports::unserved(container);
            let (module, spec) = self.spec(log.clone());
            let server = runtime.serve(&module, spec, &addresses).await.map_err(|error| Failure::start(&error))?;
            Guest::Server(Arc::new(server))
        } else if self.limits.prepare_only {
            let (_, spec) = self.spec(log.clone());
            Guest::Command(Arc::new(runtime.complete(spec).map_err(|error| Failure::start(&error))?))
        } else {
            let (module, spec) = self.spec(log.clone());
            let execution = runtime.run(&module, spec).await.map_err(|error| Failure::start(&error))?;
            Guest::Command(Arc::new(execution))
        };
        Ok(Started { guest, log, launched })
    }

    /// Puts the container's new image in the place of the one that is being served; gives its `repository@digest`.
    pub async fn swap(self, server: Arc<HttpServer>, log: LogFile) -> Result<String, Failure> {
        if self.kind() != GuestKind::Server {
            return Err(Failure::container(
                "the new image runs to completion and cannot take the place of one that serves; delete the pod instead",
            ));
        }
        let image = self.image.reference.clone();
        let (module, spec) = self.spec(log);
        server.swap(&module, spec).await.map_err(|error| Failure::start(&error))?;
        Ok(image)
    }

    fn claim_ports(&self) -> Result<Vec<SocketAddr>, Failure> {
        let Start { node, pod, container, address, .. } = &self.start;
        let served = ports::served(container, *address, node.addresses.node());
        if served.is_empty() {
            return Err(Failure::container(
                "this component serves HTTP, and the container names no containerPort of protocol TCP to serve it on",
            ));
        }
        node.ports.claim(&served, &holder(pod, container)).map_err(|refused| match &refused {
            Refused::Taken { address, holder } => {
                let whose = if address.ip() == node.addresses.node() { "this node" } else { "the pod's address" };
                Failure::port(format!(
                    "port {} of {whose} is served by container {} of pod {}; choose another containerPort or delete that pod",
                    address.port(),
                    holder.container,
                    holder.pod
                ))
            }
            Refused::TooManyOfPod => Failure::configuration(refused.to_string()),
            Refused::TooManyEphemeral(_) => {
                Failure::port(format!("{refused}; choose another containerPort or delete such a pod"))
            }
        })?;
        Ok(served)
    }

    fn spec(self, log: LogFile) -> (Module, ContainerSpec) {
        let Self { start, module, limits, environment, mounts, ca_bundle, held, .. } = self;
        let name = format!("{}/{}", full_name(&start.pod), start.container.name);
        let spec = ContainerSpec {
            args: environment.args,
            env: environment.env,
            mounts: mounts.directories,
            working_dir: mounts.working_dir,
            memory_limit: limits.memory,
            pod_memory: Some(start.pod_memory()),
            held,
            cpu_limit: limits.cpu,
            allowed_hosts: limits.allowed_hosts,
            ca_bundle,
            source: match start.address {
                PodAddress { ip: IpAddr::V4(ip), is_own: true } => Some(ip),
                _ => None,
            },
            gate: start.node.policies.gate(&start.pod, &start.container, start.address),
            request_timeout: limits.request_timeout,
            stream_idle_timeout: limits.stream_idle_timeout,
            max_concurrent_requests: limits.max_concurrent_requests,
            ..ContainerSpec::new(name, log)
        };
        (module, spec)
    }
}

/// As whom a container holds its ports.
pub fn holder(pod: &Pod, container: &Container) -> Holder {
    Holder { uid: uid(pod).to_owned(), container: container.name.clone(), pod: full_name(pod) }
}
