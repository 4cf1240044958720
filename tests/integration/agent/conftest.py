"""One control plane, one registry and one agent that the agent's tests share."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from components.providers import cargo
from tests.integration.agent.harness import Agent, Cluster, Registry, Workspace, make_namespace
from tests.integration.agent.link import Link
from tests.integration.conftest import REPOSITORY, Localcloud

AgentFactory = Callable[..., Agent]


@pytest.fixture(scope="session")
def agent_binary() -> Path:
    """The agent: the one that KRUSTLET_BINARY names, else built from this checkout or from the cache."""
    given = os.environ.get("KRUSTLET_BINARY")
    return Path(given) if given else Path(cargo.build(REPOSITORY / "krustlet").path)


@pytest.fixture(scope="session")
def registry(localcloud: Localcloud) -> Registry:
    return Registry(localcloud, "guests")


@pytest.fixture(scope="session")
def cluster(localcloud: Localcloud) -> Iterator[Cluster]:
    made = Cluster(localcloud, "agent-tests")
    yield made
    made.close()


@pytest.fixture(scope="session")
def namespace(cluster: Cluster, registry: Registry) -> str:
    return make_namespace(cluster, registry)


@pytest.fixture(scope="session")
def agent(
    cluster: Cluster, registry: Registry, agent_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Agent]:
    """The agent that most tests share: none of them stops it."""
    directory = tmp_path_factory.mktemp("agent")
    made = Agent(cluster, agent_binary, directory, registry.key.public_key, "shared", registry.host)
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture
def make_agent(
    cluster: Cluster, registry: Registry, agent_binary: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[AgentFactory]:
    """Makes agents of the test's own, not started: `make_agent("name", "--flag=…")`."""
    made: list[Agent] = []

    def make(name: str, *flags: str) -> Agent:
        directory = tmp_path_factory.mktemp(name)
        made.append(
            Agent(cluster, agent_binary, directory, registry.key.public_key, name, registry.host, list(flags))
        )
        return made[-1]

    yield make
    for agent in made:
        agent.remove()


@pytest.fixture
def link(cluster: Cluster) -> Iterator[Link]:
    """A way to the API server that the test may cut."""
    made = Link(cluster.server)
    yield made
    made.close()


@pytest.fixture
def make_workspace(
    cluster: Cluster, registry: Registry, namespace: str
) -> Iterator[Callable[[Agent], Workspace]]:
    """Gives a test a place for its objects on the node of an agent of its own."""
    made: list[Workspace] = []

    def make(agent: Agent) -> Workspace:
        made.append(Workspace(cluster, registry, agent, namespace))
        return made[-1]

    yield make
    for space in made:
        space.close()


@pytest.fixture
def space(agent: Agent, make_workspace: Callable[[Agent], Workspace]) -> Workspace:
    """A test's place for its objects, on the shared agent's node."""
    return make_workspace(agent)


@pytest.fixture(scope="session")
def routed_range() -> Iterator[str]:
    """A range outside of 127.0.0.0/8 that this machine holds as local, for as long as the tests run."""
    sudo = [] if os.geteuid() == 0 else ["sudo", "-n"]
    route = [*sudo, "ip", "route"]
    # Of the range for benchmarks (RFC 2544), so that nobody's network is cut off.
    cidr = f"198.18.{random.randint(0, 255)}.0/24"  # noqa: S311
    if shutil.which(route[0]) is None:
        pytest.skip(f"{route[0]} is not on PATH")
    added = subprocess.run(
        [*route, "add", "local", cidr, "dev", "lo"], capture_output=True, text=True, check=False
    )
    if added.returncode:
        pytest.skip(f"an EndpointSlice takes no loopback address, and no other may be had: {added.stderr}")
    yield cidr
    subprocess.run([*route, "del", "local", cidr, "dev", "lo"], check=True)
