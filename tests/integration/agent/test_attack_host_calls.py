"""Attacks through calls to the host: what the node does and keeps for a guest is bounded as the guest is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import wasmtime

from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, layout
from tests.waiting import until

LIMIT: Manifest = {"limits": {"memory": "64Mi"}}

# A command that writes so many bytes of line breaks to its log, so often, in one function without a loop.
WRITES = """(component
  (import "wasi:io/error@0.2.0" (instance $error (export "error" (type (sub resource)))))
  (alias export $error "error" (type $error-type))
  (import "wasi:io/streams@0.2.0" (instance $streams
    (export "output-stream" (type $output (sub resource)))
    (alias outer 1 $error-type (type $outer-error))
    (export "error" (type $own-error (eq $outer-error)))
    (type $stream-error' (variant (case "last-operation-failed" (own $own-error)) (case "closed")))
    (export "stream-error" (type $stream-error (eq $stream-error')))
    (export "[method]output-stream.write" (func (param "self" (borrow $output)) (param "contents" (list u8))
      (result (result (error $stream-error)))))))
  (alias export $streams "output-stream" (type $output-type))
  (import "wasi:cli/stdout@0.2.0" (instance $stdout
    (alias outer 1 $output-type (type $outer-output))
    (export "output-stream" (type $own-output (eq $outer-output)))
    (export "get-stdout" (func (result (own $own-output))))))
  (core module $libc (memory (export "memory") 300))
  (core instance $libc (instantiate $libc))
  (core func $stdout (canon lower (func $stdout "get-stdout")))
  (core func $write (canon lower (func $streams "[method]output-stream.write")
    (memory (core memory $libc "memory"))))
  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "stdout" (func $stdout (result i32)))
    (import "host" "write" (func $write (param i32 i32 i32 i32)))
    (func $all (param i32) {calls})
    (func (export "run") (result i32)
      (memory.fill (i32.const 1024) (i32.const 10) (i32.const {size}))
      (call $all (call $stdout))
      (i32.const 0)))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "host" (instance (export "stdout" (func $stdout)) (export "write" (func $write))))))
  (func $run (result (result)) (canon lift (core func $code "run")))
  (instance $cli (export "run" (func $run)))
  (export "wasi:cli/run@0.2.0" (instance $cli)))"""

# Each request makes a hundred maps of headers of 64 KiB in a millisecond or two, and waits for five seconds.
HEADERS = """(component
  (import "wasi:io/poll@0.2.0" (instance $poll
    (export "pollable" (type $pollable (sub resource)))
    (export "[method]pollable.block" (func (param "self" (borrow $pollable))))))
  (alias export $poll "pollable" (type $pollable-type))
  (import "wasi:clocks/monotonic-clock@0.2.0" (instance $clock
    (alias outer 1 $pollable-type (type $outer-pollable))
    (export "pollable" (type $own-pollable (eq $outer-pollable)))
    (type $duration' u64)
    (export "duration" (type $duration (eq $duration')))
    (export "subscribe-duration" (func (param "when" $duration) (result (own $own-pollable))))))
  (import "wasi:http/types@0.2.0" (instance $types
    (export "fields" (type $fields (sub resource)))
    (export "incoming-request" (type (sub resource)))
    (export "response-outparam" (type (sub resource)))
    (type $error' (variant (case "invalid-syntax") (case "forbidden") (case "immutable")))
    (export "header-error" (type $error (eq $error')))
    (type $field-value' (list u8))
    (export "[constructor]fields" (func (result (own $fields))))
    (export "[method]fields.append" (func (param "self" (borrow $fields)) (param "name" string)
      (param "value" $field-value') (result (result (error $error)))))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $out))
  (core module $libc (memory (export "memory") 2))
  (core instance $libc (instantiate $libc))
  (core func $new (canon lower (func $types "[constructor]fields")))
  (core func $append (canon lower (func $types "[method]fields.append")
    (memory (core memory $libc "memory"))))
  (core func $sleep (canon lower (func $clock "subscribe-duration")))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "new" (func $new (result i32)))
    (import "host" "append" (func $append (param i32 i32 i32 i32 i32 i32)))
    (import "host" "sleep" (func $sleep (param i64) (result i32)))
    (import "host" "block" (func $block (param i32)))
    (data (i32.const 16) "x")
    (func (export "handle") (param i32 i32) (local $made i32)
      (memory.fill (i32.const 1024) (i32.const 97) (i32.const 65536))
      (loop $more
        (call $append (call $new)
          (i32.const 16) (i32.const 1) (i32.const 1024) (i32.const 65536) (i32.const 0))
        (br_if $more
          (i32.lt_u (local.tee $made (i32.add (local.get $made) (i32.const 1))) (i32.const 100))))
      (call $block (call $sleep (i64.const 5000000000)))))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "host" (instance (export "new" (func $new)) (export "append" (func $append))
      (export "sleep" (func $sleep)) (export "block" (func $block))))))
  (func $handle (param "request" (own $request)) (param "response-out" (own $out))
    (canon lift (core func $code "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))"""


def _push(space: Workspace, text: str) -> str:
    return space.registry.push("host-calls", layout(bytes(wasmtime.wat2wasm(text))), space.unique("calls"))


def _writes(space: Workspace, size: int, count: int) -> str:
    call = f"(call $write (local.get 0) (i32.const 1024) (i32.const {size}) (i32.const 0))"
    return _push(space, WRITES.format(size=size, calls=call * count))


def _ended(pod: Pod) -> Manifest:
    ended = pod.wait_terminated()
    return {"reason": ended.reason, "code": ended.exit_code, "message": ended.message or ""}


def test_a_function_that_calls_the_host_again_and_again_gives_way_and_is_ended_at_once(
    space: Workspace,
) -> None:
    neighbour = space.serve().wait_ready()
    image = _writes(space, 65_536, 20_000)
    # As many as there are threads for guests, and more.
    attacks = [space.run(image=image, resources=LIMIT) for _ in range(4)]
    for attack in attacks:
        attack.wait_phase("Running")
    for _ in range(10):
        assert neighbour.get("/version", timeout=5).ok
    for attack in attacks:
        attack.delete(grace=0)
    until(
        lambda: neighbour.get("/version").elapsed.total_seconds() < 0.1, "the guests to be ended", timeout=10
    )


def test_more_than_a_stream_permits_is_no_write_and_the_log_stays_in_its_bounds(
    space: Workspace, agent: Agent
) -> None:
    image = _writes(space, 16_000_000, 1)
    with agent.bounded(64):
        pod = space.run(image=image, resources=LIMIT)
        assert "wrote 16000000 bytes at once" in _ended(pod)["message"]
    assert len(pod.logs()) < 1000


def test_what_requests_hold_while_they_wait_is_the_memory_of_their_container(
    space: Workspace, agent: Agent
) -> None:
    neighbour = space.serve().wait_ready()
    pod = space.serve(image=_push(space, HEADERS), resources=LIMIT).wait_ready()
    with agent.bounded(64), ThreadPoolExecutor(100) as pool:
        answers = pool.map(lambda _: pod.get("/", timeout=60).status_code, range(100))
        assert neighbour.get("/version").ok
        # None gives an answer; most find no room.
        assert set(answers) == {500, 503}


def _fill(agent: Agent, name: str, files: int) -> Manifest:
    """Make so many files with long names in a directory of the host's; give what a pod has it by."""
    directory = agent.host_directory / name
    directory.mkdir()
    for number in range(files):
        (directory / f"{number:0250}").touch()
    return {"volumes": [{"name": "v", "hostPath": {"path": str(directory)}}]}


MOUNTED: Manifest = {"volumeMounts": [{"name": "v", "mountPath": "/v"}], "resources": LIMIT}


def test_lists_of_a_directory_are_the_memory_of_the_container_that_keeps_them(
    space: Workspace, agent: Agent
) -> None:
    volume = _fill(agent, "listed", 10_000)
    with agent.bounded(64):
        assert _ended(space.run("lists", "/v", "60", pod=volume, **MOUNTED))["reason"] == "OOMKilled"
    # What one has dropped is given back.
    dropped = ["lists", "/v", "9", "then"] * 9
    assert _ended(space.run(*dropped, "print", "x", pod=volume, **MOUNTED))["code"] == 0


def test_a_directory_of_too_many_files_is_not_listed(space: Workspace, agent: Agent) -> None:
    volume = _fill(agent, "crowded", 45_000)
    with agent.bounded(64):
        component = space.run("ls", "/v", pod=volume, **MOUNTED)
        assert _ended(component)["code"] == 1
    assert "insufficient-memory" in component.logs()
