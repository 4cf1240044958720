"""The same app, served in five ways: what starts an instance, where it answers, which processes it takes."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

from kubernetes import client, watch

from scripts.lib import paths
from scripts.lib.bench import guard
from scripts.lib.bench.engine import Engine
from scripts.lib.bench.measure import Address, BenchError, family, until

LOOPBACK = "127.0.0.1"
FIRST_PORT = 20000
NATIVE = paths.REPOSITORY / "bench" / "native"


class AbsentError(Exception):
    """The peer is not on this machine; the message says how to install it."""


def of_stack(words: list[str], *names: str) -> bool:
    """Whether arguments are of a program of that name that works in the stack's localcloud."""
    home = os.environ["LOCALCLOUD_HOME"]
    return bool(words) and Path(words[0]).name in names and any(home in word for word in words)


class Peer:
    """One way of serving the app. Instances are numbered; each has a port of its own."""

    name: ClassVar[str]
    title: str
    base: ClassVar[int]  # its ports begin here

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    @property
    def command(self) -> str:
        """What starts an instance."""
        raise NotImplementedError

    def address(self, number: int) -> Address:
        """Where an instance answers."""
        return LOOPBACK, self.base + number

    def launch(self, number: int) -> None:
        """Starts an instance and does not wait for its answer."""
        raise NotImplementedError

    def remove(self, numbers: Iterable[int]) -> None:
        """Ends instances."""
        raise NotImplementedError

    def processes(self) -> set[int]:
        """The processes of the platform and of all instances."""
        raise NotImplementedError

    def close(self) -> None:
        """Ends the platform."""


class Node(Peer):
    """Pods on the stack's node, by the API server."""

    name, title, base = "node", "pod on our node", 20000
    namespace = "bench"

    def __init__(self, directory: Path, outputs: dict[str, Any]) -> None:
        super().__init__(directory)
        self.outputs = outputs
        self.api = client.CoreV1Api()
        self.ready: dict[int, float] = {}
        with contextlib.suppress(client.ApiException):
            self.api.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=self.namespace)))
        until(self._has_service_account, "the namespace to be usable", 30)
        self.close()  # what an interrupted run left
        threading.Thread(target=self._watch, daemon=True).start()

    @property
    def command(self) -> str:
        """A pod with one container and nothing else."""
        return (
            f"kubectl run --image={self.outputs['image']} --port=PORT (through the API, on a kept connection)"
        )

    def address(self, number: int) -> Address:
        """A port of the node's address."""
        return str(urlsplit(self.outputs["url"]).hostname), self.base + number

    def _has_service_account(self) -> bool:
        try:
            self.api.read_namespaced_service_account("default", self.namespace)
        except client.ApiException:
            return False
        return True

    def _watch(self) -> None:
        """Notes when each pod was first Ready."""
        pods = watch.Watch().stream(self.api.list_namespaced_pod, self.namespace, label_selector="bench=yes")
        for event in pods:
            conditions = event["object"].status.conditions or []
            if any(condition.type == "Ready" and condition.status == "True" for condition in conditions):
                number = int(event["object"].metadata.name.removeprefix("bench-"))
                self.ready.setdefault(number, time.monotonic())

    def launch(self, number: int) -> None:
        """Creates a pod. Without a CPU limit, as no peer has one."""
        port = client.V1ContainerPort(container_port=self.base + number)
        container = client.V1Container(name="app", image=self.outputs["image"], ports=[port])
        pod = client.V1Pod(
            metadata=client.V1ObjectMeta(name=f"bench-{number}", labels={"bench": "yes"}),
            spec=client.V1PodSpec(
                automount_service_account_token=False,
                node_selector={"kubernetes.io/hostname": self.outputs["node"]},
                tolerations=[client.V1Toleration(key="kubernetes.io/arch", operator="Exists")],
                termination_grace_period_seconds=0,
                containers=[container],
            ),
        )
        self.ready.pop(number, None)
        self.api.create_namespaced_pod(self.namespace, pod)

    def remove(self, numbers: Iterable[int]) -> None:
        """Deletes pods and waits until the API server knows none of them."""
        gone = {f"bench-{number}" for number in numbers}
        for name in gone:
            with contextlib.suppress(client.ApiException):
                self.api.delete_namespaced_pod(name, self.namespace, grace_period_seconds=0)
        until(lambda: not gone & self._pods(), "the pods to go", 300)

    def _pods(self) -> set[str]:
        listed = self.api.list_namespaced_pod(self.namespace).items
        return {str(pod.metadata.name) for pod in listed if pod.metadata}

    def processes(self) -> set[int]:
        """The agent and what it started."""
        found = family(lambda _, words: of_stack(words, "krustlet"))
        if not found:
            raise BenchError("no krustlet of this stack runs on this machine")
        return found

    def control_plane(self) -> set[int]:
        """What a pod also takes, and no peer has: API server, etcd, scheduler, controller manager."""
        names = ("kube-apiserver", "etcd", "kube-scheduler", "kube-controller-manager")
        return family(lambda _, words: of_stack(words, *names))

    def close(self) -> None:
        """Deletes every pod of the benchmark."""
        self.api.delete_collection_namespaced_pod(self.namespace, grace_period_seconds=0)
        until(lambda: not self._pods(), "the pods to go", 300)


class Program(Peer):
    """A process for each instance."""

    def __init__(self, directory: Path, file: Path) -> None:
        super().__init__(directory)
        self.file = file
        self._started: dict[int, subprocess.Popen[bytes]] = {}

    def line(self, port: str) -> list[str]:
        """The command line of an instance."""
        return [str(self.file), f"{LOOPBACK}:{port}"]

    @property
    def command(self) -> str:
        """The same line for people."""
        return " ".join(self.line("PORT"))

    def launch(self, number: int) -> None:
        """Starts the program."""
        self._started[number] = subprocess.Popen(
            self.line(str(self.base + number)),
            env=guard.environment(self.directory),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    def remove(self, numbers: Iterable[int]) -> None:
        """Ends it."""
        ended = [process for number in numbers if (process := self._started.pop(number, None))]
        for process in ended:
            process.kill()
        for process in ended:
            process.wait()

    def processes(self) -> set[int]:
        """What was started."""
        return {process.pid for process in self._started.values()}

    def close(self) -> None:
        """Ends all of them."""
        self.remove(list(self._started))


class Native(Program):
    """The app's routes as a static native program."""

    name, title, base = "process", "native process", 22000


class WasmtimeServe(Program):
    """`wasmtime serve`, a process for each instance; its module is compiled ahead, as the node's is."""

    name, title, base = "wasmtime", "wasmtime serve", 24000

    def __init__(self, directory: Path, component: Path) -> None:
        program = wasmtime()
        compiled = directory / "app.cwasm"
        command = [str(program), "compile", str(component), "-o", str(compiled)]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode != 0:
            raise BenchError(f"{' '.join(command)}: {answer.stderr}")
        super().__init__(directory, compiled)
        self.program = program

    def line(self, port: str) -> list[str]:
        """The command line of an instance."""
        serve = [str(self.program), "serve", "--allow-precompiled", "--addr", f"{LOOPBACK}:{port}"]
        return [*serve, str(self.file)]


class Runtime(Peer):
    """The native program in a container by an OCI runtime alone: no engine."""

    name, title, base = "runtime", "container, OCI runtime alone", 26000

    def __init__(self, directory: Path, file: Path) -> None:
        super().__init__(directory)
        self._file = file
        refused: list[str] = []
        # crun is the quicker one, and knows no machine with both versions of control groups.
        for program in ("crun", "runc"):
            if os.geteuid() == 0 and shutil.which(program):
                try:
                    self._prepare(program)
                    self.launch(0)
                except BenchError as error:
                    refused.append(str(error))
                    continue
                self.remove([0])
                self.title = f"container, {program} alone"
                self._refused = "".join(f" ({error})" for error in refused)
                return
        raise AbsentError("; ".join([*refused, "apt-get install crun, and run this as root"]))

    def _prepare(self, program: str) -> None:
        self.program = program
        root = self.directory / program
        root.mkdir()
        (root / "rootfs").mkdir()
        shutil.copy2(self._file, root / "rootfs" / "app")
        subprocess.run([program, "spec"], cwd=root, check=True)
        spec = json.loads((root / "config.json").read_text(encoding="utf-8"))
        spec["process"] |= {"terminal": False, "env": [f"{guard.MARK}={self.directory}"]}
        spec["root"]["path"] = str(root / "rootfs")
        # The host's network, as Docker's containers have it here.
        spec["linux"]["namespaces"] = [one for one in spec["linux"]["namespaces"] if one["type"] != "network"]
        self._spec = spec
        self._state = [program, "--root", str(root / "state")]

    @property
    def command(self) -> str:
        """With the bundle that `spec` writes, its root replaced and its network the host's."""
        return f"{self.program} run --detach --bundle BUNDLE bench-NUMBER{self._refused}"

    def launch(self, number: int) -> None:
        """Starts a container of a bundle of its own."""
        bundle = self.directory / f"bundle-{number}"
        bundle.mkdir(exist_ok=True)
        process = self._spec["process"] | {"args": ["/app", f"{LOOPBACK}:{self.base + number}"]}
        linux = self._spec["linux"] | {"cgroupsPath": f"/{self.directory.name}/{number}"}
        text = json.dumps(self._spec | {"process": process, "linux": linux})
        (bundle / "config.json").write_text(text, encoding="utf-8")
        command = [*self._state, "run", "--detach", "--bundle", str(bundle), f"bench-{number}"]
        # Into a file: the container keeps what it is given open.
        with (bundle / "log").open("w+b") as log:
            ended = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=False)
            if ended.returncode != 0:
                log.seek(0)
                raise BenchError(f"{self.program}: {log.read().decode(errors='replace').strip()}")

    def remove(self, numbers: Iterable[int]) -> None:
        """Deletes containers."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self._delete, numbers))

    def _delete(self, number: int) -> None:
        command = [*self._state, "delete", "--force", f"bench-{number}"]
        subprocess.run(command, stderr=subprocess.DEVNULL, check=False)

    def processes(self) -> set[int]:
        """The app's alone: the runtime does not stay."""
        ours = set(guard.marked(self.directory))
        line = re.compile(rf"/app {re.escape(LOOPBACK)}:{self.base // 1000}\d\d\d")
        return family(lambda pid, words: pid in ours and line.fullmatch(" ".join(words)) is not None)


class Docker(Peer):
    """The native program in an image of nothing else, by Docker's engine."""

    name, title, base = "docker", "container, Docker", 28000

    def __init__(self, directory: Path, file: Path) -> None:
        missing = [name for name in ("dockerd", "docker", "runc") if shutil.which(name) is None]
        if os.geteuid() != 0 or missing:
            raise AbsentError("apt-get install docker.io, and run this as root: the engine is started here")
        super().__init__(directory)
        try:
            self.engine = Engine(directory)
        except BenchError as error:
            raise AbsentError(f"{error}; apt-get install docker.io where it starts") from None
        try:
            self.image = self.engine.import_image(file)
            self.launch(0)
            self.remove([0])
        except (BenchError, subprocess.CalledProcessError) as error:
            self.engine.close()
            raise AbsentError(
                f"{error}; apt-get install docker.io, and run this where containers start"
            ) from None

    @property
    def command(self) -> str:
        """As a user types it; the engine's API is asked for the same."""
        return f"docker run --detach --network host {self.image} {LOOPBACK}:PORT"

    def launch(self, number: int) -> None:
        """Creates and starts a container by the engine's API."""
        self.engine.start(f"bench-{number}", self.image, f"{LOOPBACK}:{self.base + number}")

    def run(self, number: int) -> None:
        """The same by `docker run`."""
        self.engine.run(f"bench-{number}", self.image, f"{LOOPBACK}:{self.base + number}")

    def remove(self, numbers: Iterable[int]) -> None:
        """Removes containers."""
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(self.engine.remove, [f"bench-{number}" for number in numbers]))

    def processes(self) -> set[int]:
        """The engine, containerd, a shim for each container, and the containers."""
        return self.engine.processes()

    def close(self) -> None:
        """Ends the engine."""
        self.engine.close()


def wasmtime() -> Path:
    """`wasmtime` of the version that the agent is built with. Raises AbsentError."""
    lock = (paths.REPOSITORY / "krustlet" / "Cargo.lock").read_text(encoding="utf-8")
    found = re.search(r'name = "wasmtime"\nversion = "([^"]+)"', lock)
    if found is None:
        raise BenchError("krustlet/Cargo.lock names no wasmtime")
    version = found.group(1)
    root = paths.CACHE / "tools" / f"wasmtime-cli-{version}"
    if not (root / "bin" / "wasmtime").exists():
        raise AbsentError(f"cargo install wasmtime-cli --version {version} --locked --root {root}")
    return root / "bin" / "wasmtime"


def component() -> Path:
    """The app as the stack builds it, from the cache."""
    module = ["-m", "components.providers.cargo", "wasm_app", "--target", "wasm32-unknown-unknown"]
    answer = subprocess.run(
        [sys.executable, *module], cwd=paths.REPOSITORY, capture_output=True, text=True, check=True
    )
    return Path(answer.stdout.splitlines()[-1])


def native() -> Path:
    """The app's routes as a static program. Raises BenchError."""
    triple = f"{platform.machine()}-unknown-linux-gnu"
    target = paths.CACHE / "target" / "bench"
    command = ["cargo", "build", "--release", "--locked", "--target", triple]
    answer = subprocess.run(
        command,
        cwd=NATIVE,
        env={**os.environ, "CARGO_TARGET_DIR": str(target)},
        capture_output=True,
        text=True,
        check=False,
    )
    if answer.returncode != 0:
        raise BenchError(f"{' '.join(command)} in {NATIVE}:\n{answer.stderr}")
    return target / triple / "release" / "native"
