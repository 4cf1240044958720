//! Making room on the disk: images that no pod uses go, those that were not used for longest first.

use crate::artifact::{Artifact, Digest, MAX_MANIFEST};
use crate::precompiled::Cache;
use crate::store::Store;
use std::collections::{HashMap, HashSet};
use std::time::{Duration, SystemTime};

/// An image stays for this long after its last use: somebody may be about to start it.
const MIN_AGE: Duration = Duration::from_secs(120);

/// What was removed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Freed {
    pub images: u64,
    pub bytes: u64,
}

/// One image in the store.
struct Stored {
    manifest: Digest,
    artifact: Artifact,
    used: SystemTime,
}

/// Removes images whose manifest is not in use until `wanted` bytes are free, and content that belongs to no image.
pub fn free(store: &Store, cache: &Cache, in_use: &HashSet<Digest>, wanted: u64, now: SystemTime) -> Freed {
    let mut blobs = store.blobs();
    let old = |used: SystemTime| now.duration_since(used).is_ok_and(|age| age >= MIN_AGE);
    let mut images: Vec<Stored> = blobs
        .iter()
        .filter(|(_, blob)| blob.size <= MAX_MANIFEST)
        .filter_map(|(digest, blob)| {
            let artifact = Artifact::parse(&store.read(digest, MAX_MANIFEST)?).ok()?;
            // Each start looks at the module; a manifest without one is of no use to anybody.
            let used = blobs.get(&artifact.module.digest).map_or(blob.used, |module| module.used.max(blob.used));
            Some(Stored { manifest: digest.clone(), artifact, used })
        })
        .collect();
    images.sort_by_key(|image| image.used);
    let mut references: HashMap<Digest, usize> = HashMap::new();
    for image in &images {
        for digest in [&image.manifest, &image.artifact.config.digest, &image.artifact.module.digest] {
            *references.entry(digest.clone()).or_default() += 1;
        }
    }
    let mut freed = Freed::default();
    for image in images.iter().filter(|image| old(image.used) && !in_use.contains(&image.manifest)) {
        if freed.bytes >= wanted {
            break;
        }
        tracing::info!(digest = %image.manifest, "removing an image that no pod uses");
        freed.images += 1;
        for digest in [&image.manifest, &image.artifact.config.digest, &image.artifact.module.digest] {
            let left = references.entry(digest.clone()).or_default();
            *left = left.saturating_sub(1);
            if *left == 0
                && let Some(blob) = blobs.remove(digest)
            {
                freed.bytes += store.remove(digest, blob.size) + cache.remove(digest);
            }
        }
    }
    for (digest, blob) in blobs {
        if !references.contains_key(&digest) && old(blob.used) {
            freed.bytes += store.remove(&digest, blob.size);
        }
    }
    store.remove_dead_names();
    freed
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::executor::Executor;
    use crate::image_name::ImageName;
    use crate::precompiled::VerifiedCode;
    use crate::signature::Signed;

    struct Node {
        _directory: tempfile::TempDir,
        executor: Executor,
        store: Store,
        cache: Cache,
    }

    impl Node {
        fn new() -> Self {
            let directory = tempfile::tempdir().unwrap();
            let store = Store::open(directory.path().join("images")).unwrap();
            let executor = Executor::for_tests().unwrap();
            let cache = Cache::open(directory.path().join("precompiled"), &executor.engine).unwrap();
            Self { _directory: directory, executor, store, cache }
        }

        /// Puts an image with this module on the node, last used that many hours ago. Gives its manifest's digest.
        fn image(&self, name: &str, module: &[u8], hours: u64) -> Digest {
            let descriptor = |media_type: &str, content: &[u8]| {
                let digest = Digest::of(content);
                serde_json::json!({"mediaType": media_type, "digest": digest.as_str(), "size": content.len()})
            };
            let manifest = serde_json::to_vec(&serde_json::json!({
                "schemaVersion": 2,
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "config": descriptor("application/vnd.wasm.config.v0+json", b"{}"),
                "layers": [descriptor("application/wasm", module)],
                "annotations": {"name": name},
            }))
            .unwrap();
            let digest = Digest::of(&manifest);
            for content in [manifest.as_slice(), b"{}", module] {
                self.store.write(content).unwrap();
                self.age(&Digest::of(content), hours);
            }
            let code = VerifiedCode::compile(&self.executor.engine, b"\0asm\x01\0\0\0", false).unwrap();
            self.cache.store(&Digest::of(module), &code).unwrap();
            self.store.write_signatures(&digest, &[Signed::simple(b"payload", "signature".into())]).unwrap();
            self.store.write_tag(&ImageName::parse(&format!("host.io/{name}:v1")).unwrap(), &digest).unwrap();
            digest
        }

        fn age(&self, digest: &Digest, hours: u64) {
            self.store.set_used(digest, SystemTime::now() - Duration::from_secs(hours * 3600));
        }

        fn free(&self, in_use: &[&Digest], wanted: u64) -> Freed {
            let in_use = in_use.iter().copied().cloned().collect();
            free(&self.store, &self.cache, &in_use, wanted, SystemTime::now())
        }

        fn has(&self, manifest: &Digest, module: &[u8]) -> [bool; 2] {
            [
                self.store.read(manifest, MAX_MANIFEST).is_some(),
                self.store.holds(&Digest::of(module), module.len() as u64),
            ]
        }
    }

    #[test]
    fn what_was_not_used_for_longest_goes_first_and_no_more_than_is_wanted() {
        let node = Node::new();
        let [new, old, middle] = [("new", 1), ("old", 3), ("middle", 2)].map(|(name, hours)| {
            let module = name.repeat(100);
            node.image(name, module.as_bytes(), hours)
        });
        assert_eq!(node.free(&[], 0), Freed::default());
        assert_eq!(node.free(&[], 1).images, 1);
        assert_eq!(node.has(&old, "old".repeat(100).as_bytes()), [false, false]);
        assert_eq!(node.has(&middle, "middle".repeat(100).as_bytes()), [true, true]);
        assert_eq!(node.free(&[], u64::MAX).images, 1, "looking at the other one has just used it");
        assert_eq!(node.has(&new, "new".repeat(100).as_bytes()), [false, false]);
    }

    #[test]
    fn an_image_goes_with_all_that_belongs_to_it() {
        let node = Node::new();
        let digest = node.image("app", b"module", 1);
        let freed = node.free(&[], u64::MAX);
        assert!(freed.bytes > 1000, "compiled code counts: {freed:?}");
        assert!(node.store.blobs().is_empty());
        assert!(node.store.signatures(&digest).is_empty());
        assert!(node.store.tagged(&ImageName::parse("host.io/app:v1").unwrap()).is_none());
        assert!(node.cache.load(&Digest::of(b"module")).is_none());
    }

    #[test]
    fn what_is_in_use_or_was_used_a_moment_ago_stays() {
        let node = Node::new();
        let used = node.image("used", b"used", 9);
        let fresh = node.image("fresh", b"fresh", 0);
        assert_eq!(node.free(&[&used], u64::MAX), Freed::default());
        assert_eq!(node.has(&used, b"used"), [true, true]);
        assert_eq!(node.has(&fresh, b"fresh"), [true, true]);
        assert!(node.cache.load(&Digest::of(b"used")).is_some());
    }

    #[test]
    fn a_module_that_another_image_has_too_stays() {
        let node = Node::new();
        let [gone, stays] = ["gone", "stays"].map(|name| node.image(name, b"shared", 5));
        assert_eq!(node.free(&[&stays], u64::MAX).images, 1);
        assert_eq!(node.has(&gone, b"shared"), [false, true]);
        assert_eq!(node.has(&stays, b"shared"), [true, true]);
        assert!(!node.store.signatures(&stays).is_empty());
    }

    #[test]
    fn content_that_belongs_to_no_image_goes_unless_a_pull_may_have_just_brought_it() {
        let node = Node::new();
        for (content, hours) in [(b"abandoned", 1), (b"on_its_wa", 0)] {
            node.store.write(content).unwrap();
            node.age(&Digest::of(content), hours);
        }
        assert_eq!(node.free(&[], 0), Freed { images: 0, bytes: 9 });
        assert!(node.store.holds(&Digest::of(b"on_its_wa"), 9));
    }
}
