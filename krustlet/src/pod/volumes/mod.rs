//! A pod's volumes: ConfigMaps, Secrets, tokens and fields of the pod as files, empty directories, allowed host paths.
//!
//! [`projection`] says which files, [`tokens`] gets those that are tokens, [`atomic_writer`] writes them; [`host_path`] and
//! [`directory`] find directories, always below a descriptor; [`mounts`] gives a container its share.

mod atomic_writer;
mod directory;
mod host_path;
mod mounts;
mod projection;
mod tokens;

pub use host_path::HostPaths;
pub use mounts::Mounts;

use super::fields::{PodFacts, nanos};
use super::sources::{ConfigError, MAX_AGE, Objects};
use host_path::HostPath;
use k8s_openapi::api::core::v1::{EmptyDirVolumeSource, Pod, Volume};
use projection::{Budget, Files, Projection, type_name};
use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;
use tokens::Tokens;
use tokio::sync::Mutex;

/// The prepared volumes of one pod.
#[derive(Debug)]
pub struct PodVolumes {
    dir: PathBuf,
    volumes: BTreeMap<String, Kind>,
    hosts: Arc<HostPaths>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Files(Projection),
    /// Its limit is kept by [`crate::eviction`].
    Empty,
    Host(HostPath),
}

/// What need not be done again at every refresh.
#[derive(Debug, Default)]
struct Kept {
    tokens: Tokens,
    /// Volumes whose files will not change any more.
    settled: BTreeSet<String>,
}

impl PodVolumes {
    /// Makes the volumes that the pod's containers mount, under `dir` (`<data-dir>/pods/UID/volumes`). May be repeated:
    /// contents are brought up to date, an emptyDir keeps what is in it.
    ///
    /// Fails with [`ConfigError::Missing`] for what may still appear, and with [`ConfigError::Invalid`] for what no repetition
    /// will make right.
    pub async fn prepare(
        objects: &Objects,
        pod: &Pod,
        facts: &PodFacts,
        dir: &Path,
        hosts: &Arc<HostPaths>,
        not_before: Instant,
    ) -> Result<Self, ConfigError> {
        let mounted = mounted(pod);
        let mut volumes = BTreeMap::new();
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            if mounted.contains(volume.name.as_str()) {
                check_name(&volume.name)?;
                volumes.insert(volume.name.clone(), Kind::of(volume, hosts)?);
            }
        }
        let volumes = Self { dir: dir.to_owned(), volumes, hosts: hosts.clone(), kept: Mutex::default() };
        let volumes = blocking(move || volumes.make().map(|()| volumes)).await?;
        volumes.write(objects, pod, facts, not_before).await?;
        Ok(volumes)
    }

    /// Brings the contents up to date: changed ConfigMaps, Secrets, labels and annotations, tokens that grow old.
    pub async fn refresh(&self, objects: &Objects, pod: &Pod, facts: &PodFacts) -> Result<(), ConfigError> {
        let now = Instant::now();
        self.write(objects, pod, facts, now.checked_sub(MAX_AGE).unwrap_or(now)).await
    }

    fn make(&self) -> Result<(), ConfigError> {
        for (name, kind) in &self.volumes {
            match kind {
                Kind::Host(path) => drop(path.open(&self.hosts)?),
                Kind::Files(_) | Kind::Empty => {
                    let path = self.dir.join(name);
                    private_dir(&path).map_err(|error| failed("create", &path, &error))?;
                }
            }
        }
        Ok(())
    }

    async fn write(
        &self,
        objects: &Objects,
        pod: &Pod,
        facts: &PodFacts,
        not_before: Instant,
    ) -> Result<(), ConfigError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let mut kept = self.kept.lock().await;
        let Kept { tokens, settled } = &mut *kept;
        let files = self.volumes.iter().filter_map(|(name, kind)| match kind {
            Kind::Files(projection) => Some((name, projection)),
            Kind::Empty | Kind::Host(_) => None,
        });
        let projections: Vec<(&String, &Projection)> = files.collect();
        let wanted = projections.iter().flat_map(|(name, projection)| projection.tokens(name)).collect();
        let mut budget = Budget::default();
        // One volume that fails does not hold up the others, and one at a time is in memory.
        let mut first_error = tokens::renew(objects.client(), namespace, pod, wanted, tokens).await.err();
        for (name, projection) in projections {
            if settled.contains(name) {
                continue;
            }
            let write = async {
                let sources = objects.read(namespace, &projection.wanted(), not_before).await?;
                let files = projection.files(name, pod, facts, &sources, tokens, &mut budget)?;
                publish(self.dir.join(name), files).await?;
                Ok::<bool, ConfigError>(projection.is_settled(&sources))
            };
            match write.await {
                Ok(true) => drop(settled.insert(name.clone())),
                Ok(false) => {}
                Err(error) => drop(first_error.get_or_insert(error)),
            }
        }
        first_error.map_or(Ok(()), Err)
    }
}

/// Names of the volumes that some container mounts. As under the kubelet, the others are not made.
fn mounted(pod: &Pod) -> BTreeSet<&str> {
    let containers =
        pod.spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    containers.flat_map(|container| container.volume_mounts.iter().flatten()).map(|mount| mount.name.as_str()).collect()
}

impl Kind {
    fn of(volume: &Volume, hosts: &HostPaths) -> Result<Self, ConfigError> {
        if let Some(projection) = Projection::of(volume)? {
            Ok(Self::Files(projection))
        } else if let Some(source) = &volume.empty_dir {
            Self::empty(&volume.name, source)
        } else if let Some(source) = &volume.host_path {
            HostPath::of(&volume.name, source, hosts).map(Self::Host)
        } else {
            Err(ConfigError::Invalid(format!(
                "volume {:?}: the type {} is not supported",
                volume.name,
                type_name(volume)
            )))
        }
    }

    fn empty(name: &str, source: &EmptyDirVolumeSource) -> Result<Self, ConfigError> {
        // "Memory" only asks for speed and privacy; the directory is the agent's own either way.
        let medium = source.medium.as_deref().unwrap_or_default();
        if !matches!(medium, "" | "Memory") {
            return Err(ConfigError::Invalid(format!("volume {name:?}: emptyDir medium {medium:?} is not supported")));
        }
        match &source.size_limit {
            Some(limit) if nanos(limit).is_none_or(|limit| limit < 0) => {
                Err(ConfigError::Invalid(format!("volume {name:?}: {:?} is no size", limit.0)))
            }
            _ => Ok(Self::Empty),
        }
    }
}

fn check_name(name: &str) -> Result<(), ConfigError> {
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 63 || !name.chars().all(label) {
        return Err(ConfigError::Invalid(format!("{name:?} is not the name of a volume")));
    }
    Ok(())
}

/// A full or failing disk may recover, so the container waits.
fn failed(what: &str, path: &Path, error: &std::io::Error) -> ConfigError {
    ConfigError::Missing(format!("failed to {what} {}: {error}", path.display()))
}

fn private_dir(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

async fn publish(path: PathBuf, files: Files) -> Result<(), ConfigError> {
    blocking(move || {
        let written = directory::trusted(&path).and_then(|directory| atomic_writer::write(&directory, &files));
        written.map_err(|error| failed("write", &path, &error))
    })
    .await
}

/// Work on files: a disk, or a file system of another machine, may take its time.
async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, ConfigError> + Send + 'static,
) -> Result<T, ConfigError> {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(error) => Err(ConfigError::Missing(format!("failed to work on the pod's volumes: {error}"))),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::super::environment::ContainerEnvironment;
    use super::super::testing::Cluster;
    use super::mounts::Mounts;
    use super::*;
    use k8s_openapi::api::core::v1::Container;
    use serde_json::{Value, json};
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};

    pub(super) fn pod(volumes: Value, mounts: Value) -> Pod {
        serde_json::from_value(json!({
            "metadata": {"name": "web", "namespace": "shop", "uid": "u-1", "labels": {"app": "web"}},
            "spec": {
                "serviceAccountName": "robot",
                "containers": [{"name": "app", "volumeMounts": mounts}],
                "volumes": volumes,
            },
        }))
        .unwrap()
    }

    /// A pod that mounts one volume, `v`, at `/v`.
    pub(super) fn pod_with(volume: Value) -> Pod {
        let mut volume = volume;
        volume["name"] = json!("v");
        pod(json!([volume]), json!([{"name": "v", "mountPath": "/v"}]))
    }

    pub(super) fn container(pod: &Pod) -> &Container {
        &pod.spec.as_ref().unwrap().containers[0]
    }

    pub(super) fn objects(cluster: &Cluster) -> Objects {
        Objects::new(cluster.client())
    }

    pub(super) fn mounts(volumes: &PodVolumes, pod: &Pod) -> Result<Mounts, ConfigError> {
        volumes.mounts(container(pod), &ContainerEnvironment::default())
    }

    /// Whether a guest sees this directory of the host.
    pub(super) fn is_at(mounts: &Mounts, guest: &str, host: &Path) -> bool {
        let mount = mounts.directories.iter().find(|mount| mount.guest == guest).unwrap();
        let (a, b) = (mount.directory.metadata().unwrap(), std::fs::metadata(host).unwrap());
        (a.dev(), a.ino()) == (b.dev(), b.ino())
    }

    pub(super) async fn prepare(cluster: &Cluster, pod: &Pod, dir: &Path) -> Result<PodVolumes, ConfigError> {
        PodVolumes::prepare(&objects(cluster), pod, &PodFacts::default(), dir, &Arc::default(), Instant::now()).await
    }

    pub(super) fn text(path: PathBuf) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    fn mode(path: PathBuf) -> u32 {
        std::fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    fn invalid(result: Result<PodVolumes, ConfigError>) -> String {
        match result {
            Err(ConfigError::Invalid(message)) => message,
            other => panic!("expected Invalid, got {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_config_map_becomes_files_and_a_change_reaches_them() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"a": "1", "b": "2"}, "binaryData": {"bin": "AP8="}}));
        let pod = pod_with(json!({"configMap": {"name": "c"}}));
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        let v = dir.path().join("v");
        assert_eq!((text(v.join("a")), text(v.join("b"))), ("1".into(), "2".into()));
        assert_eq!(std::fs::read(v.join("bin")).unwrap(), [0, 255]);
        let first = std::fs::read_link(v.join("..data")).unwrap();

        volumes.refresh(&objects(&cluster), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(std::fs::read_link(v.join("..data")).unwrap(), first, "nothing changed, nothing written");

        cluster.put("configmaps", "c", json!({"data": {"a": "new"}}));
        volumes.refresh(&objects(&cluster), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(text(v.join("a")), "new");
        let mut left: Vec<_> = std::fs::read_dir(&v).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left.len(), 3, "a, ..data and one version of the data: {left:?}");
    }

    #[tokio::test]
    async fn every_link_is_relative_and_stays_in_the_volume() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"a": "1"}}));
        let items = json!([{"key": "a", "path": "deep/er/a"}, {"key": "a", "path": "./flat"}]);
        let pod = pod_with(json!({"configMap": {"name": "c", "items": items}}));
        prepare(&cluster, &pod, dir.path()).await.unwrap();
        let v = dir.path().join("v");
        assert_eq!(text(v.join("deep/er/a")), "1");
        assert_eq!(text(v.join("flat")), "1");
        assert_eq!(std::fs::read_link(v.join("deep")).unwrap(), Path::new("..data/deep"));
        assert_eq!(std::fs::read_link(v.join("..data")).unwrap().components().count(), 1);
    }

    #[tokio::test]
    async fn a_secret_is_readable_by_the_agent_alone() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("secrets", "s", json!({"data": {"key": "czNjcmV0", "other": "eA=="}}));
        let items = json!([{"key": "key", "path": "key"}, {"key": "other", "path": "other", "mode": 0o400}]);
        let pod = pod_with(json!({"secret": {"secretName": "s", "items": items}}));
        prepare(&cluster, &pod, dir.path()).await.unwrap();
        let v = dir.path().join("v");
        assert_eq!(text(v.join("key")), "s3cret");
        assert_eq!((mode(v.join("key")), mode(v.join("other"))), (0o600, 0o400));
        assert_eq!((mode(v.clone()), mode(v.join("..data"))), (0o700, 0o700));
    }

    #[tokio::test]
    async fn modes_are_the_items_then_the_volumes() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"a": "1", "b": "2"}}));
        let items = json!([{"key": "a", "path": "a", "mode": 0o640}, {"key": "b", "path": "b"}]);
        let pod = pod_with(json!({"configMap": {"name": "c", "items": items, "defaultMode": 0o444}}));
        prepare(&cluster, &pod, dir.path()).await.unwrap();
        assert_eq!((mode(dir.path().join("v/a")), mode(dir.path().join("v/b"))), (0o640, 0o444));
    }

    #[tokio::test]
    async fn a_missing_mandatory_object_or_key_holds_the_pod_and_an_optional_one_does_not() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"a": "1"}}));
        for (source, object) in [
            (json!({"configMap": {"name": "none"}}), "ConfigMap shop/none"),
            (json!({"secret": {"secretName": "none"}}), "Secret shop/none"),
            (json!({"configMap": {"name": "c", "items": [{"key": "none", "path": "p"}]}}), "no key \"none\""),
        ] {
            let error = prepare(&cluster, &pod_with(source.clone()), dir.path()).await.unwrap_err();
            assert!(matches!(&error, ConfigError::Missing(m) if m.contains(object)), "{error}");
            let mut optional = source;
            for source in optional.as_object_mut().unwrap().values_mut() {
                source["optional"] = json!(true);
            }
            prepare(&cluster, &pod_with(optional), dir.path()).await.unwrap();
        }
    }

    #[tokio::test]
    async fn an_immutable_config_map_is_read_once() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"immutable": true, "data": {"a": "1"}}));
        let pod = pod_with(json!({"configMap": {"name": "c"}}));
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        volumes.refresh(&objects(&cluster), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(cluster.reads(), 1);
        assert_eq!(text(dir.path().join("v/a")), "1");
    }

    #[tokio::test]
    async fn the_default_service_account_volume_mounts() {
        let cluster = Cluster::giving_tokens_of(3600);
        let dir = tempfile::tempdir().unwrap();
        cluster.put("configmaps", "kube-root-ca.crt", json!({"data": {"ca.crt": "PEM"}}));
        let access = json!({"projected": {"defaultMode": 0o644, "sources": [
            {"serviceAccountToken": {"expirationSeconds": 3607, "path": "token"}},
            {"configMap": {"name": "kube-root-ca.crt", "items": [{"key": "ca.crt", "path": "ca.crt"}]}},
            {"downwardAPI": {"items": [
                {"path": "namespace", "fieldRef": {"apiVersion": "v1", "fieldPath": "metadata.namespace"}},
            ]}},
        ]}});
        let mut volume = access;
        volume["name"] = json!("kube-api-access-x7k2p");
        let at = "/var/run/secrets/kubernetes.io/serviceaccount";
        let mount = json!([{"name": "kube-api-access-x7k2p", "mountPath": at, "readOnly": true}]);
        let pod = pod(json!([volume]), mount);
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        let host = dir.path().join("kube-api-access-x7k2p");
        let mounts = mounts(&volumes, &pod).unwrap();
        assert!(is_at(&mounts, at, &host) && mounts.directories[0].read_only);
        assert_eq!(text(host.join("token")), "token-1");
        assert_eq!(text(host.join("ca.crt")), "PEM");
        assert_eq!(text(host.join("namespace")), "shop");
        assert_eq!(mode(host.join("token")), 0o600);

        volumes.refresh(&objects(&cluster), &pod, &PodFacts::default()).await.unwrap();
        let requests = cluster.token_requests();
        assert_eq!(requests.len(), 1, "a young token is kept");
        assert_eq!(requests[0]["account"], "robot");
        assert_eq!(requests[0]["spec"]["expirationSeconds"], 3607);
        let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u-1"});
        assert_eq!(requests[0]["spec"]["boundObjectRef"], bound);
    }

    #[tokio::test]
    async fn an_old_token_is_replaced_at_the_next_refresh() {
        let cluster = Cluster::giving_tokens_of(0);
        let dir = tempfile::tempdir().unwrap();
        let pod = pod_with(json!({"projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "audience": "vault"}},
        ]}}));
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        volumes.refresh(&objects(&cluster), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(text(dir.path().join("v/token")), "token-2");
        assert_eq!(cluster.token_requests()[0]["spec"]["audiences"], json!(["vault"]));
    }

    #[tokio::test]
    async fn changed_labels_reach_a_downward_file() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        let items = json!([
            {"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}},
            {"path": "cpu", "resourceFieldRef": {"containerName": "app", "resource": "limits.cpu", "divisor": "1m"}},
        ]);
        let mut pod = pod_with(json!({"downwardAPI": {"items": items}}));
        let facts = PodFacts { allocatable_cpu_millis: 2000, ..PodFacts::default() };
        let volumes =
            PodVolumes::prepare(&objects(&cluster), &pod, &facts, dir.path(), &Arc::default(), Instant::now())
                .await
                .unwrap();
        assert_eq!(text(dir.path().join("v/labels")), "app=\"web\"");
        assert_eq!(text(dir.path().join("v/cpu")), "2000");
        pod.metadata.labels = Some([("app".to_owned(), "shop".to_owned())].into());
        volumes.refresh(&objects(&cluster), &pod, &facts).await.unwrap();
        assert_eq!(text(dir.path().join("v/labels")), "app=\"shop\"");
    }

    #[tokio::test]
    async fn an_empty_dir_is_writable_and_keeps_its_files() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        let pod = pod_with(json!({"emptyDir": {"sizeLimit": "1Ki", "medium": "Memory"}}));
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        let v = dir.path().join("v");
        assert!(!mounts(&volumes, &pod).unwrap().directories[0].read_only);
        assert_eq!(mode(v.clone()), 0o700);
        std::fs::create_dir(v.join("sub")).unwrap();
        std::fs::write(v.join("sub/file"), "x").unwrap();
        prepare(&cluster, &pod, dir.path()).await.unwrap();
        assert!(v.join("sub/file").exists());
    }

    #[tokio::test]
    async fn an_unknown_type_is_refused_by_name_unless_nobody_mounts_it() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        let claim = json!({"persistentVolumeClaim": {"claimName": "c"}});
        let message = invalid(prepare(&cluster, &pod_with(claim), dir.path()).await);
        assert!(message.contains("persistentVolumeClaim"), "{message}");
        let bundle = json!({"projected": {"sources": [{"clusterTrustBundle": {"path": "p"}}]}});
        let message = invalid(prepare(&cluster, &pod_with(bundle), dir.path()).await);
        assert!(message.contains("clusterTrustBundle"), "{message}");
        let unused = pod(json!([{"name": "v", "nfs": {"server": "s", "path": "/"}}]), json!([]));
        prepare(&cluster, &unused, dir.path()).await.unwrap();
    }

    #[tokio::test]
    async fn a_path_that_would_leave_the_volume_is_refused() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"a": "1"}}));
        for path in ["../a", "/a", "b/../../a", "..data", "..", "", ".", "a\u{0}"] {
            let pod = pod_with(json!({"configMap": {"name": "c", "items": [{"key": "a", "path": path}]}}));
            invalid(prepare(&cluster, &pod, dir.path()).await);
        }
        for key in ["../a", "..data", "/etc/passwd"] {
            cluster.put("configmaps", "evil", json!({"data": {key: "1"}}));
            invalid(prepare(&cluster, &pod_with(json!({"configMap": {"name": "evil"}})), dir.path()).await);
        }
        let items = json!([{"key": "a", "path": "x"}, {"key": "a", "path": "x/y"}]);
        invalid(prepare(&cluster, &pod_with(json!({"configMap": {"name": "c", "items": items}})), dir.path()).await);
        assert_eq!(
            projection::checked_path("..a/b").unwrap_err().to_string(),
            "path \"..a/b\" must not start with '..'"
        );
    }
}
