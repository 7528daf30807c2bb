"""Artifacts: directories that are whole or not there, with a manifest that says what they hold and where it came from.

A directory counts if and only if its `manifest.json`, written last, exists and verifies. Files are written beside and
renamed, so a reader never sees half a file; on object stores, where a rename is a copy, the manifest still comes last.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import itertools
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from dccot_jax.records import Dropped, InputError, canonical_json, content_hash, count_reasons, dropped_to_table

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
BATCH_ROWS = 16384
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "transformers", "tokenizers", "grain", "numpy", "pyarrow", "math-verify")


class ArtifactError(InputError):
    """An artifact that cannot be trusted: missing or damaged files, or a manifest that does not parse."""


@dataclasses.dataclass(frozen=True)
class StageResult:
    """What a stage reports back to the pipeline, which writes it into the manifest.

    Attributes:
      logical_hash: hash of what the artifact means (see `table_hash`, `tree_hash`).
      rows_in, rows_out: rows read and written. dropped: count per reason. facts: further figures worth keeping (JSON-able).
      device_seconds: accelerator time, where the stage measured it.
    """

    logical_hash: str
    rows_in: int = 0
    rows_out: int = 0
    dropped: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    device_seconds: float | None = None


@dataclasses.dataclass(frozen=True)
class Artifact:
    """A finished artifact, read only."""

    path: epath.Path
    manifest: Mapping[str, Any]

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def identity(self) -> str:
        return self.manifest["identity"]

    @property
    def logical_hash(self) -> str:
        return self.manifest["logical_hash"]

    @property
    def facts(self) -> Mapping[str, Any]:
        return self.manifest["facts"]

    def file(self, name: str) -> epath.Path:
        return self.path / name

    def has(self, name: str) -> bool:
        return (self.path / name).exists()

    def table(self, name: str) -> pa.Table:
        """Read `name`.parquet."""
        return read_table(self.path / f"{name}.parquet")

    def batches(self, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Read some columns of `name`.parquet, rows in their order, a batch at a time."""
        return read_batches(self.path / f"{name}.parquet", columns)

    def json(self, name: str) -> Any:
        """Read `name`.json."""
        return json.loads((self.path / f"{name}.json").read_text())


@dataclasses.dataclass(frozen=True)
class ArmRun:
    """The artifacts of one (arm, seed), by node name. The arm ``base`` is the untrained student."""

    arm: str
    seed: int
    config: dict[str, Any]
    artifacts: dict[str, Artifact]


class ArtifactWriter:
    """An artifact being made. Process 0 writes; every process may commit its own chunks."""

    def __init__(self, path: epath.PathLike):
        self.path = epath.Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def file(self, name: str) -> epath.Path:
        return self.path / name

    def write_bytes(self, name: str, data: bytes) -> None:
        write_atomic(self.path / name, data)

    def write_text(self, name: str, text: str) -> None:
        self.write_bytes(name, text.encode())

    def write_json(self, name: str, value: Any) -> None:
        """Write `name`.json, indented, keys sorted. Raises ValueError on NaN or infinity."""
        self.write_text(f"{name}.json", json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n")

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write `name`.parquet."""
        write_table(self.path / f"{name}.parquet", table)

    def write_row_groups(self, name: str, tables: Iterable[pa.Table]) -> None:
        """Write `name`.parquet, one row group per table: what is too large to be held at once. At least one table."""
        write_row_groups(self.path / f"{name}.parquet", tables)

    def write_dropped(self, dropped: Sequence[Dropped]) -> dict[str, int]:
        """Write `dropped.parquet` and return the count per reason."""
        self.write_table("dropped", dropped_to_table(dropped))
        return count_reasons(dropped)

    # Chunks: `chunks/<series>-<index>.parquet`, each written whole; a kill loses at most the one in flight.

    def chunk_path(self, series: str, index: int) -> epath.Path:
        return self.path / "chunks" / f"{series}-{index:06d}.parquet"

    def commit_chunk(self, series: str, index: int, table: pa.Table) -> None:
        path = self.chunk_path(series, index)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_table(path, table)

    def read_chunk(self, series: str, index: int) -> pa.Table | None:
        """A committed chunk, or None. A file that does not read (torn by a crash) is removed and counts as missing."""
        path = self.chunk_path(series, index)
        if not path.exists():
            return None
        try:
            return read_table(path)
        except (pa.ArrowException, OSError):
            path.unlink()
            return None

    def drop_chunks(self) -> None:
        """Remove the chunks, whose rows stand in the artifact's tables; `finish` does so once the manifest is there."""
        if (self.path / "chunks").exists():
            (self.path / "chunks").rmtree()


class Store:
    """All artifacts of a workdir; runs, arms and sweeps share it."""

    def __init__(self, root: epath.PathLike):
        self.root = epath.Path(root)

    def path(self, kind: str, identity: str) -> epath.Path:
        return self.root / f"{kind.replace(':', '_')}-{identity[:16]}"

    def find(self, kind: str, identity: str, *, full: bool = False) -> Artifact | None:
        """The finished artifact, or None if it was never finished. Raises ArtifactError if it is damaged."""
        path = self.path(kind, identity)
        return open_artifact(path, full=full) if (path / MANIFEST).exists() else None

    def writer(self, kind: str, identity: str) -> ArtifactWriter:
        return ArtifactWriter(self.path(kind, identity))

    def discard(self, kind: str, identity: str) -> None:
        path = self.path(kind, identity)
        if path.exists():
            path.rmtree()


def artifact_identity(kind: str, version: int, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Identity hash of an artifact: stage kind and version, semantic config, logical hashes of inputs by role."""
    return content_hash("artifact", SCHEMA_VERSION, kind, version, config, dict(inputs), digits=64)


def finish(
    writer: ArtifactWriter,
    *,
    kind: str,
    identity: str,
    version: int,
    config: Mapping[str, Any],
    inputs: Mapping[str, Mapping[str, str]],
    result: StageResult,
    wall_seconds: float,
    recorded: Mapping[str, Any],
) -> Artifact:
    """Write the manifest (process 0, after the barrier) and return the finished artifact."""
    files = {}
    for path in sorted(walk(writer.path)):
        name = str(path.relative_to(writer.path))
        if name != MANIFEST and not name.startswith("chunks/"):
            files[name] = {"bytes": path.stat().length, "sha256": file_hash(path)}
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "identity": identity,
        "stage_version": version,
        "logical_hash": result.logical_hash,
        "config": config,
        "inputs": inputs,
        "rows_in": result.rows_in,
        "rows_out": result.rows_out,
        "dropped": dict(result.dropped),
        "facts": dict(result.facts),
        "files": files,
        "wall_seconds": round(wall_seconds, 3),
        "device_seconds": result.device_seconds,
        "recorded": dict(recorded),
        "versions": package_versions(),
        "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }
    writer.write_text(MANIFEST, json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    writer.drop_chunks()  # not before: a kill in between would repeat them
    return Artifact(writer.path, manifest)


def open_artifact(path: epath.PathLike, *, full: bool = False) -> Artifact:
    """Open a finished artifact and verify it: file sizes always, SHA-256 of every file if `full`.

    Raises ArtifactError naming the file that is missing or differs.
    """
    path = epath.Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        files = manifest["files"].items()
    except (OSError, ValueError, KeyError) as error:
        raise ArtifactError(f"{path / MANIFEST}: not a readable manifest ({error})") from None
    for name, expected in files:
        file = path / name
        if not file.exists():
            raise ArtifactError(f"{file}: listed in the manifest and missing")
        size = file.stat().length
        if size != expected["bytes"]:
            raise ArtifactError(f"{file}: {size} bytes, the manifest says {expected['bytes']}")
        if full and file_hash(file) != expected["sha256"]:
            raise ArtifactError(f"{file}: content differs from the manifest's SHA-256")
    return Artifact(path, manifest)


# --- files ------------------------------------------------------------------------------------------------------------


def write_atomic(path: epath.PathLike, data: bytes) -> None:
    """Write beside, flush to disk, rename.

    Raises ArtifactError if the disk is full; what was at `path` before is whole.
    """
    with _beside(path) as file:
        file.write(data)


@contextlib.contextmanager
def _beside(path: epath.PathLike) -> Iterator[Any]:
    """A file to write that takes the place of `path` once it is whole and on disk; on an error `path` stays as it was.

    Raises ArtifactError if the disk is full.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        with beside.open("wb") as file:
            yield file
            file.flush()
            _flush_to_disk(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        if error.errno in DISK_FULL:
            raise ArtifactError(f"{path}: {error.strerror}; make room and run the same command again") from error
        raise
    beside.replace(path)


def _flush_to_disk(file: Any) -> None:
    """fsync where there is one: object stores have no file descriptor, and some mounts refuse. A full disk may show only here."""
    try:
        os.fsync(file.fileno())
    except AttributeError:
        pass
    except OSError as error:
        if error.errno in (*DISK_FULL, errno.EIO):
            raise


def write_table(path: epath.PathLike, table: pa.Table) -> None:
    """Parquet, written atomically."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    write_atomic(path, sink.getvalue().to_pybytes())


def write_row_groups(path: epath.PathLike, tables: Iterable[pa.Table]) -> None:
    """Parquet with one row group per table, written atomically; holds one table at a time. At least one table."""
    each = iter(tables)
    first = next(each)
    with _beside(path) as file, pq.ParquetWriter(file, first.schema, compression="zstd") as writer:
        for table in itertools.chain([first], each):
            writer.write_table(table, row_group_size=max(1, table.num_rows))


def read_table(path: epath.PathLike) -> pa.Table:
    with epath.Path(path).open("rb") as file:
        return pq.read_table(pa.BufferReader(file.read()))


def read_batches(path: epath.PathLike, columns: Sequence[str], rows: int | None = None) -> Iterator[pa.RecordBatch]:
    """Batches of at most so many rows, `BATCH_ROWS` unless said; of the file, only these columns' bytes are read."""
    with epath.Path(path).open("rb") as file:
        yield from pq.ParquetFile(file).iter_batches(rows or BATCH_ROWS, columns=list(columns))


def remove_leftovers(path: epath.PathLike) -> None:
    """Remove temporary files that a killed writer left under `path`."""
    for file in walk(epath.Path(path)):
        if file.name.startswith(".") and file.name.endswith(".tmp"):
            file.unlink(missing_ok=True)


def file_hash(path: epath.PathLike) -> str:
    """SHA-256 of a file's bytes, read in blocks."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def walk(path: epath.Path) -> Iterable[epath.Path]:
    """Every file below a directory."""
    for child in path.iterdir():
        if child.is_dir():
            yield from walk(child)
        else:
            yield child


def copy_tree(source: epath.PathLike, target: epath.PathLike) -> None:
    """Copy a directory, replacing what is there."""
    source, target = epath.Path(source), epath.Path(target)
    if target.exists():
        target.rmtree()
    target.mkdir(parents=True)
    for file in walk(source):
        goal = target / file.relative_to(source)
        goal.parent.mkdir(parents=True, exist_ok=True)
        with file.open("rb") as reader, goal.open("wb") as writer:
            shutil.copyfileobj(reader, writer)


# --- logical hashes ---------------------------------------------------------------------------------------------------


def table_hash(table: pa.Table, by: Sequence[str] = ("id",)) -> str:
    """Hash of a table's rows, independent of row order, chunking and compression.

    Args:
      table: any table whose columns are numbers, booleans, strings or lists of those.
      by: columns to sort rows by; together they should identify a row.
    """
    if by and table.num_rows:
        table = table.sort_by([(name, "ascending") for name in by])
    digest = hashlib.sha256()
    for name in sorted(table.column_names):
        column = table.column(name)
        digest.update(f"{name}:{column.type}:{len(column)};".encode())
        _hash_array(digest, pa.concat_arrays([_as_array(chunk) for chunk in column.chunks]) if column.num_chunks else None)
    return digest.hexdigest()


def tree_hash(tree: Any) -> str:
    """Hash of a nested dict of arrays (or numbers): path, dtype, shape and bytes of every leaf, sorted by path."""
    digest = hashlib.sha256()
    for path, leaf in sorted(_leaves(tree)):
        array = np.asarray(leaf)
        digest.update(f"{path}:{array.dtype}:{array.shape};".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def json_hash(value: Any) -> str:
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()


def _leaves(tree: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}/{key}")
    else:
        yield prefix, tree


def _as_array(chunk: pa.Array) -> pa.Array:
    return chunk.dictionary_decode() if pa.types.is_dictionary(chunk.type) else chunk


def _hash_array(digest: Any, array: pa.Array | None) -> None:
    if array is None or not len(array):
        return
    digest.update(np.packbits(np.asarray(array.is_null())).tobytes())
    kind = array.type
    if pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        lengths = pc.call_function("list_value_length", [array])
        digest.update(np.asarray(pc.fill_null(lengths, 0), np.int64).tobytes())
        _hash_array(digest, pc.call_function("list_flatten", [array]))
    elif pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_binary(kind):
        filled = pc.fill_null(array, "" if not pa.types.is_binary(kind) else b"")
        digest.update(np.asarray(pc.call_function("binary_length", [filled]), np.int64).tobytes())
        for value in filled.to_pylist():
            digest.update(value if isinstance(value, bytes) else value.encode())
    elif pa.types.is_boolean(kind):
        digest.update(np.packbits(np.asarray(pc.fill_null(array, False))).tobytes())
    else:
        digest.update(np.ascontiguousarray(np.asarray(pc.fill_null(array, 0))).tobytes())


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a result."""
    found = {"python": platform.python_version()}
    for name in ("dccot-jax", *_PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
