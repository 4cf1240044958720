//! Who may connect to a container and what it may connect to, as its gate says: when a connection is made, and with each request
//! after a change.
#![allow(clippy::unwrap_used)]

mod common;

use common::{Client, Node, get, served};
use futures::FutureExt as _;
use krustlet_runtime::{Gate, Verdict};
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const OPEN: u64 = 0;
const CLOSED: u64 = 1;
/// What it says by now it said after some time.
const SLOW: u64 = 2;

/// Two bits of what it says, and above them how often that was changed.
#[derive(Debug, Default)]
struct Switch(AtomicU64);

impl Switch {
    fn set(&self, state: u64) {
        let version = self.version() >> 2;
        self.0.store((version + 1) << 2 | state, Ordering::SeqCst);
    }
}

impl Gate for Switch {
    fn admits(&self, from: IpAddr, _: SocketAddr) -> Verdict {
        assert!(from.is_loopback());
        let state = self.version() & 3;
        let is_open = state & CLOSED == OPEN;
        match (state & SLOW, is_open) {
            (SLOW, _) => Verdict::Pending(tokio::time::sleep(Duration::from_millis(50)).map(move |()| is_open).boxed()),
            (_, true) => Verdict::Admitted,
            (_, false) => Verdict::Denied,
        }
    }

    fn permits(&self, _: SocketAddr) -> Verdict {
        Verdict::Admitted
    }

    fn version(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
}

/// What comes back, if anything.
async fn answer(address: SocketAddr) -> String {
    // The reset may be there before the connection is known to be.
    let Ok(mut stream) = TcpStream::connect(address).await else { return String::new() };
    let _ = stream.write_all(b"GET / HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn who_is_denied_gets_no_byte_and_takes_no_place() {
    let node = Node::trusting_anyone().await;
    let gate = Arc::new(Switch::default());
    let (server, _) = served(&node, |spec| spec.gate = Some(gate.clone())).await;
    let address = server.local_addr();
    assert!(answer(address).await.starts_with("HTTP/1.1 200"));
    let before = node.metric("krustlet_denied_connections_total");
    for (state, admitted) in [(CLOSED, false), (CLOSED | SLOW, false), (OPEN | SLOW, true), (OPEN, true)] {
        gate.set(state);
        assert_eq!(answer(address).await.starts_with("HTTP/1.1 200"), admitted, "{state}");
        assert_eq!(answer(address).await.is_empty(), !admitted, "{state}");
    }
    assert_eq!(node.metric("krustlet_denied_connections_total"), before + 4);
    assert_eq!(server.stats().requests, 5);
    assert!(server.drain(Duration::from_secs(5)).await, "nobody is left");
}

#[tokio::test]
async fn a_connection_that_is_kept_takes_no_request_more_when_its_client_is_denied() {
    let node = Node::trusting_anyone().await;
    let gate = Arc::new(Switch::default());
    let (server, _) = served(&node, |spec| spec.gate = Some(gate.clone())).await;
    let mut client = Client::connect(server.local_addr()).await;
    for state in [OPEN, OPEN, OPEN | SLOW] {
        gate.set(state);
        assert_eq!(client.get("/").await.unwrap().status, 200);
    }
    gate.set(CLOSED);
    assert!(client.get("/").await.is_err());
    assert!(client.get("/").await.is_err(), "it is closed");
    gate.set(OPEN);
    assert_eq!(get(server.local_addr(), "/").await.status, 200);
    assert_eq!(server.stats().requests, 4);
}
