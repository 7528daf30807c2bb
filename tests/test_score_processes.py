"""Two real processes score as one does: each commits only rows it can address, and a torn part is scored again by both."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from worker_processes import reports_of

PROCESSES = 2
ROWS = 30
CHUNK_ROWS = 8


def score(folder: Path, index: int, processes: int, devices: list[Any]):
    """The stage on this process; returns its result and the ids this process committed."""
    import test_score_engine as cases
    from rich.console import Console

    from dccot_jax import config as config_lib
    from dccot_jax.artifact import ArtifactWriter
    from dccot_jax.context import Context
    from dccot_jax.model.sharding import make_mesh, param_shardings, weight_shapes
    from dccot_jax.select import engine
    from dccot_jax.train.checkpoint import Student

    rng = np.random.default_rng(3)
    host = jax.tree.map(lambda shape: (0.2 * rng.normal(size=shape)).astype(np.float32), weight_shapes(cases.MC), is_leaf=cases.is_shape)

    def load(source, mesh):
        params = jax.tree.map(lambda x, s: jax.make_array_from_callback(x.shape, s, lambda i: x[i]), host, param_shardings(cases.MC, mesh))
        return Student(mc=cases.MC, params=params, tokenizer_dir=folder, eos_id=3, stop_ids=(3,), pad_id=0, source="test")  # type: ignore[arg-type]

    committed: list[str] = []
    commit = ArtifactWriter.commit_chunk

    def noting(self, series, number, table):
        committed.extend(table["id"].to_pylist())
        commit(self, series, number, table)

    ArtifactWriter.commit_chunk = noting  # type: ignore[method-assign]
    engine.load_student, engine.TILE_TOKENS = load, {"cpu": cases.TILE_TOKENS}
    engine.make_mesh = lambda _: make_mesh({"fsdp": -1}, devices)
    engine.load_tokenizer = lambda _: cases.FakeTokenizer()  # type: ignore[assignment]
    cfg = config_lib.override(config_lib.default_config(), {"score.signals": cases.SIGNALS, "score.chunk_rows": CHUNK_ROWS})
    inputs = {"tokenize": cases.Fake({"tokens": cases.tokens_table(cases.make_rows(ROWS))}), "student": cases.Fake({})}
    ctx = Context(folder, process_index=index, process_count=processes, console=Console(quiet=True))
    try:
        result = engine.run(cfg, inputs, ArtifactWriter(folder / "score"), ctx)  # type: ignore[arg-type]
    finally:
        ArtifactWriter.commit_chunk = commit
    return result, committed


def _worker(folder: Path, index: int, port: int) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, index)
    _, first = score(folder, index, PROCESSES, jax.devices())
    chunks = sorted((folder / "score" / "chunks").glob("*-p1-*"))
    if index == 0:
        chunks[1].write_bytes(chunks[1].read_bytes()[:30])
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices("torn")
    result, again = score(folder, index, PROCESSES, jax.devices())
    print(json.dumps({"first": first, "again": again, "facts": dict(result.facts)}), flush=True)


@pytest.mark.slow
def test_two_processes_score_as_one(tmp_path, monkeypatch):
    reports = reports_of(__file__, tmp_path / "two", PROCESSES)
    parts = [set(report["first"]) for report in reports]
    assert len(parts[0]) + len(parts[1]) == len(parts[0] | parts[1]) == ROWS and all(parts)
    for report in reports:
        assert 0 < len(report["again"]) < len(report["first"])  # only the torn chunk, on both processes
    assert reports[0]["facts"]["rows_scored"] == sum(len(report["again"]) for report in reports)

    from kept_cases import assert_kept_agree
    from test_score_engine import SIGNALS, assert_close

    from dccot_jax.artifact import Artifact
    from dccot_jax.select import engine

    for name in ("load_student", "TILE_TOKENS", "make_mesh", "load_tokenizer"):
        monkeypatch.setattr(engine, name, getattr(engine, name))  # `score` replaces them; undone at the end
    score(tmp_path / "one", 0, 1, jax.devices()[:1])
    two, one = (Artifact(_path(tmp_path / name / "score"), {}).table("scores") for name in ("two", "one"))
    assert two.num_rows == ROWS
    assert_close(two, one)
    assert_kept_agree(two, one, SIGNALS)


def _path(path: Path):
    from etils import epath

    return epath.Path(path)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
