"""Steps with a name, a live elapsed time and a result; a step that fails shows the tail of its own log."""

import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from localcloud.backends.processes import end, marked
from scripts.lib import paths

T = TypeVar("T")
TAIL_LINES = 25
MARK = "AWESOME_WASM_STEP"


class StepError(Exception):
    """A step failed. The message says what, on what, and what to do next; it is shown without a traceback."""


class _Clock:
    """Shows a running step: rewritten in place on a terminal, a line every half minute elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.started = time.monotonic()
        self._done = threading.Event()
        self._live = sys.stdout.isatty()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def elapsed(self) -> str:
        seconds = time.monotonic() - self.started
        return f"{seconds:.1f}s" if seconds < 60 else f"{int(seconds // 60)}m{int(seconds % 60):02}s"

    def _show(self) -> None:
        while not self._done.wait(0.2 if self._live else 30):
            if self._live:
                print(f"\r\033[K  … {self.name}  {self.elapsed()}", end="", flush=True)
            else:
                print(f"  … {self.name}  {self.elapsed()}", flush=True)

    def start(self) -> None:
        self._thread.start()

    def finish(self, mark: str, result: str) -> None:
        self._done.set()
        self._thread.join()
        start = "\r\033[K" if self._live else ""
        print(f"{start}  {mark} {self.name}  {self.elapsed()}{'  ' + result if result else ''}", flush=True)


class Log:
    """A step's log file and its way to run programs."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._file = path.open("w", encoding="utf-8", errors="replace")

    def run(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path = paths.REPOSITORY,
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Runs a program with its output in the log.

        Raises StepError when it cannot be started or does not exit with 0.
        """
        words = [str(word) for word in command]
        print(f"$ {' '.join(words)}", file=self._file, flush=True)
        environment = {**(os.environ if env is None else env), MARK: mark(self.path)}
        try:
            # A group of its own: an interrupt is handed on once.
            process = subprocess.Popen(
                words,
                cwd=cwd,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=self._file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            raise StepError(f"cannot start {words[0]}: {error.strerror}") from error
        try:
            status = process.wait()
        except BaseException:
            _end_group(process)
            end_left(self.path)
            raise
        if status != 0:
            end_left(self.path)
            raise StepError(f"{Path(words[0]).name} exited with {status}")

    def tail(self) -> str:
        """The last lines of the log."""
        self._file.flush()
        lines = self.path.read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"    {line}" for line in lines[-TAIL_LINES:])


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Ends a program: asked first, so that pulumi saves its state, then made to, at once if asked again."""
    for sent, patience in ((signal.SIGINT, 30), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired, KeyboardInterrupt):
            process.wait(timeout=patience)
            return


def mark(log: Path) -> str:
    """What the processes of a step have in their environment, also those that left its process group."""
    return f"{log}#"


def end_left(log: Path) -> None:
    """Ends what a step that was interrupted or killed left behind, as pulumi its plugins.

    Nothing interrupts this: it takes seconds, and what is left would hold locks and ports.
    """
    ignored = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        end(lambda: marked(mark(log), MARK))
    finally:
        for number, handler in ignored.items():
            signal.signal(number, handler)


def log_path(name: str) -> Path:
    """The log file of a step."""
    return paths.LOGS / f"{name.replace(' ', '-').replace('/', '-')}.log"


def step(name: str, work: Callable[[Log], T], result: Callable[[T], str] = lambda _: "") -> T:
    """Runs work(log) as a step and gives back what it gives.

    Raises StepError, with the tail of the step's log in the message, when the work raises one.
    """
    log = Log(log_path(name))
    clock = _Clock(name)
    clock.start()
    try:
        value = work(log)
    except StepError as error:
        clock.finish("✗", "failed")
        tail = log.tail()
        raise StepError(f"{name}: {error}\n{tail}\n  the whole log: {log.path}") from error
    except BaseException:
        clock.finish("✗", "interrupted")
        raise
    clock.finish("✓", result(value))
    return value


@contextlib.contextmanager
def lock(path: Path, waiting: str = "") -> Iterator[None]:
    """Holds an exclusive lock on a file, so that two runs at once wait for each other instead of meeting.

    Whoever holds it may remove the file. `waiting` is said if there is something to wait for.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    print(waiting, flush=True)
                fcntl.flock(file, fcntl.LOCK_EX)
            # A file that was removed meanwhile keeps nobody out.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield
                return
