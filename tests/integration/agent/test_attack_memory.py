"""Attacks on the node's memory: no pod takes more than its part, whatever it asks for and however often."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.integration.agent.conftest import AgentFactory
from tests.integration.agent.harness import Agent, Manifest, Pod, Workspace, served

MIB = 1024 * 1024


def _attack(pods: list[Pod], agent: Agent, requests: int, mib: int) -> tuple[list[int], float]:
    """So many requests at once that each hold so much; give statuses and by how many MiB the agent grew."""
    before = most = agent.resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.02):
            most = max(most, agent.resident_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(requests) as pool:
            ask = [pods[number % len(pods)] for number in range(requests)]
            codes = list(
                pool.map(lambda pod: pod.get("/alloc", mib=mib, ms=300, timeout=60).status_code, ask)
            )
    finally:
        done.set()
        watcher.join()
    return codes, (most - before) / MIB


def test_sixty_requests_of_forty_mebibytes_take_no_more_than_the_limit_of_their_container(
    space: Workspace, agent: Agent
) -> None:
    neighbour = space.serve().wait_ready()
    pod = space.serve(resources={"limits": {"memory": "64Mi"}}).wait_ready()
    pod.get("/alloc", mib=40)
    codes, grown = _attack([pod], agent, 60, 40)
    # How many are served is a race; the others are told so, and nothing else.
    assert {503} <= set(codes) <= {200, 503}, codes
    # The limit, and what sixty connections and their answers take.
    assert grown < 64 + 48, f"the agent grew by {grown:.0f} MiB"
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
    codes, grown = _attack(ways, agent, 40, 40)
    assert {503} <= set(codes) <= {200, 503}, codes
    assert grown < 64 + 48, f"the agent grew by {grown:.0f} MiB"


def test_a_pod_without_a_limit_takes_a_quarter_of_what_the_node_has_for_guests(
    make_agent: AgentFactory, make_workspace: Callable[[Agent], Workspace]
) -> None:
    # What is admitted, and not who is evicted once it is.
    eviction = "--eviction-hard=allocatableMemory.available<0,nodefs.available<1%,nodefs.inodesFree<1%"
    small = make_agent("small", "--guest-memory=400Mi", eviction)
    small.start()
    space = make_workspace(small)
    pod, neighbour = space.serve().wait_ready(), space.serve().wait_ready()
    codes, grown = _attack([pod], small, 40, 40)
    assert {503} <= set(codes) <= {200, 503}, codes
    assert grown < 100 + 48, f"the agent grew by {grown:.0f} MiB"
    # Nor do several of them end the node.
    pods = [pod, *(space.serve().wait_ready() for _ in range(5))]
    codes, grown = _attack(pods, small, 60, 40)
    assert set(codes) <= {200, 503}, codes
    assert grown < 400 + 48, f"the agent grew by {grown:.0f} MiB"
    began = time.monotonic()
    assert neighbour.get("/version").ok
    assert time.monotonic() - began < 10
