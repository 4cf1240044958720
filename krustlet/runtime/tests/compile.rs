//! Compiling, from outside: what a module made for it can do to the compiler, and what is refused without it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::{Node, get, http_guest, served, until};
use futures::future::join_all;
use krustlet_runtime::Compiler;
use std::path::Path;
use std::time::{Duration, Instant};

/// A module that takes the compiler seconds.
fn large(functions: usize) -> Vec<u8> {
    let function = format!("(func (param i32) (result i32) (local.get 0) {})", "(i32.const 3) (i32.mul) ".repeat(50));
    wat::parse_str(format!(r#"(module {} (func (export "_start")))"#, function.repeat(functions))).unwrap()
}

/// Processes that this one has started and that are still alive.
fn children() -> usize {
    let parent = std::process::id().to_string();
    let of_ours = |directory: &Path| {
        let stat = std::fs::read_to_string(directory.join("stat")).unwrap_or_default();
        // After the name in brackets: state, parent.
        let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
        fields.get(1) == Some(&parent.as_str()) && fields[0] != "Z"
    };
    std::fs::read_dir("/proc").unwrap().filter(|entry| of_ours(&entry.as_ref().unwrap().path())).count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_compilation_goes_on_while_anyone_waits_and_ends_when_nobody_does() {
    let node = Node::trusting_anyone().await;
    let image = node.image(&large(20_000)).await;
    let gone = tokio::time::timeout(Duration::from_millis(50), node.runtime.load(&image)).await;
    assert!(gone.is_err(), "it was compiled before anyone could go");
    until("the compiler is gone", || children() == 0).await;
    // One of two goes: what it began is not begun again.
    let small = node.image(&large(500)).await;
    let (runtime, wanted) = (node.runtime.clone(), small.clone());
    let first = tokio::spawn(async move { runtime.load(&wanted).await });
    until("it is being compiled", || children() > 0).await;
    let second = node.runtime.load(&small);
    first.abort();
    second.await.unwrap();
    assert_eq!(node.metric(r#"krustlet_module_loads_total{source="compiled"}"#), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pod_has_a_part_of_the_nodes_memory_for_the_code_of_its_modules_and_what_others_run_is_free() {
    let node = Node::configured(|config| config.guest_memory = Some(16 << 20)).await;
    let run = async |pod: &str, functions: usize| {
        let module = node.module(&large(functions)).await;
        let mut spec = node.spec("command");
        spec.name = format!("default/{pod}/command");
        (node.runtime.run(&module, spec).await, module)
    };
    let mut loaded = Vec::new();
    let refused = loop {
        let (result, module) = run("greedy", 500 + loaded.len()).await;
        match result {
            // A pod is one for as long as it has a container.
            Ok(execution) => loaded.push((execution, module)),
            Err(error) => break error,
        }
        assert!(loaded.len() < 100);
    };
    assert!(!refused.is_permanent() && refused.to_string().contains("memory than a pod may have"), "{refused}");
    let (limit, used) = node.runtime.guest_memory();
    assert!(used < limit / 2, "{used}");
    assert!(run("greedy", 500).await.0.is_ok(), "what it has");
    let (other, module) = run("other", 400).await;
    let _other = other.unwrap();
    let of_other = node.runtime.run(&module, node.spec("command")).await;
    assert!(of_other.is_ok(), "what another pod has loaded");
}

#[tokio::test(flavor = "multi_thread")]
async fn pods_are_served_while_a_module_keeps_the_compiler_busy() {
    let node = Node::configured(|config| config.max_concurrent_compiles = 2).await;
    let (server, _) = served(&node, |_| {}).await;
    let image = node.image(&large(20_000)).await;
    let runtime = node.runtime.clone();
    let busy = tokio::spawn(async move { runtime.load(&image).await });
    until("the compiler is busy", || children() > 0).await;
    for reply in join_all((0..50).map(|_| get(server.local_addr(), "/version"))).await {
        assert_eq!(reply.status, 200);
    }
    // Another module is compiled beside it.
    node.module(&http_guest("another")).await;
    busy.abort();
}

#[tokio::test]
async fn a_compiler_that_is_ended_or_gives_no_code_costs_its_module_alone() {
    for (program, reason) in [
        ("/bin/false", "CreateContainerError"),
        ("/bin/true", "CreateContainerError"),
        ("/does/not/exist", "CreateContainerError"),
    ] {
        let node = Node::configured(|config| {
            config.compiler = Compiler { program: program.into(), arguments: Vec::new() };
        })
        .await;
        let image = node.image(&http_guest("version")).await;
        let error = node.runtime.load(&image).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
    }
}

#[tokio::test]
async fn what_the_node_does_not_offer_is_refused_without_compiling() {
    let node = Node::configured(|config| {
        config.compiler = Compiler { program: "/bin/false".into(), arguments: Vec::new() };
    })
    .await;
    let function = format!("(func (param i32) (result i32) (local.get 0) {})", "(i32.const 3) (i32.mul) ".repeat(50));
    let large = |import: &str| format!("(component {import} (core module {}))", function.repeat(5000));
    for (text, reason, words) in [
        (
            large(r#"(import "acme:secret/vault" (instance (export "open" (func))))"#),
            "UnsupportedImport",
            vec!["acme:secret/vault"],
        ),
        (
            large(r#"(import "wasi:http/types@0.3.0" (instance (export "fields" (type (sub resource)))))"#),
            "InvalidImage",
            vec!["WASI 0.3.0", "wasi:http/types@0.3.0", "WASI 0.2", "wasm32-wasip2"],
        ),
        (
            large(
                r#"(import "wasi:cli/run@0.3.0-rc-2026-01-06" (instance (export "run" (func async (result (result))))))"#,
            ),
            "InvalidImage",
            vec!["WASI 0.3.0-rc-2026-01-06"],
        ),
        ("(component)".into(), "InvalidImage", vec!["nothing to run"]),
        ("(module)".into(), "InvalidImage", vec!["_start", "wasm32-wasip1"]),
        (
            r#"(module (import "wbg" "f" (func)) (func (export "_start")))"#.into(),
            "UnsupportedImport",
            vec!["wbg.f", "JavaScript"],
        ),
    ] {
        let image = node.image(&wat::parse_str(&text).unwrap()).await;
        let began = Instant::now();
        let error = node.runtime.load(&image).await.unwrap_err();
        assert_eq!(error.reason(), reason, "{error}");
        for word in words {
            assert!(error.to_string().contains(word), "{word}: {error}");
        }
        assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
    }
}

#[tokio::test]
async fn sockets_may_be_imported_and_not_be_made() {
    let node = Node::trusting_anyone().await;
    let socket = r#"(component
      (import "wasi:sockets/network@0.2.0" (instance $network
        (type $code' (enum "unknown" "access-denied" "not-supported" "invalid-argument" "out-of-memory" "timeout"
          "concurrency-conflict" "not-in-progress" "would-block" "invalid-state" "new-socket-limit" "address-not-bindable"
          "address-in-use" "remote-unreachable" "connection-refused" "connection-reset" "connection-aborted"
          "datagram-too-large" "name-unresolvable" "temporary-resolver-failure" "permanent-resolver-failure"))
        (export "error-code" (type (eq $code')))
        (type $family' (enum "ipv4" "ipv6"))
        (export "ip-address-family" (type (eq $family')))))
      (alias export $network "error-code" (type $code))
      (alias export $network "ip-address-family" (type $family))
      (import "wasi:sockets/tcp@0.2.0" (instance $tcp (export "tcp-socket" (type (sub resource)))))
      (alias export $tcp "tcp-socket" (type $socket))
      (import "wasi:sockets/tcp-create-socket@0.2.0" (instance $create
        (alias outer 1 $socket (type $s')) (export "tcp-socket" (type $s (eq $s')))
        (alias outer 1 $code (type $c')) (export "error-code" (type $c (eq $c')))
        (alias outer 1 $family (type $f')) (export "ip-address-family" (type $f (eq $f')))
        (export "create-tcp-socket" (func (param "address-family" $f) (result (result (own $s) (error $c)))))))
      (core module $libc (memory (export "memory") 1))
      (core instance $libc (instantiate $libc))
      (core func $create (canon lower (func $create "create-tcp-socket") (memory (core memory $libc "memory"))))
      (core module $code
        (import "libc" "memory" (memory 1))
        (import "host" "create" (func $create (param i32 i32)))
        ;; An error of code 1, access-denied, is the way to end well.
        (func (export "run") (result i32)
          (call $create (i32.const 0) (i32.const 16))
          (i32.or (i32.ne (i32.load8_u (i32.const 16)) (i32.const 1)) (i32.ne (i32.load8_u (i32.const 20)) (i32.const 1)))))
      (core instance $code (instantiate $code (with "libc" (instance $libc))
        (with "host" (instance (export "create" (func $create))))))
      (func $run (result (result)) (canon lift (core func $code "run")))
      (instance $cli (export "run" (func $run)))
      (export "wasi:cli/run@0.2.0" (instance $cli)))"#;
    let exit = node.runtime.run(&node.wat(socket).await, node.spec("command")).await.unwrap().wait().await;
    assert_eq!(exit.code, 0, "{}", exit.message);
}
