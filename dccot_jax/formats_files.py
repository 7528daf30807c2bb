"""Row files: JSON arrays, JSON lines and parquet, plain or gzipped, read into dicts with their place and written whole."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow as pa
import pyarrow.parquet as pq

from dccot_jax.artifact import write_atomic
from dccot_jax.records import Dropped, InputError

_ROW_LISTS = ("examples", "data", "rows", "train")  # keys under which a single JSON object may hold its rows


class FormatError(InputError):
    """A file that cannot be read as rows; the message names the file, the line and the problem."""


class Row(NamedTuple):
    """One raw row: where it stands (``file.jsonl:12``, counted from 1) and its fields."""

    place: str
    fields: dict[str, Any]


def read_rows(path: str | Path, *, name: str = "", skip_corrupt: bool = False) -> tuple[list[Row], list[Dropped]]:
    """Rows of one file, in order.

    The content decides, not the name: gzip and parquet by their magic bytes; a text that is one
    JSON value is an array of rows (or an object that holds one); everything else is JSON lines.

    Args:
      path: the file. name: how places name it (default: the file name).
      skip_corrupt: count a line that is not a JSON object as `Dropped` (``corrupt_line``) and go on; only JSON lines can do so.

    Raises:
      FormatError: unreadable file, damaged archive, or a line that is not a JSON object.
    """
    path = Path(path)
    name = name or path.name
    data = _load(path)
    if data[:4] == b"PAR1":
        return _parquet_rows(path, name, data), []
    head = data.lstrip()[:1]
    if not head:
        return [], []
    if path.suffix.lower() == ".parquet" and head not in b"[{":
        raise FormatError(f"{path}: not a parquet file, nor JSON")
    if head in b"[{":
        try:
            value = _parse(data)
        except ValueError as error:
            first = data.lstrip().split(b"\n", 1)[0].strip()
            lines = isinstance(error, json.JSONDecodeError) and error.msg == "Extra data"
            if not lines and (head == b"[" or first == b"{"):
                raise FormatError(_problem(path, error)) from None
        else:
            return _dict_rows(path, name, _row_list(value)), []
    return _line_rows(path, name, data, skip_corrupt)


def write_rows(path: str | Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows atomically; the suffix decides: ``.jsonl``, ``.json`` (array) or ``.parquet``, the first two also with ``.gz``.

    Raises FormatError on another suffix, ValueError on NaN or infinity. Equal rows give equal bytes (gzip carries no time).
    """
    path = Path(path)
    kind, packed = written_as(path)
    if kind == ".jsonl":
        data = "".join(_dump(row) + "\n" for row in rows).encode()
    elif kind == ".json":
        data = ("[\n" + ",\n".join(_dump(row) for row in rows) + "\n]\n").encode()
    else:
        sink = io.BytesIO()
        names = list(dict.fromkeys(name for row in rows for name in row))  # pyarrow would take the first row's columns only
        pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), sink, compression="zstd")
        data = sink.getvalue()
    write_atomic(path, gzip.compress(data, mtime=0) if packed else data)


def written_as(path: str | Path) -> tuple[str, bool]:
    """(``.jsonl``, ``.json`` or ``.parquet``, whether gzipped), by the name alone. Raises FormatError on a name that says none of these."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    packed = suffixes[-1:] == [".gz"]
    kind = "".join((suffixes[:-1] if packed else suffixes)[-1:])
    if kind not in (".jsonl", ".json") and (kind != ".parquet" or packed):
        raise FormatError(f"{path}: cannot tell what to write; use .jsonl, .json or .parquet (.jsonl.gz and .json.gz also work)")
    return kind, packed


def _load(path: Path) -> bytes:
    try:
        data = path.read_bytes()
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file") from None
    except (OSError, EOFError, zlib.error) as error:
        raise FormatError(f"{path}: cannot be read ({error})") from None


def _parquet_rows(path: Path, name: str, data: bytes) -> list[Row]:
    try:
        rows = pq.read_table(pa.BufferReader(data)).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise FormatError(f"{path}: not readable as parquet ({error})") from None
    return [Row(f"{name}:{number}", row) for number, row in enumerate(rows, 1)]


def _row_list(value: Any) -> list[Any]:
    """The rows of one JSON value: an array itself, an object's list under one of `_ROW_LISTS`, or the object as the only row."""
    if isinstance(value, list):
        return value
    for key in _ROW_LISTS:
        if isinstance(value.get(key), list):
            return value[key]
    return [value]


def _dict_rows(path: Path, name: str, values: list[Any]) -> list[Row]:
    for number, value in enumerate(values, 1):
        if not isinstance(value, dict):
            raise FormatError(f"{path}: row {number} is a {type(value).__name__}, not an object with named fields")
    return [Row(f"{name}:{number}", value) for number, value in enumerate(values, 1)]


def _line_rows(path: Path, name: str, data: bytes, skip_corrupt: bool) -> tuple[list[Row], list[Dropped]]:
    rows, dropped = [], []
    for number, line in enumerate(data.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            value = _parse(line)
            if not isinstance(value, dict):
                raise ValueError(f"a {type(value).__name__}, not an object with named fields")
        except ValueError as error:
            problem = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            if not skip_corrupt:
                raise FormatError(f"{path}:{number}: not a valid JSON line ({problem})") from None
            dropped.append(Dropped(f"{name}:{number}", "corrupt_line", problem))
            continue
        rows.append(Row(f"{name}:{number}", value))
    return rows, dropped


def _parse(data: bytes) -> Any:
    """JSON value of UTF-8 bytes. Raises ValueError (its subclasses for bad UTF-8 and bad JSON), also on NaN and infinity."""
    return json.loads(data.decode("utf-8-sig"), parse_constant=_no_constant)


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON value")


def _problem(path: Path, error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{path}:{error.lineno}: not valid JSON ({error.msg}, column {error.colno})"
    return f"{path}: not valid JSON ({error})"


def _dump(row: Mapping[str, Any]) -> str:
    return json.dumps(dict(row), ensure_ascii=False, allow_nan=False)
