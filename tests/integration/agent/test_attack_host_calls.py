"""Attacks through calls to the host: what the node does and keeps for a guest is bounded as the guest is."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import wasmtime

from tests.integration.agent.harness import MIB, Agent, Manifest, Pod, Workspace, layout
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

# Each request makes something so many times, in a few milliseconds, and then waits.
WAITS = """(component
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
    (type $name-and-value (tuple string $field-value'))
    (export "[static]fields.from-list" (func (param "entries" (list $name-and-value))
      (result (result (own $fields) (error $error)))))
    (export "[method]fields.set" (func (param "self" (borrow $fields)) (param "name" string)
      (param "value" (list $field-value')) (result (result (error $error)))))
    (export "[method]fields.delete" (func (param "self" (borrow $fields)) (param "name" string)
      (result (result (error $error)))))
    (export "[method]fields.append" (func (param "self" (borrow $fields)) (param "name" string)
      (param "value" $field-value') (result (result (error $error)))))))
  (alias export $types "incoming-request" (type $request))
  (alias export $types "response-outparam" (type $out))
  (core module $libc (memory (export "memory") {pages}))
  (core instance $libc (instantiate $libc))
  (core func $new (canon lower (func $types "[constructor]fields")))
  (core func $append (canon lower (func $types "[method]fields.append")
    (memory (core memory $libc "memory"))))
  (core func $from-list (canon lower (func $types "[static]fields.from-list")
    (memory (core memory $libc "memory"))))
  (core func $set (canon lower (func $types "[method]fields.set") (memory (core memory $libc "memory"))))
  (core func $delete (canon lower (func $types "[method]fields.delete")
    (memory (core memory $libc "memory"))))
  (core func $sleep (canon lower (func $clock "subscribe-duration")))
  (core func $block (canon lower (func $poll "[method]pollable.block")))
  (core module $code
    (import "libc" "memory" (memory 1))
    (import "host" "new" (func $new (result i32)))
    (import "host" "append" (func $append (param i32 i32 i32 i32 i32 i32)))
    (import "host" "from-list" (func $from-list (param i32 i32 i32)))
    (import "host" "set" (func $set (param i32 i32 i32 i32 i32 i32)))
    (import "host" "delete" (func $delete (param i32 i32 i32 i32)))
    (import "host" "sleep" (func $sleep (param i64) (result i32)))
    (import "host" "block" (func $block (param i32)))
    (data (i32.const 16) "x")
    ;; Names at 65536, each of three letters, and a list of them with empty values at 8192.
    (func $names (local $at i32)
      (loop $more
        (i32.store (i32.add (i32.const 65536) (i32.shl (local.get $at) (i32.const 2)))
          (i32.add (i32.const 0x616161) (i32.add (i32.and (local.get $at) (i32.const 15))
            (i32.add (i32.shl (i32.and (local.get $at) (i32.const 0xf0)) (i32.const 4))
              (i32.shl (i32.and (local.get $at) (i32.const 0xf00)) (i32.const 8))))))
        (i32.store (i32.add (i32.const 8192) (i32.shl (local.get $at) (i32.const 4)))
          (i32.add (i32.const 65536) (i32.shl (local.get $at) (i32.const 2))))
        (i32.store offset=4 (i32.add (i32.const 8192) (i32.shl (local.get $at) (i32.const 4))) (i32.const 3))
        (br_if $more (i32.lt_u (local.tee $at (i32.add (local.get $at) (i32.const 1))) (i32.const 1700)))))
    (func $deep (param i32)
      (if (local.get 0) (then (call $deep (i32.sub (local.get 0) (i32.const 1))))))
    (func (export "handle") (param i32 i32) (local $made i32) (local $map i32)
      (loop $more
        {each}
        (br_if $more
          (i32.lt_u (local.tee $made (i32.add (local.get $made) (i32.const 1))) (i32.const {times}))))
      (call $block (call $sleep (i64.const {ms}000000)))))
  (core instance $code (instantiate $code
    (with "libc" (instance $libc))
    (with "host" (instance (export "new" (func $new)) (export "append" (func $append))
      (export "from-list" (func $from-list)) (export "set" (func $set)) (export "delete" (func $delete))
      (export "sleep" (func $sleep)) (export "block" (func $block))))))
  (func $handle (param "request" (own $request)) (param "response-out" (own $out))
    (canon lift (core func $code "handle")))
  (instance $handler (export "handle" (func $handle)))
  (export "wasi:http/incoming-handler@0.2.0" (instance $handler)))"""


MAPS = {
    "a long value": """(memory.fill (i32.const 65536) (i32.const 97) (i32.const 65536))
        (call $append (call $new)
          (i32.const 16) (i32.const 1) (i32.const 65536) (i32.const 65536) (i32.const 0))""",
    "many empty ones": "(call $names) (call $from-list (i32.const 8192) (i32.const 1700) (i32.const 0))",
    # 3,200 empty values of one name, and none of them any more.
    "many that were removed": """(memory.fill (i32.const 65536) (i32.const 0) (i32.const 32768))
        (call $set (local.tee $map (call $new))
          (i32.const 16) (i32.const 1) (i32.const 65536) (i32.const 3200) (i32.const 0))
        (call $delete (local.get $map) (i32.const 16) (i32.const 1) (i32.const 0))""",
}


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


@pytest.mark.parametrize("kind", MAPS)
def test_what_requests_hold_while_they_wait_is_the_memory_of_their_container(
    space: Workspace, agent: Agent, kind: str
) -> None:
    neighbour = space.serve().wait_ready()
    # So few that it waits before its first slice ends, or so many that it does not.
    times, requests = (8, 300) if kind == "a long value" else (60, 60)
    text = WAITS.format(each=MAPS[kind], times=times, pages=2, ms=5000)
    pod = space.serve(
        image=_push(space, text),
        resources={"limits": {"memory": "64Mi"}},
        pod={"annotations": {"krustlet.dev/max-concurrent-requests": "300"}},
    ).wait_ready()
    with agent.bounded(64), ThreadPoolExecutor(requests) as pool:
        answers = pool.map(lambda _: pod.get("/", timeout=60).status_code, range(requests))
        assert neighbour.get("/version").ok
        # None gives an answer; most find no room.
        assert set(answers) <= {500, 503}


def test_what_a_guest_has_touched_of_its_stack_is_the_memory_of_its_container(
    space: Workspace, agent: Agent
) -> None:
    neighbour = space.serve().wait_ready()
    # A third of a mebibyte each.
    text = WAITS.format(each="(call $deep (i32.const 7500))", times=1, pages=1, ms=10_000)
    pod = space.serve(
        image=_push(space, text),
        resources={"limits": {"memory": "48Mi"}},
        pod={"annotations": {"krustlet.dev/max-concurrent-requests": "400"}},
    ).wait_ready()
    before = agent.resident_bytes()
    with agent.bounded(48), ThreadPoolExecutor(400) as pool:
        answers = pool.map(lambda _: pod.get("/", timeout=60).status_code, range(400))
        assert neighbour.get("/version").ok
        assert set(answers) == {500, 503}
    # Nor does it stay with the node.
    until(lambda: agent.resident_bytes() < before + 48 * MIB, "the stacks to be given back")


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


def test_what_streams_have_read_of_a_file_is_the_memory_of_the_container_that_waits_for_them(
    space: Workspace, agent: Agent
) -> None:
    (agent.host_directory / "read").mkdir()
    (agent.host_directory / "read" / "f").write_bytes(bytes(64 * 1024))
    volume = {"volumes": [{"name": "v", "hostPath": {"path": str(agent.host_directory / "read")}}]}
    with agent.bounded(64):
        assert _ended(space.run("ahead", "/v/f", "4000", pod=volume, **MOUNTED))["reason"] == "OOMKilled"
    # What one has dropped is given back.
    dropped = ["ahead", "/v/f", "900", "then"] * 9
    assert _ended(space.run(*dropped, "print", "x", pod=volume, **MOUNTED))["code"] == 0
