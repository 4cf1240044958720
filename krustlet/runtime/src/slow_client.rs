//! Cuts clients that keep what others wait for: a connection on which nothing happens, an answer that nobody takes.
//!
//! On every connection it is somebody's turn: the guests', whose time is limited by the request timeout, or the client's.
//! A client that does nothing with its turn loses the connection, whether it sends no request, half of one, or reads none of
//! its answer, and whether it speaks HTTP/1 or HTTP/2 and answers pings all the while.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

/// What the clients of one container may keep, and for how long.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// Connections. More wait in the backlog.
    pub connections: usize,
    /// Answers that are ready and not taken. Each may hold a few chunks of its body, and an HTTP/2 client can leave many.
    pub untaken: usize,
    /// For a request's head, and for the next request on a connection that is kept alive.
    pub head: Duration,
    /// Until a write makes progress.
    pub write: Duration,
    /// Until something comes of the client's turn. Long enough for an answer's last 64 KiB at 1 KiB a second.
    pub turn: Duration,
    /// For a client that lost its connection to hear of it, where its protocol has a word for that.
    pub farewell: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            connections: 4096,
            untaken: 1024,
            head: Duration::from_secs(30),
            write: Duration::from_secs(30),
            turn: Duration::from_secs(60),
            farewell: Duration::from_secs(1),
        }
    }
}

/// Whose turn it is on one connection.
#[derive(Debug)]
pub struct Traffic {
    origin: Instant,
    /// Requests that their guests work on.
    guests: AtomicUsize,
    /// When a turn last ended, in milliseconds after `origin`.
    last: AtomicU64,
    /// Answers of the whole container that wait for their clients.
    untaken: Arc<AtomicUsize>,
}

impl Traffic {
    pub fn new(untaken: Arc<AtomicUsize>) -> Arc<Self> {
        Arc::new(Self { origin: Instant::now(), guests: AtomicUsize::new(0), last: AtomicU64::new(0), untaken })
    }

    /// A request has come in: it is its guest's turn.
    pub fn begin(self: &Arc<Self>) -> Turn {
        self.guests.fetch_add(1, Ordering::SeqCst);
        Turn { traffic: self.clone(), guest: true }
    }

    fn moved(&self) {
        self.last.store(self.origin.elapsed().as_millis() as u64, Ordering::SeqCst);
    }

    /// Ends when the client has had its turn for so long.
    pub async fn abandoned(&self, patience: Duration) {
        loop {
            let last = Duration::from_millis(self.last.load(Ordering::SeqCst));
            let idle = match self.guests.load(Ordering::SeqCst) {
                0 => self.origin.elapsed().saturating_sub(last),
                _ => Duration::ZERO,
            };
            if idle >= patience {
                return;
            }
            tokio::time::sleep(patience - idle).await;
        }
    }
}

/// One request's part in whose turn it is, until all of its answer was taken.
#[derive(Debug)]
pub struct Turn {
    traffic: Arc<Traffic>,
    guest: bool,
}

impl Turn {
    /// The answer, or a piece of it, is there to be taken.
    pub fn of_client(&mut self) {
        if std::mem::replace(&mut self.guest, false) {
            self.traffic.untaken.fetch_add(1, Ordering::Relaxed);
            self.traffic.moved();
            self.traffic.guests.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The client took what there was.
    pub fn of_guest(&mut self) {
        if !std::mem::replace(&mut self.guest, true) {
            self.traffic.guests.fetch_add(1, Ordering::SeqCst);
            self.traffic.untaken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.traffic.moved();
        if self.guest {
            self.traffic.guests.fetch_sub(1, Ordering::SeqCst);
        } else {
            self.traffic.untaken.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A stream on which a write that makes no progress fails.
pub struct WriteTimeout {
    stream: TcpStream,
    patience: Duration,
    /// Runs while a write waits.
    timer: Option<Pin<Box<Sleep>>>,
}

impl WriteTimeout {
    pub fn new(stream: TcpStream, patience: Duration) -> Self {
        Self { stream, patience, timer: None }
    }

    fn check<T>(&mut self, context: &mut Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_ready() {
            self.timer = None;
            return result;
        }
        let patience = self.patience;
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(patience)));
        timer.as_mut().poll(context).map(|()| Err(io::ErrorKind::TimedOut.into()))
    }
}

impl AsyncRead for WriteTimeout {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(context, buffer)
    }
}

impl AsyncWrite for WriteTimeout {
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
    use crate::engine::Executor;
    use crate::guest::ContainerSpec;
    use crate::http::HttpServer;
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
    const PATIENT: Patience =
        Patience { connections: 1, untaken: 1024, head: EVER, write: EVER, turn: EVER, farewell: SHORT };

    struct Node {
        _directory: tempfile::TempDir,
        server: HttpServer,
    }

    fn served(patience: Patience) -> Node {
        let directory = tempfile::tempdir().unwrap();
        let executor = Arc::new(Executor::for_tests().unwrap());
        let guest = wat::parse_str(include_str!("../tests/guest.wat")).unwrap();
        let module = compile_and_link(&executor, &guest).unwrap();
        let log = LogFile::create(directory.path().join("0.log"), LogLimits::default()).unwrap();
        let mut spec = ContainerSpec::new("default/pod/app", log);
        spec.request_timeout = EVER;
        let metrics = Metrics::register(&mut prometheus_client::registry::Registry::default());
        let any_port = "127.0.0.1:0".parse().unwrap();
        let server = HttpServer::start(&executor, &metrics, &module, spec, &[any_port], patience).unwrap();
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
    async fn a_client_that_sends_no_request_or_half_of_one_loses_its_connection_to_another() {
        for begin in
            ["", "PRI * HTTP/2.0\r\n", "GET /version HTTP/1.1\r\nhost: gue", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"]
        {
            let node = served(Patience { turn: SHORT, ..PATIENT });
            let _stalled = node.connect(begin).await;
            assert!(node.get("/version").await.ends_with("VERSION"), "{begin:?}");
        }
    }

    #[tokio::test]
    async fn a_head_that_is_not_whole_in_time_costs_its_client_the_connection() {
        let node = served(Patience { head: SHORT, ..PATIENT });
        let _stalled = node.connect("GET /version HTTP/1.1\r\nhost: gue").await;
        assert!(node.get("/version").await.ends_with("VERSION"));
    }

    #[tokio::test]
    async fn a_connection_that_is_kept_and_not_used_is_closed() {
        let node = served(Patience { turn: SHORT, ..PATIENT });
        let (mut sender, connection) = node.http_2(65_535).await;
        for _ in 0..3 {
            assert_eq!(sender.send_request(request("/version")).await.unwrap().status(), 200);
        }
        assert!(node.get("/version").await.ends_with("VERSION"));
        // It was told, not cut off.
        connection.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_its_answer_loses_its_connection_and_its_guest() {
        for patience in [Patience { write: SHORT, ..PATIENT }, Patience { turn: SHORT, ..PATIENT }] {
            let node = served(patience);
            let _deaf = node.connect("GET /flood HTTP/1.1\r\nhost: guest\r\n\r\n").await;
            assert!(node.get("/version").await.ends_with("VERSION"), "{patience:?}");
            node.until_idle().await;
        }
    }

    #[tokio::test]
    async fn an_http_2_client_that_answers_pings_and_reads_nothing_loses_its_connection_and_its_guest() {
        let node = served(Patience { turn: SHORT, head: SHORT / 4, ..PATIENT });
        let (mut sender, connection) = node.http_2(65_535).await;
        let unread = sender.send_request(request("/flood")).await.unwrap();
        assert!(node.get("/version").await.ends_with("VERSION"));
        let _ = connection.await.unwrap();
        assert!(unread.into_body().collect().await.is_err(), "it was cut, and looks whole");
        node.until_idle().await;
    }

    #[tokio::test]
    async fn answers_that_nobody_takes_are_limited_in_number() {
        let node = served(Patience { untaken: 2, ..PATIENT });
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
    async fn a_guest_that_takes_its_time_is_no_slow_client() {
        let node = served(Patience { turn: SHORT, ..PATIENT });
        assert!(node.get("/wait").await.ends_with("VERSION"));
        let (mut sender, _connection) = node.http_2(65_535).await;
        let response = sender.send_request(request("/wait")).await.unwrap();
        assert_eq!(response.into_body().collect().await.unwrap().to_bytes(), "VERSION");
    }

    #[tokio::test]
    async fn a_client_that_sends_nothing_does_not_hold_up_the_end() {
        let node = served(Patience { connections: 10, ..PATIENT });
        let _silent = [node.connect("").await, node.connect("PRI * ").await];
        // Connections are accepted in their order.
        assert!(node.get("/version").await.ends_with("VERSION"));
        assert!(node.server.drain(TOO_LONG).await);
    }
}
