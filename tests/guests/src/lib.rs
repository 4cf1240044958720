//! What a guest can try on its node: files, environment, clocks, memory, time. Each guest gives it another surface.
//!
//! The target has no system of its own, so `std::fs` and the like would only fail: everything goes to WASI directly.

use std::hint::black_box;
use std::io::Write as _;

use wasip2::cli::{environment, stderr, stdout};
use wasip2::clocks::monotonic_clock;
use wasip2::filesystem::preopens::get_directories;
use wasip2::filesystem::types::{Descriptor, DescriptorFlags, ErrorCode, NewTimestamp, OpenFlags, PathFlags};

/// Set at compile time, so that two builds have two digests and can be told apart from outside.
pub const VERSION: &str = match option_env!("GUEST_VERSION") {
    Some(version) => version,
    None => "1",
};

const MIB: usize = 1 << 20;
const PAGE: usize = 4096;

/// The environment as a JSON object, in the order that the host gave.
pub fn env() -> String {
    let pairs = environment::get_environment();
    let pairs = pairs.iter().map(|(name, value)| format!("{}:{}", json(name), json(value)));
    format!("{{{}}}", pairs.collect::<Vec<_>>().join(","))
}

/// The arguments as a JSON array.
pub fn args() -> String {
    let args: Vec<_> = environment::get_arguments().iter().map(|argument| json(argument)).collect();
    format!("[{}]", args.join(","))
}

/// A file's content.
pub fn read(path: &str) -> Result<Vec<u8>, ErrorCode> {
    let file = open(path, OpenFlags::empty(), DescriptorFlags::READ)?;
    let mut content = Vec::new();
    loop {
        let (chunk, end) = file.read(MIB as u64, content.len() as u64)?;
        content.extend_from_slice(&chunk);
        if end {
            return Ok(content);
        }
    }
}

/// Replaces a file's content, or creates it.
pub fn write(path: &str, text: &str) -> Result<(), ErrorCode> {
    let file = open(path, OpenFlags::CREATE | OpenFlags::TRUNCATE, DescriptorFlags::WRITE)?;
    let mut written = 0;
    while written < text.len() {
        written += file.write(&text.as_bytes()[written..], written as u64)? as usize;
    }
    Ok(())
}

pub fn remove(path: &str) -> Result<(), ErrorCode> {
    let (directory, name) = resolve(path)?;
    directory.unlink_file_at(&name)
}

pub fn make_directory(path: &str) -> Result<(), ErrorCode> {
    let (directory, name) = resolve(path)?;
    directory.create_directory_at(&name)
}

/// Moves within a volume, or from one to another.
pub fn rename(from: &str, to: &str) -> Result<(), ErrorCode> {
    let ((directory, name), (other, new)) = (resolve(from)?, resolve(to)?);
    directory.rename_at(&name, &other, &new)
}

pub fn symlink(target: &str, path: &str) -> Result<(), ErrorCode> {
    let (directory, name) = resolve(path)?;
    directory.symlink_at(target, &name)
}

pub fn hard_link(from: &str, to: &str) -> Result<(), ErrorCode> {
    let ((directory, name), (other, new)) = (resolve(from)?, resolve(to)?);
    directory.link_at(PathFlags::empty(), &name, &other, &new)
}

/// Sets both times of what is there to the present: `way` is `open` (and then by its descriptor), `link` (not followed), or else by
/// its path with links followed.
pub fn touch(path: &str, way: &str) -> Result<(), ErrorCode> {
    let now = NewTimestamp::Now;
    if way == "open" {
        return open(path, OpenFlags::empty(), DescriptorFlags::READ)?.set_times(now, now);
    }
    let flags = if way == "link" { PathFlags::empty() } else { PathFlags::SYMLINK_FOLLOW };
    let (directory, name) = resolve(path)?;
    directory.set_times_at(flags, &name, now, now)
}

/// A directory in a directory in a directory, deeper than a path may be long.
pub fn deep(path: &str, levels: u32) -> Result<(), ErrorCode> {
    let mut directory = open(path, OpenFlags::DIRECTORY, DescriptorFlags::READ | DescriptorFlags::MUTATE_DIRECTORY)?;
    for _ in 0..levels {
        directory.create_directory_at("d")?;
        let flags = DescriptorFlags::READ | DescriptorFlags::MUTATE_DIRECTORY;
        directory = directory.open_at(PathFlags::empty(), "d", OpenFlags::DIRECTORY, flags)?;
    }
    Ok(())
}

/// A file of so many MiB.
pub fn fill(path: &str, mib: u64) -> Result<(), ErrorCode> {
    let file = open(path, OpenFlags::CREATE | OpenFlags::TRUNCATE, DescriptorFlags::WRITE)?;
    let piece = vec![b'x'; 64 * 1024];
    let mut written = 0;
    while written < mib << 20 {
        written += file.write(&piece, written)?;
    }
    Ok(())
}

/// Waits until there is something at the path.
pub fn wait_for(path: &str) {
    while !exists(path) {
        sleep(20);
    }
}

/// The names in a directory, sorted, one a line. `/` gives the directories that the host opened.
pub fn list(path: &str) -> Result<String, ErrorCode> {
    let mut names = Vec::new();
    if path == "/" {
        names.extend(get_directories().into_iter().map(|(_, path)| path));
    } else {
        let entries = open(path, OpenFlags::DIRECTORY, DescriptorFlags::READ)?.read_directory()?;
        while let Some(entry) = entries.read_directory_entry()? {
            names.push(entry.name);
        }
    }
    names.sort();
    Ok(names.join("\n"))
}

/// Begins to list a directory so often, and keeps all of the lists.
pub fn lists(path: &str, count: u32) -> Result<(), ErrorCode> {
    let directory = open(path, OpenFlags::DIRECTORY, DescriptorFlags::READ)?;
    let lists = (0..count).map(|_| directory.read_directory()).collect::<Result<Vec<_>, _>>()?;
    black_box(lists);
    Ok(())
}

/// Holds so many streams that have each read the beginning of a file, and gives nothing of it to the guest.
pub fn read_ahead(path: &str, count: u32) -> Result<(), ErrorCode> {
    let file = open(path, OpenFlags::empty(), DescriptorFlags::READ)?;
    let streams = (0..count).map(|_| file.read_via_stream(0)).collect::<Result<Vec<_>, _>>()?;
    for stream in &streams {
        let _ = stream.read(64 << 10);
    }
    for stream in &streams {
        stream.subscribe().block();
    }
    black_box(streams);
    Ok(())
}

pub fn exists(path: &str) -> bool {
    resolve(path).and_then(|(directory, name)| directory.stat_at(PathFlags::SYMLINK_FOLLOW, &name)).is_ok()
}

/// Never gives the processor back.
pub fn spin() -> ! {
    loop {
        black_box(());
    }
}

pub fn trap() -> ! {
    std::process::abort()
}

/// Gives so much memory, every page of it touched; traps when it gets no more.
pub fn allocate(mib: usize) -> Vec<Vec<u8>> {
    let mut held = Vec::new();
    for _ in 0..mib {
        let mut piece = vec![0u8; MIB];
        piece.iter_mut().step_by(PAGE).for_each(|byte| *byte = 1);
        held.push(black_box(piece));
    }
    black_box(held)
}

pub fn sleep(milliseconds: u64) {
    monotonic_clock::subscribe_duration(milliseconds.saturating_mul(1_000_000)).block();
}

/// Writes a line; a log that nobody takes is no fault of the guest.
pub fn print(line: &str) {
    let _ = writeln!(stdout::get_stdout(), "{line}");
}

pub fn print_error(line: &str) {
    let _ = writeln!(stderr::get_stderr(), "{line}");
}

fn open(path: &str, how: OpenFlags, access: DescriptorFlags) -> Result<Descriptor, ErrorCode> {
    let (directory, name) = resolve(path)?;
    directory.open_at(PathFlags::SYMLINK_FOLLOW, &name, how, access)
}

/// The host's directory that holds a path, the deepest if there are several, and the path inside it. A relative path begins
/// in the directory `.`, if there is one.
fn resolve(path: &str) -> Result<(Descriptor, String), ErrorCode> {
    let inside = |directory: &str| {
        if directory == "." {
            return (!path.starts_with('/')).then(|| path.to_owned());
        }
        let rest = path.strip_prefix(directory.trim_end_matches('/'))?;
        match rest.strip_prefix('/') {
            Some("") | None if rest.len() < 2 => Some(".".to_owned()),
            Some(name) => Some(name.to_owned()),
            None => None, // "/data-old" is not in "/data"
        }
    };
    get_directories()
        .into_iter()
        .filter_map(|(descriptor, directory)| Some((directory.len(), descriptor, inside(&directory)?)))
        .max_by_key(|(length, ..)| *length)
        .map(|(_, descriptor, name)| (descriptor, name))
        .ok_or(ErrorCode::NoEntry)
}

/// A JSON string.
fn json(text: &str) -> String {
    let mut quoted = String::from("\"");
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            '\0'..='\x1f' => quoted.push_str(&format!("\\u{:04x}", u32::from(character))),
            _ => quoted.push(character),
        }
    }
    quoted + "\""
}
