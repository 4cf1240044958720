"""Long-running operations: a request records one and returns, a worker does its work and records its end.

Operations on the same target run one after the other, in the order of the requests; others run side by side.
An operation that was not done when the process ended is taken up again by `resume`.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from localcloud.api.errors import ApiError, reason
from localcloud.api.faults import operation_fails, work_fails
from localcloud.specs import BackendError
from localcloud.store import Json, Record, Store

logger = logging.getLogger("localcloud.operations")

Finish = Callable[[Json, Json | None, ApiError | None], None]
"""Writes the end into an operation's body: (body, response or None, error or None)."""

_WORKERS = 8
_WRITE_AGAIN_SECONDS = 1.0
_KEPT = 500


class Operations:
    """The worker. `work` does a task, by its name and arguments; `kinds` says for each kind of record how its
    body shows the end.
    """

    def __init__(
        self, store: Store, work: Callable[[str, Json], Json | None], kinds: Mapping[str, Finish]
    ) -> None:
        self._store = store
        self._work = work
        self._kinds = kinds
        self._pool = ThreadPoolExecutor(_WORKERS, thread_name_prefix="operation")
        self._changed = threading.Condition()
        self._closed = threading.Event()
        self._queues: dict[str, deque[Callable[[], None]]] = {}

    def submit(self, record: Record, target: str, task: str, arguments: Json) -> Json:
        """Keep a new operation, and have its work done once the caller's transaction is kept."""
        record.private |= {
            "task": task,
            "arguments": arguments,
            "target": target,
            "done": False,
            "order": time.time_ns(),
        }
        if operation_fails.get():
            record.private["fails"] = True
        self._store.put(record)
        self._forget_old(record.kind)
        self._store.after_commit(lambda: self.schedule(target, partial(self._do, record.key)))
        return record.body

    def schedule(self, target: str, work: Callable[[], None]) -> None:
        """Do some work once everything that was asked of `target` before is done."""
        with self._changed:
            queue = self._queues.setdefault(target, deque())
            queue.append(work)
            if len(queue) == 1:
                self._pool.submit(self._drain, target)

    @property
    def pending(self) -> int:
        """How many targets have work that is not done."""
        with self._changed:
            return len(self._queues)

    def resume(self) -> list[str]:
        """Take up what an earlier process left; returns the operations' keys."""
        left = [record for kind in self._kinds for record in self._store.list(kind)]
        left = [record for record in left if not record.private["done"]]
        left.sort(key=lambda record: record.private["order"])
        for record in left:
            self.schedule(record.private["target"], partial(self._do, record.key))
        return [record.key for record in left]

    def wait(self, key: str, seconds: float) -> Record | None:
        """The operation when it is done, or as it is after so many seconds; None if there is none."""
        end = time.monotonic() + seconds
        with self._changed:
            while True:
                record = self._store.get(key)
                left = end - time.monotonic()
                if record is None or record.private["done"] or left <= 0:
                    return record
                self._changed.wait(left)

    def settle(self, seconds: float) -> bool:
        """Wait until there is no work; whether that came in time."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._queues, seconds)

    def close(self) -> None:
        """Begin no more work; what runs is left to finish, or to `resume`."""
        self._closed.set()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _drain(self, target: str) -> None:
        while True:
            with self._changed:
                queue = self._queues[target]
                work = queue[0]
            try:
                work()
            except Exception:
                logger.exception("work on %s failed", target)
            with self._changed:
                queue.popleft()
                if not queue:
                    del self._queues[target]
                self._changed.notify_all()
                if not queue:
                    return

    def _do(self, key: str) -> None:
        record = self._store.get(key)
        if record is None:
            return
        response: Json | None = None
        error: ApiError | None = None
        work_fails.set(record.private.get("fails", False))
        try:
            response = self._work(record.private["task"], record.private["arguments"])
            if work_fails.get():  # no backend had a part in it
                raise ApiError(500, "fault: the work was done, and the operation is to fail")  # noqa: TRY301
        except ApiError as raised:
            error = raised
        except BackendError as raised:
            error = ApiError(503, str(raised))
        except Exception as raised:
            logger.exception("operation %s failed", key)
            error = ApiError(500, f"Internal error: {reason(raised)}")
        finally:
            work_fails.set(False)
        self._end(key, response, error)

    def _end(self, key: str, response: Json | None, error: ApiError | None) -> None:
        """Write down how it ended; where that cannot be done now (a full disk), as soon as it can be."""
        while True:
            try:
                with self._store.transaction():
                    record = self._store.get(key)
                    if record is not None:
                        self._kinds[record.kind](record.body, response, error)
                        record.private["done"] = True
                        self._store.put(record)
            except sqlite3.OperationalError:
                logger.exception("the end of operation %s cannot be written; trying again", key)
                if self._closed.wait(_WRITE_AGAIN_SECONDS):
                    return  # `resume` takes it up
            else:
                return

    def _forget_old(self, kind: str) -> None:
        """Google forgets operations after a while; we keep the latest few hundred."""
        records = self._store.list(kind)
        if len(records) > _KEPT * 2:
            done = [record for record in records if record.private["done"]]
            done.sort(key=lambda record: record.private["order"])
            for record in done[: len(records) - _KEPT]:
                self._store.delete(record.key)
