//! hostPath volumes: directories of the machine that the node's administrator lets pods mount.

use super::super::sources::ConfigError;
use super::directory::{Below, trusted};
use cap_std::fs::Dir;
use k8s_openapi::api::core::v1::HostPathVolumeSource;
use rustix::fs::{Mode, OFlags, fstat, openat};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

/// What pods may mount of the machine.
#[derive(Debug, Clone, Default)]
pub struct HostPaths {
    /// Directories below which everything may be mounted.
    pub allowed: Vec<PathBuf>,
    /// The agent's own keys lie in there: it is never shown, whatever is allowed.
    pub data_dir: PathBuf,
}

/// A directory of the machine that a volume names; it is looked for each time that a container starts.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HostPath {
    volume: String,
    path: String,
    /// The allowed directory, which the administrator answers for.
    allowed: PathBuf,
    /// From there on, which a pod that mounts the whole may have changed.
    rest: PathBuf,
    create: bool,
}

impl HostPath {
    /// Judges the path by its words alone.
    ///
    /// Fails with [`ConfigError::Invalid`] when it is not allowed, or is no directory's.
    pub fn of(volume: &str, source: &HostPathVolumeSource, hosts: &HostPaths) -> Result<Self, ConfigError> {
        let path = Path::new(&source.path);
        let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
        // The outermost one: what lies in it may be changed by whoever mounts it, another allowed directory included.
        let allowed = hosts.allowed.iter().filter(|allowed| path.starts_with(allowed));
        let outermost = allowed.min_by_key(|allowed| allowed.components().count());
        let (Some(allowed), true) = (outermost, path.is_absolute() && plain) else {
            return Err(ConfigError::Invalid(format!(
                "volume {volume:?}: hostPath {} is not allowed on this node; --hostpath-allow lists what is",
                source.path
            )));
        };
        let create = match source.type_.as_deref().unwrap_or_default() {
            "" | "Directory" => false,
            "DirectoryOrCreate" => true,
            other => {
                return Err(ConfigError::Invalid(format!(
                    "volume {volume:?}: hostPath type {other} is not supported: WASI mounts directories only"
                )));
            }
        };
        let rest = path.strip_prefix(allowed).unwrap_or(Path::new("")).to_owned();
        Ok(Self { volume: volume.to_owned(), path: source.path.clone(), allowed: allowed.clone(), rest, create })
    }

    /// Opens it, below the allowed directory.
    ///
    /// Fails with [`ConfigError::Missing`] when it is not there (yet), and with [`ConfigError::Invalid`] when links lead out
    /// of what is allowed, or it would show the agent's own files.
    pub fn open(&self, hosts: &HostPaths) -> Result<Dir, ConfigError> {
        let missing = |path: &Path, error: &std::io::Error| {
            ConfigError::Missing(format!("volume {:?}: host directory {}: {error}", self.volume, path.display()))
        };
        let allowed = trusted(&self.allowed).map_err(|error| missing(&self.allowed, &error))?;
        let what = format!("volume {:?}: hostPath {}", self.volume, self.path);
        let whole = format!("{}, which --hostpath-allow names", self.allowed.display());
        let below = Below { what: &what, whole: &whole, create: self.create.then_some(0o755) };
        let directory = below.open(&allowed, &self.rest)?;
        let shows =
            shows(&directory, &hosts.data_dir).map_err(|error| missing(Path::new(&self.path), &error.into()))?;
        if shows {
            return Err(ConfigError::Invalid(format!(
                "{what} is not allowed: the agent's own keys and files are there"
            )));
        }
        Ok(directory)
    }
}

/// Whether one of the directories lies in the other. By what they are: a path has many spellings.
fn shows(directory: impl AsFd, data_dir: &Path) -> rustix::io::Result<bool> {
    let data_dir = match rustix::fs::open(data_dir, OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()) {
        Err(rustix::io::Errno::NOENT) => return Ok(false),
        opened => opened?,
    };
    Ok(ancestors(&directory)?.contains(&identity(&data_dir)?) || ancestors(&data_dir)?.contains(&identity(&directory)?))
}

/// The directory itself, its parent, and so on up to the root.
fn ancestors(directory: impl AsFd) -> rustix::io::Result<Vec<(u64, u64)>> {
    let up = |from: &dyn AsFd| -> rustix::io::Result<OwnedFd> {
        openat(from.as_fd(), "..", OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
    };
    let mut found = vec![identity(&directory)?];
    let mut parent = up(&directory)?;
    while !found.contains(&identity(&parent)?) {
        found.push(identity(&parent)?);
        parent = up(&parent)?;
    }
    Ok(found)
}

fn identity(directory: impl AsFd) -> rustix::io::Result<(u64, u64)> {
    let stat = fstat(directory)?;
    // Their types differ from system to system.
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss)]
    Ok((stat.st_dev as u64, stat.st_ino as u64))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn try_it(path: &Path, type_: &str, hosts: &HostPaths) -> Result<Dir, ConfigError> {
        let source = HostPathVolumeSource { path: path.display().to_string(), type_: Some(type_.into()) };
        HostPath::of("v", &source, hosts)?.open(hosts)
    }

    fn id(path: &Path) -> (u64, u64) {
        identity(std::fs::File::open(path).unwrap()).unwrap()
    }

    #[test]
    fn a_host_path_needs_the_flag_and_cannot_leave_what_it_allows() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("ok/data")).unwrap();
        std::fs::create_dir(root.join("secret")).unwrap();
        symlink("/etc", root.join("ok/escape")).unwrap();
        symlink("../secret", root.join("ok/beside")).unwrap();
        symlink("data", root.join("ok/inside")).unwrap();
        let hosts = HostPaths { allowed: vec![root.join("ok")], data_dir: root.join("none") };
        for (path, type_) in
            [("ok/data", ""), ("ok/inside", "Directory"), ("ok", ""), ("ok/new/er", "DirectoryOrCreate")]
        {
            let opened = try_it(&root.join(path), type_, &hosts).unwrap();
            assert_eq!(identity(&opened).unwrap(), id(&root.join(path)), "{path}");
        }
        for path in ["", "okay", "secret", "ok/../secret", "ok/escape", "ok/escape/new", "ok/beside", "ok/beside/new"] {
            let error = try_it(&root.join(path), "DirectoryOrCreate", &hosts).unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid(m) if m.contains("--hostpath-allow")), "{path}: {error}");
        }
        assert!(matches!(try_it(&root.join("ok/none"), "Directory", &hosts), Err(ConfigError::Missing(_))));
        assert!(matches!(try_it(&root.join("ok/data"), "Socket", &hosts), Err(ConfigError::Invalid(_))));
        assert!(try_it(&root.join("ok/data"), "", &HostPaths::default()).is_err());
    }

    #[test]
    fn an_allowed_directory_inside_another_is_not_trusted_more_than_that_one() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("a")).unwrap();
        std::fs::create_dir(root.join("secret")).unwrap();
        let hosts = HostPaths { allowed: vec![root.join("a/b"), root.join("a")], data_dir: root.join("none") };
        // As a pod that mounts `a` can do it.
        symlink("../secret", root.join("a/b")).unwrap();
        assert!(try_it(&root.join("a/b"), "", &hosts).is_err());
    }

    #[test]
    fn the_agents_own_directory_is_never_shown_nor_one_that_holds_it() {
        let host = tempfile::tempdir().unwrap();
        let root = host.path().canonicalize().unwrap();
        std::fs::create_dir_all(root.join("lib/krustlet/pki")).unwrap();
        std::fs::create_dir(root.join("lib/other")).unwrap();
        symlink("lib/krustlet", root.join("link")).unwrap();
        let hosts = HostPaths { allowed: vec![root.clone()], data_dir: root.join("link") };
        for path in ["", "lib", "lib/krustlet", "lib/krustlet/pki", "link", "link/pki"] {
            let error = try_it(&root.join(path), "", &hosts).unwrap_err();
            assert!(matches!(&error, ConfigError::Invalid(m) if m.contains("agent's own")), "{path}: {error}");
        }
        try_it(&root.join("lib/other"), "", &hosts).unwrap();
    }
}
