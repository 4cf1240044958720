"""An agent's way to the API server, which a test can cut: for this agent alone; nothing else notices."""

from __future__ import annotations

import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

from tests.integration.agent.harness import Agent

_CHUNK = 64 * 1024


class Link:
    """Passes TCP connections on to the API server, or refuses them, or lets them fall silent."""

    def __init__(self, server: str) -> None:
        parts = urlsplit(server)
        assert parts.hostname is not None
        assert parts.port is not None
        self._target = (parts.hostname, parts.port)
        self._open = threading.Event()
        self._open.set()
        self._passing = threading.Event()
        self._passing.set()
        self._dead: list[threading.Event] = []
        self._connections: list[socket.socket] = []
        self._listener = _listen(0)
        self._port: int = self._listener.getsockname()[1]
        self._closed = False
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"https://127.0.0.1:{self._port}"

    def carry(self, agent: Agent) -> None:
        """Have an agent that has not joined yet reach the API server over this link."""
        bootstrap = json.loads(agent.bootstrap_file.read_text())
        bootstrap["clusters"][0]["cluster"]["server"] = self.url
        agent.bootstrap_file.write_text(json.dumps(bootstrap))

    @contextlib.contextmanager
    def refused(self) -> Iterator[None]:
        """Nobody listens in here: connections break, new ones are refused."""
        self._open.clear()
        # A thread that waits in accept() keeps the socket open beyond its close().
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()
        try:
            yield
        finally:
            self._listener = _listen(self._port)
            self._open.set()

    @contextlib.contextmanager
    def silent(self) -> Iterator[None]:
        """No byte passes in here, as without a network; what is open then stays dead afterwards, too."""
        self._passing.clear()
        try:
            yield
        finally:
            self._dead.append(self._passing)
            self._passing = threading.Event()
            self._passing.set()

    def close(self) -> None:
        self._closed = True
        for passing in self._dead:
            passing.set()
        self._open.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._drop()

    def _drop(self) -> None:
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        self._connections.clear()

    def _accept(self) -> None:
        while self._open.wait() and not self._closed:
            try:
                near, _ = self._listener.accept()
                far = socket.create_connection(self._target)
            except OSError:
                continue
            self._connections += [near, far]
            passing = self._passing
            for ends in ((near, far), (far, near)):
                threading.Thread(target=_pump, args=(*ends, passing), daemon=True).start()


def _listen(port: int) -> socket.socket:
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    listener.listen(64)
    return listener


def _pump(source: socket.socket, target: socket.socket, passing: threading.Event) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK):
            passing.wait()
            target.sendall(data)
    # What was silenced may not even say that it has ended.
    passing.wait()
    for end in (source, target):
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
