"""A random walk through a stack's life: settings change, things vanish, processes die; every up converges.

    AWESOME_WASM_WALK_SECONDS=3600 AWESOME_WASM_WALK_SEED=7 python -m pytest -s tests/e2e/test_walk.py

walks for an hour; without them it walks for a minute, the same way each time. A failure prints
the seed and the steps. A walk of more than ten minutes replaces the cluster and the node, too, and
destroys the stack from wherever it is. As root the clone lies on a disk of its own, which the walk fills.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule, run_state_machine_as_test

from components.providers.artifacts import signature_tag
from components.providers.client import Client
from scripts.lib.changes import ALL, CHANGES, KMS, VM, Change
from tests.e2e.cloud import Cloud
from tests.e2e.conftest import Stack, clone

SECONDS = float(os.environ.get("AWESOME_WASM_WALK_SECONDS", "60"))
SEED = int(os.environ.get("AWESOME_WASM_WALK_SEED", "1"))
# Every row of the table of changes but these: localcloud has one project, a protected cluster is not to be
# destroyed, an app that is renamed beside others is another one, which waits for the port, and what makes a
# key in Cloud KMS is no part of the program, and may meet a fault.
LEFT_OUT = ("gcp:project", "deletionProtection", "apps")
SETTINGS = [change for change in CHANGES if change.key not in LEFT_OUT and change.value != KMS]
# These replace the VM or the cluster, or do when they are taken back: a short walk leaves them out.
RANGE = "wasmPodCidr"
SLOW = [
    change
    for change in SETTINGS
    if change.downtime in (VM, ALL) or RANGE in (change.key, *(key for key, _ in change.also))
]
QUICK = [change for change in SETTINGS if change not in SLOW]
PROGRAMS = ("krustlet", "kube-apiserver", "etcd", "kube-controller-manager", "registry")
# What goes wrong, by its name here, and the options of `localcloud faults add` that make it.
FAULTS = {
    "error": ["error", "--status", "503"],
    "lost-answer": ["lost-answer"],
    "failed-operation": ["failed-operation"],
    "latency": ["latency", "--seconds", "3"],
    "refused deletes": ["error", "--method", "*.delete", "--status", "403", "--times", "0"],
    "read-only-registry": ["read-only-registry"],
    "no-control-plane": ["no-control-plane", "--seconds", "20"],
}


@contextmanager
def filled(directory: Path, left: int) -> Iterator[None]:
    """Let the disk of a directory have so many bytes left."""
    filler, space = directory / "filler", os.statvfs(directory)
    with filler.open("wb") as file, suppress(OSError):  # whoever else writes to it meanwhile was quicker
        os.posix_fallocate(file.fileno(), 0, max(1, space.f_bavail * space.f_frsize - left))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def small_disk(directory: Path) -> Iterator[bool]:
    """Give a directory a disk of 2 GiB, where this user may; whether it has one."""
    if os.geteuid() != 0:
        print("  only root may mount the small disk that the walk would fill")  # noqa: T201 - with pytest -s
        yield False
        return
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2g", "tmpfs", directory], check=True)
    try:
        yield True
    finally:
        subprocess.run(["umount", "--lazy", directory], check=True)


@dataclass
class World:
    """The stack that walks, how long it may, and what was done to it."""

    stack: Stack
    end: float
    steps: list[str] = field(default_factory=list)
    settings: str = field(init=False)
    """The settings that the stack had, as its file."""
    changes: dict[str, Change] = field(default_factory=dict)
    """What is set beside them, by key."""
    small: bool = False
    """Whether its clone has a disk of its own, which may be filled."""
    disturbed: bool = False
    """Whether something was done since it was last brought up."""
    destroyed: bool = False
    """Whether nothing was done since it was destroyed."""
    failed: BaseException | None = None
    """What ended the walk. hypothesis would try the step again, in a world that is another one then."""
    walks: int = 0
    """How many of hypothesis' examples are over."""

    def __post_init__(self) -> None:
        self.settings = self._file.read_text()

    @property
    def _file(self) -> Path:
        return self.stack.directory / "Pulumi.local.yaml"

    def change(self, change: Change, *, back: bool) -> None:
        """Change a setting or take it back; a zone goes with its region."""
        key = "gcp:zone" if change.key == "gcp:region" else change.key
        self.changes.pop(key, None)
        if not back:
            self.changes[key] = change
        self._file.write_text(self.settings)
        for one in self.changes.values():
            self.stack.configure(one)

    @property
    def cloud(self) -> Cloud:
        """What localcloud has."""
        return Cloud(self.stack.env)

    def did(self, step: str) -> None:
        """Remember a step, and show it."""
        self.steps.append(step)
        print(f"  {len(self.steps):3} {step}", flush=True)  # noqa: T201 - the way that it took, with pytest -s

    def start(self) -> None:
        """Start localcloud where it was killed."""
        self.stack.run("python", "-m", "localcloud", "start")
        self.stack.read_environment()

    def run_for(self, seconds: float, how: signal.Signals, *command: str) -> None:
        """Run a command of the stack's, and end it where it takes longer."""
        process = subprocess.Popen(
            command,
            cwd=self.stack.directory,
            env=self.stack.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, how)
            process.wait()

    def destroy(self) -> None:
        """Destroy the stack as it is, and look whether anything is left."""
        self.start()
        # The lock of one that was killed, or that wrote it on a full disk: pulumi itself says to cancel it.
        self.stack.run("pulumi", "cancel", "--yes")
        self.stack.run("python", "-m", "scripts.lib.interrupted", "local", "destroy")
        self.stack.run("pulumi", "destroy", "--yes")
        left = self.cloud.resources()
        assert left == set(), f"a destroy leaves nothing, and left {left}"

    def rests(self) -> bool:
        """Whether the time is over, or has not begun: hypothesis' first example is the simplest there is."""
        return self.failed is not None or self.walks < 1 or time.monotonic() > self.end

    def pids(self, program: str) -> list[int]:
        """This clone's processes of a program, by how their command line ends or what it begins with."""
        found, home = [], str(self.stack.directory).encode()
        for process in Path("/proc").glob("[0-9]*"):
            try:
                words = (process / "cmdline").read_bytes().split(b"\0")
                mine = home in b" ".join(words) or home in (process / "environ").read_bytes()
            except OSError:
                continue
            line = b" ".join(words).decode(errors="replace").strip()
            if mine and (Path(words[0].decode(errors="replace")).name == program or line.endswith(program)):
                found.append(int(process.name))
        return found

    def converge(self) -> None:
        """Bring the stack up and look whether all is as it should be."""
        self.stack.run("./scripts/up")
        self.stack.read_environment()
        self.stack.run("./scripts/verify", "--wait", "60")
        self.stack.run("pulumi", "preview", "--expect-no-changes")
        has, knows = self.cloud.resources(), self.cloud.in_state(self.stack)
        assert has == knows, f"only in the cloud: {has - knows}; only in the state: {knows - has}"
        self.disturbed = False


Step = Callable[..., None]


def step(**drawn: Any) -> Callable[[Step], Step]:
    """Make a method a rule of the walk; for half of the steps an up then has to heal all that was done.

    When the time is over it does nothing: what hypothesis draws may not depend on a world that outlives
    an example.
    """

    def made(do: Step) -> Step:
        @functools.wraps(do)
        def taken(self: Walk, *, then_up: bool, **values: Any) -> None:
            if self.world.rests():
                return
            try:
                do(self, **values)
                if then_up and self.world.disturbed:
                    self.world.did("./scripts/up")
                    self.world.converge()
            except BaseException as error:
                self.world.failed = error
                raise

        as_rule: Callable[[Step], Step] = rule(**drawn, then_up=st.booleans())
        return as_rule(taken)

    return made


class Walk(RuleBasedStateMachine):
    """Each step does something to the stack."""

    world: World

    def teardown(self) -> None:
        """End an example; the next one goes on in the same world."""
        self.world.walks += 1

    def _did(self, step: str) -> None:
        self.world.did(step)
        self.world.disturbed, self.world.destroyed = True, False

    @step(
        changes=st.lists(
            st.tuples(st.sampled_from(SETTINGS if SECONDS > 600 else QUICK), st.booleans()),
            min_size=1,
            max_size=3,
        )
    )
    def change(self, changes: list[tuple[Change, bool]]) -> None:
        """Change settings, or take changes back; a disk that has grown does not shrink again."""
        for change, back in changes:
            taken_back = back and change.key != "diskSizeGb"
            self._did(f"{change.key}: {'as it was' if taken_back else change.value}")
            self.world.change(change, back=taken_back)

    @step(what=st.sampled_from(["pod", "node", "vm", "image", "signature", "prepared pod"]))
    def delete(self, what: str) -> None:
        """Delete something by hand; what is gone already is gone."""
        stack, outputs = self.world.stack, self.world.stack.outputs()
        if not outputs:
            return  # it is destroyed
        self._did(f"delete the {what}")
        namespace = ("--namespace", str(outputs["namespace"]))
        quickly = ("--ignore-not-found", "--wait=false")
        repository, _, digest = str(outputs["image"]).partition("@")
        deletions: dict[str, Callable[[], object]] = {
            "pod": lambda: stack.kubectl("delete", "pod", outputs["pod"], *namespace, *quickly, check=False),
            "prepared pod": lambda: stack.kubectl(
                "delete", "pods", "--field-selector=status.phase=Succeeded", *namespace, *quickly, check=False
            ),
            "node": lambda: stack.kubectl("delete", "node", outputs["node"], *quickly, check=False),
            "vm": lambda: self.world.cloud.delete_instance(str(outputs["node"])),
            "image": lambda: self._registry(repository).delete_artifact(digest, "no-tag"),
            "signature": lambda: self._delete_signature(repository, digest),
        }
        deletions[what]()

    def _registry(self, repository: str) -> Client:
        os.environ["GOOGLE_OAUTH_ACCESS_TOKEN"] = self.world.stack.env["GOOGLE_OAUTH_ACCESS_TOKEN"]
        return Client(repository)

    def _delete_signature(self, repository: str, digest: str) -> None:
        registry, tag = self._registry(repository), signature_tag(digest)
        found = registry.manifest_digest(tag)
        if found is not None:
            registry.delete_artifact(found, tag)

    @step(program=st.sampled_from([*PROGRAMS, "localcloud serve"]))
    def kill(self, program: str) -> None:
        """Kill a part without warning."""
        self._did(f"kill {program}")
        for pid in self.world.pids(program):
            os.kill(pid, signal.SIGKILL)

    @step(after=st.floats(0.5, 20), how=st.sampled_from([signal.SIGKILL, signal.SIGINT]))
    def interrupt(self, after: float, how: signal.Signals) -> None:
        """End pulumi itself in the middle of an up."""
        self._did(f"pulumi up, {how.name} after {after:.1f} s")
        self.world.run_for(after, how, "pulumi", "up", "--yes", "--skip-preview")

    @step(
        kind=st.sampled_from(list(FAULTS)),
        after=st.integers(0, 20),
        times=st.integers(1, 3),
    )
    def fault(self, kind: str, after: int, times: int) -> None:
        """Let Google's answers, or what is behind them, go wrong during an up."""
        options = ["--after", str(after), "--times", str(times), "--seed", str(after), *FAULTS[kind]]
        self._did(f"pulumi up, with localcloud faults add {' '.join(options)}")
        stack = self.world.stack
        self.world.start()
        stack.run("python", "-m", "localcloud", "faults", "add", *options)
        stack.run("pulumi", "up", "--yes", "--skip-preview", check=False)
        stack.run("python", "-m", "localcloud", "faults", "clear")

    @step(left=st.sampled_from([0, 2**16, 2**20, 2**24]))
    def fill(self, left: int) -> None:
        """Fill the disk up to so many bytes, and bring the stack up on it, where no node takes a pod."""
        if not self.world.small:
            return
        self._did(f"./scripts/up, SIGINT after 90 s, with {left} bytes left on the disk")
        with filled(self.world.stack.directory, left):
            self.world.run_for(90, signal.SIGINT, "./scripts/up")

    @step(one_in_four=st.sampled_from([False, False, False, True]))
    def destroy(self, one_in_four: bool) -> None:
        """Destroy it from where it is, which a short walk has no time for: nothing is left."""
        if SECONDS <= 600 or self.world.destroyed or not one_in_four:
            return
        self._did("pulumi destroy")
        self.world.destroy()
        self.world.destroyed = True


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")
def test_every_up_converges_and_nothing_is_lost_or_left(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("walk")
    with small_disk(directory) as small:
        made = clone(directory)
        outside = Stack(made.directory, dict(made.env))
        try:
            walk(made, outside, small=small)
        finally:
            outside.run("./scripts/down", "--force")


def walk(made: Stack, outside: Stack, *, small: bool) -> None:
    """Walk, and destroy what is there in the end; `outside` has the environment of before the stack."""
    made.run("./scripts/up")
    made.read_environment()
    world = World(made, time.monotonic() + SECONDS, small=small)
    machine = type("Walk", (Walk,), {"world": world})
    chosen = settings(
        # They follow each other in the same world.
        max_examples=int(SECONDS / 30) + 2,
        stateful_step_count=4,
        deadline=None,
        database=None,
        # The world is one and cannot be set back: what failed is told, and not tried again with fewer steps.
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(seed(SEED)(machine), settings=chosen)
        home = Path(made.directory) / ".localcloud"
        world.did("pulumi destroy, from wherever this is")
        world.destroy()
        outside.run("./scripts/down")
        assert not home.exists()
    except BaseException as error:
        print(f"AWESOME_WASM_WALK_SEED={SEED} took these steps:", *world.steps, sep="\n  ")  # noqa: T201
        raise (world.failed or error) from None
