"""Attacks on the compiler: a module made for it costs its own pod, not the node nor others."""

from __future__ import annotations

from pathlib import Path

import wasmtime

from tests.integration.agent.harness import Agent, Pod, Workspace, layout
from tests.waiting import until

MIB = 1024 * 1024


def _large(functions: int, name: str) -> bytes:
    """A valid command that takes the compiler a while."""
    body = "(i32.const 3) (i32.mul) " * 50
    function = f"(func (param i32) (result i32) (local.get 0) {body})"
    start = f'(func (export "_start")) (func (export "{name}"))'
    return bytes(wasmtime.wat2wasm(f"(module {function * functions} {start})"))


def _push(space: Workspace, functions: int) -> str:
    name = space.unique("large")
    return space.registry.push("large", layout(_large(functions, name)), name)


def _compilers(agent: Agent) -> list[int]:
    """Processes of the agent's that compile."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
            command = (path.parent / "cmdline").read_bytes()
        except OSError:
            continue
        if int(fields[1]) == agent.pid and b"compile-module" in command and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def _start_compiling(space: Workspace) -> Pod:
    pod = space.run(image=_push(space, 30_000))
    until(lambda: _compilers(space.agent), "the compiler to run", every=0.02)
    return pod


def test_pods_are_served_and_started_while_a_module_keeps_the_compiler_busy(space: Workspace) -> None:
    neighbour = space.serve().wait_ready()
    attack = _start_compiling(space)
    for _ in range(20):
        assert neighbour.get("/version", timeout=5).ok
    space.serve().wait_ready()
    # What nobody waits for any more is ended.
    attack.delete(grace=0)
    until(lambda: not _compilers(space.agent), "the compiler to be ended", timeout=20)
    assert space.agent.condition("Ready") == "True"


def test_the_compiler_sees_nothing_of_the_agents_and_goes_with_it_first_where_memory_runs_out(
    space: Workspace, agent: Agent
) -> None:
    attack = _start_compiling(space)
    process = Path("/proc") / str(_compilers(agent)[0])
    until(lambda: "Seccomp:\t2" in (process / "status").read_text(), "its sandbox", every=0.01)
    assert (process / "oom_score_adj").read_text().strip() == "1000"
    limits = (process / "limits").read_text()
    assert all("unlimited" not in line for line in limits.splitlines() if "address space" in line)
    assert all("unlimited" not in line for line in limits.splitlines() if "cpu time" in line)
    # Three pipes: no file, no socket, no key.
    assert {path.name for path in (process / "fd").iterdir()} <= {"0", "1", "2"}
    environment = (process / "environ").read_bytes()
    assert b"KRUSTLET" not in environment
    attack.delete(grace=0)


def test_compiling_leaves_no_memory_behind_in_the_agent(space: Workspace, agent: Agent) -> None:
    space.run(image=_push(space, 1_000)).wait_phase("Succeeded", timeout=120)
    before = agent.resident_bytes()
    for _ in range(3):
        space.run(image=_push(space, 1_000)).wait_phase("Succeeded", timeout=120)
    grown = (agent.resident_bytes() - before) / MIB
    assert grown < 40, f"the agent grew by {grown:.0f} MiB"


def test_what_cannot_be_run_is_refused_in_words_and_without_the_compiler(
    space: Workspace, agent: Agent
) -> None:
    body = "(i32.const 3) (i32.mul) " * 50
    module = f"(core module {f'(func (param i32) (result i32) (local.get 0) {body})' * 4000})"
    newer = '(import "wasi:http/types@0.3.0" (instance (export "fields" (type (sub resource)))))'
    image = space.registry.push("newer", layout(bytes(wasmtime.wat2wasm(f"(component {newer} {module})"))))
    before = agent.children_cpu_seconds()
    message = space.serve(image=image).wait_waiting("InvalidImage")
    assert agent.children_cpu_seconds() - before < 1
    for part in ("WASI 0.3.0", "wasi:http/types@0.3.0", "WASI 0.2", "wasm32-wasip2"):
        assert part in message
