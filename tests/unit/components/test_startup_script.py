"""The VM's startup script, run by a real shell against a metadata server and a registry in this process."""

from __future__ import annotations

import hashlib
import json
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from components.node import STARTUP_SCRIPT

AGENT = b"#!/bin/sh\n"
SUM = hashlib.sha256(AGENT).hexdigest()
MANIFEST = json.dumps({"layers": [{"digest": f"sha256:{SUM}"}]}).encode()
DIGEST = f"sha256:{hashlib.sha256(MANIFEST).hexdigest()}"


@dataclass
class Vm:
    """What the servers give, by path below their roots, and the directories that the script writes to."""

    root: Path
    metadata: dict[str, str]
    registry: dict[str, bytes]
    host: str

    def boot(self) -> subprocess.CompletedProcess[str]:
        """Run the script."""
        environment = {
            "PATH": f"{self.root / 'bin'}:/usr/local/bin:/usr/bin:/bin",
            "GCE_METADATA_HOST": self.host,
            "PREFIX": str(self.root / "usr"),
            "SYSCONFDIR": str(self.root / "etc"),
            "SYSTEMD_UNIT_PATH": str(self.root / "units"),
        }
        return subprocess.run(
            ["sh", str(STARTUP_SCRIPT)], env=environment, capture_output=True, text=True, check=False
        )

    def configuration(self) -> dict[str, str]:
        """What the agent finds in its environment."""
        lines = (self.root / "etc/krustlet/krustlet.env").read_text().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def systemctl(self) -> list[str]:
        """The calls of systemctl."""
        calls = self.root / "systemctl"
        return calls.read_text().splitlines() if calls.exists() else []


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    """A VM that was never booted."""
    found: dict[str, bytes] = {}
    metadata: dict[str, str] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer for both servers."""
            path = self.path.removeprefix("/computeMetadata/v1/")
            is_metadata = path != self.path and self.headers["Metadata-Flavor"] == "Google"
            content = metadata.get(path, "").encode() if is_metadata else found.get(path, b"")
            self.send_response(200 if content else 404)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    host = f"127.0.0.1:{server.server_port}"
    found |= {f"/v2/p/r/krustlet/manifests/{DIGEST}": MANIFEST, f"/v2/p/r/krustlet/blobs/sha256:{SUM}": AGENT}
    metadata |= {
        "instance/attributes/krustlet-image": f"{host}/p/r/krustlet@{DIGEST}",
        "instance/attributes/krustlet-sha256": SUM,
        "instance/attributes/krustlet-bootstrap-kubeconfig": '{"token": "a"}',
        "instance/attributes/krustlet-verification-key": "PUBLIC",
        "instance/attributes/krustlet-node-labels": "a=b",
        "instance/attributes/krustlet-max-pods": "7",
        "instance/attributes/krustlet-app-port": "8080",
        "instance/name": "vm-1",
        "instance/hostname": "vm-1.c.p.internal",
        "instance/zone": "projects/1/zones/europe-west1-b",
        "instance/network-interfaces/0/ip": "10.0.0.2",
        "instance/network-interfaces/0/access-configs/0/external-ip": "203.0.113.7",
        "project/project-id": "p",
    }
    bin_ = tmp_path / "bin"
    bin_.mkdir()
    (bin_ / "systemctl").write_text(f'#!/bin/sh\necho "$*" >>{tmp_path}/systemctl\n')
    (bin_ / "systemctl").chmod(0o755)
    yield Vm(tmp_path, metadata, found, host)
    server.shutdown()
    server.server_close()


def test_a_boot_installs_the_agent_configures_it_and_starts_it(vm: Vm) -> None:
    boot = vm.boot()
    assert boot.returncode == 0, boot.stderr
    assert (vm.root / "usr/bin/krustlet").read_bytes() == AGENT
    configuration = vm.configuration()
    assert configuration["KRUSTLET_PROVIDER_ID"] == "gce://p/europe-west1-b/vm-1"
    assert configuration["KRUSTLET_HOSTNAME"] == "vm-1.c.p.internal"
    assert configuration["KRUSTLET_EXTERNAL_IP"] == "203.0.113.7"
    assert (configuration["MAX_PODS"], configuration["NODE_LABELS"]) == ("7", "a=b")
    assert configuration["KRUSTLET_TRUSTED_REGISTRIES"] == vm.host
    assert (vm.root / "etc/krustlet/verification.pem").read_text() == "PUBLIC\n"
    assert vm.systemctl() == [
        "daemon-reload",
        "enable krustlet",
        "restart krustlet",
        "start krustlet-metadata",
    ]


def test_a_second_boot_takes_the_agent_that_is_there_and_what_is_new_in_the_metadata(vm: Vm) -> None:
    assert vm.boot().returncode == 0
    vm.registry.clear()
    vm.metadata["instance/attributes/krustlet-max-pods"] = "8"
    boot = vm.boot()
    assert boot.returncode == 0, boot.stderr
    assert vm.configuration()["MAX_PODS"] == "8"
    assert vm.systemctl()[-2] == "restart krustlet"


def test_a_second_boot_with_nothing_new_leaves_an_agent_alone_that_runs(vm: Vm) -> None:
    assert vm.boot().returncode == 0
    assert vm.boot().returncode == 0
    assert vm.systemctl()[-2] == "start krustlet"


@pytest.mark.parametrize(
    "missing",
    [
        "instance/attributes/krustlet-app-port",
        "instance/attributes/krustlet-verification-key",
        "instance/hostname",
        "instance/network-interfaces/0/access-configs/0/external-ip",
    ],
)
def test_a_value_that_the_metadata_server_does_not_give_is_named_and_nothing_is_started(
    vm: Vm, missing: str
) -> None:
    del vm.metadata[missing]
    boot = vm.boot()
    assert boot.returncode != 0
    assert f"the metadata server does not give {missing}" in boot.stderr
    assert vm.systemctl() == []


def test_an_agent_that_is_not_the_one_meant_is_not_installed(vm: Vm) -> None:
    vm.registry[f"/v2/p/r/krustlet/blobs/sha256:{SUM}"] = b"another"
    boot = vm.boot()
    assert boot.returncode != 0
    assert f"the registry's agent is not {SUM}" in boot.stderr
    assert not (vm.root / "usr/bin/krustlet").exists()
    assert vm.systemctl() == []


@pytest.mark.parametrize(("port", "capability"), [("80", "CAP_NET_BIND_SERVICE"), ("8080", "")])
def test_only_an_app_on_a_privileged_port_gets_the_capability_for_it(
    vm: Vm, port: str, capability: str
) -> None:
    vm.metadata["instance/attributes/krustlet-app-port"] = port
    assert vm.boot().returncode == 0
    unit = (vm.root / "units/krustlet.service").read_text().splitlines()
    assert f"AmbientCapabilities={capability}" in unit
    assert f"CapabilityBoundingSet={capability}" in unit
