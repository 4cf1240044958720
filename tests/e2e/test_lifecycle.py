"""Bringing the stack up and down the hard way: killed in the middle, twice at once, torn down."""

import os
import signal
import subprocess
from pathlib import Path

import pytest
import requests

from tests.e2e.conftest import Stack, clone
from tests.waiting import remove, until


def _processes_of(directory: Path) -> list[str]:
    """The processes whose command line, working directory or environment names the clone."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            words = (process / "cmdline").read_bytes() + (process / "environ").read_bytes()
            place = str((process / "cwd").readlink())
        except OSError:
            continue
        if int(process.name) != os.getpid() and (str(directory).encode() in words or str(directory) in place):
            found.append(f"{process.name} {(process / 'cmdline').read_bytes().decode(errors='replace')}")
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="looks for what is left in Linux's /proc")
def test_an_up_carries_on_after_a_kill_begins_anew_without_its_cloud_and_a_down_leaves_nothing(
    tmp_path: Path,
) -> None:
    made = clone(tmp_path)
    outside = Stack(made.directory, dict(made.env))
    try:
        _kill_an_up_half_way(made)
        outside.run("./scripts/up")
        made.read_environment()
        assert made.get("/primorial/30").json()["primorial"] == "6469693230"
        # The stack's state is still there, and speaks of what is gone.
        remove(made.directory / ".localcloud")
        outside.run("./scripts/up")
        made.read_environment()
        url = made.outputs()["url"]
        assert requests.get(f"{url}/primorial/30", timeout=10).json()["primorial"] == "6469693230"
    finally:
        outside.run("./scripts/down")
    until(lambda: not _processes_of(made.directory), "every process to end", timeout=20)
    with pytest.raises(requests.ConnectionError):
        requests.get(f"{url}/healthz", timeout=5)
    assert made.run("git", "status", "--porcelain", "--ignored").stdout == "", "no file of the run is left"


def _kill_an_up_half_way(made: Stack) -> None:
    """Starts an up and kills it without warning while the cluster is being made."""
    process = subprocess.Popen(
        ["./scripts/up"], cwd=made.directory, env=made.env, stdout=subprocess.DEVNULL, start_new_session=True
    )
    clusters = made.directory / ".localcloud" / "clusters"
    until(lambda: any(clusters.glob("*/*")), "a cluster to be begun", timeout=300)
    for child in _children(process.pid):
        os.kill(child, signal.SIGKILL)
    process.wait(timeout=30)


def _children(pid: int) -> list[int]:
    """A process and all its descendants that localcloud's supervisor does not own, the root first."""
    parents: dict[int, list[int]] = {}
    for process in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = process.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(process.parent.name))
    found, queue = [], [pid]
    while queue:
        current = queue.pop()
        found.append(current)
        queue += parents.get(current, [])
    return found


def test_two_ups_at_once_wait_for_each_other(stack: Stack) -> None:
    both = [
        subprocess.Popen(
            ["./scripts/up"],
            cwd=stack.directory,
            env=stack.env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for _ in range(2)
    ]
    printed = [process.communicate(timeout=600)[0].decode() for process in both]
    assert [process.returncode for process in both] == [0, 0], "\n".join(printed)
