//! The directories of a container: each is opened once, before its first instance, and every instance gets that one.
//!
//! A path is resolved anew by every open, and between two of them a guest that may write beside it can have put something
//! else in its place. A descriptor stays what it was: whoever has it sees the directory that was found then, wherever it
//! was moved, and no other.

use rustix::fs::fstat;
use std::fs::File;
use std::path::PathBuf;
use std::sync::Arc;
use wasmtime::component::ResourceTable;
use wasmtime_wasi::filesystem::{Descriptor, WasiFilesystemCtx, WasiFilesystemCtxView};
use wasmtime_wasi::p2::bindings::filesystem::preopens;
use wasmtime_wasi::{FsPerms, WasiCtxBuilder};

/// A host directory shown to the guest.
#[derive(Debug, Clone)]
pub struct Mount {
    /// The directory itself, open. It need not be open for reading (`O_PATH` will do).
    pub directory: Arc<File>,
    /// The guest's name for it, e.g. `/config`.
    pub guest: String,
    pub read_only: bool,
}

/// What the instances of a container share of the file system; cloning it opens nothing.
///
/// Fails with a sentence that names the mount when one of them is no directory, or cannot be opened.
pub fn open(mounts: &[Mount]) -> Result<WasiFilesystemCtx, String> {
    let mut wasi = WasiCtxBuilder::new();
    for mount in mounts {
        let failed = |cause: String| format!("volume cannot be mounted at {}: {cause}", mount.guest);
        let permissions = if mount.read_only { FsPerms::ReadOnly } else { FsPerms::ReadWrite };
        path(&mount.directory)
            .map_err(|error| failed(error.to_string()))
            .and_then(|path| {
                let preopened = wasi.preopened_dir(path, &mount.guest, permissions);
                preopened.map_err(|error| failed(error.root_cause().to_string()))
            })
            .map(drop)?;
    }
    let mut filesystem = wasi.build().filesystem().clone();
    let opened = descriptors(&mut filesystem).map_err(|error| error.to_string())?;
    for (mount, opened) in mounts.iter().zip(&opened) {
        if !is_same(&mount.directory, opened) {
            return Err(format!("volume cannot be mounted at {}: another directory took its place", mount.guest));
        }
    }
    Ok(filesystem)
}

/// A path that leads to an open directory and not to what has taken its place. wasmtime opens by path only.
#[cfg(target_os = "linux")]
fn path(directory: &File) -> std::io::Result<PathBuf> {
    use std::os::fd::AsRawFd;
    // Followed by the kernel to the open directory itself, whatever its name is by now.
    Ok(PathBuf::from(format!("/proc/self/fd/{}", directory.as_raw_fd())))
}

/// Its present path, which may be another's by the time that it is opened: hence the comparison in [`open`].
#[cfg(not(target_os = "linux"))]
fn path(directory: &File) -> std::io::Result<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    Ok(PathBuf::from(std::ffi::OsString::from_vec(rustix::fs::getpath(directory)?.into_bytes())))
}

/// The directories as they were opened, in their order.
fn descriptors(filesystem: &mut WasiFilesystemCtx) -> wasmtime::Result<Vec<Arc<File>>> {
    let mut table = ResourceTable::new();
    let listed = preopens::Host::get_directories(&mut WasiFilesystemCtxView { ctx: filesystem, table: &mut table })?;
    let mut directories = Vec::with_capacity(listed.len());
    for (resource, _) in listed {
        if let Descriptor::Dir(directory) = table.delete(resource)? {
            directories.push(directory.dir);
        }
    }
    Ok(directories)
}

fn is_same(a: &File, b: &File) -> bool {
    match (fstat(a), fstat(b)) {
        (Ok(a), Ok(b)) => (a.st_dev, a.st_ino) == (b.st_dev, b.st_ino),
        _ => false,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::path::Path;

    fn mount(directory: &Path) -> Mount {
        Mount { directory: Arc::new(File::open(directory).unwrap()), guest: "/data".into(), read_only: false }
    }

    #[test]
    fn a_mount_stays_the_directory_that_was_opened_whatever_is_put_in_its_place() {
        let root = tempfile::tempdir().unwrap();
        let (volume, secret) = (root.path().join("volume"), root.path().join("secret"));
        std::fs::create_dir(&volume).unwrap();
        std::fs::create_dir(&secret).unwrap();
        let mount = mount(&volume);
        std::fs::rename(&volume, root.path().join("moved")).unwrap();
        std::os::unix::fs::symlink("secret", &volume).unwrap();
        let mut filesystem = open(std::slice::from_ref(&mount)).unwrap();
        let opened = descriptors(&mut filesystem).unwrap();
        assert!(is_same(&opened[0], &File::open(root.path().join("moved")).unwrap()));
        assert!(!is_same(&opened[0], &File::open(&secret).unwrap()));
        let again = descriptors(&mut filesystem.clone()).unwrap();
        assert!(Arc::ptr_eq(&opened[0], &again[0]), "an instance opens nothing");
    }

    #[test]
    fn what_is_no_directory_is_not_mounted_and_the_mount_is_named() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let error = open(&[mount(file.path())]).map(|_| ()).unwrap_err();
        assert!(error.contains("/data"), "{error}");
    }
}
