//! HTTP as clients and proxies rely on it, on the wire; and what clients and guests can do to it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use bytes::Bytes;
use common::{Client, Node, any_port, get, http_guest, logged, until};
use futures::future::join_all;
use http_body_util::{BodyExt as _, Empty};
use hyper::Request;
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use krustlet_runtime::{ContainerSpec, HttpServer, Mount};
use std::net::SocketAddr;
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

const TOO_LONG: Duration = Duration::from_secs(20);

async fn served(node: &Node, name: &str, change: impl FnOnce(&mut ContainerSpec)) -> HttpServer {
    let module = node.module(&http_guest("version")).await;
    let mut spec = node.spec(name);
    change(&mut spec);
    node.runtime.serve(&module, spec, &[any_port()]).await.unwrap()
}

/// Everything that the server sends until it closes the connection.
async fn sent(address: SocketAddr, request: &[u8]) -> String {
    let mut stream = TcpStream::connect(address).await.unwrap();
    let _ = stream.write_all(request).await;
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(TOO_LONG, stream.read_to_end(&mut answer)).await;
    assert!(closed.is_ok(), "still open after {request:?}: {}", String::from_utf8_lossy(&answer));
    String::from_utf8_lossy(&answer).into_owned()
}

fn status(answer: &str) -> u16 {
    answer.get(9..12).and_then(|status| status.parse().ok()).unwrap_or(0)
}

async fn http_2(address: SocketAddr) -> SendRequest<Empty<Bytes>> {
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (sender, connection) = hyper::client::conn::http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn request(method: &str, uri: &str) -> Request<Empty<Bytes>> {
    Request::builder().method(method).uri(uri).body(Empty::new()).unwrap()
}

/// The status of an answer that arrives whole, and the length of its body.
async fn whole(client: &mut SendRequest<Empty<Bytes>>, request: Request<Empty<Bytes>>) -> hyper::Result<(u16, usize)> {
    let response = client.send_request(request).await?;
    let status = response.status().as_u16();
    Ok((status, response.into_body().collect().await?.to_bytes().len()))
}

// Heads of requests

#[tokio::test]
async fn http_1_0_needs_no_host() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |_| {}).await;
    for head in [
        "GET /version HTTP/1.0\r\n\r\n",
        "GET /version HTTP/1.0\r\nhost:\r\n\r\n",
        "GET /version HTTP/1.0\r\nhost: h\r\n\r\n",
    ] {
        let answer = sent(server.local_addr(), head.as_bytes()).await;
        assert!(answer.starts_with("HTTP/1.0 200") && answer.ends_with("version"), "{head:?}: {answer}");
    }
}

#[tokio::test]
async fn a_request_whose_host_is_not_plain_gets_400() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |_| {}).await;
    for head in [
        "GET / HTTP/1.1\r\n",
        "GET / HTTP/1.1\r\nhost:\r\n",
        "GET / HTTP/1.1\r\nhost: h\r\nhost: h\r\n",
        "GET / HTTP/1.1\r\nhost: h\r\nHOST: other\r\n",
        "GET / HTTP/1.0\r\nhost: h\r\nhost: h\r\n",
        "GET / HTTP/1.1\r\nhost: a b\r\n",
        "GET / HTTP/1.1\r\nhost: u@h\r\n",
        "GET / HTTP/1.1\r\nhost: h:99999\r\n",
        "GET / HTTP/1.1\r\nhost: h/path\r\n",
        "GET / HTTP/1.1\r\nhost: é\r\n",
        "GET http://u@h/ HTTP/1.1\r\nhost: h\r\n",
        "GET http://h/ HTTP/1.1\r\n",
        "GET http://h/ HTTP/1.1\r\nhost: a b\r\n",
        "GET ftp://h/ HTTP/1.1\r\nhost: h\r\n",
        "GET h:80 HTTP/1.1\r\nhost: h\r\n",
        "GET * HTTP/1.1\r\nhost: h\r\n",
    ] {
        let answer = sent(server.local_addr(), format!("{head}connection: close\r\n\r\n").as_bytes()).await;
        assert_eq!(status(&answer), 400, "{head:?}: {answer}");
    }
    for head in [
        "GET http://h/version HTTP/1.1\r\nhost: other\r\n",
        "OPTIONS * HTTP/1.1\r\nhost: h\r\n",
        "GET /version HTTP/1.1\r\nhost: [::1]:80\r\n",
    ] {
        let answer = sent(server.local_addr(), format!("{head}connection: close\r\n\r\n").as_bytes()).await;
        assert_eq!(status(&answer), 200, "{head:?}: {answer}");
    }
    let mut client = http_2(server.local_addr()).await;
    for (host, expected) in
        [(None, 200), (Some("h"), 200), (Some("H:80"), 200), (Some("other"), 400), (Some("u@h"), 400)]
    {
        let mut request = request("GET", "http://h/version");
        if let Some(host) = host {
            request.headers_mut().insert("host", host.parse().unwrap());
        }
        assert_eq!(client.send_request(request).await.unwrap().status(), expected, "{host:?}");
    }
}

#[tokio::test]
async fn what_two_servers_could_read_differently_is_answered_once_and_ends_the_connection() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |_| {}).await;
    let hidden = "GET /xHID HTTP/1.1\r\nhost: h\r\n\r\n";
    for (framing, body) in [
        ("content-length: 5\r\ntransfer-encoding: chunked\r\n", "0\r\n\r\n"),
        ("transfer-encoding: chunked\r\ncontent-length: 5\r\n", "0\r\n\r\n"),
        ("content-length: 0\r\ncontent-length: 5\r\n", ""),
        ("content-length: 0, 5\r\n", ""),
        ("content-length: +0\r\n", ""),
        ("content-length: 0x0\r\n", ""),
        ("content-length: -1\r\n", ""),
        ("content-length: 99999999999999999999\r\n", ""),
        ("transfer-encoding: chunked, identity\r\n", "0\r\n\r\n"),
        ("transfer-encoding: identity\r\n", ""),
        ("transfer-encoding: xchunked\r\n", "0\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "x\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "-1\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "0x0\r\n\r\n"),
        ("transfer-encoding: chunked\r\n", "fffffffffffffffff\r\n"),
        ("transfer-encoding: chunked\r\n", "1\r\nab\r\n0\r\n\r\n"),
        ("transfer-encoding : chunked\r\n", "0\r\n\r\n"),
        ("content-length : 0\r\n", ""),
        ("a: b\r\n content-length: 5\r\n", ""),
        ("a: b\0\r\n", ""),
        ("a: b\rc: d\r\n", ""),
        (" a: b\r\n", ""),
        ("a b: c\r\n", ""),
    ] {
        let request = format!("POST /read HTTP/1.1\r\nhost: h\r\n{framing}\r\n{body}{hidden}");
        let answer = sent(server.local_addr(), request.as_bytes()).await;
        assert!(answer.matches("HTTP/1.1 ").count() <= 1, "{framing:?} {body:?}: {answer}");
        assert!(!answer.contains("Transfer-Encoding"), "{answer}");
    }
    // HTTP/1.0 knows no chunks.
    let answer = sent(server.local_addr(), b"POST /read HTTP/1.0\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n").await;
    assert_ne!(status(&answer), 200, "{answer}");
    assert_eq!(get(server.local_addr(), "/version").await.status, 200);
}

// Answers

#[tokio::test]
async fn an_answer_without_a_body_may_tell_a_length_and_every_other_tells_the_right_one() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |_| {}).await;
    let mut http_2 = http_2(server.local_addr()).await;
    for method in ["GET", "HEAD", "POST"] {
        for code in [200, 204, 304, 404] {
            for (letter, written) in [('a', 0), ('A', 7)] {
                for length in [0, 5, 7, 900] {
                    let path = format!("/{letter}{code}{length:03}");
                    let told = format!("{method} {path}");
                    let body = method != "HEAD" && code != 204 && code != 304;
                    let wrong = body && length != written;
                    let expected = if wrong { 500 } else { code };
                    // Two on one connection: what the first leaves behind is what the second begins with.
                    let requests = format!(
                        "{method} {path} HTTP/1.1\r\nhost: h\r\n\r\nGET /version HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n"
                    );
                    let answer = sent(server.local_addr(), requests.as_bytes()).await;
                    let (head, rest) = answer.split_once("\r\n\r\n").unwrap_or_default();
                    let written = if written > 0 { "version" } else { "" };
                    // Whose head was on its way before the guest ended keeps to its length, or is cut, be it before its first byte.
                    if wrong && (answer.is_empty() || status(&answer) == code) {
                        let next = rest.find("HTTP/1.1 ").unwrap_or(rest.len());
                        let (sent, next) = rest.split_at(next);
                        assert!(written.starts_with(sent), "{told}: {answer}");
                        assert!(next.is_empty() || sent.len() == length, "{told} and then another: {answer}");
                    } else {
                        assert_eq!(status(&answer), expected, "{told}: {answer}");
                        let next = match (wrong, body) {
                            (true, _) => rest.strip_prefix("the guest failed\n"),
                            (false, true) => rest.strip_prefix(written),
                            (false, false) => Some(rest),
                        };
                        assert!(next.is_some_and(|next| next.starts_with("HTTP/1.1 200")), "{told}: {answer}");
                    }
                    if method == "HEAD" && code != 204 && code != 304 {
                        assert!(head.contains(&format!("content-length: {length}")), "{told}: {head}");
                    }
                    if code == 204 && !wrong {
                        assert!(!head.contains("content-length"), "{told}: {head}");
                    }
                    let uri = format!("http://h{path}");
                    match whole(&mut http_2, request(method, &uri)).await {
                        Ok((status, received)) if wrong && status == code => {
                            assert_eq!(received, length, "{told} in HTTP/2");
                        }
                        Ok((status, received)) => {
                            assert_eq!(status, expected, "{told} in HTTP/2");
                            let nothing = !body || (!wrong && written.is_empty());
                            assert_eq!(received == 0, nothing, "{told} in HTTP/2: {received}");
                        }
                        Err(error) => assert!(wrong, "{told} in HTTP/2: {error}"),
                    }
                }
            }
        }
    }
    for path in ["/version", "/x204", "/k2", "/wait"] {
        let request = format!("HEAD {path} HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n");
        let answer = sent(server.local_addr(), request.as_bytes()).await;
        assert!(answer.ends_with("\r\n\r\n") && status(&answer) / 100 == 2, "{path}: {answer}");
    }
    until("none is in flight", || server.stats().in_flight == 0).await;
}

#[tokio::test]
async fn nobody_listens_to_an_answer_to_head_for_longer_than_a_request_may_take() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |spec| spec.request_timeout = Duration::from_millis(300)).await;
    let answer = sent(server.local_addr(), b"HEAD /flood HTTP/1.1\r\nhost: h\r\nconnection: close\r\n\r\n").await;
    assert_eq!(status(&answer), 200);
    until("the guest is gone", || server.stats().in_flight == 0).await;
}

#[tokio::test]
async fn a_stream_may_go_on_for_as_long_as_it_likes_and_pause_for_so_long() {
    let node = Node::trusting_anyone().await;
    let patient = served(&node, "app", |spec| spec.request_timeout = Duration::from_millis(300)).await;
    assert_eq!(get(patient.local_addr(), "/k9").await.body, "version".repeat(9));
    let mut spec = node.spec("impatient");
    spec.stream_idle_timeout = Duration::from_millis(20);
    let module = node.module(&http_guest("version")).await;
    let impatient = node.runtime.serve(&module, spec.clone(), &[any_port()]).await.unwrap();
    assert!(Client::connect(impatient.local_addr()).await.get("/k9").await.is_err(), "it is cut, and is not whole");
    until("the reason is in the log", || logged(&spec).last().is_some_and(|line| line.contains("stream idle timeout")))
        .await;
    until("the guest is gone", || impatient.stats().in_flight == 0).await;
}

// Many at once

#[tokio::test(flavor = "multi_thread")]
async fn a_thousand_connections_are_all_served_and_none_waits_much_longer_than_its_turn() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |spec| spec.max_concurrent_requests = 10).await;
    let address = server.local_addr();
    let began = Instant::now();
    let clients: Vec<_> = (0..1000)
        .map(|_| {
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let mut times = Vec::new();
                for _ in 0..5 {
                    let began = Instant::now();
                    assert_eq!(client.get("/version").await.unwrap().status, 200);
                    times.push(began.elapsed());
                }
                times
            })
        })
        .collect();
    let mut times: Vec<_> = join_all(clients).await.into_iter().flat_map(Result::unwrap).collect();
    let turn = began.elapsed() / 5;
    times.sort();
    let p99 = times[times.len() * 99 / 100];
    println!("1000 connections: {turn:?} for one of each, p99 {p99:?}");
    assert!(p99 < 3 * turn, "{p99:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_with_a_hundred_streams_does_not_hold_up_one_with_one() {
    let node = Node::trusting_anyone().await;
    let server = served(&node, "app", |spec| spec.max_concurrent_requests = 1).await;
    let mut greedy = http_2(server.local_addr()).await;
    let many: Vec<_> = (0..50).map(|_| tokio::spawn(greedy.send_request(request("GET", "http://h/wait")))).collect();
    until("one is in flight", || server.stats().in_flight == 1).await;
    // Twenty seconds of work are before it in order of arrival.
    let mut client = Client::connect(server.local_addr()).await;
    let began = Instant::now();
    assert_eq!(client.get("/version").await.unwrap().status, 200);
    assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
    many.iter().for_each(|task| task.abort());
}

#[tokio::test(flavor = "multi_thread")]
async fn the_heads_of_requests_that_wait_are_the_memory_of_their_container() {
    let node = Node::trusting_anyone().await;
    let change = |spec: &mut ContainerSpec| (spec.memory_limit, spec.max_concurrent_requests) = (Some(2 << 20), 1);
    let server = served(&node, "app", change).await;
    let mut client = http_2(server.local_addr()).await;
    // After the first it is a byte on the wire for each header, and 300 kB in memory.
    let mut send = || {
        let mut request = request("GET", "http://h/wait");
        for _ in 0..1500 {
            request.headers_mut().append("x", http::HeaderValue::from_static(""));
        }
        tokio::spawn(client.send_request(request))
    };
    let answers = join_all((0..40).map(|_| send())).await;
    let statuses: Vec<u16> = answers.into_iter().map(|answer| answer.unwrap().unwrap().status().as_u16()).collect();
    let count = |wanted| statuses.iter().filter(|status| **status == wanted).count();
    assert!((1..=8).contains(&count(200)) && count(200) + count(503) == 40, "{statuses:?}");
    until("all of it came back", || server.stats().memory_bytes == 0).await;
}

#[tokio::test]
async fn a_container_listens_on_no_more_ports_than_its_pod_may_have_descriptors() {
    let node = Node::trusting_anyone().await;
    let module = node.module(&http_guest("version")).await;
    let refused = node.runtime.serve(&module, node.spec("many"), &vec![any_port(); 200_000]).await.unwrap_err();
    assert!(refused.to_string().contains("file descriptors"), "{refused}");
    let served = node.runtime.serve(&module, node.spec("some"), &[any_port(); 3]).await.unwrap();
    for address in served.local_addrs() {
        assert_eq!(get(*address, "/version").await.status, 200);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_never_has_the_last_instances_whatever_it_asks_for_and_in_however_many_containers() {
    let node = Node::trusting_anyone().await;
    let greedy = [
        served(&node, "one", |spec| spec.max_concurrent_requests = 100_000).await,
        served(&node, "two", |spec| spec.max_concurrent_requests = 100_000).await,
    ];
    let other = served(&node, "app", |spec| spec.name = "default/other/app".into()).await;
    let mut clients = Vec::new();
    for server in &greedy {
        for _ in 0..15 {
            clients.push(http_2(server.local_addr()).await);
        }
    }
    let flood: Vec<_> = clients
        .iter_mut()
        .flat_map(|client| (0..90).map(|_| client.send_request(request("GET", "http://h/k9"))).collect::<Vec<_>>())
        .map(tokio::spawn)
        .collect();
    let taken = || greedy.iter().map(|server| server.stats().in_flight).sum::<u64>();
    until("the pod has its share", || taken() > 400).await;
    for _ in 0..20 {
        let reply = tokio::time::timeout(Duration::from_secs(5), get(other.local_addr(), "/version")).await.unwrap();
        assert_eq!(reply.status, 200);
        assert!(taken() < 1000, "{} are half of the node's", taken());
    }
    // What stands in line when the pod ends goes with it.
    flood.iter().for_each(|task| task.abort());
    drop(clients);
    until("none is in flight", || taken() == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_count_among_their_pods_instances() {
    let node = Node::trusting_anyone().await;
    let endless = node.wat(r#"(module (memory 1) (func (export "_start") (loop $forever (br $forever))))"#).await;
    let mut running = Vec::new();
    let refused = loop {
        match node.runtime.run(&endless, node.spec("command")).await {
            Ok(execution) => running.push(execution),
            Err(error) => break error,
        }
        assert!(running.len() < 1000, "half of the node's instances");
    };
    assert!(!refused.is_permanent() && refused.to_string().contains("instances"), "{refused}");
    let other = served(&node, "app", |spec| spec.name = "default/other/app".into()).await;
    assert_eq!(get(other.local_addr(), "/version").await.status, 200);
    drop(running);
    until("none is left", || node.metric("krustlet_wasm_instances") == 0).await;
    node.runtime.run(&endless, node.spec("command")).await.unwrap();
}

/// Opens the file `file` of its first directory over and over, closes it again or not, and exits with the error's number.
fn opens(times: usize, closes: bool) -> String {
    let close = if closes { "(drop (call $close (i32.load (i32.const 16))))" } else { "" };
    format!(
        r#"(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 64) "file")
      (func (export "_start") (local $times i32) (local $error i32)
        (loop $more
          (local.set $error (call $open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 4) (i32.const 0)
            (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 16)))
          (if (local.get $error) (then (call $exit (local.get $error))))
          {close}
          (local.set $times (i32.add (local.get $times) (i32.const 1)))
          (br_if $more (i32.lt_u (local.get $times) (i32.const {times}))))))"#
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_that_opens_files_without_end_is_refused_and_leaves_the_others_theirs() {
    const TOO_MANY_OPEN_FILES: i32 = 33;
    let node = Node::trusting_anyone().await;
    let volume = node.directory.path().join("volume");
    std::fs::create_dir(&volume).unwrap();
    std::fs::write(volume.join("file"), "content").unwrap();
    let run = async |name: &str, text: String| {
        let mut spec = node.spec("command");
        spec.name = name.into();
        let directory = std::sync::Arc::new(std::fs::File::open(&volume).unwrap());
        spec.mounts = vec![Mount { directory, guest: "/data".into(), read_only: true }];
        let module = node.wat(&text).await;
        node.runtime.run(&module, spec).await.unwrap()
    };
    let greedy = run("default/greedy/command", opens(1 << 20, false)).await;
    assert_eq!(greedy.wait().await.code, TOO_MANY_OPEN_FILES);
    // What it had is there again, and what is closed is not counted.
    assert_eq!(run("default/greedy/command", opens(20_000, true)).await.wait().await.code, 0);
}
