//! Container log files in the CRI format (`TIMESTAMP stdout|stderr F|P text`), line-buffered and rotated.

use crate::linkers::MAX_WRITE;
use bytes::Bytes;
use parking_lot::Mutex;
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

/// A longer line is written in pieces with the tag `P`, as container runtimes do it.
const MAX_LINE: usize = 16 * 1024;
/// The tag of an entry whose line goes on in the next one, or ends without a line break.
const PARTIAL: char = 'P';
/// What a guest may write at once.
const BUDGET: usize = MAX_WRITE;

/// How large a container's log may grow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LogLimits {
    /// A file that would grow beyond this many bytes is rotated.
    pub max_size: u64,
    /// Files kept, the current one included.
    pub max_files: u32,
}

impl Default for LogLimits {
    fn default() -> Self {
        Self { max_size: 10 * 1024 * 1024, max_files: 5 }
    }
}

/// Which of a guest's streams a line came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogStream {
    Stdout,
    Stderr,
}

impl fmt::Display for LogStream {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        })
    }
}

/// One container's log. Clones share the file.
#[derive(Debug, Clone)]
pub struct LogFile(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    path: PathBuf,
    limits: LogLimits,
    current: Mutex<Current>,
}

#[derive(Debug)]
struct Current {
    file: File,
    size: u64,
    /// Who left a line of the stream without its end.
    unfinished: [Option<Writer>; 2],
}

/// One instance's stdout or stderr, or the agent itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Writer(u64);

impl Writer {
    const AGENT: Self = Self(0);

    fn new() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self(NEXT.fetch_add(1, Ordering::Relaxed))
    }
}

impl LogFile {
    /// Opens (appends to) the log at `path`; its directory is made when missing.
    pub fn create(path: impl Into<PathBuf>, limits: LogLimits) -> io::Result<Self> {
        let path = path.into();
        if let Some(directory) = path.parent() {
            fs::create_dir_all(directory)?;
        }
        let file = open(&path)?;
        let size = file.metadata()?.len();
        Ok(Self(Arc::new(Inner { path, limits, current: Mutex::new(Current { file, size, unfinished: [None; 2] }) })))
    }

    /// The current file. Rotated ones stand next to it as `PATH.1` (newest) to `PATH.4`.
    pub fn path(&self) -> &Path {
        &self.0.path
    }

    /// Writes one line, or one for each line break in the text.
    pub fn write_line(&self, stream: LogStream, text: &str) {
        let mut text = text.as_bytes().to_vec();
        text.push(b'\n');
        self.write_lines(stream, Writer::AGENT, &mut text);
    }

    /// Takes the whole lines out of `buffer`, leaving the unfinished last one unless it is over-long.
    fn write_lines(&self, stream: LogStream, writer: Writer, buffer: &mut Vec<u8>) {
        let mut entries = Vec::new();
        let mut taken = 0;
        let mut timestamp = None;
        let mut unfinished = false;
        while let Some((line, tag, consumed)) = next_line(buffer.get(taken..).unwrap_or_default()) {
            let timestamp = timestamp.get_or_insert_with(now);
            // Writing to a Vec cannot fail.
            let _ = write!(entries, "{timestamp} {stream} {tag} ");
            entries.extend_from_slice(line);
            entries.push(b'\n');
            taken += consumed;
            unfinished = tag == PARTIAL;
        }
        buffer.drain(..taken);
        if !entries.is_empty() {
            self.append(stream, writer, entries, unfinished);
        }
    }

    /// Writes the last line of a stream that ended without a line break, and adds none.
    fn write_rest(&self, stream: LogStream, writer: Writer, rest: &[u8]) {
        let mut entry = format!("{} {stream} {PARTIAL} ", now()).into_bytes();
        entry.extend_from_slice(rest);
        entry.push(b'\n');
        self.append(stream, writer, entry, true);
    }

    fn append(&self, stream: LogStream, writer: Writer, mut entries: Vec<u8>, unfinished: bool) {
        let mut current = self.0.current.lock();
        let before = current.unfinished.get_mut(stream as usize);
        if let Some(before) = before {
            // A line of one is never the rest of another's.
            if before.is_some_and(|other| other != writer) {
                entries.splice(..0, format!("{} {stream} F \n", now()).into_bytes());
            }
            *before = unfinished.then_some(writer);
        }
        let entries = entries.as_slice();
        let length = entries.len() as u64;
        if current.size > 0 && current.size + length > self.0.limits.max_size {
            match self.rotate() {
                Ok(file) => {
                    current.file = file;
                    current.size = 0;
                }
                Err(error) => {
                    tracing::warn!(path = %self.0.path.display(), %error, "failed to rotate a container log; emptied it");
                    // Lines are worth less than a disk that is not full.
                    let _ = current.file.set_len(0);
                    current.size = 0;
                }
            }
        }
        match current.file.write_all(entries) {
            Ok(()) => current.size += length,
            // A full disk must not end the guest; it has no one to tell but the node's log.
            Err(error) => tracing::warn!(path = %self.0.path.display(), %error, "failed to write a container log"),
        }
    }

    fn rotate(&self) -> io::Result<File> {
        let numbered = |number: u32| {
            let mut name = self.0.path.clone().into_os_string();
            name.push(format!(".{number}"));
            PathBuf::from(name)
        };
        // Somebody may have removed any of them by hand.
        let if_there = |result: io::Result<()>| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        };
        let oldest = self.0.limits.max_files.saturating_sub(1);
        if oldest == 0 {
            if_there(fs::remove_file(&self.0.path))?;
        }
        for number in (1..oldest).rev() {
            if_there(fs::rename(numbered(number), numbered(number + 1)))?;
        }
        if oldest > 0 {
            if_there(fs::rename(&self.0.path, numbered(1)))?;
        }
        open(&self.0.path)
    }

    /// A guest's stream into this log.
    pub(crate) fn guest_stream(&self, stream: LogStream) -> GuestStream {
        GuestStream(Arc::new(Lines { log: self.clone(), stream, writer: Writer::new(), buffer: Mutex::default() }))
    }
}

fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).open(path)
}

/// RFC 3339 with nanoseconds, always nine digits, in UTC.
fn now() -> impl fmt::Display {
    jiff::Timestamp::now().strftime("%Y-%m-%dT%H:%M:%S.%9fZ").to_string()
}

/// The next line of a buffer: its text, its tag, and how many bytes it takes up.
fn next_line(buffer: &[u8]) -> Option<(&[u8], char, usize)> {
    let window = buffer.get(..=MAX_LINE).unwrap_or(buffer);
    match window.iter().position(|byte| *byte == b'\n') {
        Some(end) => Some((window.get(..end)?, 'F', end + 1)),
        None if window.len() > MAX_LINE => Some((window.get(..MAX_LINE)?, PARTIAL, MAX_LINE)),
        None => None,
    }
}

/// A guest's stdout or stderr. Each instance has a buffer of its own, so that lines of two are never mixed.
#[derive(Clone)]
pub struct GuestStream(Arc<Lines>);

struct Lines {
    log: LogFile,
    stream: LogStream,
    writer: Writer,
    buffer: Mutex<Vec<u8>>,
}

impl Lines {
    fn write(&self, bytes: &[u8]) {
        let mut buffer = self.buffer.lock();
        buffer.extend_from_slice(bytes);
        self.log.write_lines(self.stream, self.writer, &mut buffer);
    }
}

impl Drop for Lines {
    fn drop(&mut self) {
        let buffer = std::mem::take(&mut *self.buffer.lock());
        if !buffer.is_empty() {
            self.log.write_rest(self.stream, self.writer, &buffer);
        }
    }
}

impl IsTerminal for GuestStream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for GuestStream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[async_trait::async_trait]
impl Pollable for GuestStream {
    async fn ready(&mut self) {}
}

impl OutputStream for GuestStream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.0.write(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(BUDGET)
    }
}

impl AsyncWrite for GuestStream {
    fn poll_write(self: Pin<&mut Self>, _context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let bytes = bytes.get(..BUDGET).unwrap_or(bytes);
        self.0.write(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn log(limits: LogLimits) -> (tempfile::TempDir, LogFile) {
        let directory = tempfile::tempdir().unwrap();
        let log = LogFile::create(directory.path().join("deep/0.log"), limits).unwrap();
        (directory, log)
    }

    fn content(log: &LogFile) -> Vec<String> {
        fs::read_to_string(log.path()).unwrap().lines().map(str::to_owned).collect()
    }

    #[test]
    fn lines_have_the_shape_that_cri_asks_for() {
        let (_directory, log) = log(LogLimits::default());
        log.guest_stream(LogStream::Stderr).0.write(b"hello world\n");
        let [line] = content(&log).try_into().unwrap();
        let (timestamp, rest) = line.split_once(' ').unwrap();
        assert_eq!(rest, "stderr F hello world");
        assert_eq!(timestamp.len(), "2026-01-01T00:00:00.000000000Z".len());
        timestamp.parse::<jiff::Timestamp>().unwrap();
    }

    #[test]
    fn pieces_of_a_line_are_held_back_until_it_is_whole() {
        let (_directory, log) = log(LogLimits::default());
        let (one, two) = (log.guest_stream(LogStream::Stdout), log.guest_stream(LogStream::Stdout));
        one.0.write(b"on");
        two.0.write(b"two\nrest");
        one.0.write(b"e\n\n");
        drop(two);
        let lines: Vec<_> = content(&log).into_iter().map(|line| line[31..].to_owned()).collect();
        assert_eq!(lines, ["stdout F two", "stdout F one", "stdout F ", "stdout P rest"]);
    }

    #[test]
    fn a_stream_that_ends_without_a_line_break_is_given_none_until_another_writes() {
        let (_directory, log) = log(LogLimits::default());
        log.guest_stream(LogStream::Stdout).0.write(b"one\nrest");
        let lines = || content(&log).into_iter().map(|line| line[31..].to_owned()).collect::<Vec<_>>();
        assert_eq!(lines(), ["stdout F one", "stdout P rest"]);
        log.guest_stream(LogStream::Stderr).0.write(b"of another stream\n");
        log.guest_stream(LogStream::Stdout).0.write(b"two\n");
        assert_eq!(lines()[2..], ["stderr F of another stream", "stdout F ", "stdout F two"]);
    }

    #[test]
    fn pieces_of_an_over_long_line_are_never_joined_with_anothers() {
        let (_directory, log) = log(LogLimits::default());
        let (one, two) = (log.guest_stream(LogStream::Stdout), log.guest_stream(LogStream::Stdout));
        one.0.write(&vec![b'x'; MAX_LINE + 1]);
        two.0.write(b"two\n");
        one.0.write(b"\n");
        let tags: Vec<_> = content(&log).iter().map(|line| line[31..].chars().take(10).collect::<String>()).collect();
        assert_eq!(tags, ["stdout P x", "stdout F ", "stdout F t", "stdout F x"]);
    }

    #[test]
    fn an_over_long_line_is_written_in_partial_pieces() {
        let (_directory, log) = log(LogLimits::default());
        let text = vec![b'x'; MAX_LINE * 2 + 10];
        let stream = log.guest_stream(LogStream::Stdout);
        stream.0.write(&text);
        assert!(stream.0.buffer.lock().len() <= MAX_LINE);
        stream.0.write(b"\n");
        let lines = content(&log);
        let tags: Vec<_> = lines.iter().map(|line| line.split(' ').nth(2).unwrap()).collect();
        assert_eq!(tags, ["P", "P", "F"]);
        let whole: usize = lines.iter().map(|line| line.split(' ').nth(3).unwrap().len()).sum();
        assert_eq!(whole, text.len());
    }

    #[test]
    fn files_are_rotated_and_bounded_in_number_and_size() {
        let (_directory, log) = log(LogLimits { max_size: 1000, max_files: 3 });
        for number in 0..100 {
            log.write_line(LogStream::Stdout, &format!("line {number}"));
        }
        let directory = log.path().parent().unwrap();
        let mut names: Vec<_> = fs::read_dir(directory)
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                assert!(entry.metadata().unwrap().len() <= 1000);
                entry.file_name().into_string().unwrap()
            })
            .collect();
        names.sort();
        assert_eq!(names, ["0.log", "0.log.1", "0.log.2"]);
        assert!(content(&log).last().unwrap().ends_with("line 99"));
        let newest = fs::read_to_string(directory.join("0.log.1")).unwrap();
        let oldest = fs::read_to_string(directory.join("0.log.2")).unwrap();
        assert!(oldest.lines().last() < newest.lines().next());
    }

    #[test]
    fn a_log_that_was_removed_by_hand_comes_back_at_its_next_rotation() {
        for max_files in [1, 3] {
            let (_directory, log) = log(LogLimits { max_size: 200, max_files });
            log.write_line(LogStream::Stdout, "before");
            fs::remove_file(log.path()).unwrap();
            for number in 0..100 {
                log.write_line(LogStream::Stdout, &format!("line {number}"));
            }
            assert!(content(&log).last().unwrap().ends_with("line 99"));
        }
    }

    #[test]
    fn a_log_that_cannot_be_rotated_stays_bounded() {
        let (_directory, log) = log(LogLimits { max_size: 200, max_files: 2 });
        let in_the_way = log.path().with_extension("log.1");
        fs::create_dir(&in_the_way).unwrap();
        for number in 0..100 {
            log.write_line(LogStream::Stdout, &format!("line {number}"));
            assert!(fs::metadata(log.path()).unwrap().len() <= 200);
        }
        assert!(in_the_way.is_dir());
        assert!(content(&log).last().unwrap().ends_with("line 99"));
    }

    #[test]
    fn a_log_is_appended_to_when_it_is_opened_again() {
        let (_directory, log) = log(LogLimits::default());
        log.write_line(LogStream::Stdout, "before");
        let again = LogFile::create(log.path(), LogLimits::default()).unwrap();
        again.write_line(LogStream::Stdout, "after");
        assert_eq!(content(&again).len(), 2);
    }
}
