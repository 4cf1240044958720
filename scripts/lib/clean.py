"""./scripts/clean: takes out of the cache what no checkout uses, and nothing that runs.

Each checkout notes what it uses of the cache; a note goes with its checkout. What a state in a checkout's
.stacks names is used too, and so is what a living process was started with.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path

from scripts.lib import paths, timings, toolchain, venv
from scripts.lib.steps import lock

# What is as young as this may be of a command that has not noted it yet, as a `pulumi up` by hand.
YOUNG_SECONDS = 3600
_SHA256 = re.compile(rb"[0-9a-f]{64}")
# What a command that was killed has left at the top of the cache; below, it has a name that nobody notes.
_SCRATCH = re.compile(r"tmp\w{8}|\.(bundle|durations)-\w+")


def in_use() -> AbstractContextManager[None]:
    """Keeps ./scripts/clean out while a command works with the cache."""
    return lock(paths.CACHE / "use.lock", "./scripts/clean is at work; waiting for it", shared=True)


def _notes() -> Path:
    return paths.CACHE / "uses"


def note(builds: Iterable[Path] | None = None) -> None:
    """Notes what this checkout uses of the cache; with None it is the same builds as before."""
    target = _notes() / f"{paths.LOGS.name}.json"
    used = [*toolchain.current(), venv.directory(), venv.policies_directory()]
    names = [str(path.relative_to(paths.CACHE)) for path in used]
    if builds is None:
        with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
            before = json.loads(target.read_text(encoding="utf-8"))["uses"]
            names += [name for name in before if name.startswith("builds/")]
    else:
        names += [f"builds/{path.parent.name}" for path in builds]
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}")
    scratch.write_text(json.dumps({"checkout": str(paths.REPOSITORY), "uses": names}), encoding="utf-8")
    scratch.replace(target)


def _living() -> Iterator[tuple[Path, Path, list[str]]]:
    """The notes of the checkouts that are there: the note, the checkout, what it uses."""
    for path in sorted(_notes().glob("*.json")):
        with suppress(OSError, ValueError, KeyError, TypeError):
            found = json.loads(path.read_text(encoding="utf-8"))
            checkout, used = Path(found["checkout"]), [str(name) for name in found["uses"]]
            if (checkout / "scripts" / "up").is_file():
                yield path, checkout, used


def _in_states(checkout: Path) -> set[str]:
    """The builds that the states of a checkout's stacks name."""
    found: set[bytes] = set()
    for path in (checkout / ".stacks").rglob("*.json*"):
        with suppress(OSError, EOFError):
            data = path.read_bytes()
            found.update(_SHA256.findall(gzip.decompress(data) if path.suffix == ".gz" else data))
    return {f"builds/{sha256.decode()}" for sha256 in found}


def _of_processes() -> set[str]:
    """What of the cache is named by a program, an argument or a variable of a process."""
    texts: list[bytes] = []
    processes = [entry for entry in Path("/proc").glob("[0-9]*") if entry.name != str(os.getpid())]
    for entry in processes:
        for name in ("environ", "cmdline"):
            with suppress(OSError):
                texts.append((entry / name).read_bytes())
        with suppress(OSError):
            texts.append(os.fsencode((entry / "exe").readlink()))
    if not processes:
        command = ["ps", "-axwwE", "-o", "command="]
        texts.append(subprocess.run(command, capture_output=True, check=False).stdout)
    named = re.compile(re.escape(os.fsencode(paths.CACHE)) + rb"/(tools|venvs|builds)/([\w.-]+)")
    return {f"{kind.decode()}/{name.decode()}" for text in texts for kind, name in named.findall(text)}


def unused() -> list[Path]:
    """What can go."""
    used = _of_processes()
    kept_notes = []
    for path, checkout, names in _living():
        kept_notes.append(path)
        used |= {*names, *_in_states(checkout)}
    found = [path for path in _notes().glob("*.json") if path not in kept_notes]
    for kind in ("tools", "venvs", "builds"):
        for path in (paths.CACHE / kind).glob("*"):
            is_safe = kind != "builds" or not _is_young(path)
            if path.is_dir() and is_safe and f"{kind}/{path.name}" not in used:
                found.append(path)
    left = [path for path in paths.CACHE.glob("*") if _SCRATCH.fullmatch(path.name)]
    found += [path for path in left if not _is_young(path)]
    found += _records(gone={path.name for path in found if path.parent.name == "builds"})
    found += _of_gone_sources(paths.CACHE / "pycache", Path("/"))
    links = (paths.CACHE / "checkouts").glob("*")
    return found + [link for link in links if link.is_symlink() and not link.exists()]


def _is_young(path: Path) -> bool:
    with suppress(OSError):
        return time.time() - path.lstat().st_mtime < YOUNG_SECONDS
    return True  # it is going just now


def _records(gone: set[str]) -> list[Path]:
    """The records of builds that are not there, or are going to be gone."""
    found = []
    for path in (paths.CACHE / "inputs").glob("*/*.json"):
        with suppress(OSError, ValueError, KeyError, TypeError):
            sha256 = str(json.loads(path.read_text(encoding="utf-8"))["built"]["sha256"])
            if sha256 in gone or not (paths.CACHE / "builds" / sha256).is_dir():
                found.append(path)
    return found


def _of_gone_sources(compiled: Path, sources: Path) -> list[Path]:
    """The directories of compiled Python whose sources' directory is gone, the outermost ones."""
    try:
        inside = [path for path in compiled.iterdir() if path.is_dir()]
    except OSError:
        return []
    found = []
    for path in inside:
        source = sources / path.name
        found += _of_gone_sources(path, source) if source.is_dir() else [path]
    return found


def freed(gone: Iterable[Path]) -> int:
    """The bytes that come free: a file counts once its last name goes."""
    inodes: dict[tuple[int, int], list[int]] = {}
    for root in gone:
        files = [Path(parent, name) for parent, _, names in os.walk(root) for name in names]
        for path in files if root.is_dir() and not root.is_symlink() else [root]:
            with suppress(OSError):
                found = path.lstat()
                entry = inodes.setdefault(
                    (found.st_dev, found.st_ino), [0, found.st_nlink, found.st_blocks * 512]
                )
                entry[0] += 1
    return sum(size for names, links, size in inodes.values() if names >= links)


def _remove(path: Path) -> None:
    """Removes a file or a directory; one that is interrupted leaves no tool that lacks a program."""
    if path.is_symlink() or not path.is_dir():
        path.unlink(missing_ok=True)
        return
    aside = path.with_name(f".removed-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)
    shutil.rmtree(aside)


def clean(*, dry_run: bool) -> None:
    """Removes from the cache what no checkout uses any more; says what, and how much."""
    with lock(paths.CACHE / "use.lock", "another command works with the cache; waiting for it"):
        note()
        gone = unused()
        size = timings.megabytes(freed(gone))
        shown = [path for path in gone if path.parent.parent.name != "inputs"]
        compiled = [path for path in shown if path.is_relative_to(paths.CACHE / "pycache")]
        for path in (path for path in shown if path not in compiled):
            print(f"  {path.relative_to(paths.CACHE)}  {timings.megabytes(timings.size(path))}")
        if compiled:
            whole = timings.megabytes(freed(compiled))
            print(f"  compiled Python of {len(compiled)} directories that are gone  {whole}")
        if not dry_run:
            for path in gone:
                _remove(path)
    if dry_run:
        print(f"{size} would come free in {paths.CACHE}")
    else:
        print(f"{size} came free in {paths.CACHE}" if gone else f"nothing is left over in {paths.CACHE}")
    target = paths.CACHE / "target"
    if target.is_dir():
        print(
            f"kept: cargo's intermediate files, {timings.megabytes(timings.size(target))}, without which the "
            f"next change of the agent compiles all of it: {target}"
        )
    print("Go's own are for all of Go's work on this machine: go clean -cache")
