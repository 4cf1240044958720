"""Every configuration key: what a change of it plans, and that it happens as planned and converges."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import requests

from scripts.lib.changes import AGENT, CHANGES, NONE, POD, Change
from tests.e2e.conftest import Stack

# The one that moves most of what the other tests do not hold on to, as the cluster's certificate;
# AWESOME_WASM_CHANGES=all applies every row, a list of keys those.
APPLIED = {"nodeName"}
# Seconds that the app may be away on a machine that has other work.
LIMITS = {NONE: 0.5, POD: 3.0, AGENT: 8.0}
Plan = dict[str, str]


def _name(urn: str) -> str:
    return urn.rsplit("::", 1)[1]


def planned(steps: list[dict[str, Any]]) -> Plan:
    """What becomes of each resource: create, update, replace or delete."""
    plan: Plan = {}
    there = set()
    for step in steps:
        name, op = _name(step["urn"]), step["op"]
        # What the program's components are is their resources.
        if op in ("same", "read", "refresh") or step["type"].startswith(("awesome-wasm:", "pulumi:pulumi:")):
            continue
        kind = "replace" if "replac" in op else op
        if plan.get(name) != "replace":
            plan[name] = kind
        if not op.startswith("delete"):
            there.add(name)
    # What ends with what it stood on, and is not made anew, is deleted.
    return plan | dict.fromkeys(plan.keys() - there, "delete")


def preview(stack: Stack, *options: str) -> Plan:
    """What `pulumi preview` says."""
    streaming = replace(stack, env={**stack.env, "PULUMI_ENABLE_STREAMING_JSON_PREVIEW": "true"})
    return planned(_told(streaming.run("pulumi", "preview", "--json", *options).stdout.splitlines()))


def up(stack: Stack, *options: str) -> Plan:
    """What `pulumi up` does."""
    return planned(
        _told(stack.run("pulumi", "up", "--yes", "--skip-preview", "--json", *options).stdout.splitlines())
    )


def _told(lines: list[str]) -> list[dict[str, Any]]:
    """What the engine's events say of resources."""
    events = [json.loads(line) for line in lines if line.startswith("{")]
    return [event["resourcePreEvent"]["metadata"] for event in events if "resourcePreEvent" in event]


@contextmanager
def configured(stack: Stack, change: Change) -> Iterator[tuple[str, ...]]:
    """A settings file of its own with the change; gives pulumi's options for it."""
    path = stack.directory / f".changes-{change.key.replace(':', '-')}-{threading.get_ident()}.yaml"
    shutil.copyfile(stack.directory / "Pulumi.local.yaml", path)
    options = ("--config-file", str(path))
    try:
        stack.configure(change, *options)
        yield options
    finally:
        path.unlink()


def _id(change: Change) -> str:
    return f"{change.key}={change.value}"


@pytest.fixture(scope="module")
def previews(stack: Stack) -> dict[str, Plan | Exception]:
    """The preview of every row; two at a time, because a preview mostly waits."""

    def one(change: Change) -> Plan | Exception:
        try:
            with configured(stack, change) as options:
                return preview(stack, *options)
        except AssertionError as error:
            return error

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(map(_id, CHANGES), pool.map(one, CHANGES), strict=True))


@pytest.mark.parametrize("change", CHANGES, ids=_id)
def test_a_change_plans_what_the_table_says(change: Change, previews: dict[str, Plan | Exception]) -> None:
    plan = previews[_id(change)]
    if isinstance(plan, Exception):
        raise plan
    assert plan == change.plan


@dataclass
class Client:
    """Asks 20 times a second, each time over a new connection, and notes how long nobody answered."""

    url: str
    longest: float = 0.0
    asked: int = 0
    _stop: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        """Ask until it is stopped."""
        last = time.monotonic()
        while not self._stop.wait(0.05):
            self.asked += 1
            try:
                answered = requests.get(f"{self.url}/healthz", timeout=5).ok
            except requests.RequestException:
                answered = False
            now = time.monotonic()
            if answered:
                self.longest = max(self.longest, now - last - 0.05)
                last = now

    @contextmanager
    def asking(self) -> Iterator[None]:
        """Ask while the block runs."""
        thread = threading.Thread(target=self.run)
        thread.start()
        try:
            yield
        finally:
            self._stop.set()
            thread.join()


def _applied(change: Change) -> bool:
    chosen = os.environ.get("AWESOME_WASM_CHANGES", "")
    return chosen == "all" or change.key in (chosen.split(",") if chosen else APPLIED)


@pytest.mark.parametrize("change", [change for change in CHANGES if _applied(change)], ids=_id)
def test_a_change_does_what_it_planned_and_can_be_taken_back(stack: Stack, change: Change) -> None:
    client = Client(str(stack.outputs()["url"]))
    try:
        with configured(stack, change) as options, client.asking():
            plan = preview(stack, *options)
            assert up(stack, *options) == plan
            stack.run("./scripts/verify", "--wait", "60")
            assert preview(stack, *options) == {}
    finally:
        back = preview(stack)
        assert up(stack) == back
    stack.run("./scripts/verify", "--wait", "60")
    assert preview(stack) == {}
    assert client.asked
    if "another" not in change.note:
        assert client.longest < LIMITS.get(change.downtime, 600), f"away for {client.longest:.2f} s"


def test_a_changed_line_of_the_app_is_there_within_a_moment(stack: Stack) -> None:
    source = stack.directory / "wasm_app" / "src" / "page.html"
    before, client = source.read_text(), Client(str(stack.outputs()["url"]))
    try:
        source.write_text(before.replace("</body>", "<p>yet another line</p></body>"))
        plan = preview(stack)
        with client.asking():
            assert up(stack) == plan
        assert "yet another line" in stack.get("/").text
    finally:
        source.write_text(before)
        stack.run("pulumi", "up", "--yes", "--skip-preview")
    print(f"the app was away for {client.longest:.3f} s")  # noqa: T201 - with pytest -s
    assert plan.get("workload-prepare") == "replace", "the preview says that it is prepared"
    assert client.longest < LIMITS[POD]


def test_a_saved_plan_is_what_up_does_and_is_refused_for_another_source(stack: Stack, tmp_path: Path) -> None:
    source, plan = stack.directory / "wasm_app" / "src" / "page.html", str(tmp_path / "a plan.json")
    before = source.read_text()
    try:
        source.write_text(before.replace("</body>", "<p>as it was planned</p></body>"))
        shown = stack.run("./scripts/preview", "--save-plan", plan).stdout
        stack.run("./scripts/up", "--plan", plan)
        assert "as it was planned" in stack.get("/").text
        image = str(stack.outputs()["image"])
        assert f"image: {image}" in shown, "the preview knew the digest"
        source.write_text(before.replace("</body>", "<p>as nobody planned</p></body>"))
        refused = stack.run("./scripts/up", "--plan", plan, check=False)
        assert refused.returncode != 0
        assert "violates plan" in refused.stderr
        assert stack.outputs()["image"] == image
    finally:
        source.write_text(before)
        stack.run("pulumi", "up", "--yes", "--skip-preview")
