"""What a person sees of a step, and of a machine that lacks something."""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from scripts.lib import paths, prerequisites, steps, timings, toolchain
from scripts.lib.steps import Log, StepError, beside, lock, step


@pytest.fixture(autouse=True)
def _logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "LOGS", tmp_path / "logs")


def test_a_step_shows_its_name_and_its_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert step("add", lambda _log: 2, lambda sum_: f"it is {sum_}") == 2
    assert capsys.readouterr().out.startswith("  ✓ add  0.")


def test_a_step_that_fails_shows_the_end_of_its_own_log_and_where_the_rest_is(
    capsys: pytest.CaptureFixture[str],
) -> None:
    code = "import sys; print(*range(100), 'the reason', sep='\\n'); sys.exit(7)"
    with pytest.raises(StepError) as caught:
        step("build it", lambda log: log.run([sys.executable, "-c", code]))
    message = str(caught.value)
    assert message.startswith(f"build it: {Path(sys.executable).name} exited with 7\n")
    assert "    the reason" in message
    assert "    50\n" not in message
    log = paths.LOGS / "build-it.log"
    assert message.endswith(f"the whole log: {log}")
    assert "\n50\n" in log.read_text()
    assert "✗ build it" in capsys.readouterr().out


def test_a_program_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(StepError, match="cannot start no-such-program: No such file"):
        Log(tmp_path / "log").run(["no-such-program"])


def test_an_interrupted_step_ends_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []
    wait = subprocess.Popen.wait

    def interrupted(process: subprocess.Popen[bytes], timeout: float | None = None) -> int:
        if not started:
            started.append(process)
            raise KeyboardInterrupt
        return wait(process, timeout)

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Log(tmp_path / "log").run([sys.executable, "-c", "import time; time.sleep(60)"])
    # Killed at last where interrupts are ignored, as in a shell's background job.
    assert started[0].returncode in (-signal.SIGINT, 1, -signal.SIGKILL)
    with pytest.raises(ProcessLookupError):
        os.killpg(started[0].pid, 0)


@pytest.mark.parametrize("failure", [None, KeyboardInterrupt, StepError], ids=str)
def test_what_runs_beside_the_steps_ends_with_them_and_takes_its_own_children_along(
    tmp_path: Path, failure: type[BaseException] | None
) -> None:
    pids = tmp_path / "pids"
    child = "import time; time.sleep(600)"
    code = (
        f"import os, subprocess, sys, time; child = subprocess.Popen([sys.executable, '-c', {child!r}]);"
        f"open({str(tmp_path / 'new')!r}, 'w').write(f'{{os.getpid()}} {{child.pid}}');"
        f"os.rename({str(tmp_path / 'new')!r}, {str(pids)!r}); child.wait()"
    )
    with (
        pytest.raises(failure) if failure else contextlib.nullcontext(),
        beside("begin it", [sys.executable, "-c", code], os.environ),
    ):
        until(pids.exists)
        assert step("add", lambda _log: 2) == 2
        if failure:
            raise failure
    for pid in map(int, pids.read_text().split()):
        until(functools.partial(is_gone, pid))


def test_what_ran_beside_the_steps_and_came_to_its_end_has_its_own_log() -> None:
    with beside("begin it", [sys.executable, "-c", "print('done')"], os.environ):
        log = paths.LOGS / "begin-it.log"
        until(lambda: "\ndone\n" in log.read_text())


def until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_gone(pid: int) -> bool:
    status = subprocess.run(
        ["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False
    )
    return not status.stdout.strip() or status.stdout.startswith("Z")


def test_a_second_run_waits_for_the_first(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "lock"
    code = "import fcntl, sys; fcntl.flock(open(sys.argv[1]), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    command = [sys.executable, "-c", code, str(path)]
    with lock(path):
        assert subprocess.run(command, capture_output=True, check=False).returncode != 0
    assert subprocess.run(command, capture_output=True, check=False).returncode == 0


def test_who_waits_is_told_and_is_not_fooled_by_a_lock_that_was_removed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "lock"
    code = (
        "import sys; from pathlib import Path; from scripts.lib.steps import lock\n"
        "with lock(Path(sys.argv[1]), 'waiting'): print('held', Path(sys.argv[1]).exists(), flush=True)"
    )
    with lock(path, "waiting"):
        second = subprocess.Popen(
            [sys.executable, "-c", code, str(path)], cwd=paths.REPOSITORY, stdout=subprocess.PIPE, text=True
        )
        assert second.stdout
        assert second.stdout.readline() == "waiting\n"
        path.unlink()
    assert second.communicate()[0] == "held True\n"
    assert capsys.readouterr().out == ""


def _programs(directory: Path, **versions: str) -> None:
    for name, printed in versions.items():
        (directory / name).write_text(f"#!/bin/sh\necho '{printed}'\n")
        (directory / name).chmod(0o755)


def test_what_is_missing_or_too_old_is_named_at_once_with_the_command_that_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _programs(tmp_path, go="go version go1.21.5 linux/amd64", git="git version 2.43.0", cc="cc 12")
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin-of-nobody")
    with pytest.raises(StepError) as caught:
        prerequisites.check()
    lines = str(caught.value).splitlines()
    assert lines[0] == "prerequisites:"
    assert [line.split()[0] for line in lines[1:]] == ["Go", "Rust", "curl", "openssl"]
    assert "Go 1.21 is too old, 1.26 is needed; to install: " in lines[1]
    assert "Rust through rustup is missing; to install: " in lines[2]


def test_a_machine_that_has_all_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _programs(
        tmp_path,
        go="go version go1.26.1 linux/amd64",
        git="git version 2.43.0",
        rustup="rustup 1.28.2 (e4f3ad6f8 2025-04-28)",
        curl="curl 8.5.0 (x86_64-pc-linux-gnu)",
        openssl="OpenSSL 3.0.13 30 Jan 2024",
        gcc="gcc",
    )
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin-of-nobody")
    prerequisites.check()


def test_a_step_says_which_it_is_and_one_that_lasts_what_it_is_for_and_what_comes_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.setattr(steps, "EXPLAINED_AFTER", 0)
    steps.plan_steps(["build registry", "compile krustlet", "pulumi up"])
    wait = [sys.executable, "-c", "import time; time.sleep(0.5)"]
    step("compile krustlet", lambda log: log.run(wait))
    explained, done = capsys.readouterr().out.splitlines()
    assert explained.startswith("    compile krustlet usually takes 10m00s; then pulumi up. ")
    assert explained.endswith(": krustlet/README.md")
    assert done.startswith("  ✓ 2/3 compile krustlet  ")
    step("pulumi up", lambda log: log.run(wait))
    assert "; then" not in capsys.readouterr().out
    step("something else", lambda _log: None)
    assert capsys.readouterr().out.startswith("  ✓ something else  ")


def test_every_page_that_explains_a_step_is_there() -> None:
    assert [
        about.page for about in timings.ABOUT.values() if not (paths.REPOSITORY / about.page).is_file()
    ] == []


@pytest.mark.parametrize("content", ["", "[]", "{", '{"pulumi up": "long"}', '{"pulumi up": 77}'])
def test_what_a_step_usually_takes_is_what_it_took_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    (tmp_path / "durations.json").write_text(content)
    assert timings.usual("pulumi up") == (77 if "77" in content else timings.ABOUT["pulumi up"].seconds)
    timings.remember("pulumi up", 1.0)  # it had nothing to do
    timings.remember("pulumi up", 90.0)
    assert timings.usual("pulumi up") == 90


def test_the_table_has_each_part_once_with_its_own_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(timings, "TIMINGS", [])
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    (tmp_path / "tool").write_bytes(b"x" * 3 * 2**20)
    moments = iter([0.0, 10.0, 40.0, 100.0])
    monkeypatch.setattr(timings, "time", SimpleNamespace(monotonic=lambda: next(moments)))
    with timings.timed("the rest"), timings.timed("inner") as inner:
        inner.kept = tmp_path / "tool"
    log = (
        " +  gcp:container/cluster:Cluster cluster created (9s) waiting for it\n"
        " +  a:b:Disk disk created (0.40s)\n +  a:b:Pod pod creating (7s)\n ~  a:b:Vm vm updated (1.5s) \n"
    )
    head, rest, part, *resources, together, tool = timings.table(
        {"inner": timings.resources(log)}
    ).splitlines()
    assert head.split() == ["time", "share", "in", "the", "cache"]
    assert rest.split() == ["the", "rest", "1m10s", "70%"]
    assert part.split() == ["inner", "30.0s", "30%", "3", "MB"]
    assert [line.split() for line in resources] == [
        ["Cluster", "cluster", "created", "9.0s"],
        ["Vm", "vm", "updated", "1.5s"],
    ]
    assert together.split() == ["together", "1m40s"]
    assert tool.split() == ["3", "MB", f"{tmp_path}/tool"]


@pytest.mark.parametrize(
    ("free", "absent", "enough"),
    [(20, (True, True), True), (5, (True, False), False), (0.5, (False, True), False), (0.5, (), True)],
)
def test_what_is_needed_on_the_disk_is_there_before_anything_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: float, absent: tuple[bool, ...], enough: bool
) -> None:
    tools, environment = absent or (False, False)
    monkeypatch.setattr(paths, "CACHE", tmp_path)
    monkeypatch.delenv("AWESOME_WASM_BUNDLE", raising=False)
    agent = tmp_path / "builds" / "x" / "krustlet"
    agent.parent.mkdir(parents=True)
    agent.touch()
    usage = SimpleNamespace(free=free * 2**30)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    if enough:
        prerequisites.check_disk(tools=tools, environment=environment)
    else:
        with pytest.raises(StepError, match=rf"{free:.1f} GiB are free .* are needed: "):
            prerequisites.check_disk(tools=tools, environment=environment)


def _user_has(directory: Path, monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    """Has PATH lead to programs of the user's own, and to an empty cache."""
    (directory / "bin").mkdir()
    _programs(directory / "bin", **{name.replace("_", "-"): printed for name, printed in versions.items()})
    monkeypatch.setenv("PATH", f"{directory / 'bin'}:/bin-of-nobody")
    monkeypatch.setattr(paths, "CACHE", directory / "cache")
    monkeypatch.setattr(toolchain, "_go_version", lambda: "go1.26.1")


KUBERNETES = {
    "kube_apiserver": f"Kubernetes {toolchain.KUBERNETES}",
    "kube_controller_manager": f"Kubernetes {toolchain.KUBERNETES}",
    "kube_scheduler": f"Kubernetes {toolchain.KUBERNETES}",
    "kubectl": f"Client Version: {toolchain.KUBERNETES}",
    "etcd": f"etcd Version: {toolchain.pinned('kubernetes', 'go.etcd.io/etcd/server/v3')[1:]}",
}


def test_what_the_user_has_in_the_version_that_is_pinned_is_not_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = toolchain.pinned("registry", "github.com/distribution/distribution/v3")
    pulumi = {"pulumi": toolchain.PULUMI_CLI, "pulumi_language_python": ""}
    _user_has(tmp_path, monkeypatch, **KUBERNETES, registry=f"registry x {registry}+deb1", **pulumi)
    assert toolchain.needed(tests=False) == []
    assert toolchain.directories(tests=False) == []


@pytest.mark.parametrize("program", KUBERNETES)
@pytest.mark.parametrize("printed", ["Kubernetes v1.37.1", "etcd Version: 3.7.30", "v2", "", "1.37"])
def test_one_of_another_version_is_built_and_only_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, printed: str
) -> None:
    _user_has(tmp_path, monkeypatch, **{**KUBERNETES, program: printed})
    cluster = toolchain.needed(tests=False)[0]
    assert cluster.programs == (program.replace("_", "-"),)
    assert toolchain.directory(cluster) != toolchain.directory(toolchain.CLUSTER)
    (package,) = toolchain._packages(cluster)
    assert package.rpartition("/")[2] in (program.replace("_", "-"), "v3")
    toolchain.directory(toolchain.CLUSTER).mkdir(parents=True)
    assert toolchain.needed(tests=False)[0] == toolchain.CLUSTER, "what is built is used"


def test_pulumis_versions_are_pinned_in_one_place() -> None:
    project = (paths.REPOSITORY / "Pulumi.yaml").read_text()
    assert f'requiredPulumiVersion: ">={toolchain.PULUMI_CLI[1:]}"' in project
    assert toolchain.pinned("pulumi", "github.com/pulumi/pulumi/pkg/v3") == toolchain.PULUMI_CLI
    for tool in toolchain.all_tools(tests=True):
        assert len(toolchain._packages(tool)) == len(
            [p for p in tool.programs if "pulumi-r" not in p and "-exec" not in p]
        )
