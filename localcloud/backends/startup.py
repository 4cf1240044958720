"""Runs an instance's startup script once at each boot, as Google's guest agent does.

The script comes from the metadata server (`instance/attributes/startup-script`); its output and its exit
status go to the serial console under the guest agent's own name for it.
"""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import threading
from typing import IO

from localcloud.backends import confinement
from localcloud.backends.processes import wait_until
from localcloud.backends.rootfs import Rootfs
from localcloud.home import Home
from localcloud.specs import InstanceSpec

IDENTIFIER = "google_metadata_script_runner"
_SCRIPT = "/computeMetadata/v1/instance/attributes/startup-script"
_METADATA_SECONDS = 60
# As a shell says it.
_CANNOT_EXECUTE = 126
# How long output may follow after the script itself ended, when it left something running.
_LATE_OUTPUT_SECONDS = 1.0


def main() -> int:
    """
    Returns:
        the script's exit status; 128 + N if signal N ended it, 0 if there is no script.
    """
    rootfs = Rootfs(Home.locate(), sys.argv[1])
    spec = rootfs.load()
    _say("Starting startup scripts.")
    script = _Script(rootfs.metadata_host(spec))
    if not wait_until(script.fetch, _METADATA_SECONDS, 0.1):
        _say(f"The metadata server does not answer within {_METADATA_SECONDS} s.")
        return 1
    if not script.text:
        _say("No startup scripts to run.")
        return 0
    _say("Found startup-script in metadata.")
    trusted = confinement.is_trusted(rootfs.home, script.text)
    reason = "" if trusted else confinement.refusal()
    if reason:
        _say(
            "startup-script is refused: it is not this checkout's components/startup.sh, would run with the"
            f" rights of whoever runs localcloud, and cannot be confined: {reason}. If you trust it:"
            " python -m localcloud trust FILE"
        )
        status = _CANNOT_EXECUTE
    else:
        status = _run(rootfs, spec, script.text, trusted=trusted)
        _say(f"startup-script exit status {status}")
    _say("Finished running startup scripts.")
    return status


class _Script:
    def __init__(self, host: str) -> None:
        self._host = host
        self.text = ""

    def fetch(self) -> bool:
        """Whether the metadata server answered, be it with 404."""
        connection = http.client.HTTPConnection(self._host, timeout=5)
        try:
            connection.request("GET", _SCRIPT, headers={"Metadata-Flavor": "Google"})
            reply = connection.getresponse()
            text = reply.read().decode()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        self.text = text if reply.status == 200 else ""
        return reply.status in (200, 404)


def _run(rootfs: Rootfs, spec: InstanceSpec, text: str, *, trusted: bool) -> int:
    path = rootfs.root / "tmp" / "startup-script"
    path.write_text(text)
    path.chmod(0o700)
    interpreter = () if text.startswith("#!") else ("/bin/sh",)
    if trusted:
        command = [*interpreter, str(path)]
    else:
        _say("startup-script is confined: it is not this checkout's own. It cannot start services.")
        command = confinement.command(rootfs, spec, path, interpreter)
    inherited = {key: value for key, value in os.environ.items() if key.startswith("LOCALCLOUD_SUPERVISED")}
    try:
        process = subprocess.Popen(
            command,
            env=rootfs.script_environment(spec) | inherited,
            cwd=rootfs.root,
            umask=0o022,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
    except OSError as error:
        _say(f"startup-script cannot be run: {error.strerror}")
        return _CANNOT_EXECUTE
    reader = threading.Thread(target=_copy, args=(process.stdout,), daemon=True)
    reader.start()
    status = process.wait()
    reader.join(_LATE_OUTPUT_SECONDS)
    return status if status >= 0 else 128 - status


def _copy(stream: IO[bytes]) -> None:
    for line in stream:
        _say("startup-script: " + line.decode(errors="replace").rstrip("\r\n"))


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201


if __name__ == "__main__":
    sys.exit(main())
