"""A localcloud API in this process, on backends that only remember what was asked of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from localcloud.api.server import Api
from localcloud.home import Config, Home
from tests.unit.localcloud_api.client import TOKEN, Client, FakeBackends


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
