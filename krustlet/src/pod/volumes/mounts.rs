//! From a container's `volumeMounts` to the directories that its guest is given, each as a descriptor.

use super::super::environment::ContainerEnvironment;
use super::super::sources::ConfigError;
use super::atomic_writer;
use super::directory::{Below, trusted};
use super::projection::{File, Files};
use super::{Kind, PodVolumes, failed};
use cap_std::fs::Dir;
use k8s_openapi::api::core::v1::{Container, VolumeMount};
use krustlet_runtime::Mount;
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Component, Path};
use std::sync::Arc;

/// Directories that one container may be given: each is a descriptor of the node's for as long as it runs.
const MAX_MOUNTS: usize = 128;
/// Copies of what a `subPath` names in a volume of files. No volume can have this name.
const COPIES: &str = "..files";

/// What a container is given of the file system.
#[derive(Debug, Default)]
pub struct Mounts {
    pub directories: Vec<Mount>,
    /// Where its guest begins. A relative path of WASI starts at the directory `.`, which is among the others.
    pub working_dir: Option<String>,
}

/// A directory of the node and where the guest sees it.
struct Shown {
    guest: String,
    directory: Dir,
    origin: Origin,
    read_only: bool,
}

/// Whose directory it is, which decides what may be written into it.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Origin {
    Empty,
    Host,
    Files,
}

impl PodVolumes {
    /// The directories that the container asks for. Reads and writes files, so it is called where blocking is allowed.
    ///
    /// Fails with [`ConfigError::Missing`] for what may still appear, and with [`ConfigError::Invalid`] for what cannot be
    /// mounted, or would lead out of its volume.
    pub fn mounts(&self, container: &Container, environment: &ContainerEnvironment) -> Result<Mounts, ConfigError> {
        if container.volume_devices.iter().flatten().next().is_some() {
            return Err(ConfigError::Invalid("volumeDevices are not supported: WASI has directories only".into()));
        }
        let mounts: Vec<&VolumeMount> = container.volume_mounts.iter().flatten().collect();
        if mounts.len() > MAX_MOUNTS {
            return Err(ConfigError::Invalid(format!(
                "a container may have {MAX_MOUNTS} volumeMounts, not {}",
                mounts.len()
            )));
        }
        let mut seen = BTreeSet::new();
        let mut shown: Vec<Shown> = Vec::new();
        let mut files: Vec<(String, File)> = Vec::new();
        // What is copied, by the directory in which the guest sees it.
        let mut copies: BTreeMap<String, Files> = BTreeMap::new();
        for mount in mounts {
            let guest = guest_path(mount)?;
            if !seen.insert(guest.clone()) {
                return Err(ConfigError::Invalid(format!("more than one volume is mounted at {guest}")));
            }
            let kind = self.volumes.get(&mount.name).ok_or_else(|| {
                ConfigError::Invalid(format!("volumeMount {:?}: the pod has no volume of this name", mount.name))
            })?;
            let sub_path = sub_path(mount, environment)?;
            let origin = match kind {
                Kind::Files(projection) => {
                    let Some(sub_path) = sub_path else {
                        shown.push(Shown {
                            guest,
                            directory: self.open(&mount.name)?,
                            origin: Origin::Files,
                            read_only: true,
                        });
                        continue;
                    };
                    let found = self.copied(&mount.name, &sub_path)?;
                    match found {
                        Some(mut found) => match found.remove("") {
                            Some(file) => files.push((guest, file)),
                            None => drop(copies.insert(guest, found)),
                        },
                        // As with the kubelet: an empty directory is in the place of what may be missing.
                        None if projection.is_optional() => drop(copies.insert(guest, Files::new())),
                        None => return Err(ConfigError::Missing(format!("subPath {sub_path:?} is not in the volume"))),
                    }
                    continue;
                }
                Kind::Empty => Origin::Empty,
                Kind::Host(_) => Origin::Host,
            };
            let root = match kind {
                Kind::Host(path) => path.open(&self.hosts)?,
                _ => self.open(&mount.name)?,
            };
            let directory = match sub_path {
                None => root,
                Some(sub_path) => {
                    let what = format!("volumeMount {:?}: subPath {sub_path:?}", mount.name);
                    let below = Below { what: &what, whole: "the volume", create: Some(0o700) };
                    below.open(&root, Path::new(&sub_path))?
                }
            };
            shown.push(Shown { guest, directory, origin, read_only: mount.read_only == Some(true) });
        }
        place(files, &shown, &mut copies)?;
        self.show_copies(&container.name, copies, &mut shown)?;
        let working_dir = working_dir(container, &mut shown)?;
        let mount = |shown: Shown| Mount {
            directory: Arc::new(shown.directory.into_std_file()),
            guest: shown.guest,
            read_only: shown.read_only,
        };
        Ok(Mounts { directories: shown.into_iter().map(mount).collect(), working_dir })
    }

    /// The root of a volume below the pod's directory, which no guest can change.
    fn open(&self, volume: &str) -> Result<Dir, ConfigError> {
        let path = self.dir.join(volume);
        trusted(&path).map_err(|error| failed("open", &path, &error))
    }

    /// What a path in a volume of files leads to now. As with the kubelet, it is copied once and does not change.
    fn copied(&self, volume: &str, sub_path: &str) -> Result<Option<Files>, ConfigError> {
        let what = format!("volumeMount {volume:?}: subPath {sub_path:?}");
        let below = Below { what: &what, whole: "the volume", create: None };
        check_relative(sub_path)?;
        atomic_writer::read(&self.open(volume)?, Path::new(sub_path)).map_err(|error| below.failed(&error))
    }

    /// Writes the copies, and shows them with the other directories.
    fn show_copies(
        &self,
        container: &str,
        copies: BTreeMap<String, Files>,
        shown: &mut Vec<Shown>,
    ) -> Result<(), ConfigError> {
        for (number, (guest, files)) in copies.into_iter().enumerate() {
            let path = Path::new(COPIES).join(container).join(number.to_string());
            let write = || -> std::io::Result<Dir> {
                let volumes = trusted(&self.dir)?;
                atomic_writer::make(&volumes, &path)?;
                let directory = volumes.open_dir(&path)?;
                atomic_writer::replace(&directory, &files)?;
                Ok(directory)
            };
            let directory = write().map_err(|error| failed("write", &self.dir.join(&path), &error))?;
            shown.push(Shown { guest, directory, origin: Origin::Files, read_only: true });
        }
        Ok(())
    }
}

/// Puts single files where the guest looks for them: WASI mounts directories, so each goes into the directory in which it
/// is to be seen. In an emptyDir that is a file of it, in place of the kubelet's mount on an empty one.
fn place(
    mut files: Vec<(String, File)>,
    shown: &[Shown],
    copies: &mut BTreeMap<String, Files>,
) -> Result<(), ConfigError> {
    // Those higher up first: the directory of one may be that of others.
    files.sort_by_key(|(guest, _)| guest.matches('/').count());
    for (guest, file) in files {
        let volume = shown.iter().filter_map(|shown| Some((shown.guest.len(), shown, below(&shown.guest, &guest)?)));
        let copy = copies.keys().filter_map(|copy| Some((copy.len(), copy.clone(), below(copy, &guest)?.to_owned())));
        let volume = volume.max_by_key(|(length, ..)| *length);
        let copy = copy.max_by_key(|(length, ..)| *length);
        match (volume, copy) {
            (volume, Some((length, copy, path))) if volume.as_ref().is_none_or(|(other, ..)| *other < length) => {
                copies.entry(copy).or_default().insert(path, file);
            }
            (Some((_, shown, path)), _) => put(shown, path, &guest, &file)?,
            (None, _) => {
                let (parent, name) = guest.rsplit_once('/').unwrap_or(("", &guest));
                let parent = if parent.is_empty() { "/" } else { parent };
                copies.entry(parent.to_owned()).or_default().insert(name.to_owned(), file);
            }
        }
    }
    Ok(())
}

/// Puts a single file into the directory of another volume.
fn put(shown: &Shown, path: &str, guest: &str, file: &File) -> Result<(), ConfigError> {
    let why = match shown.origin {
        Origin::Empty => {
            let put = || -> std::io::Result<()> {
                let path = Path::new(path);
                if let Some(parent) = path.parent() {
                    atomic_writer::make(&shown.directory, parent)?;
                }
                atomic_writer::replace_file(&shown.directory, path, file)
            };
            return put().map_err(|error| failed("write", Path::new(guest), &error));
        }
        Origin::Files => "its files are their sources' alone",
        Origin::Host => "the file would stay on the host",
    };
    Err(ConfigError::Invalid(format!(
        "the file {guest} lies in the volume that is mounted at {}, and {why}; mount it elsewhere",
        shown.guest
    )))
}

/// The directory `.`, which is where the guest's relative paths begin, and its name.
fn working_dir(container: &Container, shown: &mut Vec<Shown>) -> Result<Option<String>, ConfigError> {
    let Some(wanted) = container.working_dir.as_deref().filter(|path| !path.is_empty()) else { return Ok(None) };
    let path = normal(wanted)
        .ok_or_else(|| ConfigError::Invalid(format!("workingDir {wanted:?} is not a path of its own")))?;
    let volume = shown.iter().filter_map(|shown| Some((shown, below(&shown.guest, &path)?)));
    if let Some((volume, rest)) = volume.max_by_key(|(shown, _)| shown.guest.len()) {
        let what = format!("workingDir {wanted:?}");
        // As a container's runtime does it.
        let create = (!volume.read_only).then_some(0o700);
        let directory = Below { what: &what, whole: "the volume", create }.open(&volume.directory, Path::new(rest))?;
        let (origin, read_only) = (volume.origin, volume.read_only);
        shown.push(Shown { guest: ".".to_owned(), directory, origin, read_only });
    }
    Ok(Some(path))
}

/// The rest of a guest's path below a directory of its, "" for the directory itself.
fn below<'a>(directory: &str, path: &'a str) -> Option<&'a str> {
    let rest = path.strip_prefix(directory.trim_end_matches('/'))?;
    if rest.is_empty() { Some(rest) } else { rest.strip_prefix('/') }
}

/// Where the guest sees the mount, without a trailing slash.
fn guest_path(mount: &VolumeMount) -> Result<String, ConfigError> {
    let invalid = |why: &str| Err(ConfigError::Invalid(format!("volumeMount {:?}: {why}", mount.name)));
    if !matches!(mount.mount_propagation.as_deref(), None | Some("" | "None")) {
        return invalid("mountPropagation is not supported: a guest mounts nothing");
    }
    if mount.mount_path.is_empty() || mount.mount_path.contains('\0') {
        return invalid("the mountPath is not a path");
    }
    match normal(&mount.mount_path) {
        Some(path) => Ok(path),
        None => invalid("the mountPath must not contain '..'"),
    }
}

/// An absolute path in its shortest form; none when it goes up.
fn normal(path: &str) -> Option<String> {
    let mut parts = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(part) => parts.extend(part.to_str()),
            Component::RootDir | Component::CurDir => {}
            _ => return None,
        }
    }
    Some(format!("/{}", parts.join("/")))
}

/// The part of the volume that is mounted, if it is not the whole.
fn sub_path(mount: &VolumeMount, environment: &ContainerEnvironment) -> Result<Option<String>, ConfigError> {
    let plain = mount.sub_path.clone().filter(|path| !path.is_empty());
    let path = match mount.sub_path_expr.as_deref().filter(|path| !path.is_empty()) {
        Some(_) if plain.is_some() => {
            return Err(ConfigError::Invalid(format!(
                "volumeMount {:?}: subPath and subPathExpr exclude each other",
                mount.name
            )));
        }
        Some(expression) => Some(environment.expand_path(expression)?),
        None => plain,
    };
    if let Some(path) = &path {
        check_relative(path)?;
    }
    // "." is the whole, as is what only consists of it.
    Ok(path.filter(|path| Path::new(path).components().any(|part| part != Component::CurDir)))
}

fn check_relative(path: &str) -> Result<(), ConfigError> {
    let plain = Path::new(path).components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if plain && !path.contains('\0') {
        return Ok(());
    }
    Err(ConfigError::Invalid(format!("subPath {path:?} must be relative and stay inside the volume")))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::super::testing::Cluster;
    use super::super::tests::{container, is_at, mounts, pod, prepare, text};
    use super::*;
    use serde_json::{Value, json};
    use std::os::unix::fs::symlink;

    /// An emptyDir `e`, a ConfigMap `c` with `app.conf` and `deep/er`, an optional one `o` that does not exist.
    struct Stage {
        cluster: Cluster,
        dir: tempfile::TempDir,
    }

    impl Stage {
        fn new() -> Self {
            let cluster = Cluster::default();
            cluster.put("configmaps", "c", json!({"data": {"app.conf": "x=1", "er": "y"}}));
            Self { cluster, dir: tempfile::tempdir().unwrap() }
        }

        fn pod(&self, volume_mounts: Value) -> k8s_openapi::api::core::v1::Pod {
            let items = json!([{"key": "app.conf", "path": "app.conf"}, {"key": "er", "path": "deep/er"}]);
            let volumes = json!([
                {"name": "e", "emptyDir": {}},
                {"name": "c", "configMap": {"name": "c", "items": items}},
                {"name": "o", "configMap": {"name": "none", "optional": true}},
            ]);
            pod(volumes, volume_mounts)
        }

        async fn mounts(&self, volume_mounts: Value) -> Result<Mounts, ConfigError> {
            let pod = self.pod(volume_mounts);
            mounts(&prepare(&self.cluster, &pod, self.dir.path()).await?, &pod)
        }

        fn path(&self, path: &str) -> std::path::PathBuf {
            self.dir.path().join(path)
        }
    }

    fn names(mounts: &Mounts) -> Vec<&str> {
        mounts.directories.iter().map(|mount| mount.guest.as_str()).collect()
    }

    /// A file in a directory that a guest is given.
    fn read(mounts: &Mounts, guest: &str, file: &str) -> String {
        let mount = mounts.directories.iter().find(|mount| mount.guest == guest).unwrap();
        let directory = Dir::from_std_file(mount.directory.try_clone().unwrap());
        directory.read_to_string(file).unwrap()
    }

    #[tokio::test]
    async fn a_sub_path_is_a_directory_of_the_volume_and_single_files_are_copies() {
        let stage = Stage::new();
        let found = stage
            .mounts(json!([
                {"name": "e", "mountPath": "/data/", "subPath": "one/two"},
                {"name": "c", "mountPath": "/etc/app/app.conf", "subPath": "app.conf"},
                {"name": "c", "mountPath": "/etc/app/copy.conf", "subPath": "./app.conf"},
                {"name": "c", "mountPath": "/deep", "subPath": "deep"},
            ]))
            .await
            .unwrap();
        assert!(is_at(&found, "/data", &stage.path("e/one/two")));
        assert_eq!(names(&found), ["/data", "/deep", "/etc/app"]);
        assert!(found.directories[1].read_only && found.directories[2].read_only && !found.directories[0].read_only);
        assert_eq!(read(&found, "/etc/app", "app.conf"), "x=1");
        assert_eq!(read(&found, "/etc/app", "copy.conf"), "x=1");
        assert_eq!(read(&found, "/deep", "er"), "y");
    }

    #[tokio::test]
    async fn a_sub_path_that_leads_out_is_refused() {
        let stage = Stage::new();
        stage.mounts(json!([{"name": "e", "mountPath": "/e"}])).await.unwrap();
        symlink("/etc", stage.path("e/evil")).unwrap();
        symlink("../c", stage.path("e/beside")).unwrap();
        std::fs::write(stage.path("e/file"), "").unwrap();
        for (sub_path, why) in [
            ("../c", "inside"),
            ("/etc", "inside"),
            ("evil", "leads out"),
            ("evil/x", "leads out"),
            ("beside", "leads out"),
            ("file", "file"),
        ] {
            let error = stage.mounts(json!([{"name": "e", "mountPath": "/x", "subPath": sub_path}])).await.unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid(m) if m.contains(why)), "{sub_path}: {error}");
        }
        let error = stage.mounts(json!([{"name": "c", "mountPath": "/x", "subPath": "none"}])).await.unwrap_err();
        assert!(matches!(error, ConfigError::Missing(_)), "{error}");
    }

    #[tokio::test]
    async fn what_may_be_missing_is_an_empty_directory_and_holds_nothing_up() {
        let stage = Stage::new();
        let found =
            stage.mounts(json!([{"name": "o", "mountPath": "/etc/app.conf", "subPath": "app.conf"}])).await.unwrap();
        assert_eq!(names(&found), ["/etc/app.conf"]);
    }

    #[tokio::test]
    async fn a_single_file_is_seen_in_the_directory_of_another_volume() {
        let stage = Stage::new();
        let mounted = json!([
            {"name": "e", "mountPath": "/data"},
            {"name": "c", "mountPath": "/data/app.conf", "subPath": "app.conf"},
            {"name": "c", "mountPath": "/data/sub/app.conf", "subPath": "app.conf"},
        ]);
        // As another container of the pod can do it.
        stage.mounts(json!([{"name": "e", "mountPath": "/e"}])).await.unwrap();
        std::fs::write(stage.path("outside"), "untouched").unwrap();
        symlink("../outside", stage.path("e/app.conf")).unwrap();
        let found = stage.mounts(mounted.clone()).await.unwrap();
        assert_eq!(names(&found), ["/data"]);
        assert_eq!(
            (read(&found, "/data", "app.conf"), read(&found, "/data", "sub/app.conf")),
            ("x=1".into(), "x=1".into())
        );
        assert_eq!(text(stage.path("outside")), "untouched");
        std::fs::remove_dir_all(stage.path("e/sub")).unwrap();
        symlink("..", stage.path("e/sub")).unwrap();
        assert!(stage.mounts(mounted).await.is_err());
        assert!(!stage.path("app.conf").exists());
        let within = json!([
            {"name": "c", "mountPath": "/c"}, {"name": "c", "mountPath": "/c/more.conf", "subPath": "app.conf"},
        ]);
        assert!(stage.mounts(within).await.unwrap_err().to_string().contains("/c/more.conf"));
    }

    #[tokio::test]
    async fn a_sub_path_may_be_an_expression_of_the_containers_variables() {
        let stage = Stage::new();
        let expression = |path: &str| stage.pod(json!([{"name": "e", "mountPath": "/e", "subPathExpr": path}]));
        let pod = expression("logs/$(NAME)");
        let volumes = prepare(&stage.cluster, &pod, stage.dir.path()).await.unwrap();
        let with = |name: &str| ContainerEnvironment { env: vec![("NAME".into(), name.into())], args: Vec::new() };
        let found = volumes.mounts(container(&pod), &with("web-1")).unwrap();
        assert!(is_at(&found, "/e", &stage.path("e/logs/web-1")));
        assert!(volumes.mounts(container(&pod), &with("../../..")).unwrap_err().to_string().contains("inside"));
        assert!(volumes.mounts(container(&pod), &ContainerEnvironment::default()).is_err());
    }

    #[tokio::test]
    async fn a_working_directory_is_where_relative_paths_begin() {
        let stage = Stage::new();
        let mut pod = stage.pod(json!([
            {"name": "e", "mountPath": "/e"}, {"name": "c", "mountPath": "/e/c"}, {"name": "c", "mountPath": "/c"},
        ]));
        let volumes = prepare(&stage.cluster, &pod, stage.dir.path()).await.unwrap();
        std::fs::create_dir(stage.path("outside")).unwrap();
        symlink("../outside", stage.path("e/link")).unwrap();
        let mut begin = |path: &str| {
            pod.spec.as_mut().unwrap().containers[0].working_dir = Some(path.into());
            mounts(&volumes, &pod)
        };
        for (path, host) in [("/e/new/er/", "e/new/er"), ("/e", "e"), ("/e/c/deep", "c/deep"), ("/c", "c")] {
            let found = begin(path).unwrap();
            assert!(is_at(&found, ".", &stage.path(host)), "{path}");
            assert_eq!(found.working_dir.as_deref(), Some(path.trim_end_matches('/')));
        }
        assert_eq!(names(&begin("/elsewhere").unwrap()), ["/e", "/e/c", "/c"]);
        for path in ["/e/link", "/e/link/x", "/e/../c", "/c/none"] {
            assert!(begin(path).is_err(), "{path}");
        }
    }

    #[tokio::test]
    async fn contents_are_read_only_and_a_mount_that_cannot_be_made_is_refused() {
        let stage = Stage::new();
        let good = json!([
            {"name": "c", "mountPath": "/c", "readOnly": false}, {"name": "e", "mountPath": "/e", "readOnly": true},
        ]);
        assert!(stage.mounts(good).await.unwrap().directories.iter().all(|mount| mount.read_only));
        for bad in [
            json!([{"name": "none", "mountPath": "/x"}]),
            json!([{"name": "e", "mountPath": "/x/../y"}]),
            json!([{"name": "e", "mountPath": ""}]),
            json!([{"name": "e", "mountPath": "/x", "mountPropagation": "Bidirectional"}]),
            json!([{"name": "e", "mountPath": "/x"}, {"name": "c", "mountPath": "/x/"}]),
            json!((0..=MAX_MOUNTS).map(|n| json!({"name": "e", "mountPath": format!("/{n}")})).collect::<Vec<_>>()),
        ] {
            let error = stage.mounts(bad.clone()).await.unwrap_err();
            assert!(matches!(error, ConfigError::Invalid(_)), "{bad}");
        }
    }
}
