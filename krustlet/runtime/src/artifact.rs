//! The CNCF wasm OCI artifact: reads its manifest and config, refuses everything else by name. Total on garbage, and bounded.

use serde::Deserialize;
use sha2::{Digest as _, Sha256};
use std::fmt;

pub const MANIFEST_TYPE: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX_TYPES: [&str; 2] =
    ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"];
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
pub(crate) struct RawManifest {
    schema_version: u64,
    media_type: Option<String>,
    config: Option<RawDescriptor>,
    #[serde(default)]
    pub(crate) layers: Vec<RawDescriptor>,
    manifests: Option<serde::de::IgnoredAny>,
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
    pub(crate) fn checked(&self, what: &str, limit: u64) -> Result<Descriptor, String> {
        let digest = Digest::parse(&self.digest).map_err(|error| format!("the {what}'s {error}"))?;
        if self.size > limit {
            return Err(format!("the {what} has {} bytes, more than the {limit} allowed", self.size));
        }
        Ok(Descriptor { digest, size: self.size })
    }
}

impl RawManifest {
    pub(crate) fn parse(manifest: &[u8]) -> Result<Self, String> {
        if manifest.len() as u64 > MAX_MANIFEST {
            return Err(format!("the manifest has {} bytes, more than the {MAX_MANIFEST} allowed", manifest.len()));
        }
        let raw: Self = serde_json::from_slice(manifest)
            .map_err(|error| format!("the manifest is no OCI manifest: {}", cut(&error)))?;
        if raw.schema_version != 2 {
            return Err(format!("the manifest has schemaVersion {}, expected 2", raw.schema_version));
        }
        if raw.manifests.is_some() || raw.media_type.as_deref().is_some_and(|found| INDEX_TYPES.contains(&found)) {
            return Err("found an image index (several platforms), expected the manifest of one wasm artifact".into());
        }
        Ok(raw)
    }
}

impl Artifact {
    pub fn parse(manifest: &[u8]) -> Result<Self, String> {
        let raw = RawManifest::parse(manifest)?;
        if let Some(found) = raw.media_type.as_deref().filter(|found| *found != MANIFEST_TYPE) {
            return Err(format!("found manifest type {:?}, expected {MANIFEST_TYPE}", shown(found)));
        }
        let config = raw.config.ok_or_else(|| format!("the manifest has no config, expected {CONFIG_TYPE}"))?;
        if config.media_type != CONFIG_TYPE {
            let hint = match config.media_type.as_str() {
                "application/vnd.oci.image.config.v1+json" | "application/vnd.docker.container.image.v1+json" => {
                    " (a container image; this node runs WebAssembly only)"
                }
                _ => "",
            };
            return Err(format!("found config type {:?}{hint}, expected {CONFIG_TYPE}", shown(&config.media_type)));
        }
        let [layer] = raw.layers.as_slice() else {
            return Err(format!("found {} layers, expected exactly one of type {LAYER_TYPE}", raw.layers.len()));
        };
        if layer.media_type != LAYER_TYPE {
            return Err(format!("found layer type {:?}, expected {LAYER_TYPE}", shown(&layer.media_type)));
        }
        let module = layer.checked("module layer", MAX_MODULE)?;
        if module.size == 0 {
            return Err("the module layer is empty".into());
        }
        Ok(Self { config: config.checked("config", MAX_CONFIG)?, module })
    }

    /// Checks the config document that belongs to this manifest.
    pub fn check_config(&self, config: &[u8]) -> Result<(), String> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Config {
            architecture: String,
            os: String,
            #[serde(default)]
            layer_digests: Vec<String>,
        }
        if config.len() as u64 > MAX_CONFIG {
            return Err(format!("the config has {} bytes, more than the {MAX_CONFIG} allowed", config.len()));
        }
        let config: Config =
            serde_json::from_slice(config).map_err(|error| format!("the config is no wasm config: {}", cut(&error)))?;
        if config.architecture != "wasm" {
            return Err(format!("found architecture {:?}, expected \"wasm\"", shown(&config.architecture)));
        }
        if !matches!(config.os.as_str(), "wasip1" | "wasip2") {
            return Err(format!("found os {:?}, expected \"wasip2\" or \"wasip1\"", shown(&config.os)));
        }
        match config.layer_digests.as_slice() {
            [digest] if digest == self.module.digest.as_str() => Ok(()),
            [digest] => Err(format!(
                "the config's layerDigests name {:?}, expected the module layer's {}",
                shown(digest),
                self.module.digest
            )),
            found => Err(format!(
                "the config has {} layerDigests, expected exactly the module layer's {}",
                found.len(),
                self.module.digest
            )),
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

    fn refused(change: impl FnOnce(&mut serde_json::Value)) -> String {
        let mut manifest = manifest_of(b"config", b"module");
        change(&mut manifest);
        Artifact::parse(manifest.to_string().as_bytes()).unwrap_err()
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
        assert!(error.contains("image index"), "{error}");
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
        assert!(Artifact::parse(&huge).unwrap_err().contains("more than"));
    }

    #[test]
    fn a_config_for_another_module_is_refused() {
        let artifact = Artifact::parse(manifest_of(b"config", b"module").to_string().as_bytes()).unwrap();
        let error = artifact.check_config(&config_of(b"other")).unwrap_err();
        assert!(error.contains("layerDigests"), "{error}");
        let error = artifact.check_config(br#"{"architecture":"amd64","os":"linux"}"#).unwrap_err();
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
            let error = artifact.check_config(config.to_string().as_bytes()).unwrap_err();
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
