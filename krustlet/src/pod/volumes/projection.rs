//! What files a volume shows: the keys of ConfigMaps and Secrets, fields of the pod, tokens. No I/O.

use super::super::fields::{PodFacts, field_value, resource_value};
use super::super::sources::{ConfigError, Sources, Wanted, missing_key};
use super::tokens::{TokenKey, Tokens};
use k8s_openapi::api::core::v1::{
    ConfigMap, DownwardAPIVolumeFile, KeyToPath, Pod, Secret, ServiceAccountTokenProjection, Volume, VolumeProjection,
};
use std::collections::BTreeMap;
use std::path::{Component, Path};

/// Bytes that the files of one pod may take together, each counted as a block more than it holds. A key may be named for
/// any number of paths, and the annotations as well, so that a pod of a few kB can ask for gigabytes.
const MAX_PROJECTED: usize = 128 << 20;
const BLOCK: usize = 4096;

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct File {
    pub data: Vec<u8>,
    pub mode: u32,
}

/// Path in the volume → file.
pub type Files = BTreeMap<String, File>;

/// What is left of the bytes that a pod's files may take.
#[derive(Debug)]
pub struct Budget(usize);

impl Default for Budget {
    fn default() -> Self {
        Self(MAX_PROJECTED)
    }
}

impl Budget {
    /// Takes a file's share, before there is the file.
    fn take(&mut self, path: &str, bytes: usize) -> Result<(), ConfigError> {
        match self.0.checked_sub(bytes.saturating_add(BLOCK)) {
            Some(left) => {
                self.0 = left;
                Ok(())
            }
            None => Err(ConfigError::Invalid(format!(
                "{path:?}: the files of the pod's volumes take more than {} MiB together",
                MAX_PROJECTED >> 20
            ))),
        }
    }
}

/// The sources of a volume of files, in their order.
#[derive(Debug, Clone, PartialEq)]
pub struct Projection {
    sources: Vec<Source>,
    mode: u32,
}

#[derive(Debug, Clone, PartialEq)]
enum Source {
    ConfigMap { name: String, items: Vec<KeyToPath>, optional: bool },
    Secret { name: String, items: Vec<KeyToPath>, optional: bool },
    Fields(Vec<DownwardAPIVolumeFile>),
    Token(ServiceAccountTokenProjection),
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
pub fn type_name(source: &impl serde::Serialize) -> String {
    let value = serde_json::to_value(source).unwrap_or_default();
    let name = value.as_object().and_then(|fields| fields.keys().find(|key| *key != "name"));
    name.map_or_else(|| "(none)".to_owned(), Clone::clone)
}

fn mode_bits(mode: i32) -> u32 {
    u32::try_from(mode).unwrap_or(0) & 0o777
}

impl Projection {
    /// None when the volume is of another kind.
    pub fn of(volume: &Volume) -> Result<Option<Self>, ConfigError> {
        let one = |source, mode: Option<i32>| {
            Ok(Some(Self { sources: vec![source], mode: mode_bits(mode.unwrap_or(0o644)) }))
        };
        if let Some(source) = &volume.config_map {
            let (items, optional) = (source.items.clone().unwrap_or_default(), source.optional == Some(true));
            one(Source::ConfigMap { name: source.name.clone(), items, optional }, source.default_mode)
        } else if let Some(source) = &volume.secret {
            let (items, optional) = (source.items.clone().unwrap_or_default(), source.optional == Some(true));
            let name = source.secret_name.clone().unwrap_or_default();
            one(Source::Secret { name, items, optional }, source.default_mode)
        } else if let Some(source) = &volume.downward_api {
            one(Source::Fields(source.items.clone().unwrap_or_default()), source.default_mode)
        } else if let Some(source) = &volume.projected {
            let sources = source.sources.iter().flatten().map(|source| Source::of(&volume.name, source));
            let mode = mode_bits(source.default_mode.unwrap_or(0o644));
            Ok(Some(Self { sources: sources.collect::<Result<_, _>>()?, mode }))
        } else {
            Ok(None)
        }
    }

    /// Whether a file may be missing without anything being wrong.
    pub fn is_optional(&self) -> bool {
        let optional = |source: &Source| {
            matches!(source, Source::ConfigMap { optional: true, .. } | Source::Secret { optional: true, .. })
        };
        self.sources.iter().any(optional)
    }

    /// The objects that its files come from.
    pub fn wanted(&self) -> Wanted {
        let mut wanted = Wanted::default();
        for source in &self.sources {
            match source {
                Source::ConfigMap { name, .. } => wanted.config_maps.insert(name.clone()),
                Source::Secret { name, .. } => wanted.secrets.insert(name.clone()),
                Source::Fields(_) | Source::Token(_) => continue,
            };
        }
        wanted
    }

    /// Whether its files are what they will ever be: all of them are of immutable objects.
    pub fn is_settled(&self, sources: &Sources) -> bool {
        self.sources.iter().all(|source| match source {
            Source::ConfigMap { name, .. } => sources.config_maps.get(name).is_some_and(|o| o.immutable == Some(true)),
            Source::Secret { name, .. } => sources.secrets.get(name).is_some_and(|o| o.immutable == Some(true)),
            Source::Fields(_) | Source::Token(_) => false,
        })
    }

    pub fn tokens<'a>(&'a self, volume: &str) -> impl Iterator<Item = (TokenKey, &'a ServiceAccountTokenProjection)> {
        self.sources.iter().filter_map(move |source| match source {
            Source::Token(projection) => Some(((volume.to_owned(), projection.path.clone()), projection)),
            _ => None,
        })
    }

    /// All files of the volume; a later source takes an earlier one's place at the same path.
    pub fn files(
        &self,
        volume: &str,
        pod: &Pod,
        facts: &PodFacts,
        sources: &Sources,
        tokens: &Tokens,
        budget: &mut Budget,
    ) -> Result<Files, ConfigError> {
        let mut files = Files::new();
        let mode = self.mode;
        for source in &self.sources {
            match source {
                Source::ConfigMap { name, items, optional } => {
                    if let Some(object) = sources.config_map(name, *optional)? {
                        let select = Selection { kind: "ConfigMap", name, items, optional: *optional, sources };
                        select.into_files(&config_map_data(object), mode, &mut files, budget)?;
                    }
                }
                Source::Secret { name, items, optional } => {
                    if let Some(object) = sources.secret(name, *optional)? {
                        let select = Selection { kind: "Secret", name, items, optional: *optional, sources };
                        select.into_files(&secret_data(object), mode & 0o700, &mut files, budget)?;
                    }
                }
                Source::Fields(items) => {
                    for item in items {
                        let value = if let Some(field) = &item.field_ref {
                            field_value(field, pod, facts)?
                        } else if let Some(resource) = &item.resource_field_ref {
                            resource_value(resource, pod, None, facts)?
                        } else {
                            return Err(ConfigError::Invalid(format!(
                                "volume {volume:?}: {:?} has no source",
                                item.path
                            )));
                        };
                        let mode = item.mode.map_or(mode, mode_bits);
                        budget.take(&item.path, value.len())?;
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
    fn into_files(
        self,
        data: &BTreeMap<&str, &[u8]>,
        mode: u32,
        files: &mut Files,
        budget: &mut Budget,
    ) -> Result<(), ConfigError> {
        if self.items.is_empty() {
            for (key, value) in data {
                budget.take(key, value.len())?;
                files.insert(checked_path(key)?, File { data: value.to_vec(), mode });
            }
        }
        for item in self.items {
            let path = checked_path(&item.path)?;
            match data.get(item.key.as_str()) {
                Some(value) => {
                    let mode = item.mode.map_or(mode, mode_bits);
                    budget.take(&path, value.len())?;
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
pub fn checked_path(path: &str) -> Result<String, ConfigError> {
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
