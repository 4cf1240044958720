//! A pod's volumes: ConfigMaps, Secrets, tokens and fields of the pod as files, empty directories, allowed host paths.
//!
//! Contents are written as the kubelet writes them: a timestamped directory, swapped in by renaming the link `..data`.
//! Every link is relative and stays inside the volume, because a WASI directory confines links to itself.

use super::environment::{
    ConfigError, PodFacts, Sources, Wanted, field_value, missing_key, nanos, resource_value, while_forbidden,
};
use futures::future::try_join_all;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, DownwardAPIVolumeFile, EmptyDirVolumeSource, HostPathVolumeSource, KeyToPath, Pod, Secret,
    ServiceAccount, ServiceAccountTokenProjection, Volume, VolumeMount, VolumeProjection,
};
use krustlet_runtime::Mount;
use kube::api::{Api, GetParams, PostParams};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Component, Path, PathBuf};
use tokio::sync::Mutex;

/// A projected token lives this long when the pod does not say.
const TOKEN_SECONDS: i64 = 3600;
/// The longest that a token is used before it is renewed, however long it lives.
const TOKEN_MAX_AGE: SignedDuration = SignedDuration::from_hours(24);
/// What the agent keeps beside the volumes; no volume can have this name.
const SINGLE_FILES: &str = "..files";

/// The prepared volumes of one pod.
#[derive(Debug)]
pub struct PodVolumes {
    dir: PathBuf,
    volumes: BTreeMap<String, Kind>,
    kept: Mutex<Kept>,
}

#[derive(Debug, Clone, PartialEq)]
enum Kind {
    Files {
        sources: Vec<Source>,
        mode: u32,
    },
    /// The limit is in bytes.
    Empty {
        limit: Option<u64>,
    },
    Host(PathBuf),
}

#[derive(Debug, Clone, PartialEq)]
enum Source {
    ConfigMap { name: String, items: Vec<KeyToPath>, optional: bool },
    Secret { name: String, items: Vec<KeyToPath>, optional: bool },
    Fields(Vec<DownwardAPIVolumeFile>),
    Token(ServiceAccountTokenProjection),
}

/// What need not be read again at every refresh.
#[derive(Debug, Default)]
struct Kept {
    tokens: BTreeMap<TokenKey, Token>,
    /// ConfigMaps and Secrets that are marked immutable.
    immutable: Sources,
}

/// The volume, and the token's path in it.
type TokenKey = (String, String);

#[derive(Debug, Clone)]
struct Token {
    value: String,
    expires: Timestamp,
    renew: Timestamp,
}

impl Token {
    fn new(value: String, issued: Timestamp, expires: Timestamp) -> Self {
        let life = expires.duration_since(issued).max(SignedDuration::ZERO);
        // 80 % of its life, so that four failed renewals in five are survived.
        let age = (life / 5 * 4).min(TOKEN_MAX_AGE);
        Self { value, expires, renew: issued + age }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct File {
    data: Vec<u8>,
    mode: u32,
}

/// Path in the volume → file.
type Files = BTreeMap<String, File>;

impl PodVolumes {
    /// Makes the volumes that the pod's containers mount, under `dir` (`<data-dir>/pods/UID/volumes`). May be repeated:
    /// contents are brought up to date, an emptyDir keeps what is in it.
    pub async fn prepare(
        client: &kube::Client,
        pod: &Pod,
        facts: &PodFacts,
        dir: &Path,
        hostpath_allow: &[PathBuf],
    ) -> Result<Self, ConfigError> {
        let mounted = mounted(pod);
        let mut volumes = BTreeMap::new();
        for volume in pod.spec.iter().flat_map(|spec| spec.volumes.iter().flatten()) {
            if mounted.contains(volume.name.as_str()) {
                check_name(&volume.name)?;
                volumes.insert(volume.name.clone(), Kind::of(volume, hostpath_allow)?);
            }
        }
        for (name, kind) in &volumes {
            if !matches!(kind, Kind::Host(_)) {
                let path = dir.join(name);
                private_dir(&path).map_err(|error| failed("create", &path, &error))?;
            }
        }
        let volumes = Self { dir: dir.to_owned(), volumes, kept: Mutex::default() };
        volumes.write(client, pod, facts, &GetParams::default()).await?;
        Ok(volumes)
    }

    /// Brings the contents up to date: changed ConfigMaps, Secrets, labels and annotations, tokens that grow old.
    pub async fn refresh(&self, client: &kube::Client, pod: &Pod, facts: &PodFacts) -> Result<(), ConfigError> {
        // Any version will do: the API server then answers from its memory, and the next refresh gets the rest.
        self.write(client, pod, facts, &GetParams::any()).await
    }

    /// The directories that the container asks for.
    pub fn mounts(&self, container: &Container) -> Result<Vec<Mount>, ConfigError> {
        if container.volume_devices.iter().flatten().next().is_some() {
            return Err(ConfigError::Invalid("volumeDevices are not supported: WASI has directories only".into()));
        }
        let mut mounts: Vec<Mount> = Vec::new();
        let mut single_files: BTreeMap<String, Vec<(String, PathBuf)>> = BTreeMap::new();
        for mount in container.volume_mounts.iter().flatten() {
            let guest = guest_path(mount)?;
            let kind = self.volumes.get(&mount.name).ok_or_else(|| {
                ConfigError::Invalid(format!("volumeMount {:?}: the pod has no volume of this name", mount.name))
            })?;
            let (host, read_only) = match kind {
                Kind::Files { .. } => (self.dir.join(&mount.name), true),
                Kind::Empty { .. } => (self.dir.join(&mount.name), mount.read_only == Some(true)),
                Kind::Host(path) => (path.clone(), mount.read_only == Some(true)),
            };
            let host = match mount.sub_path.as_deref().filter(|path| !path.is_empty()) {
                None => host,
                Some(sub_path) => inside(&host, sub_path, !matches!(kind, Kind::Files { .. }))?,
            };
            if host.is_dir() {
                mounts.push(Mount { host, guest, read_only });
            } else if matches!(kind, Kind::Files { .. }) {
                let (parent, file) = guest.rsplit_once('/').unwrap_or(("", &guest));
                let parent = if parent.is_empty() { "/" } else { parent };
                single_files.entry(parent.to_owned()).or_default().push((file.to_owned(), host));
            } else {
                return Err(ConfigError::Invalid(format!(
                    "volumeMount {:?}: the subPath names a file, and WASI mounts directories only",
                    mount.name
                )));
            }
        }
        for (number, (guest, files)) in single_files.into_iter().enumerate() {
            let host = self.dir.join(SINGLE_FILES).join(&container.name).join(number.to_string());
            copy_files(&host, &files).map_err(|error| failed("write", &host, &error))?;
            mounts.push(Mount { host, guest, read_only: true });
        }
        let mut seen = BTreeSet::new();
        match mounts.iter().find(|mount| !seen.insert(mount.guest.as_str())) {
            Some(twice) => Err(ConfigError::Invalid(format!("more than one volume is mounted at {}", twice.guest))),
            None => Ok(mounts),
        }
    }

    /// What to tell about the first emptyDir that outgrew its sizeLimit, if one did. Walks the directories.
    pub fn over_limit(&self) -> Option<String> {
        self.volumes.iter().find_map(|(name, kind)| match kind {
            Kind::Empty { limit: Some(limit) } if size(&self.dir.join(name)) > *limit => {
                Some(format!("Usage of EmptyDir volume {name:?} exceeds the limit of {limit} bytes"))
            }
            _ => None,
        })
    }

    /// Removes what [`PodVolumes::prepare`] made; host paths are left alone. Removing twice is no error.
    pub async fn remove(dir: &Path) -> std::io::Result<()> {
        match tokio::fs::remove_dir_all(dir).await {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    async fn write(
        &self,
        client: &kube::Client,
        pod: &Pod,
        facts: &PodFacts,
        version: &GetParams,
    ) -> Result<(), ConfigError> {
        let namespace = pod.metadata.namespace.as_deref().unwrap_or("default");
        let mut kept = self.kept.lock().await;
        let mut wanted = self.wanted();
        wanted.config_maps.retain(|name| !kept.immutable.config_maps.contains_key(name));
        wanted.secrets.retain(|name| !kept.immutable.secrets.contains_key(name));
        let (mut sources, ()) = futures::try_join!(
            Sources::read(client, namespace, &wanted, version),
            renew_tokens(client, namespace, pod, &self.volumes, &mut kept.tokens),
        )?;
        let Kept { tokens, immutable } = &mut *kept;
        for (name, object) in &sources.config_maps {
            if object.immutable == Some(true) {
                immutable.config_maps.insert(name.clone(), object.clone());
            }
        }
        for (name, object) in &sources.secrets {
            if object.immutable == Some(true) {
                immutable.secrets.insert(name.clone(), object.clone());
            }
        }
        sources.config_maps.extend(immutable.config_maps.clone());
        sources.secrets.extend(immutable.secrets.clone());
        // One volume that fails does not hold up the others.
        let mut first_error = None;
        for (name, kind) in &self.volumes {
            if let Kind::Files { sources: projections, mode } = kind {
                let written = match files(name, projections, *mode, pod, facts, &sources, tokens) {
                    Ok(files) => publish(self.dir.join(name), files).await,
                    Err(error) => Err(error),
                };
                first_error = first_error.or(written.err());
            }
        }
        first_error.map_or(Ok(()), Err)
    }

    fn wanted(&self) -> Wanted {
        let mut wanted = Wanted::default();
        for kind in self.volumes.values() {
            let Kind::Files { sources, .. } = kind else { continue };
            for source in sources {
                match source {
                    Source::ConfigMap { name, .. } => wanted.config_maps.insert(name.clone()),
                    Source::Secret { name, .. } => wanted.secrets.insert(name.clone()),
                    Source::Fields(_) | Source::Token(_) => continue,
                };
            }
        }
        wanted
    }
}

/// Names of the volumes that some container mounts. As under the kubelet, the others are not made.
fn mounted(pod: &Pod) -> BTreeSet<&str> {
    let containers =
        pod.spec.iter().flat_map(|spec| spec.containers.iter().chain(spec.init_containers.iter().flatten()));
    containers.flat_map(|container| container.volume_mounts.iter().flatten()).map(|mount| mount.name.as_str()).collect()
}

impl Kind {
    fn of(volume: &Volume, hostpath_allow: &[PathBuf]) -> Result<Self, ConfigError> {
        let files = |source, mode: Option<i32>| {
            Ok(Self::Files { sources: vec![source], mode: mode_bits(mode.unwrap_or(0o644)) })
        };
        if let Some(source) = &volume.config_map {
            let (items, optional) = (source.items.clone().unwrap_or_default(), source.optional == Some(true));
            files(Source::ConfigMap { name: source.name.clone(), items, optional }, source.default_mode)
        } else if let Some(source) = &volume.secret {
            let (items, optional) = (source.items.clone().unwrap_or_default(), source.optional == Some(true));
            let name = source.secret_name.clone().unwrap_or_default();
            files(Source::Secret { name, items, optional }, source.default_mode)
        } else if let Some(source) = &volume.downward_api {
            files(Source::Fields(source.items.clone().unwrap_or_default()), source.default_mode)
        } else if let Some(source) = &volume.projected {
            let sources = source.sources.iter().flatten().map(|source| Source::of(&volume.name, source));
            let mode = mode_bits(source.default_mode.unwrap_or(0o644));
            Ok(Self::Files { sources: sources.collect::<Result<_, _>>()?, mode })
        } else if let Some(source) = &volume.empty_dir {
            Self::empty(&volume.name, source)
        } else if let Some(source) = &volume.host_path {
            host_path(&volume.name, source, hostpath_allow).map(Self::Host)
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
        let limit = match &source.size_limit {
            None => None,
            Some(limit) => match nanos(limit).and_then(|value| u64::try_from(value / 1_000_000_000).ok()) {
                Some(bytes) => Some(bytes).filter(|bytes| *bytes > 0),
                None => {
                    return Err(ConfigError::Invalid(format!("volume {name:?}: {:?} is no size", limit.0)));
                }
            },
        };
        Ok(Self::Empty { limit })
    }
}

impl Source {
    fn of(volume: &str, source: &VolumeProjection) -> Result<Self, ConfigError> {
        if let Some(source) = &source.config_map {
            let (items, optional) = (source.items.clone().unwrap_or_default(), source.optional == Some(true));
            Ok(Self::ConfigMap { name: source.name.clone(), items, optional })
        } else if let Some(source) = &source.secret {
            let (items, optional) = (source.items.clone().unwrap_or_default(), source.optional == Some(true));
            Ok(Self::Secret { name: source.name.clone(), items, optional })
        } else if let Some(source) = &source.downward_api {
            Ok(Self::Fields(source.items.clone().unwrap_or_default()))
        } else if let Some(source) = &source.service_account_token {
            Ok(Self::Token(source.clone()))
        } else {
            Err(ConfigError::Invalid(format!(
                "volume {volume:?}: the projection {} is not supported",
                type_name(source)
            )))
        }
    }
}

/// The name of the one field that says what a volume or a projection is.
fn type_name(source: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(source).unwrap_or_default();
    let name = value.as_object().and_then(|fields| fields.keys().find(|key| *key != "name"));
    name.map_or_else(|| "(none)".to_owned(), Clone::clone)
}

fn mode_bits(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0) & 0o777
}

/// Where a hostPath volume leads, if it lies under an allowed prefix, also after its links are followed.
fn host_path(name: &str, source: &HostPathVolumeSource, allow: &[PathBuf]) -> Result<PathBuf, ConfigError> {
    let path = Path::new(&source.path);
    let denied = || {
        ConfigError::Invalid(format!(
            "volume {name:?}: hostPath {} is not allowed on this node; --hostpath-allow lists what is",
            source.path
        ))
    };
    let plain = |path: &Path| path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain(path) {
        return Err(denied());
    }
    let Some(prefix) = allow.iter().find(|prefix| path.starts_with(prefix)) else { return Err(denied()) };
    let create = match source.type_.as_deref().unwrap_or_default() {
        "" | "Directory" => false,
        "DirectoryOrCreate" => true,
        other => {
            return Err(ConfigError::Invalid(format!(
                "volume {name:?}: hostPath type {other} is not supported: WASI mounts directories only"
            )));
        }
    };
    let missing = |path: &Path, error: std::io::Error| {
        ConfigError::Missing(format!("volume {name:?}: host directory {}: {error}", path.display()))
    };
    let prefix = prefix.canonicalize().map_err(|error| missing(prefix, error))?;
    if create {
        let existing = path.ancestors().find(|ancestor| ancestor.symlink_metadata().is_ok()).unwrap_or(path);
        let existing = existing.canonicalize().map_err(|error| missing(existing, error))?;
        if !existing.starts_with(&prefix) {
            return Err(denied());
        }
        std::fs::DirBuilder::new().recursive(true).mode(0o755).create(path).map_err(|error| missing(path, error))?;
    }
    let real = path.canonicalize().map_err(|error| missing(path, error))?;
    if !real.starts_with(&prefix) {
        return Err(denied());
    }
    if !real.is_dir() {
        return Err(ConfigError::Invalid(format!("volume {name:?}: hostPath {} is no directory", source.path)));
    }
    Ok(real)
}

/// Requests the tokens that are missing or have grown old. While one is still valid, a failed renewal is no failure.
async fn renew_tokens(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
    volumes: &BTreeMap<String, Kind>,
    tokens: &mut BTreeMap<TokenKey, Token>,
) -> Result<(), ConfigError> {
    let now = Timestamp::now();
    let projections = volumes.iter().flat_map(|(volume, kind)| {
        let sources: &[Source] = if let Kind::Files { sources, .. } = kind { sources } else { &[] };
        sources.iter().filter_map(move |source| match source {
            Source::Token(projection) => Some(((volume.clone(), projection.path.clone()), projection)),
            _ => None,
        })
    });
    let due = projections.filter(|(key, _)| tokens.get(key).is_none_or(|token| token.renew <= now));
    let requests = due.map(|(key, projection)| {
        let valid = tokens.get(&key).is_some_and(|token| token.expires > now);
        async move {
            match request_token(client, namespace, pod, projection).await {
                Ok(token) => Ok(Some((key, token))),
                Err(error) if valid => {
                    tracing::warn!(namespace, volume = key.0, %error, "service account token not renewed yet");
                    Ok(None)
                }
                Err(error) => Err(error),
            }
        }
    });
    let renewed = try_join_all(requests.collect::<Vec<_>>()).await?;
    tokens.extend(renewed.into_iter().flatten());
    Ok(())
}

async fn request_token(
    client: &kube::Client,
    namespace: &str,
    pod: &Pod,
    projection: &ServiceAccountTokenProjection,
) -> Result<Token, ConfigError> {
    let account = pod.spec.as_ref().and_then(|spec| spec.service_account_name.as_deref()).unwrap_or("default");
    let api: Api<ServiceAccount> = Api::namespaced(client.clone(), namespace);
    let request = TokenRequest {
        spec: Some(TokenRequestSpec {
            audiences: projection.audience.clone().filter(|audience| !audience.is_empty()).map(|one| vec![one]),
            expiration_seconds: Some(projection.expiration_seconds.unwrap_or(TOKEN_SECONDS)),
            bound_object_ref: Some(BoundObjectReference {
                api_version: Some("v1".into()),
                kind: Some("Pod".into()),
                name: pod.metadata.name.clone(),
                uid: pod.metadata.uid.clone(),
            }),
            ..TokenRequestSpec::default()
        }),
        ..TokenRequest::default()
    };
    let parameters = PostParams::default();
    let failed = |cause: &str| {
        ConfigError::Missing(format!("failed to get a token for service account {namespace}/{account}: {cause}"))
    };
    let issued = Timestamp::now();
    let answer = while_forbidden(|| api.create_token_request(account, &parameters, &request))
        .await
        .map_err(|error| failed(&error.to_string()))?;
    let status = answer.status.ok_or_else(|| failed("the answer has no status"))?;
    match (status.token, status.expiration_timestamp) {
        (Some(value), Some(expires)) => Ok(Token::new(value, issued, expires.0)),
        _ => Err(failed("the answer has no token")),
    }
}

/// All files of one volume; a later source takes an earlier one's place at the same path.
fn files(
    volume: &str,
    projections: &[Source],
    mode: u32,
    pod: &Pod,
    facts: &PodFacts,
    sources: &Sources,
    tokens: &BTreeMap<TokenKey, Token>,
) -> Result<Files, ConfigError> {
    let mut files = Files::new();
    for projection in projections {
        match projection {
            Source::ConfigMap { name, items, optional } => {
                if let Some(object) = sources.config_map(name, *optional)? {
                    let select = Selection { kind: "ConfigMap", name, items, optional: *optional, sources };
                    select.into_files(&config_map_data(object), mode, &mut files)?;
                }
            }
            Source::Secret { name, items, optional } => {
                if let Some(object) = sources.secret(name, *optional)? {
                    let select = Selection { kind: "Secret", name, items, optional: *optional, sources };
                    select.into_files(&secret_data(object), mode & 0o700, &mut files)?;
                }
            }
            Source::Fields(items) => {
                for item in items {
                    let value = if let Some(field) = &item.field_ref {
                        field_value(field, pod, facts)?
                    } else if let Some(resource) = &item.resource_field_ref {
                        resource_value(resource, pod, None, facts)?
                    } else {
                        return Err(ConfigError::Invalid(format!("volume {volume:?}: {:?} has no source", item.path)));
                    };
                    let mode = item.mode.map_or(mode, mode_bits);
                    files.insert(checked_path(&item.path)?, File { data: value.into_bytes(), mode });
                }
            }
            Source::Token(projection) => {
                let token = tokens.get(&(volume.to_owned(), projection.path.clone())).ok_or_else(|| {
                    ConfigError::Missing(format!("volume {volume:?}: no token for {:?} yet", projection.path))
                })?;
                let file = File { data: token.value.clone().into_bytes(), mode: mode & 0o700 };
                files.insert(checked_path(&projection.path)?, file);
            }
        }
    }
    for path in files.keys() {
        if Path::new(path).ancestors().skip(1).filter_map(Path::to_str).any(|parent| files.contains_key(parent)) {
            return Err(ConfigError::Invalid(format!("volume {volume:?}: {path:?} lies below another file")));
        }
    }
    Ok(files)
}

fn config_map_data(object: &ConfigMap) -> BTreeMap<&str, &[u8]> {
    let text = object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.as_bytes()));
    let binary = object.binary_data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice()));
    text.chain(binary).collect()
}

fn secret_data(object: &Secret) -> BTreeMap<&str, &[u8]> {
    object.data.iter().flatten().map(|(key, value)| (key.as_str(), value.0.as_slice())).collect()
}

/// Which keys of an object become files: all of them, or the listed ones.
struct Selection<'a> {
    kind: &'a str,
    name: &'a str,
    items: &'a [KeyToPath],
    optional: bool,
    sources: &'a Sources,
}

impl Selection<'_> {
    fn into_files(self, data: &BTreeMap<&str, &[u8]>, mode: u32, files: &mut Files) -> Result<(), ConfigError> {
        if self.items.is_empty() {
            for (key, value) in data {
                files.insert(checked_path(key)?, File { data: value.to_vec(), mode });
            }
        }
        for item in self.items {
            let path = checked_path(&item.path)?;
            match data.get(item.key.as_str()) {
                Some(value) => {
                    let mode = item.mode.map_or(mode, mode_bits);
                    files.insert(path, File { data: value.to_vec(), mode });
                }
                None if self.optional => {}
                None => return Err(missing_key(self.kind, self.sources, self.name, &item.key)),
            }
        }
        Ok(())
    }
}

/// The path in its shortest form, or why it may not be used: it is absolute, has `..` in it, or is one of the names
/// that the volume keeps for itself.
fn checked_path(path: &str) -> Result<String, ConfigError> {
    let invalid = |why: &str| Err(ConfigError::Invalid(format!("path {path:?} {why}")));
    if path.is_empty() || path.contains('\0') {
        return invalid("is not a file name");
    }
    if path.len() > 4096 || path.split('/').any(|part| part.len() > 255) {
        return invalid("is too long");
    }
    let mut parts = Vec::new();
    for part in Path::new(path).components() {
        match part {
            Component::Normal(part) => parts.extend(part.to_str()),
            Component::CurDir => {}
            _ => return invalid("must be relative and stay inside the volume"),
        }
    }
    match parts.first() {
        None => invalid("is not a file name"),
        Some(first) if first.starts_with("..") => invalid("must not start with '..'"),
        Some(_) => Ok(parts.join("/")),
    }
}

fn check_name(name: &str) -> Result<(), ConfigError> {
    let label = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-';
    if name.is_empty() || name.len() > 63 || !name.chars().all(label) {
        return Err(ConfigError::Invalid(format!("{name:?} is not the name of a volume")));
    }
    Ok(())
}

/// Where the guest sees the mount, without a trailing slash.
fn guest_path(mount: &VolumeMount) -> Result<String, ConfigError> {
    let invalid = |why: &str| Err(ConfigError::Invalid(format!("volumeMount {:?}: {why}", mount.name)));
    if mount.sub_path_expr.as_deref().is_some_and(|path| !path.is_empty()) {
        return invalid("subPathExpr is not supported; use subPath");
    }
    if !matches!(mount.mount_propagation.as_deref(), None | Some("" | "None")) {
        return invalid("mountPropagation is not supported: a guest mounts nothing");
    }
    let mut parts = Vec::new();
    for part in Path::new(&mount.mount_path).components() {
        match part {
            Component::Normal(part) => parts.extend(part.to_str()),
            Component::RootDir | Component::CurDir => {}
            _ => return invalid("the mountPath must not contain '..'"),
        }
    }
    if mount.mount_path.is_empty() || mount.mount_path.contains('\0') {
        return invalid("the mountPath is not a path");
    }
    Ok(format!("/{}", parts.join("/")))
}

/// The real path of `sub_path` below `root`. Links that lead out of it are refused: a guest can make them in its own
/// emptyDir. Directories that are missing are made where `create` says so.
fn inside(root: &Path, sub_path: &str, create: bool) -> Result<PathBuf, ConfigError> {
    let invalid = |why: &str| ConfigError::Invalid(format!("subPath {sub_path:?} {why}"));
    let root = root.canonicalize().map_err(|error| failed("open", root, &error))?;
    let mut path = root.clone();
    for part in Path::new(sub_path).components() {
        match part {
            Component::Normal(part) => path.push(part),
            Component::CurDir => continue,
            _ => return Err(invalid("must be relative and stay inside the volume")),
        }
        match path.canonicalize() {
            Ok(real) if real.starts_with(&root) => path = real,
            Ok(_) => return Err(invalid("leads out of the volume")),
            Err(error) if error.kind() == ErrorKind::NotFound && path.symlink_metadata().is_ok() => {
                return Err(invalid("is a link to nothing"));
            }
            Err(error) if error.kind() == ErrorKind::NotFound && create => {
                private_dir(&path).map_err(|error| failed("create", &path, &error))?;
            }
            Err(error) if error.kind() == ErrorKind::NotFound => {
                return Err(ConfigError::Missing(format!("subPath {sub_path:?} is not in the volume")));
            }
            Err(error) => return Err(failed("open", &path, &error)),
        }
    }
    Ok(path)
}

/// A full or failing disk may recover, so the container waits.
fn failed(what: &str, path: &Path, error: &std::io::Error) -> ConfigError {
    ConfigError::Missing(format!("failed to {what} {}: {error}", path.display()))
}

fn private_dir(path: &Path) -> std::io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(path)
}

/// Copies single files to where a directory is mounted in their place; each one is replaced as a whole.
fn copy_files(dir: &Path, files: &[(String, PathBuf)]) -> std::io::Result<()> {
    private_dir(dir)?;
    for (name, from) in files {
        let new = dir.join("..new");
        remove_any(&new)?;
        write_file(&new, &File { data: std::fs::read(from)?, mode: 0o600 })?;
        std::fs::rename(new, dir.join(name))?;
    }
    Ok(())
}

async fn publish(dir: PathBuf, files: Files) -> Result<(), ConfigError> {
    let path = dir.clone();
    match tokio::task::spawn_blocking(move || write_atomically(&dir, &files)).await {
        Ok(written) => written.map_err(|error| failed("write", &path, &error)),
        Err(error) => Err(ConfigError::Missing(format!("failed to write {}: {error}", path.display()))),
    }
}

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes the directory show exactly these files, all of them changed at one moment.
fn write_atomically(dir: &Path, files: &Files) -> std::io::Result<()> {
    let data = dir.join(DATA);
    let current = std::fs::read_link(&data).ok();
    let mut shown = Files::new();
    if let Some(current) = &current {
        read_tree(&dir.join(current), "", &mut shown)?;
    }
    let expected: Files = files
        .iter()
        // The agent itself has to read them back.
        .map(|(path, file)| (path.clone(), File { data: file.data.clone(), mode: file.mode | 0o400 }))
        .collect();
    let kept = if current.is_some() && shown == expected {
        current
    } else {
        let name = Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S.%9f").to_string();
        let new = dir.join(&name);
        private_dir(&new)?;
        for (path, file) in &expected {
            let path = new.join(path);
            if let Some(parent) = path.parent() {
                private_dir(parent)?;
            }
            write_file(&path, file)?;
        }
        let link = dir.join(NEW_DATA);
        remove_any(&link)?;
        symlink(&name, &link)?;
        std::fs::rename(link, data)?;
        Some(PathBuf::from(name))
    };
    let visible: BTreeSet<&str> = expected.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &visible {
        match symlink(Path::new(DATA).join(name), dir.join(name)) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    // What an earlier version showed, and what an interrupted one left behind.
    for entry in std::fs::read_dir(dir)? {
        let name = entry?.file_name();
        let keep = name == DATA
            || kept.as_ref().is_some_and(|kept| kept.as_os_str() == name)
            || name.to_str().is_some_and(|name| visible.contains(name));
        if !keep {
            remove_any(&dir.join(name))?;
        }
    }
    Ok(())
}

fn write_file(path: &Path, file: &File) -> std::io::Result<()> {
    let mut out = std::fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
    out.write_all(&file.data)?;
    // Whatever the umask is.
    out.set_permissions(std::fs::Permissions::from_mode(file.mode))
}

fn read_tree(dir: &Path, prefix: &str, files: &mut Files) -> std::io::Result<()> {
    let entries = match std::fs::read_dir(dir) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let path = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let metadata = entry.metadata()?;
        if metadata.is_dir() {
            read_tree(&entry.path(), &format!("{path}/"), files)?;
        } else {
            let mode = metadata.permissions().mode() & 0o777;
            files.insert(path, File { data: std::fs::read(entry.path())?, mode });
        }
    }
    Ok(())
}

fn remove_any(path: &Path) -> std::io::Result<()> {
    let removed = match path.symlink_metadata() {
        Ok(metadata) if metadata.is_dir() => std::fs::remove_dir_all(path),
        Ok(_) => std::fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Bytes of all files below `dir`; links are counted, not followed.
fn size(dir: &Path) -> u64 {
    let entries = std::fs::read_dir(dir).into_iter().flatten().flatten();
    entries
        .filter_map(|entry| {
            let metadata = entry.metadata().ok()?;
            Some(if metadata.is_dir() { size(&entry.path()) } else { metadata.len() })
        })
        .sum()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use axum::extract::{Path as UrlPath, State};
    use axum::http::StatusCode;
    use axum::routing::{get, post};
    use axum::{Json, Router};
    use serde_json::{Value, json};
    use std::sync::{Arc, Mutex as StdMutex};

    /// An API server with one namespace, `shop`.
    #[derive(Clone, Default)]
    struct Cluster {
        objects: Arc<StdMutex<BTreeMap<String, Value>>>,
        token_requests: Arc<StdMutex<Vec<Value>>>,
        reads: Arc<StdMutex<u32>>,
        token_seconds: i64,
    }

    impl Cluster {
        fn put(&self, kind: &str, name: &str, object: Value) {
            self.objects.lock().unwrap().insert(format!("{kind}/{name}"), object);
        }

        fn client(&self) -> kube::Client {
            let app = Router::new()
                .route("/api/v1/namespaces/shop/{kind}/{name}", get(read))
                .route("/api/v1/namespaces/shop/serviceaccounts/{name}/token", post(token))
                .with_state(self.clone());
            kube::Client::new(app, "shop")
        }
    }

    async fn read(
        State(cluster): State<Cluster>,
        UrlPath((kind, name)): UrlPath<(String, String)>,
    ) -> (StatusCode, Json<Value>) {
        *cluster.reads.lock().unwrap() += 1;
        match cluster.objects.lock().unwrap().get(&format!("{kind}/{name}")) {
            Some(object) => (StatusCode::OK, Json(object.clone())),
            None => {
                let status = json!({"kind": "Status", "status": "Failure", "code": 404, "reason": "NotFound"});
                (StatusCode::NOT_FOUND, Json(status))
            }
        }
    }

    async fn token(
        State(cluster): State<Cluster>,
        UrlPath(account): UrlPath<String>,
        Json(mut request): Json<Value>,
    ) -> Json<Value> {
        let mut requests = cluster.token_requests.lock().unwrap();
        request["account"] = json!(account);
        requests.push(request.clone());
        let expires = Timestamp::now() + SignedDuration::from_secs(cluster.token_seconds);
        request["status"] = json!({"token": format!("token-{}", requests.len()), "expirationTimestamp": expires});
        Json(request)
    }

    fn pod(volumes: Value, mounts: Value) -> Pod {
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
    fn pod_with(volume: Value) -> Pod {
        let mut volume = volume;
        volume["name"] = json!("v");
        pod(json!([volume]), json!([{"name": "v", "mountPath": "/v"}]))
    }

    fn container(pod: &Pod) -> &Container {
        &pod.spec.as_ref().unwrap().containers[0]
    }

    fn allowing(prefix: &Path) -> Vec<PathBuf> {
        vec![prefix.to_owned()]
    }

    async fn prepare(cluster: &Cluster, pod: &Pod, dir: &Path) -> Result<PodVolumes, ConfigError> {
        PodVolumes::prepare(&cluster.client(), pod, &PodFacts::default(), dir, &[]).await
    }

    fn text(path: PathBuf) -> String {
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
        let first = std::fs::read_link(v.join(DATA)).unwrap();

        volumes.refresh(&cluster.client(), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(std::fs::read_link(v.join(DATA)).unwrap(), first, "nothing changed, nothing written");

        cluster.put("configmaps", "c", json!({"data": {"a": "new"}}));
        volumes.refresh(&cluster.client(), &pod, &PodFacts::default()).await.unwrap();
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
        assert_eq!(std::fs::read_link(v.join(DATA)).unwrap().components().count(), 1);
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
        assert_eq!((mode(v.clone()), mode(v.join(DATA))), (0o700, 0o700));
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
        volumes.refresh(&cluster.client(), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(*cluster.reads.lock().unwrap(), 1);
        assert_eq!(text(dir.path().join("v/a")), "1");
    }

    #[tokio::test]
    async fn the_default_service_account_volume_mounts() {
        let cluster = Cluster { token_seconds: 3600, ..Cluster::default() };
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
        let mounts = volumes.mounts(container(&pod)).unwrap();
        assert_eq!(mounts, [Mount { host: host.clone(), guest: at.into(), read_only: true }]);
        assert_eq!(text(host.join("token")), "token-1");
        assert_eq!(text(host.join("ca.crt")), "PEM");
        assert_eq!(text(host.join("namespace")), "shop");
        assert_eq!(mode(host.join("token")), 0o600);

        volumes.refresh(&cluster.client(), &pod, &PodFacts::default()).await.unwrap();
        let requests = cluster.token_requests.lock().unwrap();
        assert_eq!(requests.len(), 1, "a young token is kept");
        assert_eq!(requests[0]["account"], "robot");
        assert_eq!(requests[0]["spec"]["expirationSeconds"], 3607);
        let bound = json!({"apiVersion": "v1", "kind": "Pod", "name": "web", "uid": "u-1"});
        assert_eq!(requests[0]["spec"]["boundObjectRef"], bound);
    }

    #[tokio::test]
    async fn an_old_token_is_replaced_at_the_next_refresh() {
        let cluster = Cluster { token_seconds: 0, ..Cluster::default() };
        let dir = tempfile::tempdir().unwrap();
        let pod = pod_with(json!({"projected": {"sources": [
            {"serviceAccountToken": {"path": "token", "audience": "vault"}},
        ]}}));
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        volumes.refresh(&cluster.client(), &pod, &PodFacts::default()).await.unwrap();
        assert_eq!(text(dir.path().join("v/token")), "token-2");
        assert_eq!(cluster.token_requests.lock().unwrap()[0]["spec"]["audiences"], json!(["vault"]));
    }

    #[test]
    fn a_token_is_renewed_at_four_fifths_of_its_life_and_at_least_daily() {
        let issued: Timestamp = "2026-01-01T00:00:00Z".parse().unwrap();
        let token = |seconds| Token::new("t".into(), issued, issued + SignedDuration::from_secs(seconds));
        assert_eq!(token(3600).renew, issued + SignedDuration::from_secs(2880));
        assert_eq!(token(30 * 86_400).renew, issued + SignedDuration::from_hours(24));
        assert_eq!(token(-5).renew, issued);
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
        let volumes = PodVolumes::prepare(&cluster.client(), &pod, &facts, dir.path(), &[]).await.unwrap();
        assert_eq!(text(dir.path().join("v/labels")), "app=\"web\"");
        assert_eq!(text(dir.path().join("v/cpu")), "2000");
        pod.metadata.labels = Some([("app".to_owned(), "shop".to_owned())].into());
        volumes.refresh(&cluster.client(), &pod, &facts).await.unwrap();
        assert_eq!(text(dir.path().join("v/labels")), "app=\"shop\"");
    }

    #[tokio::test]
    async fn an_empty_dir_is_writable_keeps_its_files_and_knows_its_limit() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        let pod = pod_with(json!({"emptyDir": {"sizeLimit": "1Ki", "medium": "Memory"}}));
        let volumes = prepare(&cluster, &pod, dir.path()).await.unwrap();
        let v = dir.path().join("v");
        assert!(!volumes.mounts(container(&pod)).unwrap()[0].read_only);
        assert_eq!((volumes.over_limit(), mode(v.clone())), (None, 0o700));
        std::fs::create_dir(v.join("sub")).unwrap();
        std::fs::write(v.join("sub/file"), [0; 1025]).unwrap();
        assert!(volumes.over_limit().unwrap().contains("\"v\""));
        prepare(&cluster, &pod, dir.path()).await.unwrap();
        assert!(v.join("sub/file").exists());
        PodVolumes::remove(dir.path()).await.unwrap();
        PodVolumes::remove(dir.path()).await.unwrap();
        assert!(!v.exists());
    }

    #[tokio::test]
    async fn a_host_path_needs_the_flag_and_cannot_leave_what_it_allows() {
        let (cluster, dir, host) = (Cluster::default(), tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let root = host.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("ok/data")).unwrap();
        symlink("/etc", root.join("ok/escape")).unwrap();
        let allow = allowing(&root.join("ok"));
        let at = |path: &str, kind: &str| {
            pod_with(json!({"hostPath": {"path": root.join(path).to_str().unwrap(), "type": kind}}))
        };
        let try_it = |pod: Pod| {
            let (client, dir, allow) = (cluster.client(), dir.path().to_owned(), allow.clone());
            async move {
                let volumes = PodVolumes::prepare(&client, &pod, &PodFacts::default(), &dir, &allow).await?;
                volumes.mounts(container(&pod))
            }
        };
        let mounts = try_it(at("ok/data", "")).await.unwrap();
        assert_eq!((mounts[0].host.clone(), mounts[0].read_only), (root.join("ok/data"), false));
        assert_eq!(try_it(at("ok/new/er", "DirectoryOrCreate")).await.unwrap()[0].host, root.join("ok/new/er"));
        for path in ["", "okay", "ok/../secret", "ok/escape", "ok/escape/new"] {
            let error = try_it(at(path, "DirectoryOrCreate")).await.unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid(m) if m.contains("--hostpath-allow")), "{path}: {error}");
        }
        assert!(matches!(try_it(at("ok/none", "Directory")).await, Err(ConfigError::Missing(_))));
        assert!(matches!(try_it(at("ok/data", "Socket")).await, Err(ConfigError::Invalid(_))));
        assert!(invalid(prepare(&cluster, &at("ok/data", ""), dir.path()).await).contains("--hostpath-allow"));
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
        assert_eq!(checked_path("..a/b").unwrap_err().to_string(), "path \"..a/b\" must not start with '..'");
    }

    #[tokio::test]
    async fn a_sub_path_is_a_directory_of_the_volume() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"app.conf": "x=1"}}));
        let volumes = json!([{"name": "e", "emptyDir": {}}, {"name": "c", "configMap": {"name": "c"}}]);
        let mounts = |mounts: Value| pod(volumes.clone(), mounts);
        let both = mounts(json!([
            {"name": "e", "mountPath": "/data/", "subPath": "one/two"},
            {"name": "c", "mountPath": "/etc/app/app.conf", "subPath": "app.conf"},
            {"name": "c", "mountPath": "/etc/app/copy.conf", "subPath": "app.conf"},
        ]));
        let prepared = prepare(&cluster, &both, dir.path()).await.unwrap();
        let found = prepared.mounts(container(&both)).unwrap();
        let real = dir.path().canonicalize().unwrap();
        assert_eq!((found[0].host.clone(), found[0].guest.as_str()), (real.join("e/one/two"), "/data"));
        assert_eq!((found.len(), found[1].guest.as_str(), found[1].read_only), (2, "/etc/app", true));
        assert_eq!(text(found[1].host.join("app.conf")), "x=1");
        assert_eq!(text(found[1].host.join("copy.conf")), "x=1");

        symlink("/etc", dir.path().join("e/evil")).unwrap();
        std::fs::write(dir.path().join("e/file"), "").unwrap();
        for (sub_path, why) in
            [("../c", "inside"), ("/etc", "inside"), ("evil", "leads out"), ("evil/x", "leads out"), ("file", "file")]
        {
            let pod = mounts(json!([{"name": "e", "mountPath": "/x", "subPath": sub_path}]));
            let error = prepared.mounts(container(&pod)).unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid(m) if m.contains(why)), "{sub_path}: {error}");
        }
        let pod = mounts(json!([{"name": "c", "mountPath": "/x", "subPath": "none"}]));
        assert!(matches!(prepared.mounts(container(&pod)), Err(ConfigError::Missing(_))));
    }

    #[tokio::test]
    async fn contents_are_read_only_and_a_mount_that_cannot_be_made_is_refused() {
        let (cluster, dir) = (Cluster::default(), tempfile::tempdir().unwrap());
        cluster.put("configmaps", "c", json!({"data": {"a": "1"}}));
        let volumes = json!([{"name": "e", "emptyDir": {}}, {"name": "c", "configMap": {"name": "c"}}]);
        let mounts = |mounts: Value| pod(volumes.clone(), mounts);
        let good = mounts(json!([
            {"name": "c", "mountPath": "/c", "readOnly": false}, {"name": "e", "mountPath": "/e", "readOnly": true},
        ]));
        let prepared = prepare(&cluster, &good, dir.path()).await.unwrap();
        assert!(prepared.mounts(container(&good)).unwrap().iter().all(|mount| mount.read_only));
        for bad in [
            json!({"name": "none", "mountPath": "/x"}),
            json!({"name": "e", "mountPath": "/x/../y"}),
            json!({"name": "e", "mountPath": ""}),
            json!({"name": "e", "mountPath": "/x", "subPathExpr": "$(A)"}),
            json!({"name": "e", "mountPath": "/x", "mountPropagation": "Bidirectional"}),
        ] {
            let pod = mounts(json!([bad]));
            assert!(matches!(prepared.mounts(container(&pod)), Err(ConfigError::Invalid(_))), "{bad}");
        }
        let twice = mounts(json!([{"name": "e", "mountPath": "/x"}, {"name": "c", "mountPath": "/x/"}]));
        assert!(matches!(prepared.mounts(container(&twice)), Err(ConfigError::Invalid(m)) if m.contains("/x")));
    }

    #[test]
    fn an_interrupted_write_is_cleaned_up_by_the_next_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("..2020_01_01_00_00_00.000000000")).unwrap();
        symlink("..nowhere", dir.path().join(NEW_DATA)).unwrap();
        symlink("..data/gone", dir.path().join("gone")).unwrap();
        let files = Files::from([("a".to_owned(), File { data: b"1".to_vec(), mode: 0 })]);
        write_atomically(dir.path(), &files).unwrap();
        assert_eq!(text(dir.path().join("a")), "1");
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 3);
    }
}
