"""The runner of others' preview 1 tests, on a suite that is written here."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conformance.wasi import read_suite, run_suite, table
from tests.integration.agent.harness import Workspace

# Prints its last argument to stdout and its first variable to stderr, and exits with 3 where its first
# preopened directory has no file "here".
MODULE = r"""(module
  (import "wasi_snapshot_preview1" "args_sizes_get" (func $args_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "args_get" (func $args_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_sizes_get" (func $environ_sizes_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "environ_get" (func $environ_get (param i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "proc_exit" (func $proc_exit (param i32)))
  (import "wasi_snapshot_preview1" "path_open"
    (func $path_open (param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "here")
  (func $print (param $stream i32) (param $text i32)
    (local $length i32)
    (block $end
      (loop $next
        (br_if $end (i32.eqz (i32.load8_u (i32.add (local.get $text) (local.get $length)))))
        (local.set $length (i32.add (local.get $length) (i32.const 1)))
        (br $next)))
    (i32.store (i32.const 32) (local.get $text))
    (i32.store (i32.const 36) (local.get $length))
    (drop (call $fd_write (local.get $stream) (i32.const 32) (i32.const 1) (i32.const 40))))
  (func (export "_start")
    (drop (call $args_sizes_get (i32.const 48) (i32.const 52)))
    (drop (call $args_get (i32.const 1024) (i32.const 4096)))
    (drop (call $environ_sizes_get (i32.const 56) (i32.const 60)))
    (drop (call $environ_get (i32.const 2048) (i32.const 8192)))
    (call $print (i32.const 1)
      (i32.load (i32.add (i32.const 1020) (i32.mul (i32.load (i32.const 48)) (i32.const 4)))))
    (if (i32.load (i32.const 56)) (then (call $print (i32.const 2) (i32.load (i32.const 2048)))))
    (if (call $path_open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 4) (i32.const 0)
          (i64.const 2) (i64.const 0) (i32.const 0) (i32.const 64))
      (then (call $proc_exit (i32.const 3))))))
"""


def _suite(root: Path) -> Path:
    """Two cases that pass, two that must not, and one that asks for more."""
    directory = root / "suite"
    (directory / "deep" / "files.dir").mkdir(parents=True)
    (directory / "deep" / "files.dir" / "here").touch()
    specifications = {
        "deep/whole": {
            "args": ["x", "$(HOME) is no variable here\n"],
            "env": {"WORD": "a $b\n"},
            "dirs": ["files.dir"],
            "exit_code": 0,
            "stdout": "$(HOME) is no variable here\n",
            "stderr": "WORD=a $b\n",
        },
        "code": {"args": ["\n"], "exit_code": 3},
        "wrong-code": {"args": ["\n"], "exit_code": 0},
        "wrong-text": {"args": ["one\n"], "exit_code": 3, "stdout": "two\n"},
        "later": {"operations": [{"type": "run"}]},
    }
    for name, specification in specifications.items():
        (directory / f"{name}.wat").write_text(MODULE)
        (directory / f"{name}.json").write_text(json.dumps(specification))
    return directory


def test_a_suite_of_preview_1_modules_runs_as_pods(space: Workspace, tmp_path: Path) -> None:
    results = list(run_suite(space, read_suite(_suite(tmp_path))))
    shown = table(results)
    outcomes = {result.case.name: result.outcome for result in results}
    assert outcomes == {
        "code": "ok",
        "deep/whole": "ok",
        "later": "skipped",
        "wrong-code": "failed",
        "wrong-text": "failed",
    }, shown
    assert "exit code 3, expected 0" in shown
    assert "stdout 'one\\n', expected 'two\\n'" in shown
    assert shown.endswith("2 ok, 2 failed, 1 skipped")
