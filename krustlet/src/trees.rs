//! Directory trees that guests made, removed and measured.
//!
//! A guest decides how deep they are, how many files they have and what lies in them, and it may go on changing them. So
//! nothing here recurses without a bound, holds a descriptor for each level, follows a link, or resolves a path twice.

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, Stat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Deeper directories are not looked into: each level is an open descriptor, and no program needs as many.
const MAX_DEPTH: u32 = 100;
/// Files that are counted in one tree. What has more is more than a limit in bytes can have meant.
const MAX_FILES: u64 = 1_000_000;

/// Removes a file or a whole tree, however long that takes, where blocking is allowed.
///
/// Fails as [`remove_now`] does.
pub async fn remove(path: PathBuf) -> io::Result<()> {
    match tokio::task::spawn_blocking(move || remove_now(&path)).await {
        Ok(removed) => removed,
        Err(error) => Err(io::Error::other(error)),
    }
}

/// Removes a file or a whole tree; what its links lead to stays. Nothing there is no error.
///
/// Fails when something cannot be removed; it may be called again.
pub fn remove_now(path: &Path) -> io::Result<()> {
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let name = CString::new(name.as_bytes())?;
    let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
    match open(CWD, &CString::new(parent.as_os_str().as_bytes())?, OFlags::empty()) {
        Err(Errno::NOENT) => Ok(()),
        parent => Ok(remove_at(parent?.as_fd(), &name)?),
    }
}

/// As [`remove_now`], for a name in an open directory.
pub fn remove_in(directory: impl AsFd, name: &str) -> io::Result<()> {
    Ok(remove_at(directory, &CString::new(name)?)?)
}

fn remove_at(parent: impl AsFd, name: &CString) -> rustix::io::Result<()> {
    if remove_file(&parent, name)? {
        return Ok(());
    }
    empty(&open_anyhow(&parent, name)?)?;
    unlinkat(parent, name, AtFlags::REMOVEDIR)
}

/// Empties a directory. What is in a directory of it is moved up beside that one, which is empty then: so a tree of any
/// depth takes four descriptors and no stack.
fn empty(top: &OwnedFd) -> rustix::io::Result<()> {
    let mut number: u64 = 0;
    loop {
        let mut done = true;
        for name in names(top)? {
            let name = name?;
            if remove_file(top, &name)? {
                continue;
            }
            done = false;
            let directory = open_anyhow(top, &name)?;
            for name in names(&directory)? {
                let name = name?;
                if !remove_file(&directory, &name)? {
                    lift(&directory, &name, top, &mut number)?;
                }
            }
            match unlinkat(top, &name, AtFlags::REMOVEDIR) {
                // What was moved while the directory was read may have hidden a name: the next round finds it.
                Ok(()) | Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOENT) => {}
                Err(error) => return Err(error),
            }
        }
        if done {
            return Ok(());
        }
    }
}

/// Moves a directory up to the top, under a name that is free there.
fn lift(from: &OwnedFd, name: &CString, top: &OwnedFd, number: &mut u64) -> rustix::io::Result<()> {
    let mut allowed = false;
    loop {
        *number += 1;
        match renameat(from, name, top, format!("..{number}")) {
            Err(Errno::NOTEMPTY | Errno::EXIST | Errno::NOTDIR) => {}
            // Moving a directory changes what `..` in it is.
            Err(Errno::ACCESS) if !allowed => {
                allow(from, name)?;
                allowed = true;
            }
            Err(Errno::NOENT) => return Ok(()),
            result => return result,
        }
    }
}

/// Removes whatever is no directory; gives whether it is gone.
fn remove_file(directory: impl AsFd, name: &CString) -> rustix::io::Result<bool> {
    match unlinkat(directory, name, AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => Ok(true),
        // Linux has the first for directories, POSIX and macOS the second.
        Err(Errno::ISDIR | Errno::PERM) => Ok(false),
        Err(error) => Err(error),
    }
}

fn open(directory: impl AsFd, name: &CString, more: OFlags) -> rustix::io::Result<OwnedFd> {
    openat(directory, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC | more, Mode::empty())
}

/// Opens a directory even if its mode does not let its owner.
fn open_anyhow(directory: impl AsFd, name: &CString) -> rustix::io::Result<OwnedFd> {
    match open(&directory, name, OFlags::NOFOLLOW) {
        Err(Errno::ACCESS) => {
            allow(&directory, name)?;
            open(directory, name, OFlags::NOFOLLOW)
        }
        result => result,
    }
}

fn allow(directory: impl AsFd, name: &CString) -> rustix::io::Result<()> {
    if FileType::from_raw_mode(stat(&directory, name)?.st_mode) != FileType::Directory {
        return Err(Errno::ACCESS);
    }
    rustix::fs::chmodat(directory, name, Mode::RWXU, AtFlags::empty())
}

fn stat(directory: impl AsFd, name: &CString) -> rustix::io::Result<Stat> {
    statat(directory, name, AtFlags::SYMLINK_NOFOLLOW)
}

/// What is in a directory, but for itself and its parent.
fn names(directory: impl AsFd) -> rustix::io::Result<impl Iterator<Item = rustix::io::Result<CString>>> {
    let entries = Dir::read_from(directory)?;
    let names = entries.map(|entry| Ok(entry?.file_name().to_owned()));
    Ok(names.filter(|name| !matches!(name.as_deref().map(|name| name.to_bytes()), Ok(b"." | b".."))))
}

/// What a tree takes of the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// As `du` counts: blocks, directories included. A file with several links is shared out among them.
    pub bytes: u64,
    pub files: u64,
    /// There is more than was counted: too many files, or directories too deep.
    pub more: bool,
}

impl Usage {
    pub fn add(&mut self, other: Self) {
        self.bytes = self.bytes.saturating_add(other.bytes);
        self.files = self.files.saturating_add(other.files);
        self.more |= other.more;
    }

    fn count(&mut self, stat: &Stat) {
        // Their types differ from system to system; none of the values can be negative.
        #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
        let (blocks, links) = (stat.st_blocks as u64, stat.st_nlink as u64);
        let directory = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        self.bytes = self.bytes.saturating_add(blocks * 512 / if directory { 1 } else { links.max(1) });
        self.files += 1;
    }
}

/// Measures a tree; nothing there takes nothing. What cannot be read is left out and told as `more`.
pub fn measure(path: &Path) -> Usage {
    let Ok(directory) = File::open(path) else { return Usage::default() };
    let mut usage = Usage::default();
    walk(&directory, 0, &mut usage);
    usage
}

fn walk(directory: impl AsFd, depth: u32, usage: &mut Usage) {
    let Ok(names) = names(&directory) else {
        usage.more = true;
        return;
    };
    for name in names {
        let Ok(name) = name else {
            usage.more = true;
            return;
        };
        // Gone by now.
        let Ok(stat) = stat(&directory, &name) else { continue };
        usage.count(&stat);
        if usage.files > MAX_FILES {
            usage.more = true;
            return;
        }
        if FileType::from_raw_mode(stat.st_mode) != FileType::Directory {
            continue;
        }
        match open(&directory, &name, OFlags::NOFOLLOW) {
            Ok(child) if depth < MAX_DEPTH => walk(child, depth + 1, usage),
            Err(Errno::NOENT) => {}
            _ => usage.more = true,
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use rustix::fs::mkdirat;
    use std::os::unix::fs::{PermissionsExt, symlink};

    /// A chain of directories, deeper than any path may be long.
    fn chain(top: &Path, depth: usize) {
        std::fs::create_dir(top).unwrap();
        let mut directory: OwnedFd = File::open(top).unwrap().into();
        for _ in 0..depth {
            mkdirat(&directory, "d", Mode::RWXU).unwrap();
            directory = openat(&directory, "d", OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
    }

    #[test]
    fn a_tree_deeper_than_any_stack_or_table_of_descriptors_is_removed() {
        let root = tempfile::tempdir().unwrap();
        let top = root.path().join("top");
        chain(&top, 20_000);
        // On a stack that recursion would overflow.
        let removed = std::thread::Builder::new().stack_size(128 * 1024).spawn({
            let top = top.clone();
            move || remove_now(&top)
        });
        removed.unwrap().join().unwrap().unwrap();
        assert!(!top.exists());
    }

    #[test]
    fn what_is_too_deep_to_be_measured_is_told() {
        let root = tempfile::tempdir().unwrap();
        chain(&root.path().join("deep"), 3000);
        assert!(measure(root.path()).more);
        remove_now(&root.path().join("deep")).unwrap();
        assert_eq!(measure(root.path()), Usage::default());
    }

    #[test]
    fn what_links_lead_to_stays_and_is_not_counted() {
        let root = tempfile::tempdir().unwrap();
        let (tree, outside) = (root.path().join("tree"), root.path().join("outside"));
        std::fs::create_dir_all(tree.join("a/b")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("file"), vec![1; 1 << 20]).unwrap();
        symlink(&outside, tree.join("link")).unwrap();
        symlink("../../../outside", tree.join("a/b/link")).unwrap();
        symlink("nowhere", tree.join("a/dangling")).unwrap();
        assert!(measure(&tree).bytes < 1 << 20);
        remove_now(&tree).unwrap();
        assert!(!tree.exists() && outside.join("file").exists());
        // A link in the tree's own place goes, and not what it leads to.
        symlink(&outside, &tree).unwrap();
        remove_now(&tree).unwrap();
        assert!(tree.symlink_metadata().is_err() && outside.join("file").exists());
        remove_now(&tree).unwrap();
    }

    #[test]
    fn names_that_are_taken_and_modes_that_forbid_do_not_hold_up_the_removal() {
        let root = tempfile::tempdir().unwrap();
        let tree = root.path().join("tree");
        for name in ["..1", "..2/full", "a/x/y", "a/z/y", "b/..1/c"] {
            std::fs::create_dir_all(tree.join(name)).unwrap();
        }
        std::fs::write(tree.join("..3"), "").unwrap();
        for name in ["a/x", "a"] {
            std::fs::set_permissions(tree.join(name), std::fs::Permissions::from_mode(0o0)).unwrap();
        }
        remove_now(&tree).unwrap();
        assert!(!tree.exists());
    }

    #[test]
    fn usage_counts_blocks_and_shares_a_file_out_among_its_links() {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("sub")).unwrap();
        let without = measure(root.path());
        let file = root.path().join("sub/file");
        std::fs::write(&file, vec![7; 1 << 20]).unwrap();
        File::open(&file).unwrap().sync_all().unwrap();
        let with = measure(root.path());
        assert!(with.bytes >= without.bytes + (1 << 20), "{with:?}");
        std::fs::hard_link(&file, root.path().join("again")).unwrap();
        let linked = measure(root.path());
        assert!(linked.bytes < with.bytes + (1 << 19) && linked.files == with.files + 1, "{linked:?}");
        File::create(root.path().join("hole")).unwrap().set_len(1 << 40).unwrap();
        assert!(measure(root.path()).bytes < 1 << 30);
    }
}
