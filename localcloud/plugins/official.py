"""Which official plugins count: those of exactly the version that the SDKs ask for, and that run here.

Another version is one that pulumi would not take: with it on PATH or in pulumi's home, the stand-in stays.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import platform
import queue
import struct
import subprocess
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from localcloud.plugins import sdk

WHATEVER_VERSION = "LOCALCLOUD_OFFICIAL_PLUGINS"
"""Environment variable: plugins, by comma, whose official one is taken in whatever version it is there."""
_START_SECONDS = 30
_MACHINES = {  # ELF's e_machine and Mach-O's cputype
    "x86_64": (62, 0x01000007),
    "amd64": (62, 0x01000007),
    "aarch64": (183, 0x0100000C),
    "arm64": (183, 0x0100000C),
}


def asked_for(name: str) -> str:
    """The version of the plugin that the installed SDK asks for; empty where there is none."""
    spec = importlib.util.find_spec(f"pulumi_{name}")
    for place in (spec.submodule_search_locations or []) if spec else []:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((Path(place) / "pulumi-plugin.json").read_text(encoding="utf-8"))
            return str(found.get("version", "")).removeprefix("v")
    return ""


def directory(name: str, home: Path, path: Iterable[str]) -> Path | None:
    """Where the official plugin is that counts, on `path` or in pulumi's `home`."""
    executable, version = f"pulumi-resource-{name}", asked_for(name)
    exactly = home / "plugins" / f"resource-{name}-v{version}"
    whatever = name in os.environ.get(WHATEVER_VERSION, "").split(",")
    # pulumi takes one on PATH before any that it installed
    for entry in path:
        found = Path(entry) / executable
        if _is_stand_in(found, name):
            continue
        known = whatever or found.parent == exactly
        if _runs_here(found) and (known or (version and _says(found) == version)):
            return found.parent
    for installed in sorted((home / "plugins").glob(f"resource-{name}-v*")):
        whole = not installed.with_name(f"{installed.name}.partial").exists()
        found = installed / executable
        if (
            (installed == exactly or whatever)
            and whole
            and _runs_here(found)
            and not _is_stand_in(found, name)
        ):
            return installed
    return None


def _is_stand_in(path: Path, name: str) -> bool:
    """Whether it is localcloud's own, of whatever checkout."""
    return path.resolve().parts[-4:-1] == ("localcloud", "plugins", name)


def _runs_here(path: Path) -> bool:
    """Whether it is a program, and of this system and processor as far as its head tells."""
    if not (path.is_file() and os.access(path, os.X_OK)):
        return False
    try:
        with path.open("rb") as file:
            head = file.read(20)
    except OSError:
        return False
    elf, mach_o = _MACHINES.get(platform.machine().lower(), (None, None))
    if head.startswith(b"\x7fELF") and len(head) == 20:
        (machine,) = struct.unpack_from(">H" if head[5] == 2 else "<H", head, 18)
        return platform.system() == "Linux" and elf in (None, machine)
    if head.startswith(b"\xcf\xfa\xed\xfe"):
        (kind,) = struct.unpack_from("<I", head, 4)
        return platform.system() == "Darwin" and mach_o in (None, kind)
    if head.startswith((b"\xca\xfe\xba\xbe", b"\xca\xfe\xba\xbf")):
        return platform.system() == "Darwin"  # for several processors
    return head.startswith(b"#!")


def _says(executable: Path) -> str:
    """The version that a plugin says it is, asked as pulumi asks it."""
    import grpc  # type: ignore[import-untyped]  # noqa: PLC0415
    from google.protobuf import empty_pb2  # type: ignore[import-untyped]  # noqa: PLC0415

    with sdk.not_run():
        from pulumi.runtime.proto import provider_pb2_grpc  # noqa: PLC0415

    try:
        process = subprocess.Popen(
            [str(executable), "127.0.0.1:9"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
    except OSError:
        return ""
    lines: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_first_line, args=(process.stdout, lines), daemon=True).start()
    try:
        port = int(lines.get(timeout=_START_SECONDS))
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            plugin = provider_pb2_grpc.ResourceProviderStub(channel)
            info = plugin.GetPluginInfo(empty_pb2.Empty(), timeout=_START_SECONDS)
        return str(info.version).removeprefix("v")
    except (queue.Empty, ValueError, grpc.RpcError):
        return ""
    finally:
        process.kill()
        process.wait()


def _first_line(stream: IO[bytes], lines: queue.SimpleQueue[bytes]) -> None:
    with stream:
        lines.put(stream.readline())
