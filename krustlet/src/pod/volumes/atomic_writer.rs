//! Writes a volume's files as the kubelet does: into a directory with the time as its name, swapped in by renaming the link
//! `..data`, so that a reader sees all of the old files or all of the new ones.
//!
//! Guests only read these directories. Every link is relative and stays inside, because a WASI directory confines links to
//! itself.

use super::projection::{File, Files};
use crate::trees;
use cap_std::fs::{
    Dir, DirBuilder, DirBuilderExt as _, MetadataExt as _, OpenOptions, OpenOptionsExt as _, Permissions,
    PermissionsExt as _,
};
use jiff::Timestamp;
use std::collections::BTreeSet;
use std::io::{ErrorKind, Read as _, Write as _};
use std::path::{Path, PathBuf};

const DATA: &str = "..data";
const NEW_DATA: &str = "..data_tmp";

/// Makes the directory show exactly these files, all of them changed at one moment.
pub fn write(dir: &Dir, files: &Files) -> std::io::Result<()> {
    let current = dir.read_link(DATA).ok();
    let expected: Files = files
        .iter()
        // The agent itself has to read them back.
        .map(|(path, file)| (path.clone(), File { data: file.data.clone(), mode: file.mode | 0o400 }))
        .collect();
    let unchanged = match &current {
        Some(current) => shows(dir, current, &expected),
        None => false,
    };
    let kept = if unchanged {
        current
    } else {
        let name = Timestamp::now().strftime("..%Y_%m_%d_%H_%M_%S.%9f").to_string();
        make(dir, Path::new(&name))?;
        let new = dir.open_dir(&name)?;
        for (path, file) in &expected {
            if let Some(parent) = Path::new(path).parent() {
                make(&new, parent)?;
            }
            write_file(&new, Path::new(path), file)?;
        }
        trees::remove_in(dir, NEW_DATA)?;
        dir.symlink(&name, NEW_DATA)?;
        dir.rename(NEW_DATA, dir, DATA)?;
        Some(PathBuf::from(name))
    };
    let visible: BTreeSet<&str> = expected.keys().filter_map(|path| path.split('/').next()).collect();
    for name in &visible {
        match dir.symlink(Path::new(DATA).join(name), name) {
            Err(error) if error.kind() != ErrorKind::AlreadyExists => return Err(error),
            _ => {}
        }
    }
    // What an earlier version showed, and what an interrupted one left behind.
    retain(dir, |name| {
        name == DATA || kept.as_ref().is_some_and(|kept| kept.as_os_str() == name) || visible.contains(name)
    })
}

/// Makes a directory hold exactly these files, each one replaced as a whole: what is open stays what it was.
pub fn replace(dir: &Dir, files: &Files) -> std::io::Result<()> {
    for (path, file) in files {
        let path = Path::new(path);
        if let Some(parent) = path.parent() {
            make(dir, parent)?;
        }
        replace_file(dir, path, file)?;
    }
    let visible: BTreeSet<&str> = files.keys().filter_map(|path| path.split('/').next()).collect();
    retain(dir, |name| visible.contains(name))
}

/// Puts a file in the place of whatever is there, a link itself and not what it leads to included.
pub fn replace_file(dir: &Dir, path: &Path, file: &File) -> std::io::Result<()> {
    // A name that a guest which writes here too cannot know.
    let new = path.with_file_name(format!("..{:016x}", rand::random::<u64>()));
    write_file(dir, &new, file)?;
    let replaced = dir.rename(&new, dir, path);
    if replaced.is_err() {
        dir.remove_file(&new)?;
    }
    replaced
}

/// Everything below a path, which may be a file's (under the name ""); none when nothing is there.
pub fn read(dir: &Dir, path: &Path) -> std::io::Result<Option<Files>> {
    let mut files = Files::new();
    let read = match dir.open_dir(path) {
        Ok(found) => read_tree(&found, "", &mut files),
        Err(error) if error.kind() == ErrorKind::NotADirectory => {
            read_file(dir, path).map(|file| drop(files.insert(String::new(), file)))
        }
        Err(error) => Err(error),
    };
    match read {
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        read => read.map(|()| Some(files)),
    }
}

/// Makes a private directory, and those that it lies in.
pub fn make(dir: &Dir, path: &Path) -> std::io::Result<()> {
    if path.as_os_str().is_empty() {
        return Ok(());
    }
    let mut builder = DirBuilder::new();
    builder.mode(0o700).recursive(true);
    dir.create_dir_with(path, &builder)
}

fn retain(dir: &Dir, keep: impl Fn(&str) -> bool) -> std::io::Result<()> {
    for entry in dir.entries()? {
        let name = entry?.file_name();
        // Every name here is the agent's own, and a string.
        if let Some(name) = name.to_str()
            && !keep(name)
        {
            trees::remove_in(dir, name)?;
        }
    }
    Ok(())
}

fn write_file(dir: &Dir, path: &Path, file: &File) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.write(true).create_new(true).mode(0o600);
    let mut out = dir.open_with(path, &options)?;
    out.write_all(&file.data)?;
    // Whatever the umask is.
    out.set_permissions(Permissions::from_mode(file.mode))
}

/// Whether a version is what is to be shown. One that cannot be read is not.
fn shows(dir: &Dir, version: &Path, expected: &Files) -> bool {
    let mut shown = Files::new();
    dir.open_dir(version).and_then(|version| read_tree(&version, "", &mut shown)).is_ok() && shown == *expected
}

fn read_file(dir: &Dir, path: &Path) -> std::io::Result<File> {
    let mut file = dir.open(path)?;
    let mode = file.metadata()?.mode() & 0o777;
    let mut data = Vec::new();
    file.read_to_end(&mut data)?;
    Ok(File { data, mode })
}

fn read_tree(dir: &Dir, prefix: &str, files: &mut Files) -> std::io::Result<()> {
    for entry in dir.entries()? {
        let entry = entry?;
        let name = entry.file_name();
        let path = format!("{prefix}{}", name.to_string_lossy());
        if entry.file_type()?.is_dir() {
            read_tree(&dir.open_dir(&name)?, &format!("{path}/"), files)?;
        } else {
            files.insert(path, read_file(dir, Path::new(&name))?);
        }
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::super::directory::trusted;
    use super::*;

    fn files(files: &[(&str, &str)]) -> Files {
        let file = |data: &str| File { data: data.as_bytes().to_vec(), mode: 0o600 };
        files.iter().map(|(path, data)| ((*path).to_owned(), file(data))).collect()
    }

    fn text(path: PathBuf) -> String {
        std::fs::read_to_string(path).unwrap()
    }

    #[test]
    fn a_version_takes_the_place_of_the_one_before_and_an_unchanged_one_is_not_written() {
        let root = tempfile::tempdir().unwrap();
        let dir = trusted(root.path()).unwrap();
        write(&dir, &files(&[("a", "1"), ("deep/b", "2")])).unwrap();
        let first = dir.read_link(DATA).unwrap();
        write(&dir, &files(&[("a", "1"), ("deep/b", "2")])).unwrap();
        assert_eq!(dir.read_link(DATA).unwrap(), first);
        write(&dir, &files(&[("a", "new")])).unwrap();
        assert_eq!(text(root.path().join("a")), "new");
        let left = std::fs::read_dir(root.path()).unwrap().count();
        assert_eq!(left, 3, "a, ..data and one version of the data");
    }

    #[test]
    fn an_interrupted_write_is_cleaned_up_by_the_next_one() {
        let root = tempfile::tempdir().unwrap();
        let dir = trusted(root.path()).unwrap();
        std::fs::create_dir(root.path().join("..2020_01_01_00_00_00.000000000")).unwrap();
        dir.symlink("..nowhere", NEW_DATA).unwrap();
        dir.symlink("..data/gone", "gone").unwrap();
        write(&dir, &files(&[("a", "1")])).unwrap();
        assert_eq!(text(root.path().join("a")), "1");
        assert_eq!(std::fs::read_dir(root.path()).unwrap().count(), 3);
    }

    #[test]
    fn a_file_takes_the_place_of_a_link_and_not_of_what_it_leads_to() {
        let parent = tempfile::tempdir().unwrap();
        let root = parent.path().join("volume");
        std::fs::create_dir(&root).unwrap();
        std::fs::write(parent.path().join("outside"), "untouched").unwrap();
        let dir = trusted(&root).unwrap();
        dir.symlink("../outside", "conf").unwrap();
        let file = File { data: b"new".to_vec(), mode: 0o600 };
        replace_file(&dir, Path::new("conf"), &file).unwrap();
        assert_eq!((text(root.join("conf")), text(parent.path().join("outside"))), ("new".into(), "untouched".into()));
        std::fs::create_dir(root.join("dir")).unwrap();
        assert!(replace_file(&dir, Path::new("dir"), &file).is_err());
        std::os::unix::fs::symlink("..", root.join("up")).unwrap();
        assert!(replace_file(&dir, Path::new("up/outside"), &file).is_err());
        assert_eq!(std::fs::read_dir(&root).unwrap().count(), 3, "nothing is left behind");
    }

    #[test]
    fn replaced_files_are_exactly_those_that_were_given() {
        let root = tempfile::tempdir().unwrap();
        let dir = trusted(root.path()).unwrap();
        replace(&dir, &files(&[("a", "1"), ("old/b", "2")])).unwrap();
        replace(&dir, &files(&[("a", "new"), ("c/d", "3")])).unwrap();
        let mut expected = files(&[("a", "new"), ("c/d", "3")]);
        assert_eq!(read(&dir, Path::new(".")).unwrap().unwrap(), expected);
        expected.retain(|path, _| path == "a");
        assert_eq!(read(&dir, Path::new("a")).unwrap().unwrap().remove("").unwrap().data, b"new");
        assert!(read(&dir, Path::new("none")).unwrap().is_none());
    }
}
