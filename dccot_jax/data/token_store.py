"""Token ids of the rows that one process needs, in a file of its own that is mapped, not read: memory does not grow with the data."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

TOKEN_COLUMNS = ("input_ids", "prompt_tokens")


class TokenStore:
    """Random access to token rows by their place in the token table.

    The ids lie in an unnamed temporary file on local disk (4 bytes a token; ``TMPDIR`` says where), which goes with the process;
    in memory are 20 bytes a row. Threads may read at once.

    Args:
      batches: the token table from its first row, columns `TOKEN_COLUMNS`; only one is held at a time.
      wanted: ascending places of the rows to keep.

    Raises ValueError if a wanted row lies beyond the table.
    """

    def __init__(self, batches: Iterable[pa.RecordBatch], wanted: np.ndarray):
        self._wanted = wanted
        self._offsets = np.zeros(len(wanted) + 1, np.int64)
        self._prompt = np.zeros(len(wanted), np.int32)
        self._file = tempfile.TemporaryFile(prefix="dccot-tokens-")  # noqa: SIM115 (mapped as long as the store lives)
        seen = filled = 0
        for batch in batches:
            until = int(np.searchsorted(wanted, seen + batch.num_rows))
            if until > filled:
                part = batch.take(pa.array(wanted[filled:until] - seen))
                ids = part.column("input_ids")
                self._offsets[filled + 1 : until + 1] = self._offsets[filled] + np.cumsum(np.asarray(ids.value_lengths(), np.int64))
                self._prompt[filled:until] = part.column("prompt_tokens").to_numpy()
                self._file.write(np.ascontiguousarray(ids.flatten(), np.int32))
            seen, filled = seen + batch.num_rows, until
        if filled < len(wanted):
            raise ValueError(f"row {int(wanted[filled])} of a token table of {seen} rows")
        self._file.flush()
        tokens = int(self._offsets[-1])
        self._flat = np.memmap(self._file, np.int32, "r", shape=(tokens,)) if tokens else np.empty(0, np.int32)

    def index(self, places: np.ndarray) -> np.ndarray:
        """Own row numbers, for `row`, of places in the table; all of them must have been wanted."""
        return np.searchsorted(self._wanted, places).astype(np.int32)

    def row(self, own: int) -> tuple[np.ndarray, int]:
        """(token ids int32 [n], length of the prompt)."""
        return self._flat[self._offsets[own] : self._offsets[own + 1]], int(self._prompt[own])
