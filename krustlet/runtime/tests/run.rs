//! Loading, serving and running, from outside: what guests are given, and what happens when they take too much.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{Client, Node, Upstream, any_port, get, http_guest, logged, served, until};
use futures::future::join_all;
use krustlet_runtime::{
    ContainerSpec, Exit, ExitReason, HttpServer, Kind, LoadError, Mount, NoCredentials, Verification,
};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};

const MIB: u64 = 1024 * 1024;

async fn refused(node: &Node, module: &[u8]) -> LoadError {
    let image = node.image(module).await;
    node.runtime.load(&image).await.unwrap_err()
}

async fn ran(node: &Node, wat: &str, change: impl FnOnce(&mut ContainerSpec)) -> (Exit, ContainerSpec) {
    let module = node.wat(wat).await;
    let mut spec = node.spec("command");
    change(&mut spec);
    (node.runtime.run(&module, spec.clone()).await.unwrap().wait().await, spec)
}

// Loading

#[tokio::test(flavor = "multi_thread")]
async fn a_module_is_compiled_once_however_many_ask_and_then_comes_from_the_cache() {
    let node = Node::trusting_anyone().await;
    let image = node.image(&http_guest("version")).await;
    let modules = join_all((0..50).map(|_| node.runtime.load(&image))).await;
    assert!(modules.iter().all(|module| module.as_ref().unwrap().kind() == Kind::HttpProxy));
    assert_eq!(node.metric(r#"krustlet_module_loads_total{source="compiled"}"#), 1);
    let anyone = || {
        Node::again(node.directory.clone(), node.registry.clone(), Verification::AllowUnsigned, Arc::new(NoCredentials))
    };
    let next = anyone();
    next.runtime.load(&image).await.unwrap();
    assert_eq!(next.metric(r#"krustlet_module_loads_total{source="disk"}"#), 1);
    for entry in std::fs::read_dir(node.directory.path().join("precompiled")).unwrap() {
        let path = entry.unwrap().path();
        if path.extension().is_some_and(|extension| extension == "cwasm") {
            let mut code = std::fs::read(&path).unwrap();
            *code.last_mut().unwrap() ^= 1;
            std::fs::write(&path, code).unwrap();
        }
    }
    let next = anyone();
    next.runtime.load(&image).await.unwrap();
    assert_eq!(next.metric(r#"krustlet_module_loads_total{source="compiled"}"#), 1);
}

#[tokio::test]
async fn a_module_that_is_served_or_run_is_not_loaded_again() {
    let node = Node::trusting_anyone().await;
    let from_memory = || node.metric(r#"krustlet_module_loads_total{source="memory"}"#);
    let image = node.image(&http_guest("version")).await;
    let server =
        node.runtime.serve(&node.runtime.load(&image).await.unwrap(), node.spec("app"), &[any_port()]).await.unwrap();
    node.runtime.load(&image).await.unwrap();
    assert_eq!(from_memory(), 1);
    drop(server);
    let endless = wat::parse_str(r#"(module (func (export "_start") (loop $forever (br $forever))))"#).unwrap();
    let image = node.image(&endless).await;
    let _execution = node.runtime.run(&node.runtime.load(&image).await.unwrap(), node.spec("command")).await.unwrap();
    node.runtime.load(&image).await.unwrap();
    assert_eq!(from_memory(), 2);
}

#[tokio::test]
async fn imports_that_are_not_offered_are_named() {
    let node = Node::trusting_anyone().await;
    let vault = r#"(component (import "acme:secret/vault" (instance (export "open" (func (result u32))))))"#;
    let unknown = r#"(component (import "wasi:keyvalue/store@0.2.0" (instance (export "open" (func)))))"#;
    let core = r#"(module (import "acme" "open_vault" (func)) (func (export "_start")))"#;
    for (text, import) in
        [(vault, "acme:secret/vault"), (unknown, "wasi:keyvalue/store@0.2.0"), (core, "acme.open_vault")]
    {
        let error = refused(&node, &wat::parse_str(text).unwrap()).await;
        assert_eq!(error.reason(), "UnsupportedImport");
        assert!(error.is_permanent());
        assert!(error.to_string().contains(import), "{error}");
    }
}

#[tokio::test]
async fn what_is_no_module_or_has_nothing_to_run_is_an_invalid_image() {
    let node = Node::trusting_anyone().await;
    let valid = http_guest("version");
    for module in [
        b"not wasm at all".to_vec(),
        valid[..valid.len() / 2].to_vec(),
        b"\0asm\x0d\0\x01\0\xff\xff\xff".to_vec(),
        wat::parse_str("(component)").unwrap(),
        wat::parse_str("(module)").unwrap(),
        wat::parse_str(r#"(module (func (export "_start") (param i32)))"#).unwrap(),
    ] {
        let error = refused(&node, &module).await;
        assert_eq!(error.reason(), "InvalidImage", "{error}");
        assert!(error.is_permanent());
    }
}

// Serving

#[tokio::test]
async fn every_request_gets_an_instance_of_its_own() {
    let node = Node::trusting_anyone().await;
    let (server, _) = served(&node, |_| {}).await;
    let mut client = Client::connect(server.local_addr()).await;
    let (began, mut asked, mut whole) = (Instant::now(), 0, 0);
    // One whose guest is interrupted between its head and its end has no length; each may be, where others compute.
    while asked < 3 || whole == 0 {
        let reply = client.get("/count").await.unwrap();
        assert_eq!((reply.status, reply.body.as_str()), (200, "1"));
        assert!(reply.headers.contains_key("date"));
        match reply.headers.get("content-length") {
            Some(length) => assert_eq!(length, "1"),
            None => assert_eq!(reply.headers["transfer-encoding"], "chunked"),
        }
        whole += u64::from(reply.headers.contains_key("content-length"));
        asked += 1;
        assert!(began.elapsed() < Duration::from_secs(60), "no answer of {asked} was whole");
    }
    assert_eq!(server.stats().requests, asked);
    assert!(server.stats().cpu_time > Duration::ZERO);
    until("no instance is left", || node.metric("krustlet_wasm_instances") == 0).await;
    assert_eq!(server.stats().memory_bytes, 0);
    assert_eq!(node.metric(r#"krustlet_http_requests_total{code="200"}"#), asked);
}

#[tokio::test]
async fn http_2_is_spoken_with_clients_that_begin_with_it() {
    let node = Node::trusting_anyone().await;
    let (server, _) = served(&node, |_| {}).await;
    let stream = tokio::net::TcpStream::connect(server.local_addr()).await.unwrap();
    let executor = hyper_util::rt::TokioExecutor::new();
    let (mut sender, connection) =
        hyper::client::conn::http2::handshake(executor, hyper_util::rt::TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = |_| {
        let request = hyper::Request::get(format!("http://{}/version", server.local_addr()));
        sender.send_request(request.body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap())
    };
    for response in join_all((0..10).map(request)).await {
        assert_eq!(response.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_guest_that_fails_costs_its_request_alone_and_says_why_in_the_log() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    let mut client = Client::connect(server.local_addr()).await;
    for (path, reason) in [("/trap", "unreachable"), ("/nothing", "without an answer")] {
        assert_eq!(client.get(path).await.unwrap().status, 500);
        assert!(logged(&spec).last().unwrap().contains(reason));
        assert_eq!(client.get("/version").await.unwrap().body, "version");
    }
}

#[tokio::test]
async fn what_a_guest_writes_to_stderr_is_in_the_log() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    assert_eq!(get(server.local_addr(), "/log").await.status, 200);
    assert_eq!(logged(&spec), ["stderr F written by the guest"]);
}

#[tokio::test]
async fn memory_and_tables_over_the_limit_end_the_request_and_are_given_back() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.memory_limit = Some(512 * 1024)).await;
    let mut client = Client::connect(server.local_addr()).await;
    for path in ["/grow", "/entries"] {
        let reply = client.get(path).await.unwrap();
        assert_eq!((reply.status, reply.body.as_str()), (500, "the guest ran out of memory\n"));
        assert!(logged(&spec).last().unwrap().contains("its limit is 524288"));
    }
    assert_eq!(client.get("/version").await.unwrap().status, 200);
    assert_eq!(server.stats().memory_bytes, 0);
    let (server, _) = served(&node, |spec| spec.memory_limit = Some(80 * MIB)).await;
    assert_eq!(get(server.local_addr(), "/grow").await.status, 200);
}

#[tokio::test]
async fn a_request_over_its_time_is_answered_for_the_guest() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.request_timeout = Duration::from_millis(50)).await;
    for path in ["/spin", "/wait"] {
        assert_eq!(get(server.local_addr(), path).await.status, 504);
        assert!(logged(&spec).last().unwrap().contains("timeout"));
    }
    assert_eq!(get(server.local_addr(), "/version").await.status, 200);
    assert_eq!(server.stats().in_flight, 0);
}

#[tokio::test]
async fn a_request_may_take_for_ever() {
    let node = Node::trusting_anyone().await;
    let upstream = Upstream::start(200, None).await;
    let (server, _) = served(&node, |spec| {
        spec.request_timeout = Duration::MAX;
        spec.allowed_hosts = vec!["127.0.0.1".into()];
    })
    .await;
    assert_eq!(get(server.local_addr(), "/wait").await.status, 200);
    assert_eq!(get(server.local_addr(), &format!("/o{}/", upstream.address)).await.status, 200);
}

#[tokio::test]
async fn requests_beyond_the_cap_wait_and_those_that_cannot_be_served_in_time_are_sent_away() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.max_concurrent_requests = 2).await;
    let address = server.local_addr();
    let busy: Vec<_> = (0..6).map(|_| tokio::spawn(get(address, "/wait"))).collect();
    until("two are in flight", || server.stats().in_flight == 2).await;
    assert_eq!(get(address, "/version").await.status, 200);
    for reply in join_all(busy).await {
        assert_eq!(reply.unwrap().status, 200);
    }
    let impatient = ContainerSpec { request_timeout: Duration::from_millis(50), ..spec };
    let endless: Vec<_> =
        (0..2).map(|_| tokio::spawn(async move { Client::connect(address).await.get("/spin").await })).collect();
    until("both are in flight", || server.stats().in_flight == 2).await;
    server.swap(&node.module(&http_guest("changed")).await, impatient).await.unwrap();
    let reply = get(address, "/version").await;
    assert_eq!((reply.status, reply.headers["retry-after"].to_str().unwrap()), (503, "1"));
    endless.iter().for_each(|task| task.abort());
    until("none is in flight", || server.stats().in_flight == 0).await;
    assert_eq!(get(address, "/version").await.body, "changed");
}

#[tokio::test]
async fn a_client_that_sends_its_body_slowly_loses_its_place_at_the_timeout() {
    let node = Node::trusting_anyone().await;
    let (server, _) = served(&node, |spec| {
        spec.max_concurrent_requests = 1;
        spec.request_timeout = Duration::from_millis(300);
    })
    .await;
    let address = server.local_addr();
    for (sent, status) in [("all of it!", "HTTP/1.1 200"), ("half", "HTTP/1.1 504")] {
        let mut client = TcpStream::connect(address).await.unwrap();
        let request = format!("POST /read HTTP/1.1\r\nhost: guest\r\ncontent-length: 10\r\n\r\n{sent}");
        client.write_all(request.as_bytes()).await.unwrap();
        if sent == "half" {
            until("it is in flight", || server.stats().in_flight == 1).await;
        }
        let mut answer = [0; 12];
        client.read_exact(&mut answer).await.unwrap();
        assert_eq!(String::from_utf8_lossy(&answer), status);
        until("its place is free", || server.stats().in_flight == 0).await;
        assert_eq!(get(address, "/version").await.status, 200);
    }
}

#[tokio::test]
async fn a_client_that_does_not_read_loses_its_place_at_the_timeout() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| {
        spec.max_concurrent_requests = 1;
        spec.stream_idle_timeout = Duration::from_millis(300);
    })
    .await;
    let mut deaf = TcpStream::connect(server.local_addr()).await.unwrap();
    deaf.write_all(b"GET /flood HTTP/1.1\r\nhost: guest\r\n\r\n").await.unwrap();
    until("it is in flight", || server.stats().in_flight == 1).await;
    assert_eq!(get(server.local_addr(), "/version").await.status, 200);
    assert!(logged(&spec).last().unwrap().contains("timeout"));
    // What it was sent ends as what it is: not whole.
    let mut answer = Vec::new();
    let _ = deaf.read_to_end(&mut answer).await;
    assert!(!answer.ends_with(b"\r\n0\r\n\r\n"));
}

#[tokio::test]
async fn statuses_are_passed_on_and_those_that_are_no_answers_break_nothing() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    let address = server.local_addr();
    for status in [204, 304, 404, 503, 599] {
        assert_eq!(get(address, &format!("/x{status}")).await.status, status);
    }
    for status in [100, 101, 199] {
        assert_eq!(get(address, &format!("/x{status}")).await.status, 500);
        assert!(logged(&spec).last().unwrap().contains(&format!("status {status}")));
    }
    // A tunnel is none of a guest's business; the connection is not kept for one.
    let mut tunnel = TcpStream::connect(address).await.unwrap();
    tunnel.write_all(b"CONNECT guest:80 HTTP/1.1\r\nhost: guest:80\r\n\r\n").await.unwrap();
    let mut answer = Vec::new();
    let closed = tokio::time::timeout(Duration::from_secs(10), tunnel.read_to_end(&mut answer)).await;
    assert!(closed.is_ok(), "{}", String::from_utf8_lossy(&answer));
    assert_eq!(get(address, "/version").await.status, 200);
    until("none is in flight", || server.stats().in_flight == 0).await;
}

#[tokio::test]
async fn a_body_that_its_guest_cannot_finish_is_cut_not_closed() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    assert!(Client::connect(server.local_addr()).await.get("/break").await.is_err());
    until("the trap is logged", || logged(&spec).last().is_some_and(|line| line.contains("unreachable"))).await;
}

#[tokio::test]
async fn a_client_that_goes_away_takes_its_guest_along() {
    let node = Node::trusting_anyone().await;
    let (server, _) = served(&node, |_| {}).await;
    let request = tokio::spawn(get(server.local_addr(), "/spin"));
    until("the guest runs", || server.stats().in_flight == 1).await;
    request.abort();
    until("the guest is gone", || server.stats().in_flight == 0).await;
    assert_eq!(node.metric("krustlet_wasm_instances"), 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_under_load_fails_no_request_and_every_later_one_meets_the_new_module() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    let address = server.local_addr();
    let stop = Arc::new(AtomicBool::new(false));
    let clients: Vec<_> = (0..8)
        .map(|_| {
            let stop = stop.clone();
            tokio::spawn(async move {
                let mut client = Client::connect(address).await;
                let mut seen = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let reply = client.get("/version").await.unwrap();
                    assert_eq!(reply.status, 200);
                    seen.push(reply.body);
                }
                seen
            })
        })
        .collect();
    let slow = tokio::spawn(get(address, "/wait"));
    until("a slow request is in flight among them", || server.stats().requests > 100).await;
    let next = node.module(&http_guest("changed")).await;
    server.swap(&next, spec).await.unwrap();
    assert_eq!(get(address, "/version").await.body, "changed");
    assert_eq!(slow.await.unwrap().body, "version");
    stop.store(true, Ordering::Relaxed);
    for seen in join_all(clients).await {
        let seen = seen.unwrap();
        let first_new = seen.iter().position(|body| body == "changed").unwrap();
        assert!(seen[..first_new].iter().all(|body| body == "version"));
        assert!(seen[first_new..].iter().all(|body| body == "changed"));
    }
}

#[tokio::test]
async fn a_swap_to_what_cannot_be_served_leaves_the_old_module_serving() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    let command = node.wat(r#"(module (func (export "_start")))"#).await;
    let error = server.swap(&command, spec.clone()).await.unwrap_err();
    assert_eq!((error.reason(), error.is_permanent()), ("CreateContainerError", true));
    let mut missing = spec;
    let file = std::fs::File::open(missing.log.path()).unwrap();
    missing.mounts = vec![Mount { directory: Arc::new(file), guest: "/data".into(), read_only: true }];
    let module = node.module(&http_guest("changed")).await;
    assert!(server.swap(&module, missing).await.unwrap_err().to_string().contains("/data"));
    assert_eq!(get(server.local_addr(), "/version").await.body, "version");
}

#[tokio::test]
async fn draining_finishes_what_is_in_flight_and_accepts_nothing_new() {
    let node = Node::trusting_anyone().await;
    let (server, _) = served(&node, |_| {}).await;
    let address = server.local_addr();
    let mut idle = Client::connect(address).await;
    idle.get("/version").await.unwrap();
    let request = tokio::spawn(get(address, "/wait"));
    until("the request is in flight", || server.stats().in_flight == 1).await;
    assert!(server.drain(Duration::from_secs(10)).await);
    assert_eq!(request.await.unwrap().status, 200);
    assert!(idle.get("/version").await.is_err());
    assert!(tokio::net::TcpStream::connect(address).await.is_err());
    assert!(server.drain(Duration::from_secs(10)).await, "draining again is no fault");
}

#[tokio::test]
async fn what_does_not_end_within_the_grace_is_cut() {
    let node = Node::trusting_anyone().await;
    let (server, _) = served(&node, |_| {}).await;
    let address = server.local_addr();
    let request = tokio::spawn(async move { Client::connect(address).await.get("/spin").await });
    until("the request is in flight", || server.stats().in_flight == 1).await;
    assert!(!server.drain(Duration::from_millis(20)).await);
    assert!(request.await.unwrap().is_err());
    until("the guest is gone", || server.stats().in_flight == 0).await;
}

#[tokio::test]
async fn two_servers_on_one_port_are_one_too_many_until_the_first_ends() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |_| {}).await;
    let module = node.module(&http_guest("another")).await;
    let address = server.local_addr();
    let error = node.runtime.serve(&module, spec.clone(), &[address]).await.unwrap_err();
    assert_eq!((error.reason(), error.is_permanent()), ("PortInUse", false));
    assert!(error.to_string().contains(&address.to_string()), "{error}");
    assert_eq!(get(address, "/version").await.body, "version");
    server.drain(Duration::from_secs(1)).await;
    let next = node.runtime.serve(&module, spec, &[address]).await.unwrap();
    assert_eq!(get(next.local_addr(), "/version").await.body, "another");
}

#[tokio::test]
async fn a_container_is_served_on_all_of_its_addresses_or_on_none() {
    let node = Node::trusting_anyone().await;
    let module = node.module(&http_guest("version")).await;
    let free = async || TcpListener::bind(any_port()).await.unwrap().local_addr().unwrap();
    let (first, second) = (free().await, free().await);
    let server = node.runtime.serve(&module, node.spec("app"), &[first, second]).await.unwrap();
    for address in [first, second] {
        assert_eq!(get(address, "/version").await.body, "version");
    }
    assert_eq!(server.stats().requests, 2);
    assert!(server.drain(Duration::from_secs(1)).await);
    assert!(TcpStream::connect(first).await.is_err());
    let _other = TcpListener::bind(second).await.unwrap();
    let error = node.runtime.serve(&module, node.spec("app"), &[first, second]).await.unwrap_err();
    assert!(error.to_string().contains(&second.to_string()), "{error}");
    assert!(TcpStream::connect(first).await.is_err(), "nothing is left of what was begun");
    assert!(node.runtime.serve(&module, node.spec("app"), &[]).await.is_err());
}

/// How long requests take beside a hundred endless loops in each of these containers: the median.
async fn beside_loops(node: &Node, name: &str, loops_in: &[&str]) -> Duration {
    let (server, _) = served(node, |spec| spec.name = name.into()).await;
    let mut looping = Vec::new();
    for name in loops_in {
        looping.push(served(node, |spec| spec.name = (*name).into()).await.0);
    }
    let loops: Vec<_> = looping
        .iter()
        .flat_map(|server| (0..100).map(|_| server.local_addr()))
        .map(|address| tokio::spawn(async move { Client::connect(address).await.get("/spin").await }))
        .collect();
    until("all of them loop", || looping.iter().all(|server| server.stats().in_flight == 100)).await;
    let mut client = Client::connect(server.local_addr()).await;
    let mut times = Vec::new();
    for _ in 0..100 {
        let began = Instant::now();
        assert_eq!(client.get("/version").await.unwrap().status, 200);
        times.push(began.elapsed());
    }
    times.sort();
    println!("beside {loops_in:?}: median {:?}, p90 {:?}, worst {:?}", times[50], times[90], times[99]);
    for looping in loops {
        looping.abort();
    }
    until("the loops are gone", || looping.iter().all(|server| server.stats().in_flight == 0)).await;
    times[50]
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_loops_hardly_delay_another_pod_in_however_many_containers_they_are() {
    let node = Node::trusting_anyone().await;
    let containers = ["default/pod/one", "default/pod/two", "default/pod/three"];
    let median = beside_loops(&node, "default/other/app", &containers).await;
    // A hundred loops that took turns of one millisecond with it would make it wait for 50 ms and more on two cores.
    assert!(median < Duration::from_millis(25), "{median:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_loops_in_one_container_delay_its_pods_others_by_the_slices_of_two() {
    let node = Node::trusting_anyone().await;
    let median = beside_loops(&node, "default/pod/app", &["default/pod/looping"]).await;
    // In one line with all of them, half a second.
    assert!(median < Duration::from_millis(50), "{median:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cpu_limit_holds_a_container_to_its_part_of_a_core() {
    let node = Node::trusting_anyone().await;
    let limit = 0.2;
    let held_for = Duration::from_secs(2);
    let (limited, _) = served(&node, |spec| {
        spec.cpu_limit = Some(limit);
        spec.request_timeout = held_for;
    })
    .await;
    let (free, _) = served(&node, |spec| spec.request_timeout = held_for).await;
    let began = Instant::now();
    let spin = |server: &HttpServer| join_all((0..4).map(|_| get(server.local_addr(), "/spin")));
    let replies = join_all([spin(&limited), spin(&free)]).await;
    for reply in replies.iter().flatten() {
        assert_eq!(reply.status, 504);
    }
    let part = |server: &HttpServer| server.stats().cpu_time.as_secs_f64() / began.elapsed().as_secs_f64();
    let (part, all) = (part(&limited), part(&free));
    assert!(part < limit * 1.75, "{part} of a core");
    // A machine with other work may have less to give.
    assert!(part > (limit / 2.0).min(all / 4.0), "{part} of a core, beside {all} without a limit");
}

// Commands

const PRINT: &str = r#"(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func $print (param $fd i32) (param $text i32) (param $length i32)
    (i32.store (i32.const 16) (local.get $text))
    (i32.store (i32.const 20) (local.get $length))
    (drop (call $write (local.get $fd) (i32.const 16) (i32.const 1) (i32.const 24))))
  (func (export "_start")
    (drop (call $sizes (i32.const 0) (i32.const 4)))
    (drop (call $args (i32.const 1024) (i32.const 2048)))
    (call $print (i32.const 1) (i32.const 2048) (i32.load (i32.const 4)))
    (drop (call $environ_sizes (i32.const 0) (i32.const 4)))
    (drop (call $environ (i32.const 1024) (i32.const 2048)))
    (call $print (i32.const 2) (i32.const 2048) (i32.load (i32.const 4)))))"#;

#[tokio::test]
async fn a_command_is_given_its_arguments_and_environment_and_nothing_else() {
    let node = Node::trusting_anyone().await;
    let (exit, spec) = ran(&node, PRINT, |spec| {
        spec.args = vec!["one".into(), "two words".into()];
        spec.env = vec![("KEY".into(), "value".into())];
    })
    .await;
    assert_eq!(exit, Exit { code: 0, reason: ExitReason::Completed, message: String::new() });
    assert_eq!(logged(&spec), ["stdout P command\0one\0two words\0", "stderr P KEY=value\0"]);
}

#[tokio::test]
async fn exit_codes_are_kept() {
    let node = Node::trusting_anyone().await;
    let exits = |code| {
        format!(
            r#"(module (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
            (memory (export "memory") 1) (func (export "_start") (call $exit (i32.const {code}))))"#
        )
    };
    let component = |result| {
        format!(
            r#"(component
            (core module $code (func (export "run") (result i32) (i32.const {result})))
            (core instance $code (instantiate $code))
            (func $run (result (result)) (canon lift (core func $code "run")))
            (instance $cli (export "run" (func $run)))
            (export "wasi:cli/run@0.2.0" (instance $cli)))"#
        )
    };
    for (wat, code) in [(exits(0), 0), (exits(42), 42), (component(0), 0), (component(1), 1)] {
        let (exit, _) = ran(&node, &wat, |_| {}).await;
        let reason = if code == 0 { ExitReason::Completed } else { ExitReason::Error };
        assert_eq!((exit.code, exit.reason), (code, reason), "{}", exit.message);
    }
}

#[tokio::test]
async fn a_trap_and_too_much_memory_have_reasons_of_their_own() {
    let node = Node::trusting_anyone().await;
    let (exit, _) = ran(&node, r#"(module (func (export "_start") unreachable))"#, |_| {}).await;
    assert_eq!((exit.code, exit.reason), (134, ExitReason::Error));
    assert!(exit.message.contains("unreachable"), "{}", exit.message);
    let grow = r#"(module (memory (export "memory") 1)
        (func (export "_start") (drop (memory.grow (i32.const 1024)))))"#;
    let table = r#"(module (table $t 1 funcref)
        (func (export "_start") (drop (table.grow $t (ref.null func) (i32.const 90000)))))"#;
    for wat in [grow, table] {
        let (exit, _) = ran(&node, wat, |spec| spec.memory_limit = Some(600_000)).await;
        assert_eq!((exit.code, exit.reason), (137, ExitReason::OutOfMemory), "{}", exit.message);
    }
    assert_eq!(ran(&node, grow, |_| {}).await.0.code, 0);
}

#[tokio::test]
async fn an_endless_loop_can_be_killed() {
    let node = Node::trusting_anyone().await;
    let module = node.wat(r#"(module (func (export "_start") (loop $forever (br $forever))))"#).await;
    assert_eq!(module.kind(), Kind::CoreModule);
    let execution = node.runtime.run(&module, node.spec("command")).await.unwrap();
    until("it has run for a while", || execution.stats().cpu_time > Duration::from_millis(10)).await;
    execution.kill();
    let exit = execution.wait().await;
    assert_eq!((exit.code, exit.reason), (137, ExitReason::Error));
    assert_eq!(execution.wait().await, exit);
    let dropped = node.runtime.run(&module, node.spec("command")).await.unwrap();
    until("it runs", || node.metric("krustlet_wasm_instances") == 1).await;
    drop(dropped);
    until("it is gone", || node.metric("krustlet_wasm_instances") == 0).await;
}

#[tokio::test]
async fn a_directory_is_mounted_with_the_rights_that_it_should_have() {
    let node = Node::trusting_anyone().await;
    // Creates "made" in the first directory that it was given, and exits with the error number.
    let create = r#"(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) (data (i32.const 64) "made")
      (func (export "_start")
        (call $exit (call $open (i32.const 3) (i32.const 0) (i32.const 64) (i32.const 4) (i32.const 1)
          (i64.const 64) (i64.const 0) (i32.const 0) (i32.const 0)))))"#;
    let host = node.directory.path().join("volume");
    std::fs::create_dir(&host).unwrap();
    let mount = |read_only| mounted(&host, read_only);
    assert_ne!(ran(&node, create, |_| {}).await.0.code, 0, "nothing is open that was not given");
    assert_ne!(ran(&node, create, |spec| spec.mounts = vec![mount(true)]).await.0.code, 0);
    assert!(!host.join("made").exists());
    assert_eq!(ran(&node, create, |spec| spec.mounts = vec![mount(false)]).await.0.code, 0);
    assert!(host.join("made").exists());
}

fn mounted(directory: &Path, read_only: bool) -> Mount {
    let directory = Arc::new(std::fs::File::open(directory).unwrap());
    Mount { directory, guest: "/data".into(), read_only }
}

/// What comes of an operation of `files.wat` on a path in a volume: "ok", or the number of WASI's error code.
async fn tried(node: &Node, volume: &Path, read_only: bool, operation: &str, path: &str) -> String {
    let guest = include_str!("files.wat")
        .replace("LENGTH", &path.len().to_string())
        .replace("PATH", path)
        .replace("OPERATION", operation);
    let mount = mounted(volume, read_only);
    let (exit, spec) = ran(node, &guest, |spec| spec.mounts = vec![mount]).await;
    assert_eq!(exit.code, 0, "{}", exit.message);
    logged(&spec).last().unwrap().strip_prefix("stderr P ").unwrap().to_owned()
}

/// Every name under a directory, links not followed, and the content of files.
fn content(directory: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(directory).unwrap() {
        let entry = entry.unwrap();
        let content =
            if entry.file_type().unwrap().is_file() { std::fs::read(entry.path()).unwrap() } else { Vec::new() };
        found.insert(entry.file_name().into_string().unwrap(), content);
    }
    found
}

const READ: &str = "(call $open (i32.const 0) (i32.const 1))";
const WRITE: &str = "(call $open (i32.const 0) (i32.const 2))";
const CREATE: &str = "(call $open (i32.const 1) (i32.const 2))";
const TRUNCATE: &str = "(call $open (i32.const 8) (i32.const 2))";

#[tokio::test]
async fn a_component_changes_nothing_in_a_read_only_volume() {
    let node = Node::trusting_anyone().await;
    let changes = [
        (WRITE, "file"),
        (CREATE, "new"),
        (TRUNCATE, "file"),
        ("(call $make)", "file"),
        ("(call $unlink)", "file"),
        ("(call $link)", "file"),
        ("(call $rename)", "file"),
    ];
    for (number, (operation, path)) in changes.into_iter().enumerate() {
        let volume = node.directory.path().join(format!("volume-{number}"));
        std::fs::create_dir(&volume).unwrap();
        std::fs::write(volume.join("file"), "content").unwrap();
        let before = content(&volume);
        assert_eq!(tried(&node, &volume, true, READ, "file").await, "ok");
        assert_ne!(tried(&node, &volume, true, operation, path).await, "ok", "{operation}");
        assert_eq!(content(&volume), before, "{operation}");
        assert_eq!(tried(&node, &volume, false, operation, path).await, "ok", "{operation}");
        assert_ne!(content(&volume), before, "{operation}");
    }
    // Opening to read creates and empties nothing either.
    let volume = node.directory.path().join("volume-0");
    let before = content(&volume);
    for (flags, path) in [(1, "new"), (8, "file"), (9, "file")] {
        tried(&node, &volume, true, &format!("(call $open (i32.const {flags}) (i32.const 1))"), path).await;
        assert_eq!(content(&volume), before, "{flags} {path}");
    }
}

#[tokio::test]
async fn no_path_and_no_link_leads_out_of_a_volume() {
    use std::os::unix::fs::symlink;
    let node = Node::trusting_anyone().await;
    let outside = node.directory.path().join("outside");
    let volume = outside.join("volume");
    std::fs::create_dir_all(volume.join("nested")).unwrap();
    std::fs::write(outside.join("secret"), "secret").unwrap();
    std::fs::write(volume.join("inside"), "content").unwrap();
    symlink("inside", volume.join("within")).unwrap();
    symlink("../secret", volume.join("relative")).unwrap();
    symlink(outside.join("secret"), volume.join("absolute")).unwrap();
    symlink("..", volume.join("up")).unwrap();
    symlink("../created", volume.join("dangling")).unwrap();
    for path in ["inside", "within", "nested/../inside"] {
        assert_eq!(tried(&node, &volume, false, READ, path).await, "ok", "{path}");
    }
    let before = content(&outside);
    let absolute = outside.join("secret").display().to_string();
    for path in [
        "../secret",
        "./../secret",
        "nested/../../secret",
        "relative",
        "absolute",
        "up/secret",
        "/etc/passwd",
        &absolute,
    ] {
        for operation in [READ, WRITE, TRUNCATE] {
            assert_ne!(tried(&node, &volume, false, operation, path).await, "ok", "{operation} {path}");
        }
    }
    for path in ["../created", "up/created", "dangling"] {
        assert_ne!(tried(&node, &volume, false, CREATE, path).await, "ok", "{path}");
    }
    for path in ["../secret", &absolute] {
        assert_ne!(tried(&node, &volume, false, "(call $unlink)", path).await, "ok", "{path}");
        assert_ne!(tried(&node, &volume, false, "(call $rename)", path).await, "ok", "{path}");
        // A link that the guest makes itself is no way out either.
        tried(&node, &volume, false, "(call $link)", path).await;
        assert_ne!(tried(&node, &volume, false, READ, "made").await, "ok", "{path}");
        let _ = std::fs::remove_file(volume.join("made"));
    }
    assert_eq!(content(&outside), before);
}

#[tokio::test]
async fn stdin_is_closed() {
    let node = Node::trusting_anyone().await;
    // Exits with the number of bytes read.
    let read = r#"(module
      (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1)
      (func (export "_start")
        (i32.store (i32.const 0) (i32.const 64))
        (i32.store (i32.const 4) (i32.const 64))
        (i32.store (i32.const 8) (i32.const 99))
        (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
        (call $exit (i32.load (i32.const 8)))))"#;
    assert_eq!(ran(&node, read, |_| {}).await.0.code, 0);
}

#[tokio::test]
async fn a_module_is_not_run_as_what_it_is_not() {
    let node = Node::trusting_anyone().await;
    let command = node.wat(r#"(module (func (export "_start")))"#).await;
    let error = node.runtime.serve(&command, node.spec("app"), &[any_port()]).await.unwrap_err();
    assert!(error.is_permanent());
    let proxy = node.module(&http_guest("version")).await;
    assert!(node.runtime.run(&proxy, node.spec("app")).await.unwrap_err().is_permanent());
}
