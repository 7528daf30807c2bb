"""Two real processes store a teacher's tokens as one does: each commits only rows it holds, and a torn part is made again by both."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from rich.console import Console
from tiny import tiny_config
from worker_processes import reports_of

from dccot_jax import pipeline
from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, open_artifact
from dccot_jax.context import Context
from dccot_jax.select import distill

PROCESSES = 2
K = 4


def _config(teacher: Path):
    return tiny_config(
        score__signals=(),
        score__chunk_rows=16,
        train__distill__kind="jsd",
        train__distill__teacher=str(teacher),
        train__distill__top_k=K,
        train__distill__teacher_dtype="float32",
    )


def store(folder: Path, out: Path, index: int, processes: int) -> tuple[StageResult, list[str]]:
    """The stage on this process; its result, and the ids that this process committed."""
    committed: list[str] = []
    commit = ArtifactWriter.commit_chunk

    def noting(self, series, number, table):
        committed.extend(table["id"].to_pylist())
        commit(self, series, number, table)

    ArtifactWriter.commit_chunk = noting  # type: ignore[method-assign]
    tile_tokens, distill.TILE_TOKENS = distill.TILE_TOKENS, {"cpu": 512}  # a few rows each
    inputs = {name: open_artifact(folder / name) for name in ("tokenize", "student")}
    ctx = Context(folder, process_index=index, process_count=processes, console=Console(quiet=True))
    try:
        return distill.run(_config(folder / "teacher"), inputs, ArtifactWriter(out), ctx), committed
    finally:
        ArtifactWriter.commit_chunk = commit
        distill.TILE_TOKENS = tile_tokens


def _worker(folder: Path, index: int, port: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, index)
    from jax.experimental import multihost_utils

    whole, first = store(folder, folder / "two", index, PROCESSES)
    chunks = sorted((folder / "two" / "chunks").glob("*-p1-*"))
    if index == 0:
        chunks[1].write_bytes(chunks[1].read_bytes()[:30])
    multihost_utils.sync_global_devices("torn")
    result, again = store(folder, folder / "two", index, PROCESSES)
    print(json.dumps({"first": first, "again": again, "hashes": [whole.logical_hash, result.logical_hash]}), flush=True)


@pytest.mark.slow
def test_two_processes_store_what_one_does(tmp_path):
    def made(name: str, until: str, **changes):
        ctx = Context(tmp_path / name, console=Console(file=io.StringIO()))
        [run] = pipeline.run(tiny_config(score__signals=(), select__steps=(), **changes), ctx, until=until)
        return run.artifacts

    made("other", "student", seed=7, student__model__hidden_size=48)["student"].path.rename(tmp_path / "teacher")
    for name, artifact in made("run", "tokenize").items():
        artifact.path.rename(tmp_path / name)

    reports = reports_of(__file__, tmp_path, PROCESSES)

    result, everything = store(tmp_path, tmp_path / "one", 0, 1)
    parts = [set(report["first"]) for report in reports]
    assert all(parts) and not parts[0] & parts[1] and parts[0] | parts[1] == set(everything)
    for report in reports:
        assert 0 < len(report["again"]) < len(report["first"])  # only the torn chunk, on both processes
    assert reports[1]["hashes"] == ["", ""] and reports[0]["hashes"][0] == reports[0]["hashes"][1]

    one, two = (_rows(tmp_path / name) for name in ("one", "two"))
    assert set(one) == set(two) == set(everything) and result.rows_out == len(one)
    for name, (ids, logp) in one.items():
        theirs, values = two[name]
        np.testing.assert_allclose(values, logp, atol=1e-5)
        assert np.array_equal(theirs, ids), name


def _rows(folder: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    table = Artifact(epath.Path(folder), {}).table("topk").to_pylist()
    return {row["id"]: (np.reshape(row["ids"], (-1, K)), np.reshape(row["logp"], (-1, K + 1))) for row in table}


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
