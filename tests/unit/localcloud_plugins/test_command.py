"""command:local:Command against real processes."""

import threading
import time
from pathlib import Path

import pytest

from localcloud.plugins.command.provider import TYPE, CommandProvider
from localcloud.plugins.protocol import ProviderError, Resource
from localcloud.plugins.values import UNKNOWN, Properties, Secret

RESOURCE = Resource(f"urn:pulumi:dev::p::{TYPE}::it")


def problems(inputs: Properties) -> dict[str, str]:
    return {str(f.path[0]): f.reason for f in CommandProvider().check(RESOURCE, {}, inputs, b"").failures}


def run(inputs: Properties) -> Properties:
    return CommandProvider().create(RESOURCE, inputs, preview=False)[1]


def test_both_streams_are_outputs_without_their_last_newline() -> None:
    state = run({"create": "cat; echo $K >&2; echo", "stdin": "in\n", "environment": {"K": "v"}})
    assert (state["stdout"], state["stderr"]) == ("in\n", "v")


def test_a_failure_shows_status_command_and_output() -> None:
    with pytest.raises(ProviderError, match=r'exit status 3: running "echo broken >&2; exit 3":\nbroken$'):
        run({"create": "echo broken >&2; exit 3"})


def test_dir_and_interpreter_are_used(tmp_path: Path) -> None:
    state = run(
        {"create": "import os; print(os.getcwd())", "dir": str(tmp_path), "interpreter": ["python3", "-c"]}
    )
    assert state["stdout"] == str(tmp_path)


def test_a_missing_dir_is_named() -> None:
    with pytest.raises(ProviderError, match="dir: /nowhere is no directory"):
        run({"create": "true", "dir": "/nowhere"})


def test_an_update_runs_update_with_the_previous_output() -> None:
    old = {"create": "echo one", "update": "echo $PULUMI_COMMAND_STDOUT two"}
    state = CommandProvider().update(RESOURCE, run(old), old, old, preview=False)
    assert state["stdout"] == "one two"
    silent = {**old, "addPreviousOutputInEnv": False}
    assert CommandProvider().update(RESOURCE, state, old, silent, preview=False)["stdout"] == "two"


def test_a_delete_runs_delete(tmp_path: Path) -> None:
    state = run({"create": "echo x", "delete": f"echo $PULUMI_COMMAND_STDOUT > {tmp_path}/gone"})
    CommandProvider().delete(RESOURCE, state, {})
    assert (tmp_path / "gone").read_text() == "x\n"


def test_only_a_trigger_replaces() -> None:
    old = {"create": "a", "triggers": [1, "x"]}
    diff = CommandProvider().diff(RESOURCE, old, old, {"create": "b", "triggers": [1, UNKNOWN]})
    assert set(diff.changes) == {("create",), ("triggers", 1)}
    assert diff.replace == {("triggers", 1)}


def test_a_preview_runs_nothing_and_knows_no_output(tmp_path: Path) -> None:
    inputs = {"create": f"touch {tmp_path}/ran"}
    assert CommandProvider().create(RESOURCE, inputs, preview=True)[1]["stdout"] is UNKNOWN
    assert not (tmp_path / "ran").exists()


def test_a_secret_input_makes_secret_output() -> None:
    assert run({"create": "echo $K", "environment": {"K": Secret("v")}})["stdout"] == Secret("v")


def test_wrong_inputs_are_refused_by_name() -> None:
    assert problems({"create": UNKNOWN, "environment": {"a": UNKNOWN}}) == {}
    found = problems(
        {"creates": "x", "create": 1, "environment": {"a": 1}, "logging": "loud", "triggers": "x"}
    )
    assert set(found) == {"creates", "create", "environment", "logging", "triggers"}
    assert found["logging"] == "expected one of stdout, stderr, stdoutAndStderr, none, got 'loud'"


def test_another_type_is_refused_by_name() -> None:
    with pytest.raises(ProviderError, match="command:remote:Command is not served by the stand-in"):
        CommandProvider().check(Resource("urn:pulumi:dev::p::command:remote:Command::it"), {}, {}, b"")


def test_an_interrupt_ends_the_command_and_its_children() -> None:
    provider = CommandProvider()
    threading.Timer(0.2, provider.cancelled.set).start()
    started = time.monotonic()
    with pytest.raises(ProviderError, match="interrupted"):
        provider.create(RESOURCE, {"create": "sleep 60 & sleep 60"}, preview=False)
    assert time.monotonic() - started < 10


def test_custom_timeouts_bound_a_command() -> None:
    with pytest.raises(ProviderError, match="customTimeouts"):
        CommandProvider().create(Resource(RESOURCE.urn, timeout=0.2), {"create": "sleep 60"}, preview=False)
