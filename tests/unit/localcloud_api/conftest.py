"""A localcloud API in this process, on backends that only remember what was asked of them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvicorn

from localcloud.api.server import Api, application
from localcloud.home import Config, Home
from tests.unit.localcloud_api.client import TOKEN, Client, FakeBackends
from tests.waiting import until


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    home.save(Config(port=1234, token=TOKEN))
    return home


@pytest.fixture
def backends() -> FakeBackends:
    return FakeBackends()


@pytest.fixture
def client(home: Home, backends: FakeBackends) -> Iterator[Client]:
    api = Api(home, backends)
    api.restore()
    yield Client(api, backends)
    backends.gate.set()
    api.services.operations.close()


@pytest.fixture
def server(home: Home, backends: FakeBackends) -> Iterator[str]:
    """The address of a server."""
    config = uvicorn.Config(application(Api(home, backends)), host="127.0.0.1", port=0, log_level="error")
    running = uvicorn.Server(config)
    thread = threading.Thread(target=running.run)
    thread.start()
    until(lambda: running.started, "the server to listen")
    yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    running.should_exit = True
    thread.join(30)
