//! The files of core modules: what their descriptors are, and what they open while others change it.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod common;

use common::Node;
use krustlet_runtime::Mount;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use std::fs::File;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

const TOO_LONG: Duration = Duration::from_secs(60);

/// Runs a core module that has the directory as its descriptor 3; gives its exit code. `body` may use the functions here, 4
/// bytes at 0 for results, 1 kB from 512 for what is read, and the texts, which begin at 16, 64, 128 and 256.
async fn exit_code(node: &Node, directory: &Path, texts: [&str; 4], body: &str) -> i32 {
    let data: String =
        [16, 64, 128, 256].iter().zip(texts).map(|(at, text)| format!("(data (i32.const {at}) {text:?})")).collect();
    let module = node
        .wat(&format!(
            r#"(module
      (import "wasi_snapshot_preview1" "path_open"
        (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "path_filestat_set_times"
        (func $set_times (param i32 i32 i32 i32 i64 i64 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_close" (func $close (param i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_renumber" (func $renumber (param i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_read" (func $fd_read (param i32 i32 i32 i32) (result i32)))
      (import "wasi_snapshot_preview1" "fd_readdir" (func $readdir (param i32 i32 i32 i64 i32) (result i32)))
      (import "wasi_snapshot_preview1" "proc_exit" (func $exit (param i32)))
      (memory (export "memory") 1) {data}
      ;; Links are followed; to be read.
      (func $open (param $fd i32) (param $path i32) (param $length i32) (param $how i32) (result i32)
        (call $path_open (local.get $fd) (i32.const 1) (local.get $path) (local.get $length) (local.get $how)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 0)))
      ;; The first byte of what the descriptor has next.
      (func $read (param $fd i32) (result i32)
        (i32.store (i32.const 4) (i32.const 512)) (i32.store (i32.const 8) (i32.const 1))
        (drop (call $fd_read (local.get $fd) (i32.const 4) (i32.const 1) (i32.const 12)))
        (i32.load8_u (i32.const 512)))
      (func $expect (param $step i32) (param $result i32) (param $expected i32)
        (if (i32.ne (local.get $result) (local.get $expected)) (then (call $exit (local.get $step)))))
      (func (export "_start") (local $times i32) (local $error i32) (local $seen i32) {body}))"#
        ))
        .await;
    let mut spec = node.spec("command");
    spec.mounts =
        vec![Mount { directory: Arc::new(File::open(directory).unwrap()), guest: "/data".into(), read_only: false }];
    let execution = node.runtime.run(&module, spec).await.unwrap();
    let exit = tokio::time::timeout(TOO_LONG, execution.wait()).await.unwrap();
    assert_eq!(exit.message, "");
    exit.code
}

/// Makes `name` a file and a FIFO in turn, as long as it lives.
struct Swapping {
    stop: Arc<AtomicBool>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl Swapping {
    fn start(directory: &Path) -> Self {
        let path = |name: &str| directory.join(name);
        std::fs::write(path("file"), "content").unwrap();
        mknodat(CWD, path("fifo"), FileType::Fifo, Mode::RWXU, 0).unwrap();
        std::fs::hard_link(path("file"), path("name")).unwrap();
        let [file, fifo, next, name] = ["file", "fifo", "next", "name"].map(path);
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = stop.clone();
        let thread = std::thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                for kind in [&fifo, &file] {
                    std::fs::hard_link(kind, &next).unwrap();
                    std::fs::rename(&next, &name).unwrap();
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Swapping {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = self.thread.take().map(std::thread::JoinHandle::join);
    }
}

/// Does something over and over, until it was done and refused, and so often.
fn until_done_and_refused(something: &str) -> String {
    format!(
        "(loop $more
          (local.set $error {something})
          (if (local.get $error)
            (then
              (call $expect (i32.const 1) (local.get $error) (i32.const 63))
              (local.set $seen (i32.or (local.get $seen) (i32.const 2))))
            (else (local.set $seen (i32.or (local.get $seen) (i32.const 1)))))
          (local.set $times (i32.add (local.get $times) (i32.const 1)))
          (br_if $more (i32.or (i32.lt_u (local.get $times) (i32.const 2000)) (i32.ne (local.get $seen) (i32.const 3)))))"
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fifo_that_is_put_in_a_files_place_at_any_moment_is_refused_and_waited_for_by_nobody() {
    let node = Node::trusting_anyone().await;
    let directory = tempfile::tempdir().unwrap();
    let _swapping = Swapping::start(directory.path());
    let opened = "(call $open (i32.const 3) (i32.const 16) (i32.const 4) (i32.const 0))";
    let times = "(call $set_times (i32.const 3) (i32.const 1) (i32.const 16) (i32.const 4)
        (i64.const 0) (i64.const 0) (i32.const 10))";
    let closed = "(if (i32.eqz (local.get $error)) (then (drop (call $close (i32.load (i32.const 0))))))";
    let open = until_done_and_refused(opened).replacen("(if", &format!("{closed} (if"), 1);
    for body in [open, until_done_and_refused(times)] {
        assert_eq!(exit_code(&node, directory.path(), ["name", "", "", ""], &body).await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_descriptor_is_what_was_opened_for_it_wherever_it_is_moved() {
    let node = Node::trusting_anyone().await;
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    std::fs::create_dir(path("d")).unwrap();
    std::fs::write(path("file"), "outer").unwrap();
    std::fs::write(path("d/file"), "inner").unwrap();
    let body = "
      (call $expect (i32.const 1) (call $open (i32.const 3) (i32.const 64) (i32.const 1) (i32.const 2)) (i32.const 0))
      (call $expect (i32.const 2) (i32.load (i32.const 0)) (i32.const 4))
      (call $expect (i32.const 3) (call $open (i32.const 4) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 0))
      (call $expect (i32.const 4) (call $read (i32.const 5)) (i32.const 105))
      ;; A file is no directory, and neither is what nobody opened, nor the standard input.
      (call $expect (i32.const 5) (call $open (i32.const 5) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 54))
      (call $expect (i32.const 6) (call $open (i32.const 9) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 8))
      (call $expect (i32.const 7) (call $open (i32.const 0) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 8))
      ;; The mount in the place of the inner directory, and the inner file in the place of the outer one.
      (call $expect (i32.const 8) (call $renumber (i32.const 3) (i32.const 4)) (i32.const 0))
      (call $expect (i32.const 9) (call $open (i32.const 4) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 0))
      (local.set $seen (i32.load (i32.const 0)))
      (call $expect (i32.const 10) (call $read (local.get $seen)) (i32.const 111))
      (call $expect (i32.const 11) (call $renumber (i32.const 5) (local.get $seen)) (i32.const 0))
      (call $expect (i32.const 12) (call $read (local.get $seen)) (i32.const 110))
      (call $expect (i32.const 13) (call $open (local.get $seen) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 54))
      (call $expect (i32.const 14) (call $close (i32.const 4)) (i32.const 0))
      (call $expect (i32.const 15) (call $open (i32.const 4) (i32.const 16) (i32.const 4) (i32.const 0)) (i32.const 8))
      (call $expect (i32.const 16) (call $readdir (i32.const 4) (i32.const 512) (i32.const 9) (i64.const 0) (i32.const 0))
        (i32.const 8))";
    assert_eq!(exit_code(&node, directory.path(), ["file", "d", "", ""], body).await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_outside_of_the_mount_is_opened_and_no_text_that_is_no_path() {
    let node = Node::trusting_anyone().await;
    let directory = tempfile::tempdir().unwrap();
    let (mount, outside) = (directory.path().join("mount"), directory.path().join("outside"));
    std::fs::create_dir(&mount).unwrap();
    std::fs::write(&outside, "x").unwrap();
    std::os::unix::fs::symlink("../outside", mount.join("link")).unwrap();
    let open = |step: i32, path: i32, length: usize, error: i32| {
        format!(
            "(call $expect (i32.const {step})
               (call $open (i32.const 3) (i32.const {path}) (i32.const {length}) (i32.const 0)) (i32.const {error}))"
        )
    };
    let texts = ["../outside", "link", "/etc/hosts", "none"];
    let [escaped, absent] = [63, 44];
    let body = [
        open(1, 16, texts[0].len(), escaped),
        open(2, 64, texts[1].len(), escaped),
        open(3, 128, texts[2].len(), escaped),
        open(4, 256, texts[3].len(), absent),
        open(5, 256, 0, absent),
        // Ends in the middle of nothing but zeros, which no path has in it.
        open(6, 300, 8, 28),
    ]
    .concat();
    assert_eq!(exit_code(&node, &mount, texts, &body).await, 0);
}
