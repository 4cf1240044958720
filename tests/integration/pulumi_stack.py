"""A Pulumi project of a test, driven by the command that a user types."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import requests


@dataclass(frozen=True)
class Stack:
    """A project in a directory of its own, with the environment for pulumi."""

    directory: Path
    environment: dict[str, str]

    def run(self, *arguments: str, fails: bool = False) -> str:
        """Runs pulumi; returns what it printed. Raises AssertionError when it ends otherwise than asked."""
        ended = subprocess.run(
            ["pulumi", *arguments, "--stack", "local", "--non-interactive"],
            cwd=self.directory,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=900,  # a busy machine
            check=False,
        )
        assert (ended.returncode != 0) == fails, ended.stdout + ended.stderr
        return ended.stdout + ended.stderr

    def up(self, *, fails: bool = False) -> dict[str, int]:
        """`pulumi up`; how many resources it did what with."""
        self.run("up", "--yes", "--skip-preview", fails=fails)
        return self.last()

    def last(self) -> dict[str, int]:
        """The changes of the last update, as `up`."""
        history = self.run("stack", "history", "--json", "--page-size", "1")
        changes: dict[str, int] = json.loads(history[history.index("[") :])[0].get("resourceChanges", {})
        return changes

    def set(self, **values: str) -> None:
        for name, value in values.items():
            self.run("config", "set", name.replace("__", ":"), value)

    def outputs(self) -> dict[str, Any]:
        shown: dict[str, Any] = json.loads(self.run("stack", "output", "--json", "--show-secrets"))
        return shown

    def google(self, service: str, method: str, path: str, body: object = None) -> None:
        """One request to localcloud as the user, outside of Pulumi."""
        url = self.environment[f"GOOGLE_{service}_CUSTOM_ENDPOINT"] + path
        token = self.environment["GOOGLE_OAUTH_ACCESS_TOKEN"]
        headers = {"Authorization": f"Bearer {token}"}
        requests.request(method, url, headers=headers, json=body, timeout=60).raise_for_status()
