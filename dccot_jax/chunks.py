"""Committed chunks of a long stage: which are there, and which belong to another layout."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from dccot_jax.artifact import ArtifactError, ArtifactWriter
from dccot_jax.context import Context


def committed(out: ArtifactWriter, ctx: Context, series: Sequence[str], count: int) -> list[bool]:
    """Which of `count` chunks are there in every one of `series`, as seen by process 0 and agreed by all processes."""
    found = np.zeros(count, bool)
    if ctx.is_main:
        found = np.array([all(out.read_chunk(part, index) is not None for part in series) for index in range(count)], bool)
    if ctx.process_count > 1:
        from jax.experimental import multihost_utils

        found = np.asarray(multihost_utils.broadcast_one_to_all(found))
    return [bool(x) for x in found]


def read_committed(out: ArtifactWriter, series: str, index: int) -> pa.Table:
    """A chunk that `committed` has seen or this run has written. Raises ArtifactError if it does not read."""
    table = out.read_chunk(series, index)
    if table is None:
        raise ArtifactError(f"{out.chunk_path(series, index)}: committed and cannot be read back")
    return table


def drop_other_layouts(out: ArtifactWriter, ctx: Context, prefix: str, layout: str) -> int:
    """Remove chunks of `prefix` that another layout left (other chunk size, mesh or number of processes); says how many."""
    if not ctx.is_main or not (out.path / "chunks").exists():
        return 0
    stale = [path for path in (out.path / "chunks").iterdir() if path.name.startswith(prefix) and not path.name.startswith(prefix + layout)]
    for path in stale:
        path.unlink(missing_ok=True)
    if stale:
        ctx.log(f"  {len(stale)} chunks of another layout (chunk size, mesh or number of processes) are discarded")
    return len(stale)
