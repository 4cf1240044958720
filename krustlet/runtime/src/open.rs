//! Opens what a path below a guest's directory leads to, files and directories only.
//!
//! An open of a FIFO waits until somebody has its other end, one of a device for as long as its driver likes: in a thread of
//! the node's, which nothing can call back, not even when the guest is gone. WASI's implementation opens whatever is there.
//! So this does it in its place, by the same rules and without waiting; what was opened is looked at, not the path.

use cap_primitives::fs::{FollowSymlinks, OpenOptions, OpenOptionsExt as _};
use rustix::fs::OFlags;
use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::Arc;
use wasmtime::component::Resource;
use wasmtime_wasi::filesystem::{self, Descriptor, Dir, OpenMode, WasiFilesystemCtxView};
use wasmtime_wasi::p2::FsError;
use wasmtime_wasi::p2::bindings::filesystem::types::{
    DescriptorFlags, ErrorCode, HostDescriptor as _, NewTimestamp, OpenFlags, PathFlags,
};

pub async fn open_at(
    directory: &Dir,
    path_flags: PathFlags,
    path: String,
    open_flags: OpenFlags,
    flags: DescriptorFlags,
) -> Result<Descriptor, ErrorCode> {
    let synchronized = DescriptorFlags::FILE_INTEGRITY_SYNC
        | DescriptorFlags::DATA_INTEGRITY_SYNC
        | DescriptorFlags::REQUESTED_WRITE_SYNC;
    if flags.intersects(synchronized) {
        return Err(ErrorCode::Unsupported);
    }
    let [create, truncate, only_new, only_directory] =
        [OpenFlags::CREATE, OpenFlags::TRUNCATE, OpenFlags::EXCLUSIVE, OpenFlags::DIRECTORY]
            .map(|flag| open_flags.contains(flag));
    if only_directory && (create || truncate || only_new) {
        return Err(ErrorCode::Invalid);
    }
    let write = flags.contains(DescriptorFlags::WRITE);
    // What is not opened for writing is opened for reading, which has to be possible.
    let read = flags.contains(DescriptorFlags::READ) || !write;
    let mut mode = OpenMode::empty();
    mode.set(OpenMode::READ, read);
    mode.set(OpenMode::WRITE, write || create || truncate);
    if directory.perms.write_not_permitted() && mode.contains(OpenMode::WRITE) {
        return Err(ErrorCode::NotPermitted);
    }
    let mut options = OpenOptions::new();
    options
        .read(read)
        .write(mode.contains(OpenMode::WRITE))
        .truncate(truncate)
        .create(create && !only_new)
        .create_new(create && only_new)
        ._cap_fs_ext_follow(match path_flags.contains(PathFlags::SYMLINK_FOLLOW) {
            true => FollowSymlinks::Yes,
            false => FollowSymlinks::No,
        });
    let root: Arc<File> = directory.dir.clone();
    let opened = tokio::task::spawn_blocking(move || open(&root, path.as_ref(), &mut options));
    let (file, is_directory) = opened.await.map_err(io::Error::other).flatten()?;
    match is_directory {
        true => Ok(Descriptor::Dir(Dir::new(file, directory.perms, mode, false))),
        false if only_directory => Err(ErrorCode::NotDirectory),
        false => Ok(Descriptor::File(filesystem::File::new(file, directory.perms, mode, false))),
    }
}

fn open(root: &File, path: &Path, options: &mut OpenOptions) -> io::Result<(File, bool)> {
    options.custom_flags((OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed());
    let file = cap_primitives::fs::open(root, path, options)?;
    let kind = file.metadata()?.file_type();
    match kind.is_file() || kind.is_dir() {
        true => Ok((file, kind.is_dir())),
        false => Err(rustix::io::Errno::PERM.into()),
    }
}

/// Sets the times of what a path leads to. Where links are followed, WASI's implementation opens it for this, so that the same is
/// opened here, and given to it.
pub async fn set_times_at(
    files: &mut WasiFilesystemCtxView<'_>,
    directory: Resource<Descriptor>,
    path_flags: PathFlags,
    path: String,
    accessed: NewTimestamp,
    modified: NewTimestamp,
) -> Result<(), FsError> {
    // A link that is not followed is not opened.
    if !path_flags.contains(PathFlags::SYMLINK_FOLLOW) {
        return files.set_times_at(directory, path_flags, path, accessed, modified).await;
    }
    let Descriptor::Dir(directory) = files.table.get(&directory)?.clone() else {
        return Err(ErrorCode::NotDirectory.into());
    };
    let mut opened = Err(ErrorCode::Access);
    for flags in [DescriptorFlags::READ, DescriptorFlags::WRITE] {
        if matches!(opened, Err(ErrorCode::Access)) {
            opened = open_at(&directory, path_flags, path.clone(), OpenFlags::empty(), flags).await;
        }
    }
    let opened = files.table.push(opened?)?;
    let result = files.set_times(Resource::new_borrow(opened.rep()), accessed, modified).await;
    files.table.delete(opened)?;
    result
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use std::os::unix::fs::symlink;
    use std::os::unix::net::UnixListener;
    use std::time::Duration;
    use wasmtime_wasi::FsPerms;

    async fn opened(directory: &Dir, path: &str, open_flags: OpenFlags, flags: DescriptorFlags) -> Option<ErrorCode> {
        let opening = open_at(directory, PathFlags::SYMLINK_FOLLOW, path.to_owned(), open_flags, flags);
        tokio::time::timeout(Duration::from_secs(10), opening).await.unwrap().err()
    }

    #[tokio::test]
    async fn what_is_neither_file_nor_directory_is_refused_at_once_in_each_mode_and_by_each_way() {
        let root = tempfile::tempdir().unwrap();
        mknodat(CWD, root.path().join("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        let _socket = UnixListener::bind(root.path().join("socket")).unwrap();
        symlink("fifo", root.path().join("link")).unwrap();
        let dir = Dir::new(File::open(root.path()).unwrap(), FsPerms::ReadWrite, OpenMode::all(), false);
        let modes = [DescriptorFlags::empty(), DescriptorFlags::READ, DescriptorFlags::WRITE];
        for flags in modes.into_iter().chain([DescriptorFlags::READ | DescriptorFlags::WRITE]) {
            for path in ["fifo", "./fifo", "link", "socket"] {
                for open_flags in [OpenFlags::empty(), OpenFlags::CREATE, OpenFlags::TRUNCATE, OpenFlags::DIRECTORY] {
                    let error = opened(&dir, path, open_flags, flags).await;
                    assert!(error.is_some(), "{path} {open_flags:?} {flags:?}");
                }
            }
            let file = opened(&dir, "file", OpenFlags::CREATE, flags).await;
            assert_eq!(file, None, "{flags:?}");
        }
        assert_eq!(opened(&dir, ".", OpenFlags::DIRECTORY, DescriptorFlags::READ).await, None);
    }

    #[tokio::test]
    async fn each_combination_of_flags_does_what_wasis_implementation_does() {
        use wasmtime_wasi::filesystem::{WasiFilesystemCtx, WasiFilesystemCtxView};
        use wasmtime_wasi::p2::bindings::filesystem::types::{Host as _, HostDescriptor as _};
        const OPEN_FLAGS: [OpenFlags; 4] =
            [OpenFlags::CREATE, OpenFlags::DIRECTORY, OpenFlags::EXCLUSIVE, OpenFlags::TRUNCATE];
        const FLAGS: [DescriptorFlags; 3] =
            [DescriptorFlags::READ, DescriptorFlags::WRITE, DescriptorFlags::DATA_INTEGRITY_SYNC];
        let made = || {
            let root = tempfile::tempdir().unwrap();
            std::fs::write(root.path().join("file"), "content").unwrap();
            std::fs::create_dir(root.path().join("directory")).unwrap();
            symlink("file", root.path().join("link")).unwrap();
            symlink("/etc/hostname", root.path().join("out")).unwrap();
            root
        };
        let left = |root: &tempfile::TempDir| {
            let size = std::fs::metadata(root.path().join("file")).map(|file| file.len()).ok();
            (size, std::fs::exists(root.path().join("none")).unwrap())
        };
        let mut roots = [made(), made()];
        for perms in [FsPerms::ReadOnly, FsPerms::ReadWrite] {
            let dir =
                |root: &tempfile::TempDir| Dir::new(File::open(root.path()).unwrap(), perms, OpenMode::all(), false);
            for path in ["file", "directory", "link", "out", "none", "directory/", "file/", "../x", "/etc"] {
                for bits in 0..1_u32 << 8 {
                    let flag = |bit: usize| bits & (1 << bit) != 0;
                    let open_flags = OPEN_FLAGS.iter().enumerate().filter(|(bit, _)| flag(*bit));
                    let open_flags = open_flags.fold(OpenFlags::empty(), |all, (_, flag)| all | *flag);
                    let flags = FLAGS.iter().enumerate().filter(|(bit, _)| flag(4 + *bit));
                    let flags = flags.fold(DescriptorFlags::empty(), |all, (_, flag)| all | *flag);
                    let path_flags = if flag(7) { PathFlags::SYMLINK_FOLLOW } else { PathFlags::empty() };
                    let kind = |opened: &Descriptor| match opened {
                        Descriptor::Dir(dir) => ("directory", dir.open_mode, dir.perms),
                        Descriptor::File(file) => ("file", file.open_mode, file.perms),
                    };
                    let [ours, theirs] = roots.each_ref().map(dir);
                    let result = open_at(&ours, path_flags, path.to_owned(), open_flags, flags).await;
                    let own = (result.as_ref().map(kind).map_err(ToString::to_string), left(&roots[0]));

                    let (mut table, mut ctx) = (Default::default(), WasiFilesystemCtx::default());
                    let mut files = WasiFilesystemCtxView { ctx: &mut ctx, table: &mut table };
                    let dir = files.table.push(Descriptor::Dir(theirs)).unwrap();
                    let result = match files.open_at(dir, path_flags, path.to_owned(), open_flags, flags).await {
                        Ok(opened) => Ok(kind(files.table.get(&opened).unwrap())),
                        Err(error) => Err(files.convert_error_code(error).unwrap().to_string()),
                    };
                    assert_eq!(
                        own,
                        (result, left(&roots[1])),
                        "{path} {open_flags:?} {flags:?} {path_flags:?} {perms:?}"
                    );
                    for root in &mut roots {
                        if left(root) != (Some(7), false) {
                            *root = made();
                        }
                    }
                }
            }
        }
    }
}
