"""A whole stack for the tests: a clone of its own, brought up by the command that a user types."""

import base64
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from components.providers import compiler
from components.providers.signature import generate_key
from scripts.lib.changes import KMS, Change
from tests.kms import Kms

REPOSITORY = Path(__file__).resolve().parents[2]
# What scripts/env sets for one checkout must not reach another one.
OWN = ("LOCALCLOUD_HOME", "KUBECONFIG", "PULUMI_BACKEND_URL", "PULUMI_HOME", "PULUMI_STACK")


Answer = subprocess.CompletedProcess[str]


@dataclass
class Stack:
    """A clone with its stack: runs the tools in it as a user would."""

    directory: Path
    env: dict[str, str] = field(default_factory=dict)

    def run(
        self, *command: str, check: bool = True, text: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Runs a program in the clone; a failure shows what it printed."""
        answer = subprocess.run(
            command, cwd=self.directory, env=self.env, input=text, capture_output=True, text=True, check=False
        )
        if check and answer.returncode != 0:
            raise AssertionError(
                f"{' '.join(command)} exited with {answer.returncode}\n{answer.stdout}\n{answer.stderr}"
            )
        return answer

    def read_environment(self) -> None:
        """Takes over what ./scripts/env prints, as `eval` does."""
        script = (
            'eval "$(./scripts/env)" && exec python3 -c "import json,os;print(json.dumps(dict(os.environ)))"'
        )
        self.env = json.loads(self.run("sh", "-c", script).stdout)

    def configure(self, change: Change, *options: str) -> None:
        """Set a row of the table of changes, and what has to change with it, by `pulumi config set`."""
        for key, value in settings(self, change).items():
            how = ("--secret", *options) if "signing" in key and "://" not in value else options
            if value.startswith(("[", "{")) or "[" in key:
                parsed = json.loads(value) if value.startswith(("[", "{")) else value
                for path, item in leaves(key, parsed):
                    self.run("pulumi", "config", "set", "--path", path, item, *how)
            else:
                self.run("pulumi", "config", "set", *how, key, text=value)

    def outputs(self) -> dict[str, Any]:
        """`pulumi stack output`, secrets included."""
        found: dict[str, Any] = json.loads(
            self.run("pulumi", "stack", "output", "--json", "--show-secrets").stdout
        )
        return found

    def kubectl(self, *arguments: str, check: bool = True, text: str | None = None) -> str:
        """kubectl's standard output."""
        return self.run("kubectl", *arguments, check=check, text=text).stdout

    def kubectl_json(self, *arguments: str) -> dict[str, Any]:
        """kubectl's answer as JSON."""
        found: dict[str, Any] = json.loads(self.kubectl(*arguments, "--output", "json"))
        return found

    def get(self, path: str) -> requests.Response:
        """An HTTP request to the pod."""
        return requests.get(f"{self.outputs()['url']}{path}", timeout=10)


def leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """The texts in a value by their paths."""
    if isinstance(value, str):
        yield path, value
        return
    named = (
        ((f"{path}[{number}]", item) for number, item in enumerate(value))
        if isinstance(value, list)
        else ((f"{path}.{name}", item) for name, item in value.items())
    )
    for inner, item in named:
        yield from leaves(inner, item)


def settings(stack: Stack, change: Change) -> dict[str, str]:
    """The values to set, with what a table cannot hold."""
    value = change.value
    if value == "HOST":
        value = compiler.host(Path("wasm_app"))
    elif value == "KEY":
        value = generate_key().private_key
    elif value == KMS:
        value = kms_of(stack).new_key()
    return dict(((change.key, value), *change.also))


def clone(target: Path) -> Stack:
    """A copy of the working tree as git sees it, with a history of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for name in filter(None, listed.split("\0")):
        source = REPOSITORY / name
        if source.is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target / name, follow_symlinks=False)
    env = {key: value for key, value in os.environ.items() if key not in OWN}
    stack = Stack(target, env)
    stack.run("git", "init", "--quiet")
    stack.run("git", "add", "--all")
    stack.run(
        "git",
        "-c",
        "user.name=test",
        "-c",
        "user.email=test@localhost",
        "commit",
        "--quiet",
        "-m",
        "as it is",
    )
    return stack


def private_keys(stack: Stack) -> list[str]:
    """The private keys in the state, in clear, PEM."""
    exported = json.loads(stack.run("pulumi", "stack", "export", "--show-secrets").stdout)
    return [
        json.loads(text) if text.startswith('"') else text
        for resource in exported["deployment"]["resources"]
        for text in _strings(resource.get("outputs", {}))
        if "BEGIN PRIVATE KEY" in text
    ]


def kms_of(stack: Stack) -> Kms:
    """The Cloud KMS of a stack's project."""
    return Kms(stack.env["GOOGLE_KMS_CUSTOM_ENDPOINT"], stack.env["GOOGLE_OAUTH_ACCESS_TOKEN"])


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _strings(inner)


@contextmanager
def running(directory: Path, **settings: object) -> Iterator[Stack]:
    """A stack in a clone below a directory, with these settings, up and verified, and down in the end."""
    made = clone(directory)
    if settings:
        path = made.directory / "Pulumi.local.yaml"
        configured = yaml.safe_load(path.read_text())
        configured["config"] |= {f"awesome-wasm:{key}": value for key, value in settings.items()}
        path.write_text(yaml.safe_dump(configured))
    outside = Stack(made.directory, dict(made.env))
    try:
        made.run("./scripts/up")
        made.read_environment()
        yield made
    finally:
        outside.run("./scripts/down", "--force")


@pytest.fixture(scope="session", autouse=True)
def _interrupts() -> None:
    """Let interrupts end what the tests start: a job in the background hands on that it ignores them."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """The stack that most tests share, up and verified."""
    with running(tmp_path_factory.mktemp("clone")) as made:
        yield made


@pytest.fixture
def peers(stack: Stack, tmp_path: Path) -> dict[str, str]:
    """Credentials for the registry in the form that crane, oras and cosign read."""
    registry = str(stack.outputs()["registry"]).partition("/")[0]
    secret = f"oauth2accesstoken:{stack.env['GOOGLE_OAUTH_ACCESS_TOKEN']}"
    config = {"auths": {registry: {"auth": base64.b64encode(secret.encode()).decode()}}}
    directory = tmp_path / "docker"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    return {"DOCKER_CONFIG": str(directory)}
