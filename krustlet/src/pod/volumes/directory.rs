//! A directory of a volume, found below an open one.
//!
//! A guest that may write into a volume can put a link in the place of any name there, at any moment. So a path inside a
//! volume is resolved by the kernel (or, where it cannot, by `cap-std`) below the volume's descriptor, and what comes of it
//! is a descriptor again: there is no moment at which a path was checked and is opened later.

use super::super::sources::ConfigError;
use cap_std::ambient_authority;
use cap_std::fs::{Dir, DirBuilder, DirBuilderExt as _};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};

/// Opens a directory by a path that no guest has a hand in.
pub fn trusted(path: &Path) -> std::io::Result<Dir> {
    Dir::open_ambient_dir(path, ambient_authority())
}

/// What a path below an open directory leads to, and whose words its errors are in.
#[derive(Debug, Clone, Copy)]
pub struct Below<'a> {
    /// What the pod's author calls the path, e.g. `subPath "a/b"`.
    pub what: &'a str,
    /// What it must not leave, e.g. `the volume`.
    pub whole: &'a str,
    /// The mode of directories that are made where they are missing; none are made without it.
    pub create: Option<u32>,
}

impl Below<'_> {
    /// Opens a directory. A link is followed where it stays below `root`, and refused where it does not, also when it is
    /// put there while this runs.
    ///
    /// Fails with [`ConfigError::Missing`] for what may still appear, and else with [`ConfigError::Invalid`].
    pub fn open(self, root: &Dir, path: &Path) -> Result<Dir, ConfigError> {
        let mut found: Option<Dir> = None;
        let mut so_far = PathBuf::new();
        for part in path.components() {
            match part {
                Component::Normal(part) => so_far.push(part),
                Component::CurDir => continue,
                _ => return Err(self.invalid("must be relative and stay inside")),
            }
            found = Some(match root.open_dir(&so_far) {
                Err(error) if error.kind() == ErrorKind::NotFound && self.create.is_some() => {
                    self.make(root, &so_far)?
                }
                result => result.map_err(|error| self.failed(&error))?,
            });
        }
        match found {
            Some(directory) => Ok(directory),
            None => root.try_clone().map_err(|error| self.failed(&error)),
        }
    }

    fn make(self, root: &Dir, path: &Path) -> Result<Dir, ConfigError> {
        let mut builder = DirBuilder::new();
        builder.mode(self.create.unwrap_or(0o700));
        match root.create_dir_with(path, &builder) {
            // Another container of the pod was quicker, or a link to nothing is there.
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(self.failed(&error)),
            _ => {}
        }
        match root.open_dir(path) {
            Err(error) if error.kind() == ErrorKind::NotFound => Err(self.invalid("is a link to nothing in")),
            result => result.map_err(|error| self.failed(&error)),
        }
    }

    fn invalid(self, why: &str) -> ConfigError {
        ConfigError::Invalid(format!("{} {why} {}", self.what, self.whole))
    }

    pub fn failed(self, error: &std::io::Error) -> ConfigError {
        match error.kind() {
            ErrorKind::NotFound => ConfigError::Missing(format!("{} is not in {}", self.what, self.whole)),
            ErrorKind::NotADirectory => {
                ConfigError::Invalid(format!("{} names a file, and WASI mounts directories only", self.what))
            }
            // No error of the system's: the path led out.
            ErrorKind::PermissionDenied if error.raw_os_error().is_none() => self.invalid("leads out of"),
            _ => ConfigError::Missing(format!("failed to open {}: {error}", self.what)),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;
    use std::sync::atomic::{AtomicBool, Ordering};

    const BELOW: Below<'_> = Below { what: "subPath", whole: "the volume", create: Some(0o700) };

    fn inode(directory: &Dir) -> u64 {
        use cap_std::fs::MetadataExt as _;
        directory.dir_metadata().unwrap().ino()
    }

    fn inode_of(path: &Path) -> u64 {
        use std::os::unix::fs::MetadataExt as _;
        std::fs::metadata(path).unwrap().ino()
    }

    #[test]
    fn a_path_is_made_where_it_is_missing_and_links_inside_are_followed() {
        let root = tempfile::tempdir().unwrap();
        let volume = trusted(root.path()).unwrap();
        let made = BELOW.open(&volume, Path::new("a/./b")).unwrap();
        assert_eq!(inode(&made), inode_of(&root.path().join("a/b")));
        symlink("a/b", root.path().join("link")).unwrap();
        assert_eq!(inode(&BELOW.open(&volume, Path::new("link")).unwrap()), inode(&made));
        assert_eq!(inode(&BELOW.open(&volume, Path::new(".")).unwrap()), inode_of(root.path()));
        let missing = Below { create: None, ..BELOW }.open(&volume, Path::new("none")).unwrap_err();
        assert!(matches!(missing, ConfigError::Missing(_)), "{missing}");
    }

    #[test]
    fn every_spelling_of_a_way_out_is_refused_and_nothing_is_made_there() {
        let parent = tempfile::tempdir().unwrap();
        let (root, outside) = (parent.path().join("volume"), parent.path().join("outside"));
        std::fs::create_dir_all(root.join("deep/er")).unwrap();
        std::fs::create_dir(&outside).unwrap();
        for (link, target) in [
            ("up", "..".to_owned()),
            ("beside", "../outside".to_owned()),
            ("far", "../../../../../../../../etc".to_owned()),
            ("absolute", outside.display().to_string()),
            ("root", "/".to_owned()),
            ("proc", "/proc/self/root".to_owned()),
            ("deep/er/out", "../../../outside".to_owned()),
            ("twice", "beside".to_owned()),
            ("in-and-out", "deep/../../outside".to_owned()),
            ("nothing", "not-there".to_owned()),
            ("loop", "loop".to_owned()),
        ] {
            symlink(target, root.join(link)).unwrap();
        }
        std::fs::write(root.join("file"), "").unwrap();
        let volume = trusted(&root).unwrap();
        for path in [
            "up",
            "up/outside",
            "beside",
            "beside/new",
            "far",
            "absolute",
            "absolute/new",
            "root",
            "root/etc",
            "proc",
            "deep/er/out",
            "deep/er/out/new",
            "twice",
            "in-and-out",
            "nothing",
            "nothing/new",
            "loop",
            "..",
            "../outside",
            "deep/../..",
            "/",
            "/etc",
            "file",
            "file/x",
        ] {
            assert!(BELOW.open(&volume, Path::new(path)).is_err(), "{path}");
        }
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 0);
        assert!(!parent.path().join("new").exists());
    }

    #[test]
    fn a_link_that_comes_and_goes_while_paths_are_opened_never_leads_out() {
        let parent = tempfile::tempdir().unwrap();
        let (root, outside) = (parent.path().join("volume"), parent.path().join("outside"));
        std::fs::create_dir_all(root.join("s/t")).unwrap();
        std::fs::create_dir_all(outside.join("t")).unwrap();
        let forbidden = [inode_of(&outside), inode_of(&outside.join("t")), inode_of(parent.path())];
        let volume = trusted(&root).unwrap();
        let stop = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    // At every moment a directory, a link out, or nothing.
                    std::fs::rename(root.join("s"), root.join("kept")).unwrap();
                    symlink("../outside", root.join("link")).unwrap();
                    std::fs::rename(root.join("link"), root.join("s")).unwrap();
                    std::fs::remove_file(root.join("s")).unwrap();
                    std::fs::rename(root.join("kept"), root.join("s")).unwrap();
                }
            });
            for _ in 0..20_000 {
                for path in ["s", "s/t"] {
                    let below = Below { create: None, ..BELOW };
                    if let Ok(opened) = below.open(&volume, Path::new(path)) {
                        assert!(!forbidden.contains(&inode(&opened)), "{path}");
                    }
                }
            }
            stop.store(true, Ordering::Relaxed);
        });
        assert_eq!(std::fs::read_dir(&outside).unwrap().count(), 1, "nothing was made outside");
    }
}
