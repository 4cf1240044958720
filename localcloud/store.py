"""What localcloud remembers: resources, operations and policies, in one SQLite file that survives a restart.

A record is a JSON document under a key, which is Google's relative resource name
(`projects/P/zones/Z/instances/NAME`); `kind` says what it is (`compute.instances`). `body` is what a client
sees, `private` what it does not (for an instance: its loopback address; for an operation: the work to do).

One file, many readers: the server writes, each metadata server opens the file with `read_only=True` and sees
every change at its next read.

On a full disk what happened can still be written down, and things can be deleted: the file and its log begin
with room to spare, and SQLite uses that before it asks the disk for more.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Json = dict[str, Any]

# The log is written back after a quarter of it, so that it does not outgrow its own room.
_RESERVED_BYTES = 2 * 2**20
_CHECKPOINT_PAGES = 128

_SCHEMA = """
CREATE TABLE IF NOT EXISTS records (
    key TEXT PRIMARY KEY,
    kind TEXT NOT NULL,
    body TEXT NOT NULL,
    private TEXT NOT NULL,
    serial INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS records_by_kind ON records (kind, key);
"""


@dataclass
class Record:
    """One stored document. Changes are kept only when it is given to `Store.put`."""

    key: str
    kind: str
    body: Json
    private: Json = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rsplit("/", 1)[-1]

    @property
    def is_seed(self) -> bool:
        """Whether it came with the project rather than by a request."""
        return bool(self.private.get("seed"))


class Store:
    """Records in SQLite. Safe to use from many threads: each gets a connection of its own."""

    def __init__(self, path: Path, *, read_only: bool = False) -> None:
        self._path = path
        self._read_only = read_only
        self._local = threading.local()
        if not read_only:
            self._connection().executescript(_SCHEMA)
            path.chmod(0o600)
            self._reserve()

    def _reserve(self) -> None:
        """Make the file and its log as large as they may need to be; pages that are free are used again."""
        connection = self._connection()
        with contextlib.suppress(sqlite3.OperationalError):  # the disk is full already, or others read
            connection.execute("CREATE TABLE IF NOT EXISTS reserve (content BLOB)")
            connection.execute("INSERT INTO reserve VALUES (zeroblob(?))", (_RESERVED_BYTES,))
        with contextlib.suppress(sqlite3.OperationalError):
            connection.execute("DROP TABLE IF EXISTS reserve")
            connection.execute("PRAGMA wal_checkpoint(RESTART)").fetchall()

    def _connection(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is None:
            mode = "ro" if self._read_only else "rwc"
            connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode={mode}", uri=True, timeout=30, isolation_level=None
            )
            connection.execute("PRAGMA busy_timeout = 30000")
            if not self._read_only:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.execute("PRAGMA synchronous = NORMAL")
                connection.execute(f"PRAGMA wal_autocheckpoint = {_CHECKPOINT_PAGES}")
            self._local.connection = connection
        return connection

    def close(self) -> None:
        """Close the calling thread's connection."""
        connection: sqlite3.Connection | None = getattr(self._local, "connection", None)
        if connection is not None:
            connection.close()
            self._local.connection = None

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All writes inside are kept together or not at all; other writers wait. May be nested."""
        connection = self._connection()
        if connection.in_transaction:
            yield
            return
        connection.execute("BEGIN IMMEDIATE")
        self._local.after_commit = []
        try:
            yield
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
        for function in self._local.after_commit:
            function()

    def after_commit(self, function: Callable[[], None]) -> None:
        """Call `function` once this thread's transaction is kept, or now if it has none."""
        if self._connection().in_transaction:
            self._local.after_commit.append(function)
        else:
            function()

    def get(self, key: str) -> Record | None:
        row = (
            self._connection()
            .execute("SELECT key, kind, body, private FROM records WHERE key = ?", (key,))
            .fetchone()
        )
        return None if row is None else _record(row)

    def list(self, kind: str, prefix: str = "") -> list[Record]:
        """Every record of a kind whose key starts with `prefix`, by key."""
        rows = self._connection().execute(
            "SELECT key, kind, body, private FROM records "
            "WHERE kind = ? AND substr(key, 1, ?) = ? ORDER BY key",
            (kind, len(prefix), prefix),
        )
        return [_record(row) for row in rows]

    def put(self, record: Record) -> Record:
        """Create or replace."""
        with self.transaction():
            self._connection().execute(
                "INSERT INTO records (key, kind, body, private, serial) VALUES (?, ?, ?, ?, 1) "
                "ON CONFLICT (key) DO UPDATE SET kind = excluded.kind, body = excluded.body, "
                "private = excluded.private, serial = serial + 1",
                (record.key, record.kind, json.dumps(record.body), json.dumps(record.private)),
            )
        return record

    def delete(self, key: str) -> bool:
        """Whether there was one."""
        with self.transaction():
            return self._connection().execute("DELETE FROM records WHERE key = ?", (key,)).rowcount > 0


def _record(row: tuple[str, str, str, str]) -> Record:
    return Record(key=row[0], kind=row[1], body=json.loads(row[2]), private=json.loads(row[3]))


def instance_key(project: str, zone: str, name: str) -> str:
    """The key of a Compute Engine instance; its record's body is Google's `Instance`."""
    return f"projects/{project}/zones/{zone}/instances/{name}"
