"""Responses on disk, found again by everything that reached the teacher.

On a local disk: one append-only JSON-lines file per teacher; a row is one line, written by one call as soon as its response
arrives, so a kill loses only requests still in flight and none that came back is sent twice. A line torn by a crash counts
as missing. On object stores, which cannot append: one folder per teacher with a new file for every batch of rows; a kill
loses at most the batch not yet written.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from etils import epath

from dccot_jax.artifact import write_atomic
from dccot_jax.records import Message, Request, Response, Teacher, canonical_json, content_hash

_KEY_DIGITS = 64
_PREFIX = b'{"key":"'
_SYNC_ROWS = 64  # local: rows between flushes to disk (only a power cut loses them); object store: rows in one batch


def request_key(teacher: Teacher, request: Request) -> str:
    """Cache key: the canonical JSON of the request and the teacher's own key, as 64 hex digits."""
    return content_hash("request/1", teacher.cache_key, dataclasses.asdict(request), digits=_KEY_DIGITS)


class RequestCache:
    """Cached responses under `root`; several arms and runs of a workdir share them. Use as a context manager or call `close`.

    Args:
      root: local folder or object-store path. append: whether files there can be appended to; None decides by the path.
    """

    def __init__(self, root: epath.PathLike, *, append: bool | None = None):
        self.root = epath.Path(root)
        self._append = "://" not in os.fspath(self.root) if append is None else append
        self._shards: dict[str, _Appended | _Batched] = {}

    def get(self, teacher: Teacher, key: str) -> Response | None:
        """The stored response, or None."""
        row = self._shard(teacher).row(key)
        return None if row is None else Response(**row["response"])

    def put(self, teacher: Teacher, key: str, request: Request, response: Response) -> None:
        """Append one row. Responses that are errors must not be stored: a later run asks again."""
        if response.finish_reason == "error":
            raise ValueError("an error is not a response to keep")
        self._shard(teacher).put(key, {"request": dataclasses.asdict(request), "response": dataclasses.asdict(response)})

    def request(self, teacher: Teacher, key: str) -> Request | None:
        """The stored request, or None: what exactly a trace came from."""
        row = self._shard(teacher).row(key)
        if row is None:
            return None
        fields = dict(row["request"])
        return Request(**{**fields, "messages": tuple(Message(**message) for message in fields["messages"])})

    def sync(self) -> None:
        """Flush everything to disk."""
        for shard in self._shards.values():
            shard.sync()

    def close(self) -> None:
        for shard in self._shards.values():
            shard.close()
        self._shards.clear()

    def __enter__(self) -> RequestCache:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def _shard(self, teacher: Teacher) -> _Appended | _Batched:
        key = teacher.cache_key
        if key not in self._shards:
            label = re.sub(r"[^A-Za-z0-9._-]+", "-", teacher.name)[:40]
            name = f"{label}-{content_hash(key, digits=16)}"
            self._shards[key] = _Appended(Path(self.root / f"{name}.jsonl")) if self._append else _Batched(self.root / name)
        return self._shards[key]


class _Appended:
    """One file: an index from key to place in the file; rows are parsed when asked for."""

    def __init__(self, path: Path):
        path.parent.mkdir(parents=True, exist_ok=True)
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self._index: dict[str, tuple[int, int]] = {}
        self._unsynced = 0
        torn = False
        for start, line in _lines(path):
            torn = not line.endswith(b"\n")
            key = line[len(_PREFIX) : len(_PREFIX) + _KEY_DIGITS]
            if not torn and line.startswith(_PREFIX) and len(key) == _KEY_DIGITS:
                self._index[key.decode("ascii", "replace")] = (start, len(line))
        if torn:
            self._append(b"\n")  # ends the torn line, so that the next row stands alone

    def row(self, key: str) -> dict[str, Any] | None:
        place = self._index.get(key)
        if place is None:
            return None
        try:
            row = json.loads(os.pread(self._descriptor, place[1], place[0]))
        except ValueError:
            del self._index[key]
            return None
        return row

    def put(self, key: str, row: dict[str, Any]) -> None:
        line = _line(key, row)
        start = self._append(line)
        self._index[key] = (start, len(line))
        self._unsynced += 1
        if self._unsynced >= _SYNC_ROWS:
            self.sync()

    def sync(self) -> None:
        if self._unsynced:
            os.fsync(self._descriptor)
            self._unsynced = 0

    def close(self) -> None:
        self.sync()
        os.close(self._descriptor)

    def _append(self, data: bytes) -> int:
        """Write at the end of the file in one call and return where it starts."""
        written = os.write(self._descriptor, data)
        if written != len(data):
            raise OSError(f"wrote {written} of {len(data)} bytes to the request cache; is the disk full?")
        # Another process may have appended since, so the place is read from the file position and not counted here.
        return os.lseek(self._descriptor, 0, os.SEEK_CUR) - len(data)


class _Batched:
    """One folder of immutable files; rows are held in memory."""

    def __init__(self, folder: epath.Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._rows: dict[str, dict[str, Any]] = {}
        self._pending: list[bytes] = []
        for path in sorted(folder.glob("*.jsonl")):
            for line in path.read_bytes().splitlines():
                row = json.loads(line)
                self._rows[row["key"]] = row

    def row(self, key: str) -> dict[str, Any] | None:
        return self._rows.get(key)

    def put(self, key: str, row: dict[str, Any]) -> None:
        self._rows[key] = row
        self._pending.append(_line(key, row))
        if len(self._pending) >= _SYNC_ROWS:
            self.sync()

    def sync(self) -> None:
        if self._pending:
            write_atomic(self._folder / f"{uuid.uuid4().hex}.jsonl", b"".join(self._pending))
            self._pending = []

    def close(self) -> None:
        self.sync()


def _line(key: str, row: dict[str, Any]) -> bytes:
    return (f'{{"key":"{key}",' + canonical_json(row)[1:] + "\n").encode()


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    start = 0
    with path.open("rb") as file:
        for line in file:
            yield start, line
            start += len(line)
