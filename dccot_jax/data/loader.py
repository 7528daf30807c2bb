"""Packed training rows by step number, as Grain reads them.

Layout of a step, R rows of T tokens: documents lie one behind the other in a row; ``segment_ids`` counts them from 1, 0
is padding; ``positions`` restart at 0 in every document; ``labels[r, t]`` is the token that position t must predict, and
``weights[r, t]`` its loss weight, 0 on prompts (under the response mask), on padding, and on each document's last token,
which must not predict the next document's first. The whole state of the loader is the number of the next step.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence

import grain
import numpy as np
import pyarrow as pa

from dccot_jax.artifact import Artifact, read_batches
from dccot_jax.config import LOSS_MASKS
from dccot_jax.data.teacher_store import TeacherStore
from dccot_jax.data.token_store import TOKEN_COLUMNS, TokenStore

Batch = dict[str, np.ndarray]


class PlanSource:
    """A plan as a random-access source: ``source[step]`` is a dict of [rows, T] arrays.

    Keys: ``tokens``, ``labels``, ``segment_ids``, ``positions`` (int32) and ``weights`` (float32). Where a teacher's k likeliest
    tokens were stored, also ``teacher_ids`` (int32 [rows, T, k]) and ``teacher_logp`` (float32 [rows, T, k + 1]; last, every
    other token): what it expects where the label stands; 0 at positions that are not trained.

    Args:
      plan: table with columns step, row, token_row, weight, sorted by step, row, slot.
      tokens: the token table, from its first row; what this process does not need is read over.
      steps, rows_per_step, row_tokens: as in ``plan.json``.
      loss_mask: ``response`` (completion tokens) or ``full`` (all but each document's first token).
      rows: the packed rows this process builds, in order; None: all of them.
      teacher: from the ids of the rows that this process reads, in the token table's order, to what a teacher expects there;
        None: no teacher.
    """

    def __init__(
        self,
        plan: pa.Table,
        tokens: Iterable[pa.RecordBatch],
        *,
        steps: int,
        rows_per_step: int,
        row_tokens: int,
        loss_mask: str = "response",
        rows: Sequence[int] | None = None,
        teacher: Callable[[Sequence[str]], TeacherStore] | None = None,
    ):
        if loss_mask not in LOSS_MASKS:
            raise ValueError(f"loss_mask {loss_mask!r} is not one of {', '.join(LOSS_MASKS)}")
        self._steps, self._row_tokens, self._full = steps, row_tokens, loss_mask == "full"
        self.rows = tuple(range(rows_per_step)) if rows is None else tuple(rows)
        if not all(0 <= row < rows_per_step for row in self.rows):
            raise ValueError(f"rows {self.rows} are not all in 0..{rows_per_step - 1}")
        self._place = np.full(rows_per_step, -1, np.int32)  # packed row -> row of this process's arrays
        self._place[list(self.rows)] = np.arange(len(self.rows))
        step, row = plan["step"].to_numpy(), plan["row"].to_numpy()
        mine = np.flatnonzero(self._place[row] >= 0)
        self._starts = np.searchsorted(step[mine], np.arange(steps + 1))
        self._row = row[mine]
        self._weight = plan["weight"].to_numpy()[mine]
        token_row = plan["token_row"].to_numpy()[mine]
        self._store = TokenStore(tokens, np.unique(token_row))
        self._own = self._store.index(token_row)
        self._teacher = None
        if teacher is not None:
            _, first = np.unique(token_row, return_index=True)
            self._teacher = teacher(plan["id"].take(pa.array(mine[first])).to_pylist())

    @classmethod
    def from_artifacts(
        cls, plan: Artifact, tokens: Artifact, stored: Artifact | None = None, *, rows: Sequence[int] | None = None
    ) -> PlanSource:
        """The source of a finished plan, with the teacher's tokens that stage ``distill`` has `stored`.

        Raises ValueError if the plan was made from other token rows, ArtifactError if some of its rows are not stored.
        """
        about = plan.json("plan")
        if about["tokens_hash"] != tokens.logical_hash:
            raise ValueError(f"{plan.path.name} was made from other token rows than {tokens.path.name}")
        return cls(
            plan.table("plan"),
            read_batches(tokens.file("tokens.parquet"), TOKEN_COLUMNS),
            steps=about["steps"],
            rows_per_step=about["rows_per_step"],
            row_tokens=about["row_tokens"],
            loss_mask=about["loss_mask"],
            rows=rows,
            teacher=None if stored is None else functools.partial(TeacherStore.from_artifact, stored),
        )

    def __len__(self) -> int:
        return self._steps

    def __repr__(self) -> str:  # Grain prints its sources
        return f"PlanSource({self._steps} steps, rows {len(self.rows)} x {self._row_tokens})"

    def __getitem__(self, index: int) -> Batch:
        batch = self._empty(len(self.rows))
        used = np.zeros(len(self.rows), np.int64)
        segments = np.zeros(len(self.rows), np.int64)
        for entry in self._entries(index):
            place = int(self._place[self._row[entry]])
            segments[place] += 1
            used[place] += self._write(batch, entry, place, int(used[place]), int(segments[place]))
        return batch

    def unpacked(self, step: int) -> Batch:
        """The same documents, one per row, in plan order: what packing must equal."""
        entries = self._entries(step)
        batch = self._empty(len(entries))
        for place, entry in enumerate(entries):
            self._write(batch, entry, place, 0, 1)
        return batch

    def _entries(self, step: int) -> range:
        if not 0 <= step < self._steps:
            raise IndexError(f"step {step} of a plan of {self._steps} steps")
        return range(int(self._starts[step]), int(self._starts[step + 1]))

    def _empty(self, rows: int) -> Batch:
        shape = (rows, self._row_tokens)
        batch: Batch = {name: np.zeros(shape, np.int32) for name in ("tokens", "labels", "segment_ids", "positions")}
        batch["weights"] = np.zeros(shape, np.float32)
        if self._teacher is not None:
            batch["teacher_ids"] = np.zeros((*shape, self._teacher.k), np.int32)
            batch["teacher_logp"] = np.zeros((*shape, self._teacher.k + 1), np.float32)
        return batch

    def _write(self, batch: Batch, entry: int, place: int, start: int, segment: int) -> int:
        """Write one document at `start` of a row; returns its length."""
        ids, prompt = self._store.row(self._own[entry])
        n = len(ids)
        batch["tokens"][place, start : start + n] = ids
        batch["segment_ids"][place, start : start + n] = segment
        batch["positions"][place, start : start + n] = np.arange(n)
        batch["labels"][place, start : start + n - 1] = ids[1:]
        first = 0 if self._full else max(prompt - 1, 0)  # position whose label is the first trained token
        batch["weights"][place, start + first : start + n - 1] = self._weight[entry]
        if self._teacher is not None:
            likely, logp = self._teacher.row(self._own[entry], n - 1 - first)
            batch["teacher_ids"][place, start + first : start + n - 1] = likely
            batch["teacher_logp"][place, start + first : start + n - 1] = logp
        return n


def batches(source: PlanSource, first_step: int = 0, *, threads: int = 2, prefetch: int = 4) -> Iterator[Batch]:
    """Batches of steps `first_step`, `first_step` + 1, ..., to the end, built ahead by Grain's read threads.

    To resume, call again with the next step; nothing else is remembered.
    """
    if first_step >= len(source):
        return iter(())
    rest = grain.MapDataset.source(source).slice(slice(first_step, len(source)))
    return iter(rest.to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch)))
