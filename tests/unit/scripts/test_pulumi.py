"""What is left of a stack that was destroyed, and of the others beside it."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from scripts.lib import paths, pulumi


@pytest.fixture
def stacks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory as pulumi leaves it after the stack `local` was removed."""
    monkeypatch.setattr(paths, "STACKS", tmp_path / ".stacks")
    state = tmp_path / ".stacks" / ".pulumi"
    for name in (
        "meta.yaml",
        "stacks/awesome-wasm/local.json.bak",
        "history/awesome-wasm/local/local-1.history.json",
        "backups/awesome-wasm/local/local.1.json",
    ):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_text("{}")
    return state


def test_nothing_is_left_where_the_stack_was_alone(stacks: Path) -> None:
    assert pulumi.remove_files() == set()
    assert not stacks.parent.exists()


@pytest.mark.parametrize("name", ["dev.json", "dev.json.gz"])
def test_the_state_of_another_stack_stays_with_its_history(stacks: Path, name: str) -> None:
    kept = {stacks / "stacks/awesome-wasm" / name, stacks / "history/awesome-wasm/dev/dev-1.history.json"}
    for path in kept:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    assert not pulumi.is_known()
    assert pulumi.remove_files() == {"dev"}
    files = {path for path in stacks.rglob("*") if path.is_file()}
    assert files == {stacks / "meta.yaml", *kept}


def test_a_stack_is_known_by_its_state(stacks: Path) -> None:
    assert not pulumi.is_known()
    (stacks / "stacks/awesome-wasm/local.json").write_text("{}")
    assert pulumi.is_known()


@pytest.mark.parametrize(
    ("state", "has_nothing"),
    [
        ({"checkpoint": {"stack": "local"}}, True),
        ({"checkpoint": {"latest": None}}, True),
        ({"checkpoint": {"latest": {"resources": []}}}, True),
        ({"checkpoint": {"latest": {"resources": [{"urn": "x"}]}}}, False),
        ({"checkpoint": {"latest": {"pending_operations": [{"type": "creating"}]}}}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_a_first_up_is_one_of_a_stack_in_which_nothing_was_made_or_begun(
    stacks: Path, state: object, has_nothing: bool
) -> None:
    assert not pulumi._has_nothing(), "there is no state"
    path = stacks / "stacks/awesome-wasm/local.json"
    path.write_text(json.dumps(state))
    assert pulumi._has_nothing() is has_nothing
    path.write_text("{ broken")
    assert not pulumi._has_nothing()
    path.write_text(json.dumps(state))
    lock = stacks / "locks/organization/awesome-wasm/local/1.json"
    lock.parent.mkdir(parents=True)
    lock.touch()
    assert not pulumi._has_nothing(), "somebody is at work, or was killed"


@pytest.mark.parametrize(
    ("status", "kind", "is_lost"),
    [
        (404, pulumi.CLUSTER, True),
        (200, pulumi.CLUSTER, False),
        (503, pulumi.CLUSTER, False),
        (403, pulumi.CLUSTER, False),
        (404, "gcp:compute/network:Network", False),
    ],
)
def test_a_cluster_is_given_up_when_google_says_that_it_is_not_there_and_else_never(
    status: int, kind: str, is_lost: bool
) -> None:
    class Google(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            """Answer."""
            self.send_response(status if self.path == "/v1/projects/p/clusters/c" else 500)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - http.server's name
            """Say nothing."""

    resources = [{"type": kind, "id": "projects/p/clusters/c"}]
    with HTTPServer(("127.0.0.1", 0), Google) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        endpoint = f"http://127.0.0.1:{server.server_port}/v1/"
        env = {"GOOGLE_CONTAINER_CUSTOM_ENDPOINT": endpoint, "GOOGLE_OAUTH_ACCESS_TOKEN": "t"}
        assert pulumi._has_lost_its_cluster(env, resources) is is_lost
        server.shutdown()
    assert pulumi._has_lost_its_cluster(env, resources) is False, "nobody answers"
