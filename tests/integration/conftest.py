"""A localcloud of the tests' own, started by the command that a user types."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests

REPOSITORY = Path(__file__).resolve().parents[2]
TOOLS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubectl", "registry")
# What points a user's shell at a cloud must not reach the tests.
_FOREIGN = ("CLOUDSDK_", "GOOGLE_", "GCLOUD_", "PULUMI_", "KUBECONFIG", "LOCALCLOUD_", "GCE_METADATA_")


@dataclass(frozen=True)
class Localcloud:
    """A home and the environment in which its commands run."""

    home: Path
    outer: dict[str, str]

    def command(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `python -m localcloud …`."""
        command = [sys.executable, "-m", "localcloud", *arguments]
        answer = subprocess.run(
            command, cwd=REPOSITORY, env=self.outer, capture_output=True, text=True, check=False, timeout=300
        )
        if check:
            assert answer.returncode == 0, f"{command}\n{answer.stdout}\n{answer.stderr}"
        return answer

    @property
    def variables(self) -> dict[str, str]:
        """What `env` prints."""
        lines = self.command("env").stdout.splitlines()
        words = [shlex.split(line) for line in lines]
        assert all(word[0] == "export" and len(word) == 2 for word in words)
        return dict(word[1].split("=", 1) for word in words)

    @property
    def environment(self) -> dict[str, str]:
        """A user's environment after `eval "$(python -m localcloud env)"`."""
        return self.outer | self.variables

    @property
    def url(self) -> str:
        port = json.loads((self.home / "config.json").read_text())["port"]
        return f"http://127.0.0.1:{port}"

    @property
    def token(self) -> str:
        token: str = json.loads((self.home / "config.json").read_text())["token"]
        return token

    def status(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.command("status", "--json", check=False).stdout)
        return report

    def request(self, verb: str, path: str, body: object = None, **options: Any) -> requests.Response:
        """A request as the developer."""
        headers = {"Authorization": f"Bearer {self.token}"} | options.pop("headers", {})
        return requests.request(verb, self.url + path, json=body, headers=headers, timeout=130, **options)

    def trust(self, script: str) -> None:
        """Have its VMs run a startup script that is not this checkout's."""
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(script)
            file.flush()
            self.command("trust", file.name)

    def done(self, operation: dict[str, Any]) -> dict[str, Any]:
        """A Compute Engine operation when it is done; it must have succeeded."""
        answer = requests.post(
            f"{self.url}{urlsplit(operation['selfLink']).path}/wait",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=130,
        )
        body: dict[str, Any] = answer.json()
        assert body["status"] == "DONE", body
        assert "error" not in body, body
        return body


def make_localcloud(root: Path) -> Localcloud:
    """A localcloud that is not started yet.

    Raises:
        pytest.fail: a tool that it runs is not on PATH.
    """
    missing = [name for name in TOOLS if shutil.which(name) is None]
    if missing:
        pytest.fail(f'not on PATH: {", ".join(missing)}; set the tools up first: eval "$(./scripts/env)"')
    outer = {key: value for key, value in os.environ.items() if not key.startswith(_FOREIGN)}
    return Localcloud(root / "home", outer | {"LOCALCLOUD_HOME": str(root / "home")})


@pytest.fixture(scope="session")
def localcloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Localcloud]:
    """A running localcloud that the tests of a session share."""
    cloud = make_localcloud(tmp_path_factory.mktemp("localcloud"))
    try:
        cloud.command("start")
        yield cloud
    finally:
        cloud.command("reset")
