//! The CNCF wasm OCI artifact: reads its manifest and config, refuses everything else by name. Total on garbage, and bounded.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::fmt;

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
pub const INDEX_TYPE: &str = "application/vnd.oci.image.index.v1+json";
const INDEX_TYPES: [&str; 2] = [INDEX_TYPE, "application/vnd.docker.distribution.manifest.list.v2+json"];
const DOCKER_MANIFEST_TYPE: &str = "application/vnd.docker.distribution.manifest.v2+json";
const CONTAINER_CONFIG_TYPES: [&str; 2] =
    ["application/vnd.oci.image.config.v1+json", "application/vnd.docker.container.image.v1+json"];
const CONFIG_TYPE: &str = "application/vnd.wasm.config.v0+json";
const LAYER_TYPE: &str = "application/wasm";

/// The distribution specification asks registries to take manifests up to this size.
pub const MAX_MANIFEST: u64 = 4 * 1024 * 1024;
pub const MAX_CONFIG: u64 = 4 * 1024 * 1024;
/// A component of a few hundred kilobytes is usual; language runtimes compiled to wasm reach some tens of megabytes.
pub const MAX_MODULE: u64 = 256 * 1024 * 1024;

/// `sha256:` and 64 lower-case hexadecimal digits.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Digest(String);

impl Digest {
    pub fn parse(text: &str) -> Result<Self, String> {
        let hex = text
            .strip_prefix("sha256:")
            .ok_or_else(|| format!("digest {:?} is not sha256, the only algorithm accepted", shown(text)))?;
        let lower_hex = hex.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if hex.len() != 64 || !lower_hex {
            return Err(format!("digest {:?} is not sha256: and 64 lower-case hex digits", shown(text)));
        }
        Ok(Self(text.to_owned()))
    }

    pub fn of(content: &[u8]) -> Self {
        Self::finish(Sha256::new_with_prefix(content))
    }

    pub fn finish(hasher: Sha256) -> Self {
        use fmt::Write as _;
        let mut text = String::with_capacity(71);
        text.push_str("sha256:");
        for byte in hasher.finalize() {
            // Writing to a String cannot fail.
            let _ = write!(text, "{byte:02x}");
        }
        Self(text)
    }

    pub fn hex(&self) -> &str {
        self.0.trim_start_matches("sha256:")
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

/// A piece of content that a manifest points at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Descriptor {
    pub digest: Digest,
    pub size: u64,
}

/// What the manifest of a wasm artifact says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Artifact {
    pub config: Descriptor,
    pub module: Descriptor,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawManifest {
    schema_version: u64,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    #[serde(default)]
    layers: Vec<RawDescriptor>,
    manifests: Option<serde_json::Value>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct RawDescriptor {
    pub(crate) media_type: String,
    pub(crate) digest: String,
    pub(crate) size: u64,
    #[serde(default)]
    pub(crate) annotations: std::collections::BTreeMap<String, String>,
}

impl RawDescriptor {
    pub(crate) fn checked(&self, what: &str, limit: u64) -> Result<Descriptor, Refused> {
        let digest = Digest::parse(&self.digest).map_err(|error| Refused::content(format!("the {what}'s {error}")))?;
        if self.size > limit {
            return Err(Refused::too_large(format!(
                "the {what} has {} bytes, more than the {limit} allowed",
                self.size
            )));
        }
        Ok(Descriptor { digest, size: self.size })
    }
}

/// Why something is no wasm artifact that this node runs: what was found, and what was expected.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    found: String,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Kind {
    /// Another kind of image; the config of a container image, where it is one.
    Foreign(Option<Descriptor>),
    /// A wasm artifact that contradicts itself or the layout.
    Content,
    TooLarge,
}

impl fmt::Display for Refused {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.found)
    }
}

impl Refused {
    fn content(found: impl Into<String>) -> Self {
        Self { found: found.into(), kind: Kind::Content }
    }

    fn foreign(found: impl Into<String>) -> Self {
        Self { found: found.into(), kind: Kind::Foreign(None) }
    }

    fn too_large(found: impl Into<String>) -> Self {
        Self { found: found.into(), kind: Kind::TooLarge }
    }

    /// The config that tells a container image's platform.
    pub fn container_config(&self) -> Option<&Descriptor> {
        match &self.kind {
            Kind::Foreign(config) => config.as_ref(),
            _ => None,
        }
    }

    /// Adds the platform that the container image's config names.
    pub fn with_container_config(self, config: &[u8]) -> Self {
        match serde_json::from_slice::<Platform>(config) {
            Ok(platform) => Self { found: format!("{}, made for {platform}", self.found), ..self },
            Err(_) => self,
        }
    }

    /// The commands that put it right.
    pub fn remedy(&self, repository: &str, tag: &str) -> String {
        let push = format!("`wkg oci push {repository}:{tag} app.wasm` and sign it with `cosign sign --key`");
        match self.kind {
            Kind::Foreign(_) => format!("push the component itself: {push}"),
            Kind::Content => format!("push the component again: {push}"),
            Kind::TooLarge => format!("make it smaller (`wasm-tools strip app.wasm -o app.wasm`) and push it: {push}"),
        }
    }
}

/// What an image is made for.
#[derive(Debug, Deserialize)]
struct Platform {
    os: String,
    architecture: String,
}

impl fmt::Display for Platform {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}/{}", shortened(&self.os, 32), shortened(&self.architecture, 32))
    }
}

impl RawManifest {
    fn parse(manifest: &[u8]) -> Result<Self, Refused> {
        if manifest.len() as u64 > MAX_MANIFEST {
            let found = format!("the manifest has {} bytes, more than the {MAX_MANIFEST} allowed", manifest.len());
            return Err(Refused::too_large(found));
        }
        let raw: Self = serde_json::from_slice(manifest)
            .map_err(|error| Refused::foreign(format!("the manifest is no OCI manifest: {}", cut(&error))))?;
        if raw.schema_version != 2 {
            let found = format!("the manifest has schemaVersion {}, expected 2", raw.schema_version);
            return Err(Refused::foreign(found));
        }
        let media_type = raw.media_type.as_deref().unwrap_or_default();
        if raw.manifests.is_some() || INDEX_TYPES.contains(&media_type) {
            return Err(Refused::foreign(format!(
                "found an image index{}, expected the manifest of one wasm artifact, {MANIFEST_TYPE}",
                platforms(raw.manifests.as_ref())
            )));
        }
        Ok(raw)
    }
}

/// The platforms that an index lists, as words behind its name.
fn platforms(manifests: Option<&serde_json::Value>) -> String {
    let listed = manifests.and_then(|manifests| manifests.as_array()).into_iter().flatten();
    let names: Vec<String> = listed
        .filter_map(|manifest| Platform::deserialize(manifest.get("platform")?).ok())
        // Of an attestation that goes with an image.
        .filter(|platform| platform.os != "unknown")
        .map(|platform| platform.to_string())
        .collect();
    match names.split_at_checked(4) {
        _ if names.is_empty() => " (several platforms)".into(),
        Some((first, rest)) if !rest.is_empty() => format!(" for {} and {} more", first.join(", "), rest.len()),
        _ => format!(" for {}", names.join(", ")),
    }
}

impl Artifact {
    pub fn parse(manifest: &[u8]) -> Result<Self, Refused> {
        let raw = RawManifest::parse(manifest)?;
        if let Some(found) =
            raw.media_type.as_deref().filter(|found| *found != MANIFEST_TYPE && *found != DOCKER_MANIFEST_TYPE)
        {
            return Err(Refused::foreign(format!("found manifest type {:?}, expected {MANIFEST_TYPE}", shown(found))));
        }
        let config = raw.config.ok_or_else(|| {
            Refused::foreign(format!("the manifest has no config, expected one of type {CONFIG_TYPE}"))
        })?;
        if config.media_type != CONFIG_TYPE {
            let is_container = CONTAINER_CONFIG_TYPES.contains(&config.media_type.as_str());
            let what =
                if is_container { "this is a container image, and this node runs WebAssembly only: " } else { "" };
            return Err(Refused {
                found: format!("{what}found config type {:?}, expected {CONFIG_TYPE}", shown(&config.media_type)),
                kind: Kind::Foreign(config.checked("config", MAX_CONFIG).ok().filter(|_| is_container)),
            });
        }
        if raw.media_type.as_deref() == Some(DOCKER_MANIFEST_TYPE) {
            return Err(Refused::foreign(format!(
                "found manifest type {DOCKER_MANIFEST_TYPE:?}, expected {MANIFEST_TYPE}"
            )));
        }
        let [layer] = raw.layers.as_slice() else {
            return Err(Refused::content(format!(
                "found {} layers, expected exactly one of type {LAYER_TYPE}",
                raw.layers.len()
            )));
        };
        if layer.media_type != LAYER_TYPE {
            let found = format!("found layer type {:?}, expected {LAYER_TYPE}", shown(&layer.media_type));
            return Err(Refused::content(found));
        }
        let module = layer.checked("module layer", MAX_MODULE)?;
        if module.size == 0 {
            return Err(Refused::content(format!("the module layer of type {LAYER_TYPE} is empty")));
        }
        Ok(Self { config: config.checked("config", MAX_CONFIG)?, module })
    }

    /// Checks the config document that belongs to this manifest.
    pub fn check_config(&self, config: &[u8]) -> Result<(), Refused> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Config {
            architecture: String,
            os: String,
            #[serde(default)]
            layer_digests: Vec<String>,
        }
        if config.len() as u64 > MAX_CONFIG {
            let found = format!("the config has {} bytes, more than the {MAX_CONFIG} allowed", config.len());
            return Err(Refused::too_large(found));
        }
        let config: Config = serde_json::from_slice(config)
            .map_err(|error| Refused::content(format!("the config is no wasm config: {}", cut(&error))))?;
        if config.architecture != "wasm" {
            let found = format!("found architecture {:?}, expected \"wasm\"", shown(&config.architecture));
            return Err(Refused::content(found));
        }
        if !matches!(config.os.as_str(), "wasip1" | "wasip2") {
            let found = format!("found os {:?}, expected \"wasip2\" or \"wasip1\"", shown(&config.os));
            return Err(Refused::content(found));
        }
        match config.layer_digests.as_slice() {
            [digest] if digest == self.module.digest.as_str() => Ok(()),
            [digest] => Err(Refused::content(format!(
                "the config's layerDigests name {:?}, expected the module layer's {}",
                shown(digest),
                self.module.digest
            ))),
            found => Err(Refused::content(format!(
                "the config has {} layerDigests, expected exactly the module layer's {}",
                found.len(),
                self.module.digest
            ))),
        }
    }
}

/// A foreign string cut to what fits in a message.
pub(crate) fn shown(text: &str) -> String {
    shortened(text, 120)
}

/// An error of a parser or compiler cut to what fits in a pod's status: it may quote what it found, at any length.
pub(crate) fn cut(error: &impl fmt::Display) -> String {
    shortened(&error.to_string(), 1000)
}

fn shortened(text: &str, length: usize) -> String {
    match text.char_indices().nth(length) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
pub(crate) mod tests {
    use super::*;
    use serde_json::json;

    pub(crate) fn manifest_of(config: &[u8], module: &[u8]) -> serde_json::Value {
        json!({
            "schemaVersion": 2,
            "mediaType": MANIFEST_TYPE,
            "config": {"mediaType": CONFIG_TYPE, "digest": Digest::of(config).as_str(), "size": config.len()},
            "layers": [{"mediaType": LAYER_TYPE, "digest": Digest::of(module).as_str(), "size": module.len()}],
        })
    }

    pub(crate) fn config_of(module: &[u8]) -> Vec<u8> {
        json!({"architecture": "wasm", "os": "wasip2", "layerDigests": [Digest::of(module).as_str()],
               "component": {"exports": [], "imports": [], "target": "wasi:http/proxy@0.2.3"}})
        .to_string()
        .into_bytes()
    }

    fn refusal(change: impl FnOnce(&mut serde_json::Value)) -> Refused {
        let mut manifest = manifest_of(b"config", b"module");
        change(&mut manifest);
        Artifact::parse(manifest.to_string().as_bytes()).unwrap_err()
    }

    fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
        refusal(change).to_string()
    }

    #[test]
    fn a_wasm_artifact_is_read() {
        let module = b"\0asm";
        let config = config_of(module);
        let artifact = Artifact::parse(manifest_of(&config, module).to_string().as_bytes()).unwrap();
        assert_eq!(artifact.module, Descriptor { digest: Digest::of(module), size: 4 });
        artifact.check_config(&config).unwrap();
    }

    #[test]
    fn a_container_image_is_refused_by_name() {
        let error = refused(|manifest| {
            manifest["config"]["mediaType"] = json!("application/vnd.oci.image.config.v1+json");
        });
        assert!(error.contains("application/vnd.oci.image.config.v1+json"), "{error}");
        assert!(error.contains("container image"), "{error}");
    }

    #[test]
    fn an_image_index_is_refused_by_name() {
        let error = refused(|manifest| manifest["manifests"] = json!([]));
        assert!(error.contains("image index (several platforms)"), "{error}");
        let platform = |os: &str, architecture: &str| json!({"platform": {"os": os, "architecture": architecture}});
        let listed = json!([platform("linux", "amd64"), platform("unknown", "unknown"), {"digest": "x"}, 7]);
        let error = refused(|manifest| manifest["manifests"] = listed);
        assert!(error.contains("image index for linux/amd64, expected"), "{error}");
        let listed = vec![platform("linux", &"x".repeat(1000)); 1000];
        let error = refused(|manifest| manifest["manifests"] = json!(listed));
        assert!(error.contains("and 996 more") && error.len() < 1000, "{error}");
    }

    #[test]
    fn a_container_image_is_told_its_platform_and_what_to_push_instead() {
        for config_type in CONTAINER_CONFIG_TYPES {
            let refused = refusal(|manifest| {
                manifest["config"]["mediaType"] = json!(config_type);
                manifest["mediaType"] = json!(DOCKER_MANIFEST_TYPE);
            });
            assert_eq!(refused.container_config().unwrap().digest, Digest::of(b"config"));
            let config = json!({"os": "linux", "architecture": "amd64", "config": {}}).to_string();
            let refused = refused.with_container_config(config.as_bytes()).with_container_config(b"no JSON");
            assert!(refused.to_string().ends_with(", made for linux/amd64"), "{refused}");
            let remedy = refused.remedy("host.io/app", "v1");
            assert!(remedy.contains("`wkg oci push host.io/app:v1 app.wasm`") && remedy.contains("cosign"), "{remedy}");
        }
    }

    /// What each refusal says, over every one that there is: the type found, the type wanted, and a command.
    #[test]
    fn every_refusal_says_what_was_found_what_was_expected_and_what_to_do() {
        let artifact = Artifact::parse(manifest_of(b"config", b"module").to_string().as_bytes()).unwrap();
        let config = |change: serde_json::Value| artifact.check_config(change.to_string().as_bytes()).unwrap_err();
        let wasm = |layers: serde_json::Value| json!({"architecture": "wasm", "os": "wasip2", "layerDigests": layers});
        for (refused, found) in [
            (Artifact::parse(b"text").unwrap_err(), "no OCI manifest"),
            (refusal(|m| m["schemaVersion"] = json!(1)), "schemaVersion 1"),
            (refusal(|m| m["manifests"] = json!([])), "image index"),
            (refusal(|m| m["mediaType"] = json!("text/plain")), "text/plain"),
            (refusal(|m| m["mediaType"] = json!(DOCKER_MANIFEST_TYPE)), DOCKER_MANIFEST_TYPE),
            (refusal(|m| m["config"] = json!(null)), "no config"),
            (refusal(|m| m["config"]["mediaType"] = json!("text/plain")), "text/plain"),
            (refusal(|m| m["config"]["size"] = json!(MAX_CONFIG + 1)), "bytes"),
            (refusal(|m| m["config"]["digest"] = json!("sha512:0")), "sha512"),
            (refusal(|m| m["layers"] = json!([])), "0 layers"),
            (refusal(|m| m["layers"][0]["mediaType"] = json!("text/plain")), "text/plain"),
            (refusal(|m| m["layers"][0]["size"] = json!(0)), "empty"),
            (refusal(|m| m["layers"][0]["size"] = json!(MAX_MODULE + 1)), "bytes"),
            (config(json!(7)), "no wasm config"),
            (config(json!({"architecture": "amd64", "os": "linux"})), "amd64"),
            (config(json!({"architecture": "wasm", "os": "linux"})), "linux"),
            (config(wasm(json!([]))), "0 layerDigests"),
            (config(wasm(json!(["sha256:0"]))), "sha256:0"),
        ] {
            let text = refused.to_string();
            assert!(text.contains(found), "{text}");
            let says = ["expected", "more than", "no OCI manifest", "no wasm config", "not sha256", "is empty"];
            assert!(says.iter().any(|word| text.contains(word)), "{text}");
            assert!(refused.remedy("host.io/app", "v1").contains("`wkg oci push host.io/app:v1 app.wasm`"), "{text}");
        }
    }

    #[test]
    fn another_layer_type_two_layers_and_none_are_refused() {
        let error = refused(|manifest| manifest["layers"][0]["mediaType"] = json!("text/plain"));
        assert!(error.contains("text/plain"), "{error}");
        let error = refused(|manifest| {
            let layer = manifest["layers"][0].clone();
            manifest["layers"] = json!([layer, layer]);
        });
        assert!(error.contains("2 layers"), "{error}");
        let error = refused(|manifest| manifest["layers"] = json!([]));
        assert!(error.contains("0 layers"), "{error}");
    }

    #[test]
    fn what_is_too_large_is_refused_before_it_is_fetched() {
        let error = refused(|manifest| manifest["layers"][0]["size"] = json!(MAX_MODULE + 1));
        assert!(error.contains("more than"), "{error}");
        let error = refused(|manifest| manifest["config"]["size"] = json!(MAX_CONFIG + 1));
        assert!(error.contains("more than"), "{error}");
        let huge = vec![b' '; usize::try_from(MAX_MANIFEST).unwrap() + 1];
        assert!(Artifact::parse(&huge).unwrap_err().to_string().contains("more than"));
    }

    #[test]
    fn a_config_for_another_module_is_refused() {
        let artifact = Artifact::parse(manifest_of(b"config", b"module").to_string().as_bytes()).unwrap();
        let error = artifact.check_config(&config_of(b"other")).unwrap_err().to_string();
        assert!(error.contains("layerDigests"), "{error}");
        let error = artifact.check_config(br#"{"architecture":"amd64","os":"linux"}"#).unwrap_err().to_string();
        assert!(error.contains("amd64"), "{error}");
    }

    #[test]
    fn no_message_grows_with_what_it_refuses() {
        let long = "x".repeat(1_000_000);
        let error = refused(|manifest| manifest["schemaVersion"] = json!(long));
        assert!(error.contains("no OCI manifest") && error.len() < 2000, "{}", error.len());
        let artifact = Artifact::parse(manifest_of(b"config", b"module").to_string().as_bytes()).unwrap();
        for config in [
            json!({"architecture": "wasm", "os": "wasip2", "layerDigests": [long]}),
            json!({"architecture": "wasm", "os": "wasip2", "layerDigests": vec!["x"; 100_000]}),
            json!({"architecture": "wasm", "os": "wasip2", "layerDigests": long}),
            json!({"architecture": long, "os": long}),
        ] {
            let error = artifact.check_config(config.to_string().as_bytes()).unwrap_err().to_string();
            assert!(error.len() < 2000, "{}", error.len());
        }
    }

    #[test]
    fn digests_of_other_shapes_are_refused() {
        for text in ["", "sha256:", "sha512:00", "sha256:ZZ", &format!("sha256:{}", "A".repeat(64))] {
            assert!(Digest::parse(text).is_err(), "{text}");
        }
        let digest = Digest::of(b"x");
        assert_eq!(Digest::parse(digest.as_str()).unwrap(), digest);
    }

    #[test]
    fn deep_nesting_is_refused_without_overflow() {
        let deep = [b"{\"a\":".repeat(100_000), b"1".to_vec(), b"}".repeat(100_000)].concat();
        assert!(Artifact::parse(&deep).is_err());
    }
}
