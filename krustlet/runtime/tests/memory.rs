//! The limits of memory, from outside: of an instance, of a container's instances together, of a pod, of the node.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{Client, Node, any_port, get, http_guest, logged, served, until};
use futures::future::join_all;
use krustlet_runtime::ExitReason;

const MIB: u64 = 1024 * 1024;
/// What `/hold` takes, beside the guest's own page and the node's part of an instance.
const HELD: u64 = 40 * MIB;

#[tokio::test(flavor = "multi_thread")]
async fn sixty_requests_at_once_take_no_more_than_the_containers_limit_and_those_beyond_it_get_a_503() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.memory_limit = Some(2 * HELD + 4 * MIB)).await;
    let address = server.local_addr();
    let requests: Vec<_> = (0..60).map(|_| tokio::spawn(get(address, "/hold"))).collect();
    let mut most = 0;
    while requests.iter().any(|request| !request.is_finished()) {
        most = most.max(server.stats().memory_bytes);
        tokio::time::sleep(std::time::Duration::from_millis(1)).await;
    }
    let replies = join_all(requests).await;
    let statuses: Vec<u16> = replies.into_iter().map(|reply| reply.unwrap().status).collect();
    assert!(most <= 2 * HELD + 4 * MIB, "{most}");
    assert!(statuses.contains(&200) && statuses.contains(&503), "{statuses:?}");
    assert!(statuses.iter().all(|status| [200, 503].contains(status)), "{statuses:?}");
    assert!(logged(&spec).iter().any(|line| line.contains("no memory is left for it")));
    until("all of it came back", || server.stats().memory_bytes == 0).await;
    assert_eq!(get(address, "/hold").await.status, 200);
}

#[tokio::test]
async fn the_containers_of_a_pod_share_its_limit_and_no_other_pod_does() {
    let node = Node::trusting_anyone().await;
    let pod = node.runtime.pod_memory("uid-1", HELD + 8 * MIB);
    let again = node.runtime.pod_memory("uid-1", HELD + 8 * MIB);
    let (one, _) = served(&node, |spec| spec.pod_memory = Some(pod)).await;
    let (two, log) = served(&node, |spec| spec.pod_memory = Some(again)).await;
    let (other, _) =
        served(&node, |spec| spec.pod_memory = Some(node.runtime.pod_memory("uid-2", HELD + 8 * MIB))).await;
    let held = tokio::spawn(get(one.local_addr(), "/hold"));
    until("it holds", || one.stats().memory_bytes > HELD).await;
    assert_eq!(get(two.local_addr(), "/hold").await.status, 503);
    assert!(logged(&log).last().unwrap().contains("the pod has"));
    assert_eq!(get(other.local_addr(), "/hold").await.status, 200);
    assert_eq!(held.await.unwrap().status, 200);
    assert_eq!(get(two.local_addr(), "/hold").await.status, 200);
}

#[tokio::test]
async fn a_container_without_a_limit_has_a_default_and_the_node_is_never_full_of_one() {
    let node = Node::configured(|config| config.guest_memory = Some(4 * (HELD + 8 * MIB))).await;
    assert_eq!(node.runtime.default_memory_limit(), HELD + 8 * MIB);
    let (server, _) = served(&node, |_| {}).await;
    let held = tokio::spawn(get(server.local_addr(), "/hold"));
    until("it holds", || server.stats().memory_bytes > HELD).await;
    assert_eq!(get(server.local_addr(), "/hold").await.status, 503);
    let (other, _) = served(&node, |_| {}).await;
    assert_eq!(get(other.local_addr(), "/hold").await.status, 200);
    assert_eq!(held.await.unwrap().status, 200);
}

#[tokio::test]
async fn the_nodes_own_budget_ends_what_no_limit_does() {
    let node = Node::configured(|config| config.guest_memory = Some(HELD + 10 * MIB)).await;
    let limit = Some(1024 * MIB);
    let (server, _) = served(&node, |spec| spec.memory_limit = limit).await;
    let held = tokio::spawn(get(server.local_addr(), "/hold"));
    until("it holds", || server.stats().memory_bytes > HELD).await;
    let (other, log) = served(&node, |spec| spec.memory_limit = limit).await;
    assert_eq!(get(other.local_addr(), "/hold").await.status, 503);
    assert!(logged(&log).last().unwrap().contains("the node has"));
    let grow = r#"(module (memory (export "memory") 1)
        (func (export "_start") (drop (memory.grow (i32.const 1024)))))"#;
    let mut spec = node.spec("command");
    spec.memory_limit = limit;
    let exit = node.runtime.run(&node.wat(grow).await, spec).await.unwrap().wait().await;
    assert_eq!((exit.code, exit.reason), (137, ExitReason::OutOfMemory), "{}", exit.message);
    assert_eq!(held.await.unwrap().status, 200);
}

#[tokio::test]
async fn the_code_of_a_module_is_the_pods_that_it_was_loaded_for() {
    let node = Node::trusting_anyone().await;
    let (first, _) = served(&node, |_| {}).await;
    let (second, _) = served(&node, |spec| spec.name = "default/other/app".into()).await;
    assert!(first.stats().code_bytes > 0);
    assert_eq!(second.stats().code_bytes, 0, "it finds it loaded");
}

#[tokio::test]
async fn a_swap_gives_the_container_no_second_limit() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.memory_limit = Some(HELD + 8 * MIB)).await;
    let address = server.local_addr();
    let next = node.module(&http_guest("changed")).await;
    let held = tokio::spawn(get(address, "/hold"));
    until("it holds", || server.stats().memory_bytes > HELD).await;
    server.swap(&next, spec).await.unwrap();
    assert_eq!(get(address, "/hold").await.status, 503);
    assert_eq!(held.await.unwrap().status, 200);
    let mut client = Client::connect(address).await;
    assert_eq!(client.get("/hold").await.unwrap().status, 200);
    assert_eq!(client.get("/version").await.unwrap().body, "changed");
}

#[tokio::test]
async fn what_each_instance_keeps_of_its_module_is_the_memory_of_its_container() {
    let node = Node::trusting_anyone().await;
    // Sixteen bytes for each element that may be copied into a table some day, or for each global.
    let elements = format!("(func $f) (elem func {})", "$f ".repeat(100_000));
    let globals = "(global (mut i32) (i32.const 1))".repeat(60_000);
    for (kept, too_little, enough) in [(elements, MIB, 2 * MIB), (globals, MIB / 2, 4 * MIB)] {
        let module = node.wat(&format!(r#"(module {kept} (func (export "_start")))"#)).await;
        let run = async |limit| {
            let mut spec = node.spec("command");
            spec.memory_limit = Some(limit);
            node.runtime.run(&module, spec).await
        };
        assert_eq!(run(too_little).await.unwrap_err().reason(), "CreateContainerConfigError");
        assert_eq!(run(enough).await.unwrap().wait().await.code, 0);
    }
}

#[tokio::test]
async fn what_begins_with_more_memory_than_its_limit_is_refused_and_limit_and_need_are_named() {
    let node = Node::trusting_anyone().await;
    let command = node.wat(r#"(module (memory 16) (func (export "_start")))"#).await;
    let table = node.wat(r#"(module (table 90000 funcref) (func (export "_start")))"#).await;
    let component = node
        .wat(
            r#"(component
            (core module $code (memory 16) (func (export "run") (result i32) (i32.const 0)))
            (core instance $code (instantiate $code))
            (func $run (result (result)) (canon lift (core func $code "run")))
            (instance $cli (export "run" (func $run)))
            (export "wasi:cli/run@0.2.0" (instance $cli)))"#,
        )
        .await;
    let refused = |message: String, whose: &str, needed: u64| {
        let named = message.split_once("begins with ").unwrap().1.split(';').next().unwrap().parse().unwrap();
        assert!((needed..needed + MIB / 2).contains(&named), "{message}");
        assert!(message.contains(&format!("the memory limit of the {whose} is 1024 bytes")), "{message}");
    };
    for (module, needed) in [(&command, MIB), (&table, 90_000 * 8), (&component, MIB)] {
        let mut spec = node.spec("command");
        spec.memory_limit = Some(1024);
        refused(node.runtime.run(module, spec).await.unwrap_err().to_string(), "container", needed);
        let mut spec = node.spec("command");
        spec.pod_memory = Some(node.runtime.pod_memory("uid", 1024));
        refused(node.runtime.run(module, spec).await.unwrap_err().to_string(), "pod", needed);
        let mut spec = node.spec("command");
        spec.memory_limit = Some(needed + MIB / 2);
        assert_eq!(node.runtime.run(module, spec).await.unwrap().wait().await.code, 0);
    }
    let (server, mut spec) = served(&node, |_| {}).await;
    spec.memory_limit = Some(1024);
    let module = node.module(&http_guest("changed")).await;
    let served = node.runtime.serve(&module, spec.clone(), &[any_port()]).await;
    refused(served.unwrap_err().to_string(), "container", 64 * 1024);
    refused(server.swap(&module, spec).await.unwrap_err().to_string(), "container", 64 * 1024);
    assert_eq!(get(server.local_addr(), "/version").await.body, "version", "a swap that is refused changes nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_stack_of_a_guest_that_computes_on_is_the_memory_of_its_container() {
    let node = Node::trusting_anyone().await;
    let module = node
        .wat(
            r#"(module
            (func $deep (param i32) (if (local.get 0)
              (then (call $deep (i32.sub (local.get 0) (i32.const 1))))
              (else (loop $forever (br $forever)))))
            (func (export "_start") (call $deep (i32.const 7500))))"#,
        )
        .await;
    let execution = node.runtime.run(&module, node.spec("deep")).await.unwrap();
    until("a third of a mebibyte counts", || execution.stats().memory_bytes > MIB / 3).await;
    let mut spec = node.spec("deep");
    spec.memory_limit = Some(MIB / 4);
    let exit = node.runtime.run(&module, spec).await.unwrap().wait().await;
    assert_eq!((exit.code, exit.reason), (137, ExitReason::OutOfMemory), "{}", exit.message);
}

#[tokio::test]
async fn headers_that_a_guest_makes_without_end_are_its_own_memory() {
    let node = Node::trusting_anyone().await;
    let (server, spec) = served(&node, |spec| spec.memory_limit = Some(2 * MIB)).await;
    let module = node.wat(FIELDS).await;
    let mut spec = spec;
    spec.log = node.spec("fields").log;
    let fields = node.runtime.serve(&module, spec.clone(), &[any_port()]).await.unwrap();
    assert_eq!(get(fields.local_addr(), "/").await.status, 500);
    assert!(logged(&spec).last().unwrap().contains("its limit is 2097152"), "{:?}", logged(&spec));
    assert_eq!(fields.stats().memory_bytes, 0);
    drop(server);
}

/// Makes maps of headers, each with a value of 64 KiB, until it cannot.
const FIELDS: &str = r#"(component
  (import "wasi:http/types@0.2.0" (instance $types
    (export "fields" (type $fields (sub resource)))
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
    (type $error' (variant (case "invalid-syntax") (case "forbidden") (case "immutable")))
    (export "header-error" (type $error (eq $error')))
    (type $field-value' (list u8))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]fields.append" (func (param "self" (borrow $fields)) (param "name" string) (param "value" $field-value')
      (result (result (error $error)))))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $out))
  (core module $libc (memory (export "memory") 2)
    (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 0)))
  (core instance $libc (instantiate $libc))
  (core func $new (canon lower (func $types "[constructor]fields")))
  (core func $append (canon lower (func $types "[method]fields.append") (memory (core memory $libc "memory"))))
  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "new" (func $new (result i32)))
    (import "host" "append" (func $append (param i32 i32 i32 i32 i32 i32)))
    (data (i32.const 16) "x")
    (func (export "handle") (param i32 i32)
      (memory.fill (i32.const 1024) (i32.const 97) (i32.const 65536))
      (loop $more
        (call $append (call $new) (i32.const 16) (i32.const 1) (i32.const 1024) (i32.const 65536) (i32.const 0))
        (br $more))))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "host" (instance (export "new" (func $new)) (export "append" (func $append))))))
  (func $handle (param "request" (own $request)) (param "response-out" (own $out)) (canon lift (core func $code "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))"#;
