"""What a teacher expects at the trained positions of the rows that one process needs, in files that are mapped, not read."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence

import numpy as np
import pyarrow as pa

from dccot_jax.artifact import Artifact, ArtifactError, read_batches

_COLUMNS = ("id", "ids", "logp")
_BATCH_ROWS = 256  # a row has some hundred numbers per token


class TeacherStore:
    """The teacher's k likeliest tokens at every trained position of some rows, as stage ``distill`` has stored them.

    The numbers lie in two unnamed temporary files on local disk (``TMPDIR`` says where), which go with the process. Threads may
    read at once.

    Args:
      batches: the stored table, columns id, ids (k a position), logp (k + 1 a position); only one is held at a time.
      wanted: ids of the rows to keep, different ones; `row` counts them in this order. k: tokens a position.

    Raises KeyError with the ids of the wanted rows that the table does not hold.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch], wanted: Sequence[str], k: int):
        self.k = k
        place = {name: own for own, name in enumerate(wanted)}
        self._first = np.full(len(wanted), -1, np.int64)  # position at which a row begins
        self._count = np.zeros(len(wanted), np.int64)
        self._files = [tempfile.TemporaryFile(prefix="dccot-teacher-") for _ in range(2)]  # noqa: SIM115 (mapped as long as the store lives)
        dtype, total = np.dtype(np.float32), 0
        for batch in batches:
            dtype = batch.column("logp").type.value_type.to_pandas_dtype()
            here = [(i, place[name]) for i, name in enumerate(batch.column("id").to_pylist()) if name in place]
            part = batch.take(pa.array([i for i, _ in here], pa.int32()))
            counts = np.asarray(part.column("ids").value_lengths(), np.int64) // k
            own = [n for _, n in here]
            self._count[own] = counts
            self._first[own] = total + np.cumsum(counts) - counts
            total += int(counts.sum())
            for file, name in zip(self._files, ("ids", "logp")):
                file.write(np.ascontiguousarray(part.column(name).flatten().to_numpy(zero_copy_only=False)))
        missing = np.flatnonzero(self._first < 0)
        if len(missing):
            raise KeyError(*(wanted[int(own)] for own in missing))
        self._ids, self._logp = (
            _mapped(file, kind, (total, width)) for file, kind, width in zip(self._files, (np.int32, dtype), (k, k + 1))
        )

    @classmethod
    def from_artifact(cls, stored: Artifact, wanted: Sequence[str]) -> TeacherStore:
        """The rows `wanted` of a finished ``distill``. Raises ArtifactError naming a row that it does not hold."""
        try:
            return cls(read_batches(stored.file("topk.parquet"), _COLUMNS, _BATCH_ROWS), wanted, stored.facts["top_k"])
        except KeyError as error:
            raise ArtifactError(
                f"{stored.path}: {len(error.args)} rows of the plan have no stored teacher log-probabilities, e.g. {error.args[0]};"
                " the plan was made with another distill artifact: make it again"
            ) from None

    def row(self, own: int, positions: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids int32 [positions, k], log-probabilities [positions, k + 1]).

        Raises ArtifactError if the row was stored with another number of trained positions.
        """
        first, count = self._first[own], int(self._count[own])
        if count != positions:
            raise ArtifactError(
                f"stored teacher log-probabilities: {count} positions where the row trains {positions}; make the artifact again"
            )
        return self._ids[first : first + count], self._logp[first : first + count]


def _mapped(file: object, dtype: object, shape: tuple[int, int]) -> np.ndarray:
    file.flush()  # type: ignore[attr-defined]
    return np.memmap(file, dtype, "r", shape=shape) if shape[0] else np.empty(shape, dtype)  # type: ignore[call-overload]
