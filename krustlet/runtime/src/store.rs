//! Images on this node: content-addressed blobs, the signatures over their manifests, and which manifest a tag stood for.
//!
//! Everything is written to a temporary file and renamed, and checked against its digest each time that it is read, so
//! that a crash or a bad disk means a pull, never a wrong module.

use crate::artifact::Digest;
use crate::image_name::ImageName;
use crate::signature::{MAX_SIGNATURES, Signed};
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

/// Signatures are kept as JSON: a payload of at most 64 KiB as base64, a bundle of at most 256 KiB as a string.
const MAX_SIGNATURES_FILE: u64 = MAX_SIGNATURES as u64 * 128 * 1024;

/// Who may use an image; see `pull_records`.
const MAX_PULL_RECORD: u64 = 4 * 1024 * 1024;

#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    counter: AtomicU64,
}

/// A blob as it lies there.
#[derive(Debug, Clone, Copy)]
pub struct Blob {
    pub size: u64,
    /// When it was written or last looked at by [`Store::holds`].
    pub used: SystemTime,
}

#[derive(Serialize, Deserialize)]
struct Tag {
    name: String,
    manifest: String,
}

impl Store {
    /// Opens the store in `root`, readable by this user alone, without what an earlier run left half-written.
    pub fn open(root: PathBuf) -> io::Result<Self> {
        let _ = fs::remove_dir_all(root.join("tmp"));
        for name in ["blobs", "provenance", "pulls", "signatures", "tags", "tmp"] {
            private_dir(&root.join(name))?;
        }
        private_dir(&root)?;
        Ok(Self { root, counter: AtomicU64::new(0) })
    }

    fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.hex())
    }

    /// A blob's content, if it is there and intact. A damaged one is removed.
    pub fn read(&self, digest: &Digest, limit: u64) -> Option<Vec<u8>> {
        let path = self.blob_path(digest);
        let content = read_bounded(&path, limit)?;
        if Digest::of(&content) == *digest {
            return Some(content);
        }
        tracing::warn!(%digest, "removed a damaged blob from the image store");
        let _ = fs::remove_file(path);
        None
    }

    /// Whether a blob of this size is there and intact; then it was used just now. A damaged one is removed.
    pub fn holds(&self, digest: &Digest, size: u64) -> bool {
        let path = self.blob_path(digest);
        let Ok(file) = File::open(&path) else { return false };
        let mut hasher = Sha256::new();
        let copied = io::copy(&mut file.take(size + 1), &mut HashWriter(&mut hasher));
        if copied.is_ok_and(|copied| copied == size) && Digest::finish(hasher) == *digest {
            self.set_used(digest, SystemTime::now());
            return true;
        }
        tracing::warn!(%digest, "removed a damaged blob from the image store");
        let _ = fs::remove_file(path);
        false
    }

    /// Begins to write a blob.
    pub fn writer(&self) -> io::Result<BlobWriter<'_>> {
        let (file, path) = self.temporary()?;
        Ok(BlobWriter { store: self, file, path, hasher: Sha256::new() })
    }

    pub fn write(&self, content: &[u8]) -> io::Result<()> {
        let mut writer = self.writer()?;
        writer.write(content)?;
        writer.keep(&Digest::of(content))
    }

    pub fn signatures(&self, manifest: &Digest) -> Vec<Signed> {
        self.signed("signatures", manifest)
    }

    /// What says who built it.
    pub fn provenance(&self, manifest: &Digest) -> Vec<Signed> {
        self.signed("provenance", manifest)
    }

    fn signed(&self, kind: &str, manifest: &Digest) -> Vec<Signed> {
        let path = self.root.join(kind).join(manifest.hex());
        read_bounded(&path, MAX_SIGNATURES_FILE)
            .and_then(|content| serde_json::from_slice(&content).ok())
            .unwrap_or_default()
    }

    pub fn write_signatures(&self, manifest: &Digest, signatures: &[Signed]) -> io::Result<()> {
        self.replace(&self.root.join("signatures").join(manifest.hex()), &serde_json::to_vec(signatures)?)
    }

    pub fn write_provenance(&self, manifest: &Digest, provenance: &[Signed]) -> io::Result<()> {
        self.replace(&self.root.join("provenance").join(manifest.hex()), &serde_json::to_vec(provenance)?)
    }

    pub fn pull_record(&self, manifest: &Digest) -> Option<Vec<u8>> {
        read_bounded(&self.root.join("pulls").join(manifest.hex()), MAX_PULL_RECORD)
    }

    pub fn write_pull_record(&self, manifest: &Digest, record: &[u8]) -> io::Result<()> {
        self.replace(&self.root.join("pulls").join(manifest.hex()), record)
    }

    /// The manifest that this name stood for when it was last pulled.
    pub fn tagged(&self, image: &ImageName) -> Option<Digest> {
        let name = image.to_string();
        let content = read_bounded(&self.tag_path(&name), 4096)?;
        let tag: Tag = serde_json::from_slice(&content).ok()?;
        if tag.name == name { Digest::parse(&tag.manifest).ok() } else { None }
    }

    pub fn write_tag(&self, image: &ImageName, manifest: &Digest) -> io::Result<()> {
        let tag = Tag { name: image.to_string(), manifest: manifest.to_string() };
        self.replace(&self.tag_path(&tag.name), &serde_json::to_vec(&tag)?)
    }

    /// Everything that is there.
    pub fn blobs(&self) -> HashMap<Digest, Blob> {
        entries(&self.root.join("blobs"))
            .filter_map(|entry| {
                let digest = Digest::parse(&format!("sha256:{}", entry.file_name().to_str()?)).ok()?;
                let metadata = entry.metadata().ok()?;
                Some((digest, Blob { size: metadata.len(), used: metadata.modified().ok()? }))
            })
            .collect()
    }

    pub(crate) fn set_used(&self, digest: &Digest, time: SystemTime) {
        // What it is for is only to choose what goes first.
        let _ = File::options().append(true).open(self.blob_path(digest)).and_then(|file| file.set_modified(time));
    }

    /// Removes a blob, and what belongs to it if it is a manifest. Gives the bytes that are free now.
    pub fn remove(&self, digest: &Digest, size: u64) -> u64 {
        for kind in ["provenance", "pulls", "signatures"] {
            let _ = fs::remove_file(self.root.join(kind).join(digest.hex()));
        }
        match fs::remove_file(self.blob_path(digest)) {
            Ok(()) => size,
            Err(error) => {
                tracing::warn!(%digest, %error, "failed to remove a blob from the image store");
                0
            }
        }
    }

    /// Removes the tags that stand for manifests which are not there any more.
    pub fn remove_dead_names(&self) {
        for entry in entries(&self.root.join("tags")) {
            let tag =
                read_bounded(&entry.path(), 4096).and_then(|content| serde_json::from_slice::<Tag>(&content).ok());
            let manifest = tag.and_then(|tag| Digest::parse(&tag.manifest).ok());
            if manifest.is_none_or(|manifest| !self.blob_path(&manifest).exists()) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// Names hold slashes and may be longer than a file name, so the file is called by the name's hash.
    fn tag_path(&self, name: &str) -> PathBuf {
        self.root.join("tags").join(Digest::of(name.as_bytes()).hex())
    }

    fn replace(&self, path: &Path, content: &[u8]) -> io::Result<()> {
        let (mut file, temporary) = self.temporary()?;
        file.write_all(content).and_then(|()| fs::rename(&temporary, path)).inspect_err(|_| {
            let _ = fs::remove_file(&temporary);
        })
    }

    fn temporary(&self) -> io::Result<(File, PathBuf)> {
        let path = self.root.join("tmp").join(self.counter.fetch_add(1, Ordering::Relaxed).to_string());
        Ok((private_file(&path)?, path))
    }
}

/// A blob on its way into the store; dropped without `keep`, it is gone.
pub struct BlobWriter<'a> {
    store: &'a Store,
    file: File,
    path: PathBuf,
    hasher: Sha256,
}

impl BlobWriter<'_> {
    pub fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.hasher.update(chunk);
        self.file.write_all(chunk)
    }

    /// Puts the blob in its place if it is the expected one.
    pub fn keep(self, expected: &Digest) -> io::Result<()> {
        let found = Digest::finish(self.hasher.clone());
        if found != *expected {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("the content's digest is {found}, not the {expected} asked for"),
            ));
        }
        fs::rename(&self.path, self.store.blob_path(expected))
    }
}

impl Drop for BlobWriter<'_> {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

struct HashWriter<'a>(&'a mut Sha256);

impl io::Write for HashWriter<'_> {
    fn write(&mut self, chunk: &[u8]) -> io::Result<usize> {
        self.0.update(chunk);
        Ok(chunk.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn entries(directory: &Path) -> impl Iterator<Item = fs::DirEntry> {
    fs::read_dir(directory).into_iter().flatten().flatten()
}

fn read_bounded(path: &Path, limit: u64) -> Option<Vec<u8>> {
    let mut content = Vec::new();
    File::open(path).ok()?.take(limit + 1).read_to_end(&mut content).ok()?;
    (content.len() as u64 <= limit).then_some(content)
}

/// A directory that this user alone may enter, made so when it is not.
pub fn private_dir(path: &Path) -> io::Result<()> {
    use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _};
    fs::DirBuilder::new().recursive(true).mode(0o700).create(path)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o700))
}

/// A new file that this user alone may read.
pub fn private_file(path: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(path)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn store() -> (tempfile::TempDir, Store) {
        let directory = tempfile::tempdir().unwrap();
        let store = Store::open(directory.path().join("images")).unwrap();
        (directory, store)
    }

    #[test]
    fn a_blob_that_was_written_is_read_back() {
        let (_directory, store) = store();
        let digest = Digest::of(b"content");
        assert!(store.read(&digest, 100).is_none());
        store.write(b"content").unwrap();
        assert_eq!(store.read(&digest, 100).unwrap(), b"content");
        assert!(store.holds(&digest, 7));
    }

    #[test]
    fn a_damaged_blob_is_refused_and_removed() {
        let (_directory, store) = store();
        let digest = Digest::of(b"content");
        for damage in [b"contenT".as_slice(), b"conten", b"content and more"] {
            store.write(b"content").unwrap();
            fs::write(store.blob_path(&digest), damage).unwrap();
            assert!(!store.holds(&digest, 7));
            assert!(!store.blob_path(&digest).exists());
            fs::write(store.blob_path(&digest), damage).unwrap();
            assert!(store.read(&digest, 100).is_none());
            assert!(!store.blob_path(&digest).exists());
        }
    }

    #[test]
    fn content_with_another_digest_is_not_kept_and_leaves_nothing_behind() {
        let (_directory, store) = store();
        let mut writer = store.writer().unwrap();
        writer.write(b"other").unwrap();
        assert!(writer.keep(&Digest::of(b"content")).is_err());
        assert_eq!(fs::read_dir(store.root.join("tmp")).unwrap().count(), 0);
        assert_eq!(fs::read_dir(store.root.join("blobs")).unwrap().count(), 0);
    }

    #[test]
    fn an_interrupted_write_is_cleared_at_the_next_start() {
        let (_directory, store) = store();
        fs::write(store.root.join("tmp/7"), b"half").unwrap();
        let again = Store::open(store.root.clone()).unwrap();
        assert_eq!(fs::read_dir(again.root.join("tmp")).unwrap().count(), 0);
    }

    #[test]
    fn a_tag_gives_the_manifest_it_stood_for() {
        let (_directory, store) = store();
        let image = ImageName::parse("host.io/app:v1").unwrap();
        assert!(store.tagged(&image).is_none());
        store.write_tag(&image, &Digest::of(b"m")).unwrap();
        assert_eq!(store.tagged(&image).unwrap(), Digest::of(b"m"));
        assert!(store.tagged(&ImageName::parse("host.io/app:v2").unwrap()).is_none());
    }

    #[test]
    fn the_store_is_closed_to_other_users() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_directory, store) = store();
        store.write(b"content").unwrap();
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&store.root), 0o700);
        assert_eq!(mode(&store.blob_path(&Digest::of(b"content"))), 0o600);
    }
}
