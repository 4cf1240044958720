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
from scripts.lib import paths, timings

T = TypeVar("T")
TAIL_LINES = 25
MARK = "AWESOME_WASM_STEP"


# A step that lasts as long as this is explained: what it is for, how long it takes, what comes next.
EXPLAINED_AFTER = 5


class StepError(Exception):
    """A step failed. The message says what, on what, and what to do next; it is shown without a traceback."""


class RefusalError(StepError):
    """What the user gave is no good. The message says all, and the step's log no more."""


_ahead: list[str] = []
"""The names of the command's steps, from the first one on."""


def plan_steps(names: Sequence[str]) -> None:
    """Says which steps the command is going to take, so that each can say which of them it is."""
    _ahead[:] = names


def _number(name: str) -> str:
    return f"{_ahead.index(name) + 1}/{len(_ahead)} " if name in _ahead else ""


def _explanation(name: str) -> str:
    """What there is to know while a step lasts; empty for one that nothing is known of."""
    about = timings.ABOUT.get(name)
    if about is None:
        return ""
    after = _ahead[_ahead.index(name) + 1 :][:1] if name in _ahead else []
    following = f"; then {after[0]}" if after else ""
    usual = timings.shown(timings.usual(name))
    return f"    {name} usually takes {usual}{following}. {about.what}: {about.page}"


class _Clock:
    """Shows a running step: rewritten in place on a terminal, a line every half minute elsewhere."""

    def __init__(self, name: str) -> None:
        self.name = f"{_number(name)}{name}"
        self.started = time.monotonic()
        self._explanation = _explanation(name)
        self._done = threading.Event()
        self._live = sys.stdout.isatty()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def seconds(self) -> float:
        return time.monotonic() - self.started

    def elapsed(self) -> str:
        return timings.shown(self.seconds())

    def _show(self) -> None:
        said = self.started
        while not self._done.wait(0.2):
            if self._explanation and self.seconds() > EXPLAINED_AFTER:
                print(f"{self._clear()}{self._explanation}", flush=True)
                self._explanation = ""
            if self._live:
                print(f"{self._clear()}  … {self.name}  {self.elapsed()}", end="", flush=True)
            elif time.monotonic() - said > 30:
                said = time.monotonic()
                print(f"  … {self.name}  {self.elapsed()}", flush=True)

    def _clear(self) -> str:
        return "\r\033[K" if self._live else ""

    def start(self) -> None:
        self._thread.start()

    def finish(self, mark: str, result: str) -> None:
        self._done.set()
        self._thread.join()
        end = f"  {result}" if result else ""
        print(f"{self._clear()}  {mark} {self.name}  {self.elapsed()}{end}", flush=True)


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
        process = self.start(command, cwd=cwd, env=env)
        try:
            status = process.wait()
        except BaseException:
            self.end(process)
            raise
        if status != 0:
            end_left(self.path)
            raise StepError(f"{Path(command[0]).name} exited with {status}")

    def start(
        self,
        command: Sequence[str | Path],
        *,
        cwd: Path = paths.REPOSITORY,
        env: Mapping[str, str] | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a program with its output in the log. Raises StepError when it cannot be started."""
        words = [str(word) for word in command]
        print(f"$ {' '.join(words)}", file=self._file, flush=True)
        environment = {**(os.environ if env is None else env), MARK: mark(self.path)}
        try:
            # A group of its own: an interrupt is handed on once.
            return subprocess.Popen(
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

    def end(self, process: subprocess.Popen[bytes]) -> None:
        """Ends a program of this log that still runs, and what it started."""
        _end_group(process)
        end_left(self.path)

    def lines(self) -> list[str]:
        """The lines of the log: each command, and what it printed."""
        self._file.flush()
        return self.path.read_text(encoding="utf-8", errors="replace").splitlines()

    def last_line(self) -> str:
        """What was printed last."""
        return (self.lines() or [""])[-1]

    def tail(self) -> str:
        """The last lines of the log."""
        return "\n".join(f"    {line}" for line in self.lines()[-TAIL_LINES:])


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
    """Runs work(log) as a step and gives back what it gives; a path is what it has in the cache.

    Raises StepError, with the tail of the step's log in the message, when the work raises one.
    """
    log = Log(log_path(name))
    clock = _Clock(name)
    clock.start()
    try:
        with timings.timed(name) as timing:
            value = work(log)
            timing.kept = value if isinstance(value, Path) else None
    except RefusalError:
        clock.finish("✗", "refused")
        raise
    except StepError as error:
        clock.finish("✗", "failed")
        tail = log.tail()
        raise StepError(f"{name}: {error}\n{tail}\n  the whole log: {log.path}") from error
    except BaseException:
        clock.finish("✗", "interrupted")
        raise
    clock.finish("✓", result(value))
    timings.remember(name, clock.seconds())
    return value


@contextlib.contextmanager
def beside(name: str, command: Sequence[str | Path], env: Mapping[str, str]) -> Iterator[None]:
    """Runs a program beside the steps of the block, and ends it where it has not come to its end by then.

    Nobody asks whether it did its work: a step does it where it is needed, and finds it done or waits for it.
    """
    log = Log(log_path(name))
    process = log.start(command, env=env)
    try:
        yield
    finally:
        if process.poll() is None:
            log.end(process)


@contextlib.contextmanager
def lock(path: Path, waiting: str = "", *, shared: bool = False) -> Iterator[None]:
    """Holds a lock on a file, so that two runs at once wait for each other instead of meeting.

    Those that share it wait only for one who does not. Whoever holds it alone may remove the file. `waiting`
    is said if there is something to wait for.
    """
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w") as file:
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
            except BlockingIOError:
                if waiting:
                    print(waiting, flush=True)
                fcntl.flock(file, kind)
            # A file that was removed meanwhile keeps nobody out.
            if path.exists() and os.path.samestat(path.stat(), os.fstat(file.fileno())):
                yield
                return
