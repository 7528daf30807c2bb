"""Score columns by trace id: what the score stage made, and what the user brings in parquet files of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from ml_collections import ConfigDict

from dccot_jax.config import ConfigError
from dccot_jax.select.candidates import FIELDS
from dccot_jax.select.gradients.settings import validation_sources
from dccot_jax.select.signals import VECTOR_COLUMNS

_NOT_SIGNALS = ("id", "group_id", *FIELDS)


@dataclasses.dataclass(frozen=True)
class ScoreColumns:
    """{column: {trace id: value}} of numbers, and of vectors (rows of one [N, D] float32 array each)."""

    numbers: Mapping[str, Mapping[str, float]]
    vectors: Mapping[str, Mapping[str, np.ndarray]]


def kinds(schema: pa.Schema) -> tuple[list[str], list[str]]:
    """Names of the columns of numbers and of those of vectors (lists of floats)."""
    numbers, vectors = [], []
    for field in schema:
        if field.name in _NOT_SIGNALS:
            continue
        if pa.types.is_floating(field.type) or pa.types.is_integer(field.type):
            numbers.append(field.name)
        elif _is_list(field.type) and pa.types.is_floating(field.type.value_type):
            vectors.append(field.name)
    return numbers, vectors


def read_columns(tables: Iterable[pa.Table]) -> ScoreColumns:
    """All columns of several tables; a null or missing row has no value.

    Raises ConfigError if two tables have a column of one name, or the vectors of a column differ in length.
    """
    numbers: dict[str, dict[str, float]] = {}
    vectors: dict[str, dict[str, np.ndarray]] = {}
    for table in tables:
        ids = table["id"].to_pylist()
        found = kinds(table.schema)
        for name in (*found[0], *found[1]):
            if name in numbers or name in vectors:
                raise ConfigError(f"config.select.tables: column {name!r} is there twice, in two tables or beside the scores; rename one")
        for name in found[0]:
            numbers[name] = {i: float(v) for i, v in zip(ids, table[name].to_pylist()) if v is not None}
        for name in found[1]:
            vectors[name] = _vectors(name, ids, table[name])
    return ScoreColumns(numbers, vectors)


def declared_columns(cfg: ConfigDict) -> tuple[list[str], list[str]]:
    """Names of numbers and of vectors that a run of this config will have to select by.

    Raises ConfigError as `check_table` and `validation_sources` do.
    """
    numbers, vectors = ([name for name in cfg.score.signals if (name in VECTOR_COLUMNS) is wanted] for wanted in (False, True))
    if "less" in numbers:
        numbers += [f"less_{source.name}" for source in validation_sources(cfg)]
    for path in cfg.select.tables:
        found = check_table(path)
        numbers += found[0]
        vectors += found[1]
    return numbers, vectors


def open_tables(paths: Sequence[str]) -> list[pa.Table]:
    """The tables of `config.select.tables`. Raises ConfigError as `check_table` does."""
    for path in paths:
        check_table(path)
    return [read_table(path) for path in paths]


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """Columns (all) of a file that `check_table` accepts, its ids as plain strings."""
    table = pq.read_table(Path(path).expanduser(), columns=list(columns) if columns else None)
    return table.set_column(table.schema.get_field_index("id"), "id", table["id"].cast(pa.string()))


def check_table(path: str) -> tuple[list[str], list[str]]:
    """Columns of numbers and of vectors of one file of `config.select.tables`.

    Raises ConfigError unless it is a parquet file with string ids, none of them twice, and at least one such column.
    """
    where, file = f"config.select.tables: {path!r}", Path(path).expanduser()
    if not file.is_file():
        raise ConfigError(f"{where}: no such file")
    try:
        schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{where}: not a parquet file ({' '.join(str(error).split())[:120]})") from None
    if "id" not in schema.names or not _is_string(schema.field("id").type):
        raise ConfigError(f"{where}: needs a string column 'id' with trace ids; columns: {', '.join(schema.names)}")
    found = kinds(schema)
    if not found[0] and not found[1]:
        raise ConfigError(f"{where}: has no column of numbers, nor of lists of floats, beside 'id'")
    seen: set[str] = set()
    for identity in read_table(path, ["id"])["id"].to_pylist():
        if identity in seen:
            raise ConfigError(f"{where}: id {identity!r} is there more than once; which of its values count? Keep one row per id")
        seen.add(identity)
    return found


def _vectors(name: str, ids: Sequence[str], column: pa.ChunkedArray) -> dict[str, np.ndarray]:
    array = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    there = np.asarray(array.is_valid())
    present = array.filter(pa.array(there))
    lengths = pc.call_function("list_value_length", [present]).unique().to_pylist()
    if len(lengths) > 1:
        raise ConfigError(
            f"config.select.tables: column {name!r} has vectors of {min(lengths)} to {max(lengths)} numbers; they must be equally long"
        )
    flat = np.asarray(present.flatten(), np.float32)
    matrix = flat.reshape(int(there.sum()), -1) if there.any() else np.zeros((0, 0), np.float32)
    return dict(zip((i for i, has in zip(ids, there) if has), matrix))


def _is_string(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
