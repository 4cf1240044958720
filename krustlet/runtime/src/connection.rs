//! Connections of one container: how many, how long each may do nothing, and which goes when another needs the room.
//!
//! On a connection there are requests that their guests work on, whose time is limited by the request's timeout, and answers
//! that the client has to take. A client that takes nothing for a while loses the connection, and so does one whose request
//! does not arrive whole, in HTTP/1 and HTTP/2 alike and whatever else it sends.
//!
//! A connection on which no request is open may stay for as long as there is room: load balancers keep theirs for ten minutes
//! and more. When there is none, the one goes that was idle for longest.

use crate::admission::Flow;
use crate::shares::{Share, Taken};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::Sleep;
use tokio_util::sync::CancellationToken;

/// With which a client begins that speaks HTTP/2 (RFC 9113, 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// What the clients of one container may keep, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// Connections. More wait in the backlog.
    pub connections: usize,
    /// Requests that wait for an instance. Each holds its head, of up to 64 KiB.
    pub queue: usize,
    /// Answers that are ready and not taken: an HTTP/2 client can leave many.
    pub untaken: usize,
    /// Bytes of such answers whose guests are gone.
    pub untaken_bytes: usize,
    /// From a request's first byte to the end of its head.
    pub read_header_timeout: Duration,
    /// Until a write makes progress.
    pub write_timeout: Duration,
    /// Until the client has taken a piece of its answer. Long enough for 64 KiB at 1 KiB a second.
    pub take_timeout: Duration,
    /// For a client whose connection is closed to hear of it, where its protocol has a word for that.
    pub close_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            connections: 4096,
            queue: 2048,
            untaken: 1024,
            untaken_bytes: 32 * 1024 * 1024,
            read_header_timeout: Duration::from_secs(30),
            write_timeout: Duration::from_secs(30),
            take_timeout: Duration::from_secs(60),
            close_timeout: Duration::from_secs(1),
        }
    }
}

/// The open connections of one container.
#[derive(Debug)]
pub struct Connections {
    origin: Instant,
    open: Mutex<Open>,
    /// New connections that wait for room.
    wanted: AtomicUsize,
    /// One was closed, or carries no request any more.
    changed: Notify,
    /// Answers that wait for their clients.
    untaken: AtomicUsize,
    /// Bytes of those whose guests are gone.
    untaken_bytes: AtomicUsize,
}

#[derive(Debug, Default)]
struct Open {
    known: HashMap<u64, Arc<Connection>>,
    opened: u64,
}

/// One connection, until its `Registered` is dropped.
#[derive(Debug)]
pub struct Connection {
    connections: Arc<Connections>,
    /// Requests from their heads to the ends of their answers.
    requests: AtomicUsize,
    /// Those of them that guests work on.
    working: AtomicUsize,
    /// When something last came of the client, in milliseconds after the origin.
    last: AtomicU64,
    /// When the head that is being received began, plus one; 0 when none is.
    head: AtomicU64,
    /// Frames may come without a request.
    http_2: AtomicBool,
    /// To be closed, as another needs its room.
    evicted: CancellationToken,
    flow: Flow,
}

/// A connection's place among its container's, and its file descriptor among the node's.
pub struct Registered {
    pub connection: Arc<Connection>,
    id: u64,
    descriptor: Option<Taken>,
}

/// Why a connection is to be closed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Lost {
    /// The client did nothing for too long.
    TimedOut,
    Evicted,
}

impl Connections {
    pub fn new() -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            open: Mutex::default(),
            wanted: AtomicUsize::new(0),
            changed: Notify::new(),
            untaken: AtomicUsize::new(0),
            untaken_bytes: AtomicUsize::new(0),
        })
    }

    /// Whether too many answers wait for clients that do not take them.
    pub fn are_clogged(&self, limits: &Limits) -> bool {
        self.untaken.load(Ordering::Relaxed) >= limits.untaken
            || self.untaken_bytes.load(Ordering::Relaxed) >= limits.untaken_bytes
    }

    /// A place for one more, once there is room for it.
    pub async fn admit(self: &Arc<Self>, limits: &Limits, descriptors: &Arc<Share>) -> Registered {
        if let Some(descriptor) = descriptors.take(1)
            && let Some(registered) = self.register(limits, descriptor)
        {
            return registered;
        }
        let _wanting = Wanting::new(&self.wanted);
        loop {
            let changed = self.changed.notified();
            let descriptor = descriptors.take(1);
            let lacking = descriptor.is_none();
            if let Some(registered) = descriptor.and_then(|descriptor| self.register(limits, descriptor)) {
                return registered;
            }
            self.evict();
            tokio::select! {
                () = changed => {}
                descriptor = descriptors.acquire(1), if lacking => {
                    if let Some(registered) = self.register(limits, descriptor) {
                        return registered;
                    }
                }
            }
        }
    }

    fn register(self: &Arc<Self>, limits: &Limits, descriptor: Taken) -> Option<Registered> {
        let mut open = self.open.lock();
        if open.known.len() >= limits.connections {
            // Giving it back may wake others.
            drop(open);
            return None;
        }
        open.opened += 1;
        let id = open.opened;
        let connection = Arc::new(Connection {
            connections: self.clone(),
            requests: AtomicUsize::new(0),
            working: AtomicUsize::new(0),
            last: AtomicU64::new(self.now()),
            head: AtomicU64::new(0),
            http_2: AtomicBool::new(false),
            evicted: CancellationToken::new(),
            flow: Flow::default(),
        });
        open.known.insert(id, connection.clone());
        Some(Registered { connection, id, descriptor: Some(descriptor) })
    }

    /// Has the one closed that is idle for longest, unless one is on its way.
    fn evict(&self) {
        let open = self.open.lock();
        let idle = || open.known.values().filter(|one| one.is_idle());
        if idle().any(|one| one.evicted.is_cancelled()) {
            return;
        }
        if let Some(longest) = idle().min_by_key(|one| one.last.load(Ordering::Relaxed)) {
            longest.evicted.cancel();
        }
    }

    fn changed(&self) {
        if self.wanted.load(Ordering::SeqCst) > 0 {
            self.changed.notify_waiters();
        }
    }

    /// Milliseconds since the origin.
    fn now(&self) -> u64 {
        self.origin.elapsed().as_millis() as u64
    }

    fn since(&self, moment: u64) -> Duration {
        Duration::from_millis(self.now().saturating_sub(moment))
    }
}

/// Counts a connection that waits for room.
struct Wanting<'a>(&'a AtomicUsize);

impl<'a> Wanting<'a> {
    fn new(wanted: &'a AtomicUsize) -> Self {
        wanted.fetch_add(1, Ordering::SeqCst);
        Self(wanted)
    }
}

impl Drop for Wanting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        let connections = &self.connection.connections;
        connections.open.lock().known.remove(&self.id);
        drop(self.descriptor.take());
        connections.changed();
    }
}

impl Connection {
    fn speaks_http_2(&self) {
        self.http_2.store(true, Ordering::Relaxed);
        self.head.store(0, Ordering::SeqCst);
    }

    /// A request's head has come in.
    pub fn begin(self: &Arc<Self>) -> OpenRequest {
        self.head.store(0, Ordering::SeqCst);
        self.requests.fetch_add(1, Ordering::SeqCst);
        self.working.fetch_add(1, Ordering::SeqCst);
        OpenRequest { connection: self.clone(), working: true, bytes: 0 }
    }

    /// Bytes have come in.
    fn received(&self) {
        if self.is_idle() && !self.http_2.load(Ordering::Relaxed) {
            let now = self.connections.now() + 1;
            let _ = self.head.compare_exchange(0, now, Ordering::SeqCst, Ordering::SeqCst);
        }
    }

    /// It carries no request.
    pub fn is_idle(&self) -> bool {
        self.requests.load(Ordering::SeqCst) == 0
    }

    fn moved(&self) {
        self.last.store(self.connections.now(), Ordering::SeqCst);
    }

    /// Ends when the client has let its time pass, or another needs the room.
    pub async fn lost(&self, limits: &Limits) -> Lost {
        let look_again = limits.read_header_timeout.min(limits.take_timeout);
        loop {
            let (since, allowed) = match self.head.load(Ordering::SeqCst) {
                0 if self.is_idle() => (Duration::ZERO, look_again),
                0 if self.working.load(Ordering::SeqCst) > 0 => (Duration::ZERO, look_again),
                0 => (self.connections.since(self.last.load(Ordering::SeqCst)), limits.take_timeout),
                head => (self.connections.since(head - 1), limits.read_header_timeout),
            };
            if since >= allowed {
                return Lost::TimedOut;
            }
            tokio::select! {
                () = tokio::time::sleep(allowed - since) => {}
                () = self.evicted.cancelled() => return Lost::Evicted,
            }
        }
    }

    /// Ends when no request is open, or the client has let its time pass.
    pub async fn until_idle(&self, limits: &Limits) {
        while !self.is_idle() {
            let since = match self.working.load(Ordering::SeqCst) {
                0 => self.connections.since(self.last.load(Ordering::SeqCst)),
                _ => Duration::ZERO,
            };
            if since >= limits.take_timeout {
                return;
            }
            // Seldom, and only while a server ends: no need to be told at once.
            tokio::time::sleep((limits.take_timeout - since).min(limits.close_timeout)).await;
        }
    }
}

/// One request on a connection, from its head until all of its answer was taken: either its guest works on it, or the client
/// has something to take.
#[derive(Debug)]
pub struct OpenRequest {
    connection: Arc<Connection>,
    working: bool,
    /// What of the answer is kept for the client though its guest is gone.
    bytes: usize,
}

impl OpenRequest {
    pub fn flow(&self) -> &Flow {
        &self.connection.flow
    }

    /// So much of the answer is kept for the client from now on, and by no guest.
    pub fn keep(&mut self, bytes: usize) {
        let kept = &self.connection.connections.untaken_bytes;
        kept.fetch_add(bytes, Ordering::Relaxed);
        kept.fetch_sub(std::mem::replace(&mut self.bytes, bytes), Ordering::Relaxed);
    }

    /// The answer, or a piece of it, is there to be taken.
    pub fn wait_for_client(&mut self) {
        if std::mem::replace(&mut self.working, false) {
            self.connection.connections.untaken.fetch_add(1, Ordering::Relaxed);
            self.connection.moved();
            self.connection.working.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The client took what there was.
    pub fn wait_for_guest(&mut self) {
        if !std::mem::replace(&mut self.working, true) {
            self.connection.working.fetch_add(1, Ordering::SeqCst);
            self.connection.connections.untaken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for OpenRequest {
    fn drop(&mut self) {
        self.connection.moved();
        if self.working {
            self.connection.working.fetch_sub(1, Ordering::SeqCst);
        } else {
            self.connection.connections.untaken.fetch_sub(1, Ordering::Relaxed);
        }
        if self.bytes > 0 {
            self.keep(0);
        }
        if self.connection.requests.fetch_sub(1, Ordering::SeqCst) == 1 {
            self.connection.connections.changed();
        }
    }
}

/// A stream that tells its connection of what comes in, and on which a write that makes no progress fails.
pub struct Stream {
    stream: TcpStream,
    connection: Arc<Connection>,
    /// How much of the preface of HTTP/2 has come in; none where something else came.
    preface: Option<usize>,
    write_timeout: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Stream {
    pub fn new(stream: TcpStream, connection: Arc<Connection>, write_timeout: Duration) -> Self {
        Self { stream, connection, preface: Some(0), write_timeout, timer: None }
    }

    fn received(&mut self, bytes: &[u8]) {
        self.connection.received();
        let Some(seen) = self.preface else { return };
        let expected = &PREFACE[seen..];
        let length = expected.len().min(bytes.len());
        self.preface = (expected[..length] == bytes[..length]).then_some(seen + length);
        if self.preface == Some(PREFACE.len()) {
            self.preface = None;
            self.connection.speaks_http_2();
        }
    }

    fn check<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.timer = None;
            return result;
        }
        let timeout = self.write_timeout;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        timer.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let result = Pin::new(&mut self.stream).poll_read(context, buffer);
        let received = &buffer.filled()[before..];
        if !received.is_empty() {
            self.received(received);
        }
        result
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.check(context, result)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.stream).poll_write_vectored(context, slices);
        self.check(context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::executor::Executor;
    use crate::guest::ContainerSpec;
    use crate::http::HttpServer;
    use crate::linkers::Linkers;
    use crate::logs::{LogFile, LogLimits};
    use crate::metrics::Metrics;
    use crate::module::compile_and_link;
    use http::Request;
    use http_body_util::{BodyExt as _, Empty};
    use hyper::client::conn::http2::SendRequest;
    use hyper_util::rt::{TokioExecutor, TokioIo};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::task::JoinHandle;

    const SHORT: Duration = Duration::from_millis(100);
    const EVER: Duration = Duration::from_secs(3600);
    /// Longer than anything here may take, and nothing waits for it unless something is wrong.
    const TOO_LONG: Duration = Duration::from_secs(10);

    /// One connection and all the time in the world; each test shortens what it is about.
    const NO_TIMEOUT: Limits = Limits {
        connections: 1,
        queue: 1024,
        untaken: 1024,
        untaken_bytes: 1024 * 1024,
        read_header_timeout: EVER,
        write_timeout: EVER,
        take_timeout: EVER,
        close_timeout: SHORT,
    };

    struct Node {
        _directory: tempfile::TempDir,
        server: HttpServer,
    }

    fn served(limits: Limits) -> Node {
        let directory = tempfile::tempdir().unwrap();
        let executor = Arc::new(Executor::for_tests().unwrap());
        let guest = wat::parse_str(include_str!("../tests/guest.wat")).unwrap();
        let module = compile_and_link(&executor, &Linkers::new(&executor.engine).unwrap(), &guest).unwrap();
        let log = LogFile::create(directory.path().join("0.log"), LogLimits::default()).unwrap();
        let mut spec = ContainerSpec::new("default/pod/app", log);
        spec.request_timeout = EVER;
        let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default());
        let any_port = "127.0.0.1:0".parse().unwrap();
        let server = HttpServer::start(&executor, &metrics, &module, spec, &[any_port], limits).unwrap();
        Node { _directory: directory, server }
    }

    impl Node {
        async fn connect(&self, begin: &str) -> TcpStream {
            let mut stream = TcpStream::connect(self.server.local_addr()).await.unwrap();
            stream.write_all(begin.as_bytes()).await.unwrap();
            stream
        }

        /// What a client gets that asks on a connection of its own, however long it takes until it has one.
        async fn get(&self, path: &str) -> String {
            let mut stream =
                self.connect(&format!("GET {path} HTTP/1.1\r\nhost: guest\r\nconnection: close\r\n\r\n")).await;
            let mut answer = String::new();
            tokio::time::timeout(TOO_LONG, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
            answer
        }

        async fn http_2(&self, window: u32) -> (SendRequest<Empty<bytes::Bytes>>, JoinHandle<hyper::Result<()>>) {
            let stream = TokioIo::new(self.connect("").await);
            let mut builder = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
            let (sender, connection) = builder.initial_stream_window_size(window).handshake(stream).await.unwrap();
            (sender, tokio::spawn(connection))
        }

        async fn until_idle(&self) {
            for _ in 0..TOO_LONG.as_millis() {
                if self.server.stats().in_flight == 0 {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            panic!("a request is still in flight");
        }
    }

    fn request(path: &str) -> Request<Empty<bytes::Bytes>> {
        Request::get(format!("http://guest{path}")).body(Empty::new()).unwrap()
    }

    #[tokio::test]
    async fn a_connection_without_a_request_gives_way_to_another() {
        for begin in [
            "",
            "PRI * HTTP/2.0\r\n",
            "GET /version HTTP/1.1\r\nhost: gue",
            "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
            "GET /version HTTP/1.1\r\nhost: guest\r\n\r\n",
        ] {
            let node = served(NO_TIMEOUT);
            let mut idle = node.connect(begin).await;
            if begin.ends_with("guest\r\n\r\n") {
                let mut answer = [0; 12];
                idle.read_exact(&mut answer).await.unwrap();
            }
            assert!(node.get("/version").await.ends_with("VERSION"), "{begin:?}");
        }
    }

    #[tokio::test]
    async fn the_one_that_is_idle_for_longest_gives_way_and_none_that_is_busy() {
        let node = served(Limits { connections: 3, ..NO_TIMEOUT });
        let ask = "GET /version HTTP/1.1\r\nhost: guest\r\n\r\n";
        let mut answer = [0; 12];
        let mut busy = node.connect("GET /wait HTTP/1.1\r\nhost: guest\r\n\r\n").await;
        let (mut first, mut second) = (node.connect(ask).await, node.connect(ask).await);
        first.read_exact(&mut answer).await.unwrap();
        second.read_exact(&mut answer).await.unwrap();
        // Two milliseconds: the clock of connections counts them.
        tokio::time::sleep(Duration::from_millis(2)).await;
        let mut rest = Vec::new();
        first.write_all(ask.as_bytes()).await.unwrap();
        while !rest.windows(15).any(|window| window == b"VERSIONHTTP/1.1") {
            assert_ne!(first.read_buf(&mut rest).await.unwrap(), 0, "{}", String::from_utf8_lossy(&rest));
        }
        assert!(node.get("/version").await.ends_with("VERSION"));
        second.read_to_end(&mut rest).await.unwrap();
        busy.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200");
        first.write_all(ask.as_bytes()).await.unwrap();
        assert_ne!(first.read_buf(&mut rest).await.unwrap(), 0, "it was there before the one that gave way");
    }

    #[tokio::test]
    async fn a_new_connection_gets_its_room_as_soon_as_one_that_was_busy_is_idle() {
        let node = served(NO_TIMEOUT);
        let _kept = node.connect("GET /wait HTTP/1.1\r\nhost: guest\r\n\r\n").await;
        assert!(node.get("/version").await.ends_with("VERSION"));
    }

    #[tokio::test]
    async fn a_connection_that_is_idle_stays_for_as_long_as_there_is_room() {
        let limits = Limits { connections: 10, read_header_timeout: SHORT, take_timeout: SHORT, ..NO_TIMEOUT };
        let node = served(limits);
        let (mut http_2, _connection) = node.http_2(65_535).await;
        let mut http_1 = node.connect("").await;
        let mut unused = node.connect("").await;
        let (mut unused_http_2, _connection) = node.http_2(65_535).await;
        for _ in 0..2 {
            tokio::time::sleep(4 * SHORT).await;
            assert_eq!(http_2.send_request(request("/version")).await.unwrap().status(), 200);
            http_1.write_all(b"GET /version HTTP/1.1\r\nhost: guest\r\n\r\n").await.unwrap();
            let mut answer = Vec::new();
            while !answer.ends_with(b"VERSION") {
                assert_ne!(http_1.read_buf(&mut answer).await.unwrap(), 0);
            }
        }
        assert_eq!(unused_http_2.send_request(request("/version")).await.unwrap().status(), 200);
        unused.write_all(b"GET /version HTTP/1.0\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        unused.read_to_string(&mut answer).await.unwrap();
        assert!(answer.ends_with("VERSION"), "{answer:?}");
    }

    #[tokio::test]
    async fn a_head_that_is_not_whole_in_time_costs_its_client_the_connection() {
        for begin in ["GET /version HTTP/1.1\r\nhost: gue", "G", "PRI * HTTP/2.0\r\n"] {
            let node = served(Limits { connections: 10, read_header_timeout: SHORT, ..NO_TIMEOUT });
            let mut stalled = node.connect(begin).await;
            let mut answer = Vec::new();
            let closed = tokio::time::timeout(TOO_LONG, stalled.read_to_end(&mut answer)).await;
            assert!(closed.is_ok(), "{begin:?}");
        }
        // Nor does it help to send a byte now and then, or to have sent a request before.
        let node = served(Limits { connections: 10, read_header_timeout: SHORT, ..NO_TIMEOUT });
        let mut slow = node.connect("GET /version HTTP/1.1\r\nhost: guest\r\n\r\nGET / HTTP/1.1\r\n").await;
        let began = Instant::now();
        while slow.write_all(b"a: b\r\n").await.is_ok() {
            assert!(began.elapsed() < TOO_LONG, "it is still open");
            tokio::time::sleep(SHORT / 10).await;
        }
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answer_loses_its_connection_and_its_guest() {
        for limits in [Limits { write_timeout: SHORT, ..NO_TIMEOUT }, Limits { take_timeout: SHORT, ..NO_TIMEOUT }] {
            let node = served(limits);
            let _deaf = node.connect("GET /flood HTTP/1.1\r\nhost: guest\r\n\r\n").await;
            assert!(node.get("/version").await.ends_with("VERSION"), "{limits:?}");
            node.until_idle().await;
        }
    }

    #[tokio::test]
    async fn an_http_2_client_that_answers_pings_and_reads_nothing_loses_its_connection_and_its_guest() {
        let node = served(Limits { take_timeout: SHORT, read_header_timeout: SHORT / 4, ..NO_TIMEOUT });
        let (mut sender, connection) = node.http_2(65_535).await;
        let unread = sender.send_request(request("/flood")).await.unwrap();
        assert!(node.get("/version").await.ends_with("VERSION"));
        let _ = connection.await.unwrap();
        assert!(unread.into_body().collect().await.is_err(), "it was cut, and looks whole");
        node.until_idle().await;
    }

    #[tokio::test]
    async fn answers_that_nobody_takes_are_limited_in_number() {
        let node = served(Limits { untaken: 2, ..NO_TIMEOUT });
        // Its window has no room for a single byte.
        let (mut sender, _connection) = node.http_2(0).await;
        let first = sender.send_request(request("/version")).await.unwrap();
        let second = sender.send_request(request("/version")).await.unwrap();
        assert_eq!((first.status(), second.status()), (200.try_into().unwrap(), 200.try_into().unwrap()));
        let third = sender.send_request(request("/version")).await.unwrap();
        assert_eq!((third.status(), third.headers()["retry-after"].as_bytes()), (503.try_into().unwrap(), &b"1"[..]));
        drop((first, second, third));
        for _ in 0..TOO_LONG.as_millis() {
            if sender.send_request(request("/version")).await.unwrap().status() == 200 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("answers that are gone are still counted");
    }

    #[tokio::test]
    async fn answers_that_nobody_takes_are_limited_in_size() {
        let node = served(Limits { untaken_bytes: 14, ..NO_TIMEOUT });
        let (mut sender, _connection) = node.http_2(0).await;
        let kept: Vec<_> = [
            sender.send_request(request("/version")).await.unwrap(),
            sender.send_request(request("/version")).await.unwrap(),
        ]
        .into();
        assert!(kept.iter().all(|response| response.status() == 200));
        assert_eq!(sender.send_request(request("/version")).await.unwrap().status(), 503);
        // They are the container's memory until they are gone, as they were when its guests wrote them.
        assert_eq!(node.server.stats().memory_bytes, 14);
        drop(kept);
        for _ in 0..TOO_LONG.as_millis() {
            if node.server.stats().memory_bytes == 0 {
                return;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        panic!("answers that are gone still take memory");
    }

    #[tokio::test]
    async fn a_guest_that_takes_its_time_is_no_slow_client() {
        let node = served(Limits { take_timeout: SHORT, ..NO_TIMEOUT });
        assert!(node.get("/wait").await.ends_with("VERSION"));
        let (mut sender, _connection) = node.http_2(65_535).await;
        let response = sender.send_request(request("/wait")).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "VERSION");
    }

    #[tokio::test]
    async fn a_client_that_sends_nothing_does_not_hold_up_the_end() {
        let node = served(Limits { connections: 10, ..NO_TIMEOUT });
        let _silent = [node.connect("").await, node.connect("PRI * ").await];
        // Connections are accepted in their order.
        assert!(node.get("/version").await.ends_with("VERSION"));
        assert!(node.server.drain(TOO_LONG).await);
    }
}
