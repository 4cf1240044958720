//! The cache of compiled code on disk, keyed by module digest, wasmtime version and engine settings.
//!
//! Each file begins with an HMAC over its name and content under a key that this node made for itself. Directory, key and
//! files are readable by the agent's user alone. Code that does not carry the right HMAC is removed, never run.

use crate::artifact::Digest;
use crate::store::{private_dir, private_file};
use anyhow::Context as _;
use hmac::{Hmac, KeyInit as _, Mac as _};
use sha2::{Digest as _, Sha256};
use std::fs::{self, File};
use std::hash::{Hash as _, Hasher};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use wasmtime::Engine;

const TAG: usize = 32;
/// Before the code: what an instance of it takes, as a number of eight bytes.
const HEAD: usize = 8;
/// Compiled code is a few times the size of its module.
const MAX_CODE: u64 = 2 * 1024 * 1024 * 1024;

/// Compiled code that came out of this agent's own compiler. What its process gives is believed: see `compile`.
pub struct VerifiedCode {
    bytes: Vec<u8>,
    offset: usize,
    instance_bytes: u64,
}

impl VerifiedCode {
    /// What the compiler's process gave for a module of whose instances each takes so many bytes.
    pub fn of_compiler(bytes: Vec<u8>, instance_bytes: u64) -> Self {
        Self { bytes, offset: 0, instance_bytes }
    }

    /// Compiles a module in this process.
    #[cfg(any(test, feature = "fuzzing"))]
    pub fn compile(engine: &Engine, wasm: &[u8], component: bool) -> wasmtime::Result<Self> {
        let bytes = if component { engine.precompile_component(wasm) } else { engine.precompile_module(wasm) }?;
        Ok(Self::of_compiler(bytes, crate::instance_size::of(wasm)?))
    }

    /// What the node holds for one instance beside its memories and tables (see `instance_size`).
    pub fn instance_bytes(&self) -> u64 {
        self.instance_bytes
    }

    pub fn bytes(&self) -> &[u8] {
        self.bytes.get(self.offset..).unwrap_or_default()
    }
}

pub struct Cache {
    root: PathBuf,
    key: [u8; 32],
    /// wasmtime's version, what is put into modules before it and told of their instances, and every setting that shapes the code, hashed.
    compatibility: String,
    counter: AtomicU64,
}

impl Cache {
    pub fn open(root: PathBuf, engine: &Engine) -> anyhow::Result<Self> {
        private_dir(&root).with_context(|| format!("failed to make {}", root.display()))?;
        let key = key(&root.join("key"))?;
        let mut hasher = Sha256Hasher(Sha256::new());
        crate::WASMTIME_VERSION.hash(&mut hasher);
        crate::yield_points::REVISION.hash(&mut hasher);
        crate::instance_size::REVISION.hash(&mut hasher);
        engine.precompile_compatibility_hash().hash(&mut hasher);
        let compatibility = Digest::finish(hasher.0).hex().get(..16).unwrap_or_default().to_owned();
        let cache = Self { root, key, compatibility, counter: AtomicU64::new(0) };
        cache.sweep();
        Ok(cache)
    }

    /// Removes what an earlier run left half-written, and code that another wasmtime or other settings made.
    fn sweep(&self) {
        let usable = format!("-{}.cwasm", self.compatibility);
        for entry in fs::read_dir(&self.root).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(|name| name != "key" && !name.ends_with(&usable)) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    fn path(&self, module: &Digest) -> PathBuf {
        self.root.join(format!("{}-{}.cwasm", module.hex(), self.compatibility))
    }

    fn mac(&self, module: &Digest, head: &[u8], code: &[u8]) -> Option<Hmac<Sha256>> {
        let mut mac = Hmac::<Sha256>::new_from_slice(&self.key).ok()?;
        mac.update(b"krustlet precompiled code 2\0");
        mac.update(module.as_str().as_bytes());
        mac.update(self.compatibility.as_bytes());
        mac.update(head);
        mac.update(code);
        Some(mac)
    }

    /// The code for this module, if it is there and carries this node's HMAC. What does not is removed.
    pub fn load(&self, module: &Digest) -> Option<VerifiedCode> {
        let path = self.path(module);
        let mut bytes = Vec::new();
        File::open(&path).ok()?.take(MAX_CODE).read_to_end(&mut bytes).ok()?;
        let verified = bytes.split_at_checked(TAG).and_then(|(tag, rest)| {
            let (head, code) = rest.split_first_chunk::<HEAD>()?;
            self.mac(module, head, code)?.verify_slice(tag).ok()?;
            Some(u64::from_le_bytes(*head))
        });
        if let Some(instance_bytes) = verified {
            return Some(VerifiedCode { bytes, offset: TAG + HEAD, instance_bytes });
        }
        tracing::warn!(path = %path.display(), "removed precompiled code that this agent did not write");
        let _ = fs::remove_file(path);
        None
    }

    /// Removes the code of a module. Gives the bytes that are free now.
    pub fn remove(&self, module: &Digest) -> u64 {
        let path = self.path(module);
        let size = fs::metadata(&path).map_or(0, |metadata| metadata.len());
        fs::remove_file(path).map_or(0, |()| size)
    }

    pub fn store(&self, module: &Digest, code: &VerifiedCode) -> io::Result<()> {
        let head = code.instance_bytes.to_le_bytes();
        let tag = self.mac(module, &head, code.bytes()).ok_or_else(|| io::Error::other("no HMAC"))?;
        let temporary = self.root.join(format!("{}.tmp", self.counter.fetch_add(1, Ordering::Relaxed)));
        let mut file = private_file(&temporary)?;
        file.write_all(&tag.finalize().into_bytes())
            .and_then(|()| file.write_all(&head))
            .and_then(|()| file.write_all(code.bytes()))
            .and_then(|()| fs::rename(&temporary, self.path(module)))
            .inspect_err(|_| {
                let _ = fs::remove_file(&temporary);
            })
    }
}

/// The node's key, made at the first start. One that others could read or have written is replaced.
fn key(path: &Path) -> anyhow::Result<[u8; 32]> {
    if let (Ok(metadata), Ok(content)) = (fs::symlink_metadata(path), fs::read(path)) {
        let ours = metadata.is_file()
            && metadata.permissions().mode() & 0o077 == 0
            && metadata.uid() == rustix::process::geteuid().as_raw();
        if let (true, Ok(key)) = (ours, <[u8; 32]>::try_from(content)) {
            return Ok(key);
        }
        tracing::warn!(path = %path.display(), "replaced the key of the compile cache: it was not private to this user");
    }
    let mut key = [0; 32];
    getrandom::fill(&mut key).map_err(|error| anyhow::anyhow!("no random numbers: {error}"))?;
    let temporary = path.with_extension("tmp");
    let _ = fs::remove_file(&temporary);
    private_file(&temporary)
        .and_then(|mut file| file.write_all(&key))
        .and_then(|()| fs::rename(&temporary, path))
        .with_context(|| format!("failed to write {}", path.display()))?;
    Ok(key)
}

/// Feeds a hash into SHA-256, whose result, unlike the standard library's, is the same in every release.
struct Sha256Hasher(Sha256);

impl Hasher for Sha256Hasher {
    fn write(&mut self, bytes: &[u8]) {
        self.0.update(bytes);
    }

    fn finish(&self) -> u64 {
        0
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn code(bytes: &[u8]) -> VerifiedCode {
        VerifiedCode::of_compiler(bytes.to_vec(), 7)
    }

    fn cache() -> (tempfile::TempDir, Cache) {
        let directory = tempfile::tempdir().unwrap();
        let cache = Cache::open(directory.path().join("precompiled"), &Engine::default()).unwrap();
        (directory, cache)
    }

    #[test]
    fn stored_code_is_loaded_again_also_by_the_next_process() {
        let (_directory, cache) = cache();
        let module = Digest::of(b"module");
        assert!(cache.load(&module).is_none());
        cache.store(&module, &code(b"code")).unwrap();
        let next = Cache::open(cache.root.clone(), &Engine::default()).unwrap();
        let loaded = next.load(&module).unwrap();
        assert_eq!((loaded.bytes(), loaded.instance_bytes()), (&b"code"[..], 7));
    }

    #[test]
    fn altered_foreign_and_misplaced_code_is_removed_and_not_loaded() {
        let (_directory, cache) = cache();
        let (module, other) = (Digest::of(b"module"), Digest::of(b"other"));
        cache.store(&module, &code(b"code")).unwrap();
        let good = fs::read(cache.path(&module)).unwrap();
        let altered = |at: usize| {
            let mut altered = good.clone();
            *altered.get_mut(at).unwrap() ^= 1;
            altered
        };
        let (head, last) = (altered(TAG), altered(good.len() - 1));
        for content in [&head, &last, &good[..TAG - 1], &good[..TAG + HEAD - 1], b"", b"code"] {
            fs::write(cache.path(&module), content).unwrap();
            assert!(cache.load(&module).is_none());
            assert!(!cache.path(&module).exists());
        }
        fs::write(cache.path(&other), &good).unwrap();
        assert!(cache.load(&other).is_none(), "code of one module must not pass for another's");
    }

    #[test]
    fn code_for_other_engine_settings_is_not_found_and_removed() {
        let (_directory, cache) = cache();
        let module = Digest::of(b"module");
        cache.store(&module, &code(b"code")).unwrap();
        let mut config = wasmtime::Config::new();
        config.epoch_interruption(true);
        let other = Cache::open(cache.root.clone(), &Engine::new(&config).unwrap()).unwrap();
        assert!(other.load(&module).is_none());
        assert!(!cache.path(&module).exists());
    }

    #[test]
    fn a_key_that_others_can_read_is_replaced_and_old_code_refused() {
        let (_directory, cache) = cache();
        let module = Digest::of(b"module");
        cache.store(&module, &code(b"code")).unwrap();
        fs::set_permissions(cache.root.join("key"), fs::Permissions::from_mode(0o644)).unwrap();
        let next = Cache::open(cache.root.clone(), &Engine::default()).unwrap();
        assert!(next.load(&module).is_none());
    }

    #[test]
    fn the_cache_is_closed_to_other_users() {
        let (_directory, cache) = cache();
        let module = Digest::of(b"module");
        cache.store(&module, &code(b"code")).unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&cache.root), 0o700);
        assert_eq!(mode(&cache.root.join("key")), 0o600);
        assert_eq!(mode(&cache.path(&module)), 0o600);
    }
}
