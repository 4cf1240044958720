"""A VM for its startup script: a metadata server and a registry in this process, made to fail at will."""

from __future__ import annotations

import hashlib
import json
import socket
import struct
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from components.node import STARTUP_SCRIPT
from components.providers.artifacts import signature_artifact, signature_tag
from components.providers.signature import KeyPair, generate_key, sign

# Longer than what a socket's buffers take, so that a break in the middle is one.
AGENT = b"#!/bin/sh\n" + bytes(range(256)) * 400
SUM = hashlib.sha256(AGENT).hexdigest()
MANIFEST = json.dumps({"layers": [{"digest": f"sha256:{SUM}"}]}).encode()
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"
MANIFEST_PATH = f"/v2/p/r/krustlet/manifests/{DIGEST}"
BLOB_PATH = f"/v2/p/r/krustlet/blobs/sha256:{SUM}"
SIGNATURE_PATH = f"/v2/p/r/krustlet/manifests/{signature_tag(DIGEST)}"
KEY = generate_key()
ACCOUNT = "instance/service-accounts/default/token"

STATUSES = ("401", "403", "404", "429", "500", "502", "503")
FAULTS = (
    *STATUSES,
    "reset",  # before the answer
    "reset in the middle",
    "closed",  # without an answer
    "partial",  # less than its length says
    "cut off",  # less, and no length says so
    "silent",  # no answer
    "stalled",  # some of it, and then nothing
    "other bytes",
    "other range",
    "whole",  # asked for the rest, it gives all
)


@dataclass
class Vm:
    """What the servers give, by path below their roots, and the directories that the script writes to.

    `faults` are the ways in which the next requests of a place fail, one after the other: `metadata`,
    `account`, `challenge`, `token`, `signature`, `payload`, `manifest`, `blob`. `served` are the places that
    were asked.
    """

    root: Path
    host: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    registry: dict[str, bytes] = field(default_factory=dict)
    faults: dict[str, list[str]] = field(default_factory=dict)
    served: list[str] = field(default_factory=list)

    def command(self, name: str, script: str) -> None:
        """Put a command before the system's own."""
        path = self.root / "bin" / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def boot(self, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run the script, which tries again at once and takes a second for a stall."""
        fixed = {
            "PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "GCE_METADATA_HOST": self.host,
            "PREFIX": str(self.root / "usr"),
            "SYSCONFDIR": str(self.root / "etc"),
            "SYSTEMD_UNIT_PATH": str(self.root / "units"),
            "RETRY_SECONDS": "0",
            "STALL_SECONDS": "1",
            "WAIT_SECONDS": "600",
        }
        return subprocess.run(
            ["sh", str(STARTUP_SCRIPT)],
            env=fixed | environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=300,
        )

    def sign(self, *signed: tuple[KeyPair, str]) -> None:
        """Put signatures, by their keys and digests, where cosign 2 looks for the agent's."""
        layers = []
        for key, digest in signed:
            made = sign(key.private_key, "r/krustlet", digest)
            pushed = signature_artifact(made.payload, made.signature)
            layers += json.loads(pushed.manifest.content)["layers"]
            for blob in pushed.blobs:
                self.registry[f"/v2/p/r/krustlet/blobs/{blob.digest}"] = blob.content
        self.registry[SIGNATURE_PATH] = json.dumps({"config": {}, "layers": layers}, indent=1).encode()

    def configuration(self) -> dict[str, str]:
        """What the agent finds in its environment."""
        lines = (self.root / "etc/krustlet/krustlet.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines if line)

    def agent(self) -> bytes | None:
        """The installed agent."""
        path = self.root / "usr/bin/krustlet"
        return path.read_bytes() if path.exists() else None

    def systemctl(self) -> list[str]:
        """The calls of systemctl."""
        calls = self.root / "systemctl"
        return calls.read_text().splitlines() if calls.exists() else []

    def was_started(self) -> bool:
        """Whether the agent was started."""
        return any(call in ("start krustlet", "restart krustlet") for call in self.systemctl())


@contextmanager
def new_vm(root: Path) -> Iterator[Vm]:
    """A VM that was never booted."""
    vm = Vm(root)
    stop = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer for both servers, and for the one that gives the registry's tokens."""
            place, content = self.asked()
            vm.served.append(place)
            faults = vm.faults.get(place)
            if faults:
                self.fail(faults.pop(0), content)
            elif place == "challenge":
                self.challenge()
            else:
                self.give(content, self.offset())

        def asked(self) -> tuple[str, bytes]:
            path = self.path.partition("?")[0]
            value = path.removeprefix("/computeMetadata/v1/")
            if value != path and self.headers["Metadata-Flavor"] == "Google":
                return ("account" if value == ACCOUNT else "metadata"), vm.metadata.get(value, "").encode()
            if path == "/token":
                return "token", json.dumps({"token": "PULL"}).encode()
            if self.headers["Authorization"] != "Bearer PULL":
                return "challenge", b""
            kinds = {MANIFEST_PATH: "manifest", SIGNATURE_PATH: "signature", BLOB_PATH: "blob"}
            return kinds.get(path, "payload"), vm.registry.get(path, b"")

        def offset(self) -> int:
            return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))

        def challenge(self) -> None:
            self.send_response(401)
            realm = f'realm="http://{vm.host}/token",service="{vm.host}",scope="repository:r:pull"'
            self.send_header("WWW-Authenticate", f"Bearer {realm}")
            self.send_header("Content-Length", "0")
            self.end_headers()

        def head(self, size: int, offset: int, length: int | None) -> None:
            self.send_response((206 if offset else 200) if size else 404)
            if offset:
                self.send_header("Content-Range", f"bytes {offset}-{size - 1}/{size}")
            if length is not None:
                self.send_header("Content-Length", str(length))
            self.end_headers()

        def give(self, content: bytes, offset: int = 0) -> None:
            if offset and offset >= len(content):
                self.send_error(416)
                return
            self.head(len(content), offset, len(content) - offset)
            self.wfile.write(content[offset:])

        def fail(self, fault: str, content: bytes) -> None:
            offset = min(self.offset(), len(content) - 1) if content else 0
            some = content[offset : offset + max(1, (len(content) - offset) // 2)]
            if fault in STATUSES:
                self.send_error(int(fault))
            elif fault == "other bytes":
                self.give(b"x" * len(content))
            elif fault == "other range":
                self.head(len(content), offset, len(content) - offset)
                self.wfile.write(content[: len(content) - offset])
            elif fault == "whole":
                self.give(content)
            elif fault in ("partial", "reset in the middle", "stalled", "cut off"):
                self.head(len(content), offset, None if fault == "cut off" else len(content) - offset + 1)
                self.wfile.write(some)
            if fault in ("silent", "stalled"):
                self.wfile.flush()
                stop.wait(10)
            if fault.startswith("reset"):
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Say nothing."""

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, *_: object) -> None:
            """A client that went away is what is tested."""

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    vm.host = f"127.0.0.1:{server.server_port}"
    vm.registry |= {MANIFEST_PATH: MANIFEST, BLOB_PATH: AGENT}
    vm.sign((KEY, DIGEST))
    vm.metadata |= {
        "instance/attributes/krustlet-image": f"{vm.host}/p/r/krustlet@{DIGEST}",
        "instance/attributes/krustlet-sha256": SUM,
        "instance/attributes/krustlet-bootstrap-kubeconfig": '{"token": "a"}',
        "instance/attributes/krustlet-verification-key": KEY.public_key.strip(),
        "instance/attributes/krustlet-node-labels": "a=b",
        "instance/attributes/krustlet-max-pods": "7",
        "instance/attributes/krustlet-app-port": "8080",
        "instance/name": "vm-1",
        "instance/hostname": "vm-1.c.p.internal",
        "instance/zone": "projects/1/zones/europe-west1-b",
        "instance/machine-type": "projects/1/machineTypes/e2-small",
        "instance/network-interfaces/0/ip": "10.0.0.2",
        "instance/network-interfaces/0/access-configs/0/external-ip": "203.0.113.7",
        "project/project-id": "p",
        ACCOUNT: json.dumps({"access_token": "VM", "expires_in": 3599}),
    }
    (root / "bin").mkdir()
    vm.command("systemctl", f'echo "$*" >>{root}/systemctl')
    yield vm
    stop.set()
    server.shutdown()
    server.server_close()
