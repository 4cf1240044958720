"""Where things are on an instance, and what its programs find in their environment.

    instances/NAME/instance.json    the InstanceSpec that it was started with, and the host's PATH
    instances/NAME/bin/systemctl    the stand-in, first on its PATH
    instances/NAME/usr/local        PREFIX
    instances/NAME/etc              SYSCONFDIR, with systemd/system below it
    instances/NAME/var/lib          state, kept over a reboot; run and tmp are not
    instances/NAME/log              serial-port-1.log

Quick to import: systemctl.py uses it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from localcloud.home import Home, write_private
from localcloud.specs import BackendError, InstanceSpec

WANTS = "multi-user.target.wants"


@dataclass(frozen=True)
class Rootfs:
    """One instance's directory."""

    home: Home
    name: str

    @property
    def scope(self) -> str:
        return f"instances/{self.name}"

    @property
    def root(self) -> Path:
        return self.home.root / "instances" / self.name

    @property
    def units(self) -> Path:
        return self.root / "etc/systemd/system"

    @property
    def wants(self) -> Path:
        """Symlinks to the enabled units, as `systemctl enable` makes them."""
        return self.units / WANTS

    @property
    def console(self) -> Path:
        return self.root / "log/serial-port-1.log"

    def program(self, part: str) -> str:
        """The supervisor's name for a part. A dot is in no instance's name: `a` and `a-b` cannot meet."""
        return f"vm-{self.name}.{part}"

    def load(self) -> InstanceSpec:
        """
        Raises:
            BackendError: the instance was never started.
        """
        fields = self._record()["spec"]
        lists = {name: tuple(fields.get(name, ())) for name in ("scopes", "alias_ranges")}
        return InstanceSpec(**{**fields, **lists})

    def save(self, spec: InstanceSpec) -> None:
        """Also keeps the caller's PATH: units must not see that of whoever calls `systemctl`."""
        record = {"spec": asdict(spec), "path": os.environ.get("PATH", os.defpath)}
        write_private(self.root / "instance.json", json.dumps(record, indent=1))

    def _record(self) -> dict[str, Any]:
        try:
            record: dict[str, Any] = json.loads((self.root / "instance.json").read_text())
        except FileNotFoundError:
            raise BackendError(f"there is no instance {self.name} in {self.home.root}") from None
        return record

    def metadata_host(self, spec: InstanceSpec) -> str:
        """HOST:PORT of the instance's metadata server."""
        ports = json.loads((self.root / "ports.json").read_text())
        return f"{spec.ip}:{ports['metadata']}"

    def environment(self, spec: InstanceSpec) -> dict[str, str]:
        """What a service manager on the instance gives to every unit."""
        path = [str(self.root / "bin"), str(self.root / "usr/local/bin"), self._record()["path"]]
        return {
            "PATH": ":".join(path),
            "HOME": str(self.root / "root"),
            "TMPDIR": str(self.root / "tmp"),
            "LANG": "C.UTF-8",
            "HOSTNAME": spec.hostname,
            "GCE_METADATA_HOST": self.metadata_host(spec),
        }

    def script_environment(self, spec: InstanceSpec) -> dict[str, str]:
        """The same for the startup script, with the GNU directory variables and systemd's unit path."""
        return self.environment(spec) | {
            "PREFIX": str(self.root / "usr/local"),
            "SYSCONFDIR": str(self.root / "etc"),
            "SYSTEMD_UNIT_PATH": str(self.units),
        }
