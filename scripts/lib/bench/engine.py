"""Docker's engine, started by hand in a directory of its own: no bridge, no firewall rules."""

import http.client
import io
import json
import shutil
import socket
import subprocess
import tarfile
from pathlib import Path
from typing import Any

from scripts.lib.bench import guard
from scripts.lib.bench.measure import BenchError, family, until


class _Connection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=120)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.connect(str(self._path))


class Engine:
    """A dockerd; it ends with its directory whatever becomes of this process."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._socket = directory / "docker.sock"
        self._groups = f"/{directory.name}"
        self.log = directory / "dockerd.log"
        try:
            self._start()
        except BenchError:
            # Where the directory itself is on an overlay, as in a container.
            self._start("--storage-driver=vfs")

    @property
    def _client(self) -> list[str]:
        return ["docker", "--host", f"unix://{self._socket}"]

    def _start(self, *flags: str) -> None:
        place = self.directory
        command = [
            "dockerd",
            f"--data-root={place}/data",
            f"--exec-root={place}/exec",
            f"--pidfile={place}/pid",
        ]
        command += [f"--host=unix://{self._socket}", "--bridge=none", "--iptables=false"]
        command += ["--shutdown-timeout=5", f"--config-file={place}/daemon.json", *flags]
        (place / "daemon.json").write_text("{}", encoding="utf-8")  # and not the machine's own
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                command, env=guard.environment(place), stdout=log, stderr=log, start_new_session=True
            )
        until(lambda: self._process.poll() is not None or self._answers(), "dockerd to answer", 60)
        if self._process.poll() is not None:
            raise BenchError(f"dockerd ended:\n{self.log.read_text(encoding='utf-8')[-2000:]}")

    def _answers(self) -> bool:
        try:
            self.ask("GET", "/version")
        except OSError:
            return False
        return True

    def ask(self, verb: str, path: str, body: object = None) -> Any:
        """A request to the engine's API. Raises BenchError for what it refuses."""
        connection = _Connection(self._socket)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(verb, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        if answer.status >= 400 and answer.status != 404:
            raise BenchError(f"{verb} {path}: {answer.status} {text.decode(errors='replace')}")
        return json.loads(text) if text else None

    def import_image(self, file: Path) -> str:
        """An image of one file, as FROM scratch makes it; gives its name."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(file, "app")
        command = [*self._client, "import", "--change", 'ENTRYPOINT ["/app"]', "-", "bench:native"]
        subprocess.run(command, input=packed.getvalue(), capture_output=True, check=True)
        return "bench:native"

    def save(self, image: str) -> bytes:
        """The layers of an image as `docker save` gives them, with its configuration."""
        return subprocess.run([*self._client, "save", image], capture_output=True, check=True).stdout

    def start(self, name: str, image: str, argument: str) -> None:
        """Creates a container and starts it."""
        host = {"NetworkMode": "host", "CgroupParent": self._groups}
        body = {"Image": image, "Cmd": [argument], "Env": [self._mark], "HostConfig": host}
        made = self.ask("POST", f"/containers/create?name={name}", body)
        self.ask("POST", f"/containers/{made['Id']}/start")

    def run(self, name: str, image: str, argument: str) -> None:
        """The same by the command."""
        options = ["--detach", "--name", name, "--network=host", f"--cgroup-parent={self._groups}"]
        command = [*self._client, "run", *options, "--env", self._mark, image, argument]
        subprocess.run(command, capture_output=True, check=True)

    @property
    def _mark(self) -> str:
        return f"{guard.MARK}={self.directory}"

    def remove(self, name: str) -> None:
        """Kills a container and removes it."""
        self.ask("DELETE", f"/containers/{name}?force=1")

    def inspect(self, name: str) -> dict[str, Any]:
        """What the engine knows of a container."""
        found: dict[str, Any] = self.ask("GET", f"/containers/{name}/json")
        return found

    def processes(self) -> set[int]:
        """The engine and all that it started; shims have no parent but name containerd's socket."""
        place = f"{self.directory}/exec/"
        return family(lambda pid, words: pid == self._process.pid or place in " ".join(words))

    def close(self) -> None:
        """Ends the engine and frees the disk."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.directory / "data", ignore_errors=True)
