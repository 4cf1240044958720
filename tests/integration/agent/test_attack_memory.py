"""Attacks on the node's memory: no pod takes more than its part, whatever it asks for and however often."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import wasmtime

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, layout, served


def _attack(pods: list[Pod], requests: int, mib: int) -> set[int]:
    """So many requests at once that each hold so much; give the statuses of their answers."""
    with ThreadPoolExecutor(requests) as pool:
        ask = [pods[number % len(pods)] for number in range(requests)]
        return set(pool.map(lambda pod: pod.get("/alloc", mib=mib, ms=300, timeout=60).status_code, ask))


def test_sixty_requests_of_forty_mebibytes_take_no_more_than_the_limit_of_their_container(
    space: Workspace, agent: Agent
) -> None:
    neighbour = space.serve().wait_ready()
    pod = space.serve(resources={"limits": {"memory": "64Mi"}}).wait_ready()
    pod.get("/alloc", mib=40)
    with agent.bounded(64):
        # How many are served is a race; the others are told so, and nothing else.
        assert {503} <= _attack([pod], 60, 40) <= {200, 503}
    assert neighbour.get("/version").ok
    assert pod.get("/alloc", mib=40).status_code == 200
    assert pod.status().restart_count == 0
    assert "no memory is left" in pod.logs()


def test_the_containers_of_a_pod_share_the_limit_of_the_pod(space: Workspace, agent: Agent) -> None:
    ports = [space.port(), space.port()]
    containers = [served(space.http_image, port, name=f"c{number}") for number, port in enumerate(ports)]
    limit: Manifest = {"limits": {"memory": "64Mi"}}
    pod = space.pod(*containers, resources=limit).wait_ready()
    ways = [dataclasses.replace(pod, port=port) for port in ports]
    with agent.bounded(64):
        assert {503} <= _attack(ways, 40, 40) <= {200, 503}


def test_a_pod_without_a_limit_takes_a_quarter_of_what_the_node_has_for_guests(
    make_agent: AgentFactory, make_workspace: Callable[[Agent], Workspace]
) -> None:
    # What is admitted, and not who is evicted once it is.
    eviction = "--eviction-hard=allocatableMemory.available<0,nodefs.available<1%,nodefs.inodesFree<1%"
    small = make_agent("small", "--guest-memory=400Mi", eviction)
    small.start()
    space = make_workspace(small)
    pod, neighbour = space.serve().wait_ready(), space.serve().wait_ready()
    with small.bounded(100):
        assert {503} <= _attack([pod], 40, 40) <= {200, 503}
    # Nor do several of them end the node.
    pods = [pod, *(space.serve().wait_ready() for _ in range(5))]
    with small.bounded(400):
        assert _attack(pods, 60, 40) <= {200, 503}
    began = time.monotonic()
    assert neighbour.get("/version").ok
    assert time.monotonic() - began < 10


GROWS = {
    "a second memory": """(memory 1) (memory $m 1)
        (func (export "_start") (loop $l (drop (memory.grow $m (i32.const 16))) (br $l)))""",
    "a memory of 64 bits": """(memory i64 1)
        (func (export "_start") (loop $l (drop (memory.grow (i64.const 16))) (br $l)))""",
    "a list of structs": """(type $n (struct (field (ref null $n))))
        (global $g (mut (ref null $n)) (ref.null $n))
        (func (export "_start") (loop $l (global.set $g (struct.new $n (global.get $g))) (br $l)))""",
    "a list of arrays": """(type $a (array (mut i64)))
        (type $n (struct (field (ref null $n)) (field (ref $a))))
        (global $g (mut (ref null $n)) (ref.null $n))
        (func (export "_start") (loop $l
            (global.set $g (struct.new $n (global.get $g) (array.new_default $a (i32.const 100000))))
            (br $l)))""",
    "a table": """(table $t 1 anyref)
        (func (export "_start") (loop $l
            (br_if $l (i32.ne (table.grow $t (ref.i31 (i32.const 1)) (i32.const 10000)) (i32.const -1)))
            unreachable))""",
}


def _command(space: Workspace, body: str) -> Pod:
    module = bytes(wasmtime.wat2wasm(f"(module {body})"))
    image = space.registry.push("grows", layout(module), space.unique("grows"))
    return space.run(image=image, resources={"limits": {"memory": "64Mi"}})


@pytest.mark.parametrize("body", GROWS.values(), ids=GROWS)
def test_whatever_a_guest_grows_has_an_end(space: Workspace, agent: Agent, body: str) -> None:
    with agent.bounded(64):
        _command(space, body).wait_phase("Failed", timeout=60)


def test_a_memory_that_threads_would_share_is_refused(space: Workspace) -> None:
    pod = _command(space, '(memory 1 1000 shared) (func (export "_start"))')
    assert "shared memories" in pod.wait_waiting("InvalidImage")
