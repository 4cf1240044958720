//! From a container's specification to a running guest: image, module, volumes and environment at once, then the start.

use super::environment::{self, ContainerEnvironment};
use super::fields::{PodFacts, nanos};
use super::probes;
use super::restart::Policy;
use super::roster::Roster;
use super::sources::{ConfigError, Objects};
use super::volumes::{HostPaths, Mounts, PodVolumes};
use super::{Role, annotation, full_name, hooks, images, port, uid};
use crate::events::{Recorder, Severity};
use crate::eviction::Evictions;
use crate::logs;
use crate::ports::{Holder, Ports};
use crate::reasons::{event, waiting};
use k8s_openapi::api::core::v1::{Container, Pod};
use krustlet_runtime::{
    ContainerSpec, Execution, HttpServer, Image, Kind, LogFile, LogLimits, Module, PullError, Runtime, StartError,
};
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};
use tokio::sync::OnceCell;
use tokio_util::sync::CancellationToken;

/// What every pod of a node shares.
pub struct NodeContext {
    pub client: kube::Client,
    pub runtime: Runtime,
    pub events: Recorder,
    pub facts: PodFacts,
    pub address: IpAddr,
    pub data_dir: PathBuf,
    pub objects: Objects,
    pub host_paths: Arc<HostPaths>,
    pub ports: Ports,
    pub roster: Arc<Roster>,
    pub evictions: Arc<Evictions>,
    /// The agent is to stop.
    pub shutdown: CancellationToken,
}

impl NodeContext {
    /// Where a pod's volumes and memory are kept.
    pub fn pod_dir(&self, pod: &Pod) -> PathBuf {
        self.data_dir.join("pods").join(uid(pod))
    }
}

/// Which kind of obstacle stands in the way; they are retried at different rhythms.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Obstacle {
    Image,
    Configuration,
    Port,
    Container,
}

/// Why a container could not be started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub obstacle: Obstacle,
    /// The waiting reason.
    pub reason: &'static str,
    pub message: String,
    /// The reason of the Event.
    pub event: &'static str,
}

impl Failure {
    fn container(message: impl Into<String>) -> Self {
        Self {
            obstacle: Obstacle::Container,
            reason: waiting::CREATE_CONTAINER_ERROR,
            message: message.into(),
            event: event::FAILED,
        }
    }

    fn configuration(message: impl Into<String>) -> Self {
        Self {
            obstacle: Obstacle::Configuration,
            reason: waiting::CREATE_CONTAINER_CONFIG_ERROR,
            message: message.into(),
            event: event::FAILED,
        }
    }

    fn volumes(error: &ConfigError) -> Self {
        Self { event: event::FAILED_MOUNT, ..Self::configuration(error.to_string()) }
    }

    fn pull(error: &PullError) -> Self {
        Self { obstacle: Obstacle::Image, reason: error.reason(), message: error.to_string(), event: event::FAILED }
    }

    fn start(error: &StartError) -> Self {
        let obstacle = match error {
            StartError::PortInUse { .. } => Obstacle::Port,
            StartError::Create { .. } => Obstacle::Container,
        };
        Self { obstacle, reason: error.reason(), message: error.to_string(), event: event::FAILED }
    }
}

/// A guest that runs.
#[derive(Debug, Clone)]
pub enum Guest {
    Server(Arc<HttpServer>),
    Command(Arc<Execution>),
}

pub struct Started {
    pub guest: Guest,
    pub image: Image,
    pub log: LogFile,
}

pub enum Outcome {
    Started(Started),
    /// It ran when the agent stopped, and its policy does not let it run a second time.
    Lost,
}

/// One try to start one container.
pub struct Start {
    pub node: Arc<NodeContext>,
    pub pod: Arc<Pod>,
    pub container: Container,
    pub role: Role,
    pub policy: Policy,
    pub volumes: Arc<OnceCell<PodVolumes>>,
    /// Which run this is: 0 for the first.
    pub attempt: i32,
    /// Whether its last run was cut off by the end of the agent.
    pub interrupted: bool,
}

impl Start {
    pub async fn run(self) -> Result<Outcome, Failure> {
        let (image, module, spec) = self.prepare(None).await?;
        let served = module.kind() == Kind::HttpProxy;
        // Serving on is not running twice: every request has an instance of its own.
        if self.interrupted && !served && self.policy == Policy::Never {
            return Ok(Outcome::Lost);
        }
        let log = spec.log.clone();
        let events = &self.node.events;
        let tell =
            |reason, message| events.pod(&self.pod, Some(&self.container.name), Severity::Normal, reason, message);
        let guest = if served {
            let address = self.claim_port()?;
            let server = self.node.runtime.serve(&module, spec, address).await.map_err(|e| Failure::start(&e))?;
            tell(event::CREATED, format!("Created container {}", self.container.name));
            tell(event::STARTED, format!("Started container {}, serving on {address}", self.container.name));
            Guest::Server(Arc::new(server))
        } else {
            let execution = self.node.runtime.run(&module, spec).await.map_err(|e| Failure::start(&e))?;
            tell(event::CREATED, format!("Created container {}", self.container.name));
            tell(event::STARTED, format!("Started container {}", self.container.name));
            Guest::Command(Arc::new(execution))
        };
        if let Some(hook) = hooks::post_start(&self.container)
            && let Err(cause) = hooks::run(&self.container, hook, self.node.address).await
        {
            let message = format!("postStart hook failed, container is stopped: {cause}");
            return Err(Failure { event: event::FAILED_POST_START_HOOK, ..Failure::container(message) });
        }
        Ok(Outcome::Started(Started { guest, image, log }))
    }

    /// Puts the container's new image in the place of the one that is being served.
    pub async fn swap(self, server: Arc<HttpServer>, log: LogFile) -> Result<Image, Failure> {
        let (image, module, spec) = self.prepare(Some(log)).await?;
        if module.kind() != Kind::HttpProxy {
            return Err(Failure::container(
                "the new image runs to completion and cannot take the place of one that serves; delete the pod instead",
            ));
        }
        server.swap(&module, spec).await.map_err(|error| Failure::start(&error))?;
        Ok(image)
    }

    /// Everything that a start needs, fetched at the same time.
    async fn prepare(&self, log: Option<LogFile>) -> Result<(Image, Module, ContainerSpec), Failure> {
        probes::validate(&self.container).map_err(Failure::configuration)?;
        hooks::validate(&self.container).map_err(Failure::configuration)?;
        let limits = Limits::of(&self.pod, &self.container).map_err(Failure::configuration)?;
        let node = &self.node;
        // What was changed before this start is what the container gets.
        let begin = Instant::now();
        let volumes = async {
            let dir = node.pod_dir(&self.pod).join("volumes");
            let prepare = || PodVolumes::prepare(&node.objects, &self.pod, &node.facts, &dir, &node.host_paths, begin);
            self.volumes.get_or_try_init(prepare).await.map_err(|error| Failure::volumes(&error))
        };
        let environment = async {
            environment::resolve(&node.objects, &self.pod, &self.container, &node.facts, begin)
                .await
                .map_err(|error| Failure::configuration(error.to_string()))
        };
        // None is cut short by another's failure: what was pulled stays pulled.
        let (module, volumes, environment) = tokio::join!(self.module(), volumes, environment);
        volumes?;
        let environment = environment?;
        let (image, module) = module?;
        let served = module.kind() == Kind::HttpProxy;
        if served && self.role == Role::Init {
            return Err(Failure::container(
                "an init container runs to completion, and this component serves HTTP; give it restartPolicy Always or \
                 put it under containers",
            ));
        }
        let (mounts, environment) = self.mounts(environment).await.map_err(|error| Failure::volumes(&error))?;
        let log = match log {
            Some(log) => log,
            None => {
                let file = logs::file(&node.data_dir, &self.pod, &self.container.name, self.attempt);
                logs::remove_old(&file, self.attempt)
                    .and_then(|()| LogFile::create(file, LogLimits::default()))
                    .map_err(|error| Failure::container(format!("failed to open the container's log: {error}")))?
            }
        };
        Ok((image, module, self.spec(limits, environment, mounts, log)))
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

    async fn module(&self) -> Result<(Image, Module), Failure> {
        let node = &self.node;
        let image = images::get(&node.client, &node.runtime, &node.events, &self.pod, &self.container)
            .await
            .map_err(|error| Failure::pull(&error))?;
        let module = node.runtime.load(&image).await.map_err(|error| Failure {
            obstacle: Obstacle::Image,
            reason: error.reason(),
            message: error.to_string(),
            event: event::FAILED,
        })?;
        Ok((image, module))
    }

    fn claim_port(&self) -> Result<SocketAddr, Failure> {
        let number = port(&self.container).ok_or_else(|| {
            Failure::container("this component serves HTTP, and the container names no containerPort to serve it on")
        })?;
        let holder = holder(&self.pod, &self.container);
        match self.node.ports.claim(number, &holder) {
            Ok(()) => Ok(SocketAddr::new(self.node.address, number)),
            Err(other) => Err(Failure {
                obstacle: Obstacle::Port,
                reason: waiting::PORT_IN_USE,
                message: format!(
                    "port {number} of this node is served by container {} of pod {}; choose another containerPort or \
                     delete that pod",
                    other.container, other.pod
                ),
                event: event::FAILED,
            }),
        }
    }

    fn spec(&self, limits: Limits, environment: ContainerEnvironment, mounts: Mounts, log: LogFile) -> ContainerSpec {
        ContainerSpec {
            args: environment.args,
            env: environment.env,
            mounts: mounts.directories,
            working_dir: mounts.working_dir,
            memory_limit: limits.memory,
            cpu_limit: limits.cpu,
            allowed_hosts: limits.allowed_hosts,
            request_timeout: limits.request_timeout,
            max_concurrent_requests: limits.max_concurrent_requests,
            ..ContainerSpec::new(format!("{}/{}", full_name(&self.pod), self.container.name), log)
        }
    }
}

/// As whom a container holds its port.
pub fn holder(pod: &Pod, container: &Container) -> Holder {
    Holder { uid: uid(pod).to_owned(), container: container.name.clone(), pod: full_name(pod) }
}

/// What a container may take, from its resources and its pod's annotations.
#[derive(Debug, Clone, PartialEq)]
struct Limits {
    /// Bytes.
    memory: Option<u64>,
    /// Cores.
    cpu: Option<f64>,
    allowed_hosts: Vec<String>,
    request_timeout: Duration,
    max_concurrent_requests: usize,
}

impl Limits {
    fn of(pod: &Pod, container: &Container) -> Result<Self, String> {
        let resource = |name: &str| -> Result<Option<i128>, String> {
            let limits = container.resources.as_ref().and_then(|resources| resources.limits.as_ref());
            let Some(quantity) = limits.and_then(|limits| limits.get(name)) else {
                return Ok(None);
            };
            match nanos(quantity) {
                Some(amount) if amount > 0 => Ok(Some(amount)),
                _ => Err(format!("resources.limits.{name}: {:?} is not a positive quantity", quantity.0)),
            }
        };
        let annotation =
            |name: &str| pod.metadata.annotations.as_ref().and_then(|all| all.get(name)).map(|value| value.trim());
        let memory = resource("memory")?.map(|nanos| u64::try_from(nanos / 1_000_000_000).unwrap_or(u64::MAX));
        #[allow(clippy::cast_precision_loss)]
        let cpu = resource("cpu")?.map(|nanos| nanos as f64 / 1e9);
        let allowed_hosts = annotation(annotation::ALLOWED_HOSTS)
            .map(|hosts| hosts.split(',').map(|host| host.trim().to_owned()).filter(|host| !host.is_empty()).collect())
            .unwrap_or_default();
        let request_timeout = match annotation(annotation::REQUEST_TIMEOUT) {
            None => ContainerSpec::DEFAULT_REQUEST_TIMEOUT,
            Some(text) => duration(text).ok_or_else(|| {
                format!(
                    "annotation {}: {text:?} is not a duration such as 30s, 500ms or 2m",
                    annotation::REQUEST_TIMEOUT
                )
            })?,
        };
        let max_concurrent_requests = match annotation(annotation::MAX_CONCURRENT_REQUESTS) {
            None => ContainerSpec::DEFAULT_MAX_CONCURRENT_REQUESTS,
            Some(text) => text.parse().ok().filter(|number| *number > 0).ok_or_else(|| {
                format!("annotation {}: {text:?} is not a positive number", annotation::MAX_CONCURRENT_REQUESTS)
            })?,
        };
        Ok(Self { memory, cpu, allowed_hosts, request_timeout, max_concurrent_requests })
    }
}

/// A number with the unit ms, s, m or h.
fn duration(text: &str) -> Option<Duration> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.')?;
    let number: f64 = text[..digits].parse().ok()?;
    let unit = match &text[digits..] {
        "ms" => 0.001,
        "s" => 1.0,
        "m" => 60.0,
        "h" => 3600.0,
        _ => return None,
    };
    Duration::try_from_secs_f64(number * unit).ok().filter(|duration| !duration.is_zero())
}

#[cfg(test)]
mod tests {
    use super::*;
    use k8s_openapi::api::core::v1::ResourceRequirements;
    use k8s_openapi::apimachinery::pkg::api::resource::Quantity;
    use std::collections::BTreeMap;

    fn pod(annotations: &[(&str, &str)]) -> Pod {
        let mut pod = Pod::default();
        pod.metadata.annotations =
            Some(annotations.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect());
        pod
    }

    fn container(limits: &[(&str, &str)]) -> Container {
        let limits: BTreeMap<_, _> =
            limits.iter().map(|(key, value)| ((*key).to_owned(), Quantity((*value).to_owned()))).collect();
        Container {
            resources: Some(ResourceRequirements { limits: Some(limits), ..ResourceRequirements::default() }),
            ..Container::default()
        }
    }

    #[test]
    fn limits_come_from_resources_and_annotations() {
        let limits = Limits::of(
            &pod(&[
                (annotation::ALLOWED_HOSTS, "a.example, b.example:8080"),
                (annotation::REQUEST_TIMEOUT, "500ms"),
                (annotation::MAX_CONCURRENT_REQUESTS, "7"),
            ]),
            &container(&[("memory", "64Mi"), ("cpu", "250m")]),
        )
        .unwrap();
        assert_eq!(limits.memory, Some(64 << 20));
        assert_eq!(limits.cpu, Some(0.25));
        assert_eq!(limits.allowed_hosts, ["a.example", "b.example:8080"]);
        assert_eq!(limits.request_timeout, Duration::from_millis(500));
        assert_eq!(limits.max_concurrent_requests, 7);
    }

    #[test]
    fn a_pod_that_asks_for_nothing_gets_the_defaults_and_no_hosts() {
        let limits = Limits::of(&Pod::default(), &Container::default()).unwrap();
        assert_eq!((limits.memory, limits.cpu), (None, None));
        assert!(limits.allowed_hosts.is_empty());
        assert_eq!(limits.request_timeout, ContainerSpec::DEFAULT_REQUEST_TIMEOUT);
    }

    #[test]
    fn a_wrong_annotation_is_named() {
        let error = Limits::of(&pod(&[(annotation::REQUEST_TIMEOUT, "soon")]), &Container::default()).unwrap_err();
        assert!(error.contains(annotation::REQUEST_TIMEOUT) && error.contains("soon"), "{error}");
        assert!(Limits::of(&pod(&[(annotation::MAX_CONCURRENT_REQUESTS, "0")]), &Container::default()).is_err());
    }

    #[test]
    fn durations_have_a_unit() {
        assert_eq!(duration("1.5s"), Some(Duration::from_millis(1500)));
        assert_eq!(duration("2m"), Some(Duration::from_secs(120)));
        for wrong in ["30", "s", "", "0s", "-1s", "1d"] {
            assert_eq!(duration(wrong), None, "{wrong}");
        }
    }
}
