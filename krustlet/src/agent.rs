//! The agent as a whole: joins the cluster, becomes a node, takes up its pods, and at the end lets go of them in order.

use crate::addresses::{self, Addresses};
use crate::api;
use crate::bootstrap::{self, Membership};
use crate::certificates::{ServingCertificate, Wanted};
use crate::cli::{Names, Options, RegistryCredentials};
use crate::disk::Disk;
use crate::events::{Recorder, Severity};
use crate::eviction::Evictor;
use crate::google::MetadataServer;
use crate::image_gc::ImageGc;
use crate::keys::Keys;
use crate::memory::{Memory, PodsMemory};
use crate::node::{self, Keeper, Machine, NodeConfig, Readiness};
use crate::panics::message_of;
use crate::pod::context::NodeContext;
use crate::pod::fields::PodFacts;
use crate::pod::images::{Builders, PullSecrets};
use crate::pod::roster::Roster;
use crate::pod::sources::Objects;
use crate::pod::volumes::HostPaths;
use crate::pods::Pods;
use crate::policies::NetworkPolicies;
use crate::ports::Ports;
use crate::pressure::Signals;
use crate::reasons::event;
use crate::services::Services;
use crate::telemetry::metrics;
use anyhow::{Context, bail};
use futures::FutureExt;
use krustlet_runtime::{
    Compiler, CredentialSource, NoCredentials, OperatorsRegistries, PullLimits, Runtime, RuntimeConfig,
};
use prometheus_client::registry::Registry;
use rustls::RootCertStore;
use rustls::pki_types::CertificateDer;
use std::fs::File;
use std::net::{IpAddr, SocketAddr};
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;
use tracing::{error, info, warn};

/// How long an agent that was killed may take to be gone.
const PREDECESSOR: Duration = Duration::from_secs(5);
/// How often it is looked up where the API server is, so that guests are kept from it.
const API_SERVER_LOOKUP: Duration = Duration::from_secs(60);
/// At the end, the API server gets this long to hear that the node is not ready before its pods are let go.
const NOT_READY_REPORT: Duration = Duration::from_secs(3);

/// Runs the agent until it is told to stop.
///
/// Fails when it cannot begin (wrong flags, no place for its data, its port taken); once it has begun, it goes on through
/// whatever the API server does.
pub async fn run(options: Options) -> anyhow::Result<()> {
    let names = options.names()?;
    let stop = stop_signal()?;
    let _lock = take_data_dir(&names.data_dir, PREDECESSOR).await?;
    // Several TLS libraries are linked in; all of the agent uses this one.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let mut registry = Registry::default();
    metrics().register(&mut registry);
    let runtime = new_runtime(&options, &names, &mut registry)?;
    info!(
        version = env!("CARGO_PKG_VERSION"),
        node = names.node_name,
        data_dir = %names.data_dir.display(),
        "krustlet starts"
    );
    tokio::select! {
        () = stop.cancelled() => {
            info!("told to stop before the node had joined");
            Ok(())
        }
        membership = bootstrap::join(&options, &names) => {
            serve(options, names, membership, runtime, registry, stop.clone()).await
        }
    }
}

async fn serve(
    options: Options,
    names: Names,
    membership: Membership,
    runtime: Runtime,
    registry: Registry,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let client = membership.client.clone();
    let address = match options.node_ip {
        Some(address) => address,
        None => route_to(&membership.server).await?,
    };
    refuse_api_server(&runtime, &membership.server).await;
    let listen = options.listen_address(address);
    let listener = TcpListener::bind(listen)
        .await
        .with_context(|| format!("failed to listen on {listen}; choose another --addr or --port"))?;
    let addresses = Arc::new(pod_addresses(&options, &names, address, &membership.server).await?);
    if options.pod_cidr.is_some() {
        runtime.resolve_names(Arc::new(Services::new(client.clone())));
    }
    let config = NodeConfig {
        name: names.node_name.clone(),
        hostname: names.hostname.clone(),
        address,
        external_address: options.external_ip,
        port: listener.local_addr()?.port(),
        labels: options.node_labels(),
        provider_id: options.provider_id.clone(),
        max_pods: options.max_pods,
        pod_cidr: options.pod_cidr,
    };
    let disk = Disk::watch(names.data_dir.clone()).await;
    let transition = options.eviction_pressure_transition_period;
    let pods_memory = PodsMemory::Of(runtime.clone());
    let signals = Arc::new(Signals::new(Memory::this(), pods_memory, disk.clone(), names.eviction, transition));
    let machine = Machine::measure(signals.clone());
    let facts = PodFacts {
        node_name: names.node_name.clone(),
        host_ip: address.to_string(),
        pod_ip: String::new(),
        allocatable_cpu_millis: machine.cpus * 1000,
        allocatable_memory: signals.allocatable_memory(),
    };
    let vital = Vital::default();
    let (events, send_events) = Recorder::new(client.clone(), &names.node_name);
    let _events = vital.spawn("sending Events", send_events);
    let refusing = keep_refusing_api_server(runtime.clone(), membership.server.clone());
    let _refusing = vital.spawn("keeping guests from the API server", refusing);

    // The HTTPS API answers as soon as it has a certificate, whatever else happens.
    let serving = Arc::new(ServingCertificate::default());
    let ips: Vec<IpAddr> = std::iter::once(address).chain(options.external_ip).collect();
    let wanted = Wanted::serving(&names.node_name, &names.hostname, &ips);
    let _serving = vital.spawn(
        "keeping the serving certificate",
        bootstrap::keep_serving_certificate(
            client.clone(),
            options.clone(),
            names.data_dir.clone(),
            wanted,
            serving.clone(),
        ),
    );
    let roster = Arc::new(Roster::default());
    let api_stop = CancellationToken::new();
    let context = api::Context {
        client: client.clone(),
        node_name: names.node_name.clone(),
        data_dir: names.data_dir.clone(),
        disk: disk.clone(),
        view: roster.clone(),
        registry: Arc::new(registry),
    };
    let tls = Arc::new(api::server_tls(serving, client_ca(&membership.client_ca)?)?);
    let api = tokio::spawn(api::serve(context, listener, tls, api_stop.clone()));
    let (ends, expiring) = watch::channel(None);
    let _membership = vital.spawn("keeping the client certificate", membership.keep(ends, events.clone()));

    // The node says that it is not ready before its pods are taken up again, and that it is once they are.
    let (readiness, current) = watch::channel(Readiness::NotReady("krustlet is taking up its pods"));
    let (told, keys) = watch::channel(runtime.verification().fingerprint());
    let policies = NetworkPolicies::new(addresses.clone(), roster.clone());
    let _policies = vital.spawn("following the NetworkPolicies", policies.clone().keep(client.clone(), events.clone()));
    let told_of = node::Told { readiness: current, keys, expiring, policies: policies.standing() };
    let mut keeper = Keeper::new(client.clone(), config, machine, told_of);
    let mut reported = keeper.reported();
    tokio::select! {
        () = keeper.register() => {}
        () = stop.cancelled() => return Ok(()),
        what = vital.failed() => bail!("{what} failed by a bug"),
    }
    let keeper = vital.spawn("keeping the node's object", keeper.keep());
    let subject = node::reference(&names.node_name);
    events.record(subject.clone(), Severity::Normal, event::NODE_STARTING, "krustlet starts".to_owned());
    let keys = Keys {
        options: options.clone(),
        runtime: runtime.clone(),
        events: events.clone(),
        node: subject.clone(),
        told,
    };
    let _keys = vital.spawn("following the verification keys", keys.follow());

    let shutdown = CancellationToken::new();
    let context = Arc::new(NodeContext {
        objects: Objects::new(client.clone()),
        pull_secrets: PullSecrets::default(),
        builders: Builders::new(&options.require_provenance),
        client,
        runtime,
        events: events.clone(),
        facts,
        addresses,
        policies,
        data_dir: names.data_dir.clone(),
        host_paths: Arc::new(HostPaths { allowed: options.hostpath_allow.clone(), data_dir: names.data_dir.clone() }),
        ports: Ports::default(),
        roster,
        evictions: Arc::default(),
        signals: signals.clone(),
        shutdown: shutdown.clone(),
    });
    let (taken_up, mut all_taken_up) = watch::channel(false);
    let image_gc = Arc::new(ImageGc {
        runtime: context.runtime.clone(),
        pods: context.roster.clone(),
        data_dir: names.data_dir.clone(),
        disk: disk.clone(),
        thresholds: names.image_gc,
        events: events.clone(),
        node: subject.clone(),
    });
    let evictor = Evictor {
        roster: context.roster.clone(),
        evictions: context.evictions.clone(),
        data_dir: names.data_dir.clone(),
        signals,
        disk,
        images: image_gc.clone(),
        measuring: Duration::ZERO,
    };
    let pods = Pods::new(context, options.max_pods, taken_up);
    let mut pods = vital.spawn("following the pods", pods.run());
    // What `wait_for` returns holds a lock that the sender needs.
    let taken_up = async move { all_taken_up.wait_for(|taken_up| *taken_up).await.map(|_| ()) };
    tokio::select! {
        Ok(()) = taken_up => {
            info!("node is ready");
            readiness.send_replace(Readiness::Ready);
            // Now it is known which images are in use.
            tokio::select! {
                () = image_gc.run() => {}
                () = evictor.run() => {}
                () = stop.cancelled() => {}
                _ = vital.failed() => {}
            }
        }
        () = stop.cancelled() => {}
        _ = vital.failed() => {}
    }

    info!("stopping: the pods are let go, and taken up again by the next start");
    events.record(subject, Severity::Normal, event::NODE_SHUTDOWN, "krustlet stops".to_owned());
    let goodbye = Readiness::NotReady("krustlet is stopping");
    readiness.send_replace(goodbye.clone());
    if tokio::time::timeout(NOT_READY_REPORT, reported.wait_for(|told| *told == Some(goodbye.clone()))).await.is_err() {
        warn!("the API server did not hear that the node stops");
    }
    shutdown.cancel();
    if let Err(error) = (&mut pods).await {
        warn!("the pods were not let go in order: {error}");
    }
    api_stop.cancel();
    if let Ok(Err(error)) = api.await {
        warn!("the HTTPS API ended with an error: {error:#}");
    }
    drop(keeper);
    if let Some(what) = vital.failed().now_or_never() {
        bail!("{what} failed by a bug");
    }
    info!("stopped");
    Ok(())
}

/// The tasks without which the agent is none. Where one panics the agent ends in order, for whoever supervises it to start
/// it again: a node that looks alive and does nothing is worse.
struct Vital(watch::Sender<Option<&'static str>>);

impl Default for Vital {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Vital {
    /// A task that ends with the agent, and by a panic ends the agent.
    fn spawn(&self, name: &'static str, work: impl Future<Output = ()> + Send + 'static) -> AbortOnDropHandle<()> {
        let failed = self.0.clone();
        AbortOnDropHandle::new(tokio::spawn(async move {
            if let Err(panic) = AssertUnwindSafe(work).catch_unwind().await {
                error!("{name} panicked: {}", message_of(&*panic));
                failed.send_replace(Some(name));
            }
        }))
    }

    /// The name of a task that panicked, once there is one.
    async fn failed(&self) -> &'static str {
        let mut failed = self.0.subscribe();
        let name = failed.wait_for(Option::is_some).await.ok().and_then(|name| *name);
        name.unwrap_or_default()
    }
}

/// Cancelled by SIGTERM or SIGINT.
fn stop_signal() -> anyhow::Result<CancellationToken> {
    let mut terminate = signal(SignalKind::terminate()).context("failed to listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("failed to listen for SIGINT")?;
    let stop = CancellationToken::new();
    let told = stop.clone();
    tokio::spawn(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        told.cancel();
    });
    Ok(stop)
}

/// Makes the data directory, for this user alone, and takes it: two agents in one would spoil each other's pods. An agent
/// that was killed a moment ago is given `timeout` to be gone.
async fn take_data_dir(path: &Path, timeout: Duration) -> anyhow::Result<File> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    let make = || -> std::io::Result<File> {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))?;
        File::options().create(true).truncate(false).write(true).open(path.join("lock"))
    };
    let file = make().with_context(|| format!("failed to prepare the data directory {}", path.display()))?;
    if file.try_lock().is_ok() {
        return Ok(file);
    }
    let (sender, locked) = tokio::sync::oneshot::channel();
    // A thread of its own, which the end of the process ends: nobody waits for it.
    std::thread::spawn(move || {
        let result = file.lock().map(|()| file);
        let _ = sender.send(result);
    });
    match tokio::time::timeout(timeout, locked).await {
        Ok(Ok(Ok(file))) => Ok(file),
        _ => {
            bail!("another krustlet uses the data directory {}; stop it, or choose another --data-dir", path.display())
        }
    }
}

fn new_runtime(options: &Options, names: &Names, registry: &mut Registry) -> anyhow::Result<Runtime> {
    let credentials: Arc<dyn CredentialSource> = match options.registry_credentials {
        RegistryCredentials::None => Arc::new(NoCredentials),
        RegistryCredentials::Gce => Arc::new(MetadataServer::new(options.trusted_registries.clone())),
    };
    let cpus = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    let config = RuntimeConfig {
        data_dir: names.data_dir.clone(),
        verification: options.verification()?,
        credentials,
        registries: OperatorsRegistries {
            insecure: options.insecure_registries.clone(),
            trusted: options.trusted_registries.clone(),
        },
        compiler: Compiler { program: own_program()?, arguments: vec![crate::COMPILE.into()] },
        // Compilers give way to the pods that serve. One whose module takes its whole time leaves another to the rest.
        max_concurrent_compiles: cpus.saturating_sub(1).max(2),
        pull_limits: PullLimits::default(),
        egress: options.egress()?,
        guest_memory: options.guest_memory,
        max_pods: options.max_pods as usize,
    };
    Runtime::new(config, registry).context("failed to start the wasm runtime")
}

/// The program that this process runs, also after its file was replaced by an update.
fn own_program() -> anyhow::Result<PathBuf> {
    let process = PathBuf::from("/proc/self/exe");
    if process.exists() {
        return Ok(process);
    }
    std::env::current_exe().context("failed to find the agent's own program")
}

fn client_ca(certificates: &[Vec<u8>]) -> anyhow::Result<RootCertStore> {
    let mut store = RootCertStore::empty();
    for der in certificates {
        store.add(CertificateDer::from(der.clone())).context("failed to use the cluster's certificate authority")?;
    }
    Ok(store)
}

/// Where the pods are served. Fails when they cannot be there.
async fn pod_addresses(
    options: &Options,
    names: &Names,
    address: IpAddr,
    server: &http::Uri,
) -> anyhow::Result<Addresses> {
    let Some(range) = options.pod_cidr else { return Ok(Addresses::of_node(address)) };
    let listen = options.listen_address(address).ip();
    let mut others: Vec<IpAddr> = [address, listen].into_iter().chain(options.external_ip).collect();
    // One whose name does not resolve now cannot be told.
    others.extend(api_server(server).await.into_iter().flatten());
    addresses::check_range(range, &others)?;
    info!(%range, "each pod has an address of its own");
    Addresses::from_range(address, range, &names.data_dir)
}

async fn api_server(server: &http::Uri) -> std::io::Result<Vec<IpAddr>> {
    let host = server.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let found = tokio::net::lookup_host((host, server.port_u16().unwrap_or(443))).await?;
    Ok(found.map(|address| address.ip()).collect())
}

/// Keeps guests from the API server, wherever its name leads.
async fn refuse_api_server(runtime: &Runtime, server: &http::Uri) {
    let host = server.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    match api_server(server).await {
        Ok(found) => runtime.refuse_api_server(host, found),
        Err(error) => {
            // Guests cannot resolve it either, and its name is refused.
            runtime.refuse_api_server(host, []);
            tracing::debug!(%error, host, "failed to resolve the API server's name");
        }
    }
}

async fn keep_refusing_api_server(runtime: Runtime, server: http::Uri) {
    loop {
        tokio::time::sleep(API_SERVER_LOOKUP).await;
        refuse_api_server(&runtime, &server).await;
    }
}

/// The address of this machine that routes to the API server. Sends nothing.
async fn route_to(server: &http::Uri) -> anyhow::Result<IpAddr> {
    let host = server.host().unwrap_or_default().trim_start_matches('[').trim_end_matches(']');
    let port = server.port_u16().unwrap_or(443);
    let find = async {
        let target: SocketAddr =
            tokio::net::lookup_host((host, port)).await?.next().ok_or(std::io::ErrorKind::NotFound)?;
        let local: SocketAddr = if target.is_ipv4() { ([0, 0, 0, 0], 0).into() } else { ([0u16; 8], 0).into() };
        let socket = tokio::net::UdpSocket::bind(local).await?;
        socket.connect(target).await?;
        Ok::<IpAddr, std::io::Error>(socket.local_addr()?.ip())
    };
    find.await.with_context(|| format!("failed to find the address that routes to {server}; pass --node-ip"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_vital_task_that_panics_is_named_and_one_that_ends_is_not() {
        let vital = Vital::default();
        vital.spawn("going on", async {}).await.unwrap();
        assert_eq!(vital.failed().now_or_never(), None);
        vital.spawn("keeping the node", async { panic!("a bug") }).await.unwrap();
        assert_eq!(vital.failed().await, "keeping the node");
    }

    #[tokio::test]
    async fn a_data_directory_has_one_agent() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("krustlet");
        let lock = take_data_dir(&path, Duration::ZERO).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        let error = take_data_dir(&path, Duration::from_millis(1)).await.unwrap_err();
        assert!(error.to_string().contains("--data-dir"));
        drop(lock);
    }

    #[tokio::test]
    async fn a_successor_waits_for_an_agent_that_is_just_going() {
        let directory = tempfile::tempdir().unwrap();
        let lock = take_data_dir(directory.path(), Duration::ZERO).await.unwrap();
        let successor = take_data_dir(directory.path(), Duration::from_secs(60));
        let going = async move { drop(lock) };
        let (taken, ()) = tokio::join!(successor, going);
        assert!(taken.is_ok());
    }

    #[tokio::test]
    async fn the_nodes_address_is_the_one_that_routes_to_the_api_server() {
        let address = route_to(&"https://127.0.0.1:6443".parse().unwrap()).await.unwrap();
        assert!(address.is_loopback());
    }
}
