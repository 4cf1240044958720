//! Container logs on disk: where they are, which ones are kept, and how they are read: rotated files first, followed while
//! the container runs.

use crate::pod::{name, namespace, uid};
use bytes::Bytes;
use jiff::{SignedDuration, Timestamp};
use k8s_openapi::api::core::v1::{ContainerStatus, Pod};
use std::collections::VecDeque;
use std::io::SeekFrom;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt};
use tokio::sync::mpsc;

/// Bytes read at a time.
const CHUNK: usize = 32 * 1024;
/// A line of the log file that is longer is no CRI line, and is left out. The runtime splits lines far below this.
const MAX_LINE: usize = 256 * 1024;
/// How long a follower waits before it looks for more; doubled from the first to the second while there is nothing.
const POLL: (Duration, Duration) = (Duration::from_millis(25), Duration::from_millis(200));
/// More rotated files than are ever kept.
const MAX_ROTATED: u32 = 99;
/// How much of a log's end becomes a termination message, by terminationMessagePolicy FallbackToLogsOnError.
const LAST_WORDS_LINES: u64 = 80;
const LAST_WORDS_BYTES: usize = 2048;

/// `<data-dir>/logs/NAMESPACE_NAME_UID`, where each container has a directory with one `RESTART.log` a run.
pub fn pod_directory(data_dir: &Path, pod: &Pod) -> PathBuf {
    data_dir.join("logs").join(directory_name(pod))
}

pub fn directory_name(pod: &Pod) -> String {
    format!("{}_{}_{}", namespace(pod), name(pod), uid(pod))
}

/// The log of one run of a container: 0 is the first run.
pub fn file(data_dir: &Path, pod: &Pod, container: &str, run: i32) -> PathBuf {
    pod_directory(data_dir, pod).join(container).join(format!("{run}.log"))
}

/// Removes the logs of the runs before the one before this one: nobody can ask for them any more.
pub fn remove_old(file: &Path, run: i32) -> std::io::Result<()> {
    let Some(directory) = file.parent() else { return Ok(()) };
    let entries = match std::fs::read_dir(directory) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        let entry = entry?;
        let of_run = entry.file_name().to_str().and_then(|name| name.split('.').next()?.parse::<i32>().ok());
        if of_run.is_some_and(|number| number < run - 1) {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The end of a log, as a termination message may hold it; empty when it cannot be read.
pub async fn last_words(file: &Path) -> String {
    let options = Options { tail_lines: Some(LAST_WORDS_LINES), ..Options::default() };
    let (sender, mut receiver) = mpsc::channel::<std::io::Result<Bytes>>(1);
    let mut end: Vec<u8> = Vec::new();
    let collecting = async {
        while let Some(Ok(part)) = receiver.recv().await {
            end.extend_from_slice(&part);
            end.drain(..end.len().saturating_sub(LAST_WORDS_BYTES));
        }
    };
    tokio::join!(send(file.to_owned(), options, || false, sender), collecting);
    // Where it was cut, there may be the rest of a character.
    let begin = (0..end.len().min(4)).find(|at| end.get(*at).is_some_and(|byte| byte & 0xc0 != 0x80)).unwrap_or(0);
    String::from_utf8_lossy(end.get(begin..).unwrap_or_default()).into_owned()
}

/// What a client asks for, as in `PodLogOptions`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Options {
    pub follow: bool,
    pub previous: bool,
    pub timestamps: bool,
    pub since: Option<Timestamp>,
    pub tail_lines: Option<u64>,
    pub limit_bytes: Option<u64>,
    pub stream: Streams,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Streams {
    #[default]
    All,
    Stdout,
    Stderr,
}

/// Why the options cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BadOptions {
    /// Not a number, not a time.
    Unreadable,
    /// Out of range, or excluding each other.
    Invalid,
}

impl Options {
    /// From the pairs of a query; of a repeated key the first counts, an unknown key is ignored.
    pub fn parse(query: &[(String, String)], now: Timestamp) -> Result<Self, BadOptions> {
        let value = |key: &str| query.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str());
        // As the API machinery reads them: everything but these two is true, also nothing at all.
        let flag = |key| value(key).is_some_and(|value| !value.eq_ignore_ascii_case("false") && value != "0");
        let number = |key: &str, least: i64| match value(key) {
            None => Ok(None),
            Some(text) => {
                let number: i64 = text.parse().map_err(|_| BadOptions::Unreadable)?;
                if number < least { Err(BadOptions::Invalid) } else { Ok(Some(number)) }
            }
        };
        let positive = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok());
        let since_seconds = number("sinceSeconds", 1)?;
        let since_time = value("sinceTime").map(|text| text.parse::<Timestamp>().map_err(|_| BadOptions::Unreadable));
        let since = match (since_seconds, since_time.transpose()?) {
            (Some(_), Some(_)) => return Err(BadOptions::Invalid),
            (Some(seconds), None) => {
                Some(now.checked_sub(SignedDuration::from_secs(seconds)).unwrap_or(Timestamp::MIN))
            }
            (None, time) => time,
        };
        let tail_lines = match value("tail").filter(|_| value("tailLines").is_none()) {
            None => number("tailLines", 0)?,
            Some("all") => None,
            Some(_) => number("tail", 0)?,
        };
        let stream = match value("stream") {
            None | Some("" | "All") => Streams::All,
            Some("Stdout") => Streams::Stdout,
            Some("Stderr") => Streams::Stderr,
            Some(_) => return Err(BadOptions::Invalid),
        };
        if stream != Streams::All && tail_lines.is_some() {
            return Err(BadOptions::Invalid);
        }
        Ok(Self {
            follow: flag("follow"),
            previous: flag("previous"),
            timestamps: flag("timestamps"),
            since,
            tail_lines: positive(tail_lines),
            limit_bytes: positive(number("limitBytes", 1)?),
            stream,
        })
    }
}

pub fn status<'a>(pod: &'a Pod, container: &str) -> Option<&'a ContainerStatus> {
    let status = pod.status.as_ref()?;
    let all = status.container_statuses.iter().chain(&status.init_container_statuses).flatten();
    all.into_iter().find(|status| status.name == container)
}

/// The number of the run whose log is wanted, or why there is none, worded as the kubelet does.
pub fn run_of(pod: &Pod, container: &str, previous: bool) -> Result<i32, String> {
    let name = pod.metadata.name.as_deref().unwrap_or_default();
    let of_pod = format!("container {container:?} in pod {name:?}");
    let Some(status) = status(pod, container) else { return Err(format!("{of_pod} is not available")) };
    let state = status.state.clone().unwrap_or_default();
    let ended_before = status.last_state.as_ref().is_some_and(|last| last.terminated.is_some());
    let at_work = state.running.is_some() || state.terminated.is_some();
    match (previous, at_work) {
        (true, _) if !ended_before => Err(format!("previous terminated {of_pod} not found")),
        // The count goes up when the next run begins, so that between two runs it is still the last one's number.
        (true, true) => Ok(status.restart_count - 1),
        (true, false) | (false, true) => Ok(status.restart_count),
        (false, false) if ended_before => Ok(status.restart_count),
        (false, false) => match state.waiting.and_then(|waiting| waiting.reason) {
            Some(reason) => Err(format!("{of_pod} is waiting to start: {reason}")),
            None => Err(format!("{of_pod} is waiting to start - no logs yet")),
        },
    }
}

/// Whether the container still is at that run.
pub fn running(pod: &Pod, container: &str, run: i32) -> bool {
    status(pod, container).is_some_and(|status| {
        status.restart_count == run && status.state.as_ref().is_some_and(|state| state.running.is_some())
    })
}

/// Sends the log at `path` until its end, the limit, the client's going, or, when following, the end of the run.
pub async fn send(
    path: PathBuf,
    options: Options,
    running: impl Fn() -> bool + Send,
    out: mpsc::Sender<std::io::Result<Bytes>>,
) {
    if let Err(error) = Sending::new(&options, &out).run(&path, running).await {
        tracing::warn!(path = %path.display(), %error, "log cannot be read");
        // The client sees a stream that was cut, not one that ended. If it has gone, nothing is lost.
        let _ = out.send(Err(error)).await;
    }
}

/// Whether there is anything to send at `path`.
pub fn exists(path: &Path) -> bool {
    path.exists() || rotated(path, 1).exists()
}

/// The file's name after it was moved aside: `PATH.1` is the newest of them.
fn rotated(path: &Path, number: u32) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(format!(".{number}"));
    PathBuf::from(name)
}

type Identity = (u64, u64);

async fn open(path: &Path) -> std::io::Result<Option<(File, Identity)>> {
    match File::open(path).await {
        Ok(file) => {
            let metadata = file.metadata().await?;
            Ok(Some((file, (metadata.dev(), metadata.ino()))))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// The log's files that are newer than `after`, oldest first. The newest is opened first, so that one that is moved
/// aside meanwhile is met twice (and taken once) instead of being missed.
async fn files(path: &Path, after: Option<Identity>) -> std::io::Result<VecDeque<(File, Identity)>> {
    let mut files: VecDeque<(File, Identity)> = VecDeque::new();
    for number in 0..=MAX_ROTATED {
        let name = if number == 0 { path.to_owned() } else { rotated(path, number) };
        match open(&name).await? {
            Some((_, identity)) if after == Some(identity) => break,
            Some((_, identity)) if files.iter().any(|(_, known)| *known == identity) => {}
            Some(file) => files.push_front(file),
            // At the moment of a rotation there is no current file, but there are older ones.
            None if number == 0 => {}
            None => break,
        }
    }
    Ok(files)
}

/// Leaves in the files only their last lines, and each where its part of them begins.
async fn tail(files: &mut VecDeque<(File, Identity)>, lines: u64) -> std::io::Result<()> {
    let mut missing = lines;
    let mut keep = 0;
    for (file, _) in files.iter_mut().rev() {
        keep += 1;
        let found = seek_lines(file, &mut missing).await?;
        if found {
            break;
        }
    }
    let skip = files.len() - keep;
    files.drain(..skip);
    Ok(())
}

/// Puts the file where its last `missing` lines begin, or at its start, `missing` less the lines that it has.
async fn seek_lines(file: &mut File, missing: &mut u64) -> std::io::Result<bool> {
    let end = file.metadata().await?.len();
    if *missing == 0 {
        file.seek(SeekFrom::Start(end)).await?;
        return Ok(true);
    }
    let mut at = end;
    let mut chunk = vec![0; CHUNK];
    while at > 0 {
        let size = at.min(CHUNK as u64);
        at -= size;
        let part = chunk.get_mut(..usize::try_from(size).unwrap_or(CHUNK)).unwrap_or_default();
        file.seek(SeekFrom::Start(at)).await?;
        file.read_exact(part).await?;
        for (index, byte) in part.iter().enumerate().rev() {
            let offset = at + index as u64;
            // The newline that ends the file's last line begins no other.
            if *byte == b'\n' && offset + 1 != end {
                *missing -= 1;
                if *missing == 0 {
                    file.seek(SeekFrom::Start(offset + 1)).await?;
                    return Ok(true);
                }
            }
        }
    }
    *missing -= u64::from(end > 0);
    file.seek(SeekFrom::Start(0)).await?;
    Ok(*missing == 0)
}

/// One client's log on its way.
struct Sending<'a> {
    options: &'a Options,
    out: &'a mpsc::Sender<std::io::Result<Bytes>>,
    /// Bytes of an unfinished line of the file.
    line: Vec<u8>,
    /// The line grew beyond all bounds; what is left of it is thrown away.
    overlong: bool,
    left: u64,
    at_line_start: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Progress {
    Read,
    EndOfFile,
    Done,
}

impl<'a> Sending<'a> {
    fn new(options: &'a Options, out: &'a mpsc::Sender<std::io::Result<Bytes>>) -> Self {
        let left = options.limit_bytes.unwrap_or(u64::MAX);
        Self { options, out, line: Vec::new(), overlong: false, left, at_line_start: true }
    }

    async fn run(mut self, path: &Path, running: impl Fn() -> bool) -> std::io::Result<()> {
        let mut files = files(path, None).await?;
        if let Some(lines) = self.options.tail_lines {
            tail(&mut files, lines).await?;
        }
        let mut pause = POLL.0;
        let mut last = None;
        loop {
            let Some((mut file, identity)) = files.pop_front() else {
                if !self.options.follow || !running() || !self.wait(&mut pause).await {
                    return Ok(());
                }
                files = self::files(path, last).await?;
                continue;
            };
            last = Some(identity);
            loop {
                // Asked before the file is read: what was written before the end is then read after it.
                let going_on = self.options.follow && files.is_empty() && running();
                match self.read_on(&mut file).await? {
                    Progress::Read => pause = POLL.0,
                    Progress::Done => return Ok(()),
                    Progress::EndOfFile => {
                        if files.is_empty() && self.options.follow {
                            files = self::files(path, last).await?;
                            if !files.is_empty() {
                                // It was moved aside, perhaps with a last line written just before.
                                if self.read_all(&mut file).await? == Progress::Done {
                                    return Ok(());
                                }
                            } else if going_on {
                                if !self.wait(&mut pause).await {
                                    return Ok(());
                                }
                                continue;
                            }
                        }
                        if self.finish_line().await == Progress::Done {
                            return Ok(());
                        }
                        break;
                    }
                }
            }
        }
    }

    /// Whether the client is still there after the pause.
    async fn wait(&self, pause: &mut Duration) -> bool {
        let waited = tokio::time::timeout(*pause, self.out.closed()).await;
        *pause = (*pause * 2).min(POLL.1);
        waited.is_err()
    }

    async fn read_all(&mut self, file: &mut File) -> std::io::Result<Progress> {
        loop {
            match self.read_on(file).await? {
                Progress::Read => {}
                progress => return Ok(progress),
            }
        }
    }

    /// Reads a chunk and sends the lines that it completes.
    async fn read_on(&mut self, file: &mut File) -> std::io::Result<Progress> {
        let mut chunk = vec![0; CHUNK];
        let size = file.read(&mut chunk).await?;
        if size == 0 {
            return Ok(Progress::EndOfFile);
        }
        let mut text = Vec::with_capacity(size);
        let mut enough = false;
        for part in chunk.get(..size).unwrap_or_default().split_inclusive(|byte| *byte == b'\n') {
            if !self.overlong {
                self.line.extend_from_slice(part);
            }
            if self.line.len() > MAX_LINE {
                self.overlong = true;
                self.line.clear();
            }
            if part.last() == Some(&b'\n') {
                enough = enough || self.complete_line(&mut text);
            }
        }
        Ok(self.pass_on(text, enough, Progress::Read).await)
    }

    /// Sends what has no newline at a file's end.
    async fn finish_line(&mut self) -> Progress {
        let mut text = Vec::new();
        let enough = self.complete_line(&mut text);
        self.pass_on(text, enough, Progress::EndOfFile).await
    }

    async fn pass_on(&self, text: Vec<u8>, enough: bool, progress: Progress) -> Progress {
        let sent = text.is_empty() || self.out.send(Ok(Bytes::from(text))).await.is_ok();
        if enough || !sent { Progress::Done } else { progress }
    }

    /// Appends what the client is to see of the line; whether it has seen enough.
    fn complete_line(&mut self, text: &mut Vec<u8>) -> bool {
        let line = std::mem::take(&mut self.line);
        if std::mem::take(&mut self.overlong) {
            return false;
        }
        let Some(entry) = Entry::parse(&line) else { return false };
        if !self.wanted(&entry) {
            return false;
        }
        let start = text.len();
        if self.options.timestamps && self.at_line_start {
            text.extend_from_slice(entry.time.as_bytes());
            text.push(b' ');
        }
        text.extend_from_slice(entry.text);
        if !entry.partial {
            text.push(b'\n');
        }
        self.at_line_start = !entry.partial;
        let size = (text.len() - start) as u64;
        if size >= self.left {
            text.truncate(start + usize::try_from(self.left).unwrap_or(usize::MAX));
        }
        self.left = self.left.saturating_sub(size);
        self.left == 0
    }

    fn wanted(&self, entry: &Entry<'_>) -> bool {
        let stream = match self.options.stream {
            Streams::All => true,
            Streams::Stdout => entry.stream == "stdout",
            Streams::Stderr => entry.stream == "stderr",
        };
        stream && self.options.since.is_none_or(|since| entry.time.parse::<Timestamp>().is_ok_and(|at| at >= since))
    }
}

/// A line of a CRI log file: `TIMESTAMP stdout|stderr F|P TEXT`.
#[derive(Debug, PartialEq, Eq)]
struct Entry<'a> {
    time: &'a str,
    stream: &'a str,
    /// The text goes on in the next entry of the stream.
    partial: bool,
    text: &'a [u8],
}

impl<'a> Entry<'a> {
    fn parse(line: &'a [u8]) -> Option<Self> {
        let line = line.strip_suffix(b"\n").unwrap_or(line);
        let mut parts = line.splitn(4, |byte| *byte == b' ');
        let mut word = || parts.next().and_then(|part| std::str::from_utf8(part).ok());
        let (time, stream, tags) = (word()?, word()?, word()?);
        let text = parts.next()?;
        if time.is_empty() || !matches!(stream, "stdout" | "stderr") {
            return None;
        }
        Some(Self { time, stream, partial: tags.split(':').next() == Some("P"), text })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic)]
mod tests {
    use super::*;
    use serde_json::{Value, json};
    use std::fmt::Write as _;
    use std::io::Write as _;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn options(query: &str) -> Result<Options, BadOptions> {
        let pairs: Vec<(String, String)> = query
            .split('&')
            .filter(|pair| !pair.is_empty())
            .map(|pair| pair.split_once('=').unwrap_or((pair, "")))
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .collect();
        Options::parse(&pairs, "2026-01-01T00:01:00Z".parse().unwrap())
    }

    #[test]
    fn options_are_read_as_the_kubelet_reads_them() {
        let all = options("follow=true&tailLines=5&limitBytes=9&timestamps=1&previous&sinceSeconds=30&x=y").unwrap();
        assert!(all.follow && all.timestamps && all.previous);
        assert_eq!((all.tail_lines, all.limit_bytes), (Some(5), Some(9)));
        assert_eq!(all.since, Some("2026-01-01T00:00:30Z".parse().unwrap()));
        assert_eq!(options("follow=false&timestamps=0&tail=all").unwrap(), Options::default());
        assert_eq!(options("tail=3").unwrap().tail_lines, Some(3));
        let since = options("sinceTime=2026-01-01T01:00:00%2B01:00".replace("%2B", "+").as_str()).unwrap().since;
        assert_eq!(since, Some("2026-01-01T00:00:00Z".parse().unwrap()));
        assert_eq!(options("stream=Stderr").unwrap().stream, Streams::Stderr);
    }

    #[test]
    fn options_that_make_no_sense_are_refused() {
        for query in ["tailLines=x", "sinceTime=yesterday", "limitBytes=", "sinceSeconds=1.5"] {
            assert_eq!(options(query), Err(BadOptions::Unreadable), "{query}");
        }
        for query in [
            "tailLines=-1",
            "limitBytes=0",
            "sinceSeconds=0",
            "sinceSeconds=1&sinceTime=2026-01-01T00:00:00Z",
            "stream=Both",
            "stream=Stdout&tailLines=1",
        ] {
            assert_eq!(options(query), Err(BadOptions::Invalid), "{query}");
        }
        assert_eq!(options(&format!("sinceSeconds={}", i64::MAX)).unwrap().since, Some(Timestamp::MIN));
    }

    fn pod(status: Value) -> Pod {
        let mut status = status;
        status["name"] = json!("app");
        for field in ["image", "imageID"] {
            status[field] = json!("");
        }
        status["ready"] = json!(false);
        serde_json::from_value(json!({
            "metadata": {"name": "web"}, "spec": {"containers": []}, "status": {"containerStatuses": [status]},
        }))
        .unwrap()
    }

    #[test]
    fn the_run_is_the_current_one_or_the_one_before_it() {
        let running = json!({"running": {}});
        let ended = json!({"terminated": {"exitCode": 1}});
        let waiting = json!({"waiting": {"reason": "CrashLoopBackOff"}});
        let run = |state: &Value, last: &Value, previous| {
            run_of(&pod(json!({"restartCount": 3, "state": state, "lastState": last})), "app", previous)
        };
        assert_eq!(run(&running, &ended, false), Ok(3));
        assert_eq!(run(&running, &ended, true), Ok(2));
        assert_eq!(run(&ended, &json!({}), false), Ok(3));
        assert_eq!(run(&waiting, &ended, false), Ok(3));
        assert_eq!(run(&waiting, &ended, true), Ok(3));
        let why = run(&running, &json!({}), true).unwrap_err();
        assert_eq!(why, "previous terminated container \"app\" in pod \"web\" not found");
        let why = run(&json!({"waiting": {"reason": "ErrImagePull"}}), &json!({}), false).unwrap_err();
        assert_eq!(why, "container \"app\" in pod \"web\" is waiting to start: ErrImagePull");
        assert!(run_of(&pod(json!({"restartCount": 0})), "other", false).unwrap_err().ends_with("is not available"));
    }

    #[test]
    fn lines_of_another_form_are_no_entries() {
        let entry = Entry::parse(b"2026-01-01T00:00:00Z stdout F a  b\n").unwrap();
        assert_eq!((entry.stream, entry.partial, entry.text), ("stdout", false, b"a  b".as_slice()));
        assert!(Entry::parse(b"2026-01-01T00:00:00Z stderr P:x ").unwrap().partial);
        for bad in [&b""[..], b"x", b"t stdout F", b"t other F x", b"\xff stdout F x", b" stdout F x"] {
            assert_eq!(Entry::parse(bad), None);
        }
    }

    /// Log lines with the given numbers, one a second.
    fn lines(numbers: std::ops::Range<u32>) -> String {
        numbers.fold(String::new(), |mut text, number| {
            writeln!(text, "2026-01-01T00:{:02}:{:02}Z stdout F line {number}", number / 60, number % 60).unwrap();
            text
        })
    }

    async fn read_while(path: &Path, query: &str, running: impl Fn() -> bool + Send + 'static) -> String {
        let (sender, mut receiver) = mpsc::channel(4);
        let sending = tokio::spawn(send(path.to_owned(), options(query).unwrap(), running, sender));
        let mut text = Vec::new();
        while let Some(part) = receiver.recv().await {
            text.extend_from_slice(&part.unwrap());
        }
        sending.await.unwrap();
        String::from_utf8(text).unwrap()
    }

    async fn read(path: &Path, query: &str) -> String {
        read_while(path, query, || false).await
    }

    fn shown(numbers: std::ops::Range<u32>) -> String {
        numbers.map(|number| format!("line {number}\n")).collect()
    }

    #[tokio::test]
    async fn a_log_is_read_with_its_rotated_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        assert_eq!(read(&path, "").await, "");
        std::fs::write(rotated(&path, 2), lines(0..10)).unwrap();
        std::fs::write(rotated(&path, 1), lines(10..20)).unwrap();
        std::fs::write(&path, lines(20..30)).unwrap();
        assert_eq!(read(&path, "").await, shown(0..30));
        for count in [0, 1, 9, 10, 11, 20, 25, 30, 99] {
            let first = 30_u32.saturating_sub(count);
            assert_eq!(read(&path, &format!("tailLines={count}")).await, shown(first..30), "{count}");
        }
        assert_eq!(read(&path, "sinceTime=2026-01-01T00:00:25Z").await, shown(25..30));
        assert_eq!(read(&path, "sinceSeconds=40&tailLines=7").await, shown(23..30));
        assert_eq!(read(&path, "limitBytes=10").await, "line 0\nlin");
        assert_eq!(read(&path, "tailLines=1&timestamps=true").await, "2026-01-01T00:00:29Z line 29\n");
        std::fs::remove_file(&path).unwrap();
        assert_eq!(read(&path, "tailLines=1").await, shown(19..20), "between two files");
    }

    #[tokio::test]
    async fn last_words_are_the_last_lines_and_not_more_than_a_message_may_hold() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        assert_eq!(last_words(&path).await, "", "no log");
        std::fs::write(&path, lines(0..100)).unwrap();
        assert_eq!(last_words(&path).await, shown(20..100));
        std::fs::write(&path, format!("T stdout F {}\n", "é".repeat(2000))).unwrap();
        assert_eq!(last_words(&path).await, format!("{}\n", "é".repeat(1023)));
    }

    #[test]
    fn of_all_runs_the_logs_of_the_last_one_and_the_one_before_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for file in ["0.log", "0.log.1", "1.log", "9.log", "9.log.1", "10.log"] {
            std::fs::write(dir.path().join(file), "").unwrap();
        }
        remove_old(&dir.path().join("11.log"), 11).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(dir.path().join("10.log").exists());
        remove_old(&dir.path().join("none/0.log"), 0).unwrap();
    }

    #[tokio::test]
    async fn a_tail_is_found_in_a_file_of_many_chunks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        std::fs::write(&path, lines(0..3000)).unwrap();
        assert_eq!(read(&path, "tailLines=2500").await, shown(500..3000));
        assert_eq!(read(&path, "").await, shown(0..3000));
    }

    #[tokio::test]
    async fn a_line_in_parts_is_one_line() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text = "T stdout P one \nT stdout F line\nT stderr F other\nnonsense\nT stdout F unfinished";
        std::fs::write(&path, text).unwrap();
        assert_eq!(read(&path, "").await, "one line\nother\nunfinished\n");
        assert_eq!(read(&path, "timestamps=true").await, "T one line\nT other\nT unfinished\n");
        assert_eq!(read(&path, "stream=Stderr").await, "other\n");
    }

    #[tokio::test]
    async fn an_endless_line_is_left_out_and_not_held_in_memory() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        let text = format!("T stdout F {}\nT stdout F next\n", "x".repeat(MAX_LINE + CHUNK));
        std::fs::write(&path, text).unwrap();
        assert_eq!(read(&path, "").await, "next\n");
    }

    /// A follower of `path`, and the switch that ends its container.
    fn follow(path: &Path) -> (mpsc::Receiver<std::io::Result<Bytes>>, Arc<AtomicBool>) {
        let running = Arc::new(AtomicBool::new(true));
        let (sender, receiver) = mpsc::channel(4);
        let flag = running.clone();
        let still = move || flag.load(Ordering::SeqCst);
        tokio::spawn(send(path.to_owned(), options("follow=true").unwrap(), still, sender));
        (receiver, running)
    }

    async fn receive(receiver: &mut mpsc::Receiver<std::io::Result<Bytes>>, text: &str) {
        let mut seen = String::new();
        while seen.len() < text.len() {
            seen.push_str(std::str::from_utf8(&receiver.recv().await.unwrap().unwrap()).unwrap());
        }
        assert_eq!(seen, text);
    }

    fn append(path: &Path, text: &str) {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(path).unwrap();
        file.write_all(text.as_bytes()).unwrap();
    }

    #[tokio::test]
    async fn a_follower_crosses_rotations_and_ends_with_the_container() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, &lines(0..2));
        let (mut receiver, running) = follow(&path);
        receive(&mut receiver, &shown(0..2)).await;
        append(&path, &lines(2..3));
        receive(&mut receiver, &shown(2..3)).await;
        // Two rotations at once, each after a last line.
        append(&path, &lines(3..4));
        std::fs::rename(&path, rotated(&path, 2)).unwrap();
        std::fs::write(rotated(&path, 1), lines(4..5)).unwrap();
        append(&path, &lines(5..6));
        receive(&mut receiver, &shown(3..6)).await;
        append(&path, "2026-01-01T00:00:06Z stdout F li");
        append(&path, "ne 6\n");
        receive(&mut receiver, &shown(6..7)).await;
        append(&path, &lines(7..8));
        running.store(false, Ordering::SeqCst);
        receive(&mut receiver, &shown(7..8)).await;
        assert!(receiver.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_follower_whose_client_has_gone_ends() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, &lines(0..1));
        let (sender, receiver) = mpsc::channel(4);
        let sending = tokio::spawn(send(path, options("follow=true").unwrap(), || true, sender));
        drop(receiver);
        sending.await.unwrap();
    }

    #[tokio::test]
    async fn a_container_that_ended_needs_no_following() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("0.log");
        append(&path, &lines(0..3));
        assert_eq!(read(&path, "follow=true").await, shown(0..3));
    }
}
