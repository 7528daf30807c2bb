"""Pools: the rows that a selection chose from, with their signals and labels and without their texts.

Only columns of numbers and labels are read, in batches; vectors pass through and leave their length. Shape: N rows of a pool.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from etils import epath

from dccot_jax.artifact import ArmRun, file_hash, read_batches, read_table
from dccot_jax.select.candidates import FIELDS
from dccot_jax.select.columns import kinds

BY = ("teacher", "style")
NONE = "(none)"
MOST_GROUPS = 12  # of one label; the smaller ones are taken together


@dataclasses.dataclass(frozen=True)
class Pool:
    """Tokenised rows, in the order of their table.

    Attributes:
      ids: [N] trace ids. signals: {name: [N] float64, NaN where a row has no value}: scored signals, the user's own columns, then `FIELDS`.
      scored: names of the first two kinds. norms: {vector column: (D, [N] Euclidean norms)}.
      groups: {label: {value: row indices}}, the most numerous value first. notes: user tables that could not be read, and why.
    """

    ids: pa.Array
    signals: Mapping[str, np.ndarray]
    scored: tuple[str, ...]
    norms: Mapping[str, tuple[int, np.ndarray]]
    groups: Mapping[str, Mapping[str, np.ndarray]]
    notes: tuple[str, ...]

    def places(self, ids: pa.Array) -> np.ndarray:
        """Row of every id, -1 where it is not in the pool."""
        return np.asarray(pc.fill_null(pc.call_function("index_in", [ids.cast(pa.string())], pc.SetLookupOptions(self.ids)), -1))


def read_pool(run: ArmRun) -> Pool:
    """The pool of one run: rows of ``tokenize``, labels from ``verify``, signals from ``score`` and the user's tables of ``select``."""
    artifacts = run.artifacts
    lengths = _columns(artifacts["tokenize"].file("tokens.parquet"), ("id", "prompt_tokens", "completion_tokens"))
    pool = Pool(_array(lengths["id"]), {}, (), {}, {}, ())
    signals: dict[str, np.ndarray] = {}
    norms: dict[str, tuple[int, np.ndarray]] = {}
    files: list = [artifacts["score"].file("scores.parquet")] if "score" in artifacts else []
    tables, notes = _user_tables(run) if "select" in artifacts else ([], [])
    for file in (*files, *tables):
        with file.open("rb") as opened:
            numbers, vectors = kinds(pq.read_schema(opened))
        signals |= _numbers(pool, read_batches(file, ["id", *numbers]), numbers) if numbers else {}
        norms |= {name: _norms(pool, read_batches(file, ["id", name]), name) for name in vectors}
    scored = tuple(signals)
    fields = {name: _numpy(_array(lengths[name])) for name in FIELDS if name in lengths.column_names}
    groups: dict[str, dict[str, np.ndarray]] = {}
    if "verify" in artifacts:
        labels = _columns(artifacts["verify"].file("traces.parquet"), ("id", *BY, "n_steps"))
        places = pool.places(_array(labels["id"]))
        fields["n_steps"] = _scatter(len(pool.ids), places, _numpy(_array(labels["n_steps"])))
        groups = {name: _groups(places, _array(labels[name])) for name in BY}
    return Pool(pool.ids, signals | {name: fields[name] for name in FIELDS if name in fields}, scored, norms, groups, tuple(notes))


def _user_tables(run: ArmRun) -> tuple[list[Path], list[str]]:
    """Files of `config.select.tables` that still are what the selection read, and a note on every other one."""
    inputs = run.artifacts["select"].manifest["inputs"]
    read = {entry["hash"] for role, entry in inputs.items() if role.startswith("table:")}
    found, notes = [], []
    for name in run.config.get("select", {}).get("tables", ()):
        path = Path(name).expanduser()
        if not path.is_file():
            notes.append(f"{name}: no longer there, its columns are not shown")
        elif file_hash(path) not in read:
            notes.append(f"{name}: changed since the selection read it, its columns are not shown")
        else:
            found.append(path)
    return found, notes


def _numbers(pool: Pool, batches: Iterable[pa.RecordBatch], names: Sequence[str]) -> dict[str, np.ndarray]:
    found = {name: np.full(len(pool.ids), np.nan) for name in names}
    for batch, places in _placed(pool, batches):
        for name in names:
            values = _numpy(batch.column(name))
            found[name][places[places >= 0]] = values[places >= 0]
    return found


def _norms(pool: Pool, batches: Iterable[pa.RecordBatch], name: str) -> tuple[int, np.ndarray]:
    """(D, [N] norms) of a column of equally long vectors; a batch of them at a time is in memory."""
    width, found = 0, np.full(len(pool.ids), np.nan)
    for batch, places in _placed(pool, batches):
        column = batch.column(name)
        there = np.asarray(column.is_valid())
        if there.any():
            matrix = np.asarray(column.filter(pa.array(there)).flatten(), np.float32).reshape(int(there.sum()), -1)
            norms = np.full(len(there), np.nan)
            norms[there] = np.sqrt(np.square(matrix).sum(axis=1, dtype=np.float64))
            found[places[places >= 0]] = norms[places >= 0]
            width = matrix.shape[1]
    return width, found


def _placed(pool: Pool, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[pa.RecordBatch, np.ndarray]]:
    for batch in batches:
        yield batch, pool.places(batch.column("id"))


def _groups(places: np.ndarray, labels: pa.Array) -> dict[str, np.ndarray]:
    """{value: rows of the pool that carry it}; beyond `MOST_GROUPS` values the rarest become one."""
    encoded = labels.dictionary_encode()
    codes, names = np.asarray(encoded.indices), encoded.dictionary.to_pylist()
    inside = places >= 0
    found = {name or NONE: np.sort(places[inside & (codes == code)]) for code, name in enumerate(names)}
    order = sorted((name for name in found if len(found[name])), key=lambda name: (-len(found[name]), name))
    if len(order) > MOST_GROUPS:
        rest = order[MOST_GROUPS - 1 :]
        order = order[: MOST_GROUPS - 1]
        return {name: found[name] for name in order} | {f"({len(rest)} others)": np.sort(np.concatenate([found[name] for name in rest]))}
    return {name: found[name] for name in order}


def _scatter(size: int, places: np.ndarray, values: np.ndarray) -> np.ndarray:
    found = np.full(size, np.nan)
    found[places[places >= 0]] = values[places >= 0]
    return found


def _columns(file: epath.Path, names: Sequence[str]) -> pa.Table:
    batches = list(read_batches(file, names))
    return pa.Table.from_batches(batches) if batches else read_table(file).select(list(names))


def _array(column: pa.ChunkedArray) -> pa.Array:
    return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)


def _numpy(column: pa.Array) -> np.ndarray:
    """Float64, nulls as NaN."""
    return np.asarray(pc.cast(column, pa.float64()).to_numpy(zero_copy_only=False), np.float64)
