"""Stage `select` with vectors, a user's own tables and a target task, on small artifacts."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import tiny_config
from toy_task import FakeTeacher, config, install, question, run_stage, traces_artifact

from dccot_jax import external
from dccot_jax.artifact import ArtifactWriter, StageResult, finish
from dccot_jax.config import ConfigError
from dccot_jax.config_identity import config_slice
from dccot_jax.preflight import check
from dccot_jax.records import make_trace
from dccot_jax.report.pools import Pool
from dccot_jax.select import stage
from dccot_jax.select.columns import check_table, open_tables, read_columns


@pytest.fixture
def rows(monkeypatch):
    install(monkeypatch, FakeTeacher())
    return [
        make_trace(
            task="toy", split="train", question=question(i, 2 * i), target=f"So {i}", reasoning="So", verdict=True, teacher="ab"[i % 2]
        )
        for i in range(12)
    ]


def artifact(tmp_path, name, **tables):
    writer = ArtifactWriter(tmp_path / name)
    for key, table in tables.items():
        writer.write_table(key, table)
    done = {"inputs": {}, "result": StageResult(""), "wall_seconds": 0.0, "recorded": {}}
    return finish(writer, kind=name, identity=name, version=1, config={}, **done)


def inputs(tmp_path, rows, vectors=None):
    tokens = pa.table({"id": [r.id for r in rows], "prompt_tokens": [3] * len(rows), "completion_tokens": [5] * len(rows)})
    scores = {
        "id": [r.id for r in rows],
        "completion_tokens": pa.array([5] * len(rows), pa.int32()),
        "nll": [float(i) for i in range(len(rows))],
    }
    if vectors is not None:
        scores["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(np.ravel(vectors).astype(np.float32)), vectors.shape[1])
    return {
        "verify": traces_artifact(tmp_path, "verify", rows),
        "tokenize": artifact(tmp_path, "tokenize", tokens=tokens),
        "score": artifact(tmp_path, "score", scores=pa.table(scores)),
    }


def run(tmp_path, rows, *steps, vectors=None, **changes):
    made, result = run_stage(stage, config(select__steps=steps, **changes), tmp_path, "select", **inputs(tmp_path, rows, vectors))
    return made.table("kept")["id"].to_pylist(), {row["id"]: row["reason"] for row in made.table("dropped").to_pylist()}, result


def test_vectors_of_the_score_table_reach_the_selectors(tmp_path, rows):
    vectors = np.array([[1, 0], [0, 1], [-1, 0]])[np.arange(12) % 3]
    steps = ({"name": "threshold", "signal": "nll", "min": 3}, {"name": "deita", "signals": "nll", "vector": "embedding", "tau": 0.5})
    kept, dropped, result = run(tmp_path, rows, *steps, vectors=vectors)
    assert set(kept) == {rows[i].id for i in (9, 10, 11)}
    assert {rows[i].id for i in range(3)} == {i for i, reason in dropped.items() if reason == "nll_below_min"}
    assert sum(reason == "too_similar" for reason in dropped.values()) == 6
    assert [step["rows_out"] for step in result.facts["funnel"]] == [9, 3]


def test_own_tables_join_by_id_and_missing_rows_are_dropped(tmp_path, rows):
    path = tmp_path / "curves.parquet"
    curves = [[float(i), i / 2] if i != 4 else None for i in range(11)]
    pq.write_table(pa.table({"id": [r.id for r in rows[:11]], "curve": curves, "rate": [i / 10 for i in range(11)]}), path)
    changes = {"select__tables": (str(path),)}
    steps = ({"name": "s2l", "vector": "curve", "clusters": 3, "rows": 6}, {"name": "top", "signal": "rate", "rows": 4})
    kept, dropped, _ = run(tmp_path, rows, *steps, **changes)
    assert len(kept) == 4 and {dropped[rows[4].id], dropped[rows[11].id]} == {"no_score_curve"}
    check(tiny_config(select__steps=steps, **changes), devices=False)
    cfg = config(select__steps=steps, **changes)
    before = external.select_files(cfg)
    assert list(before) == ["table:0"]
    copy = tmp_path / "elsewhere.parquet"
    copy.write_bytes(path.read_bytes())
    moved = config(select__steps=steps, select__tables=(str(copy),))
    assert external.select_files(moved) == before  # what a table says counts, not where it lies
    assert config_slice(moved, ("select",)) == config_slice(cfg, ("select",))
    pq.write_table(pa.table({"id": [rows[0].id], "curve": [[1.0, 2.0]], "rate": [0.5]}), path)
    assert external.select_files(cfg) != before


def test_dsir_reads_the_training_questions_of_its_target(tmp_path, rows):
    kept, _, _ = run(tmp_path, rows, {"name": "dsir", "target": "toy", "rows": 4, "sample": False})
    assert len(kept) == 4
    corpora = stage.load_corpora([{"name": "dsir", "target": "toy", "text": "full", "rows": 4}], None)
    assert corpora["toy:full"][0] == f"{question(3, 4)}\nThe answer is 7."


def test_labels_and_questions_come_from_the_traces(tmp_path, rows):
    kept, _, _ = run(tmp_path, rows, {"name": "stratified", "by": "teacher", "rows": 4}, {"name": "per_question_best", "signal": "nll"})
    by_id = {r.id: r.teacher for r in rows}
    assert sorted(by_id[i] for i in kept) == ["a", "a", "b", "b"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()], ids=str)
def test_ids_may_be_of_any_string_type(tmp_path, kind):
    """Polars and pandas 3 write large strings and views."""
    path = str(tmp_path / "t.parquet")
    pq.write_table(pa.table({"id": pa.array(["b", "a"]).cast(kind), "x": [1.0, 2.0], "v": [[1.0, 0.0], [0.0, 1.0]]}), path)
    assert pq.read_schema(path).field("id").type == kind
    [table] = open_tables([path])
    found = read_columns([table])
    assert table.schema.field("id").type == pa.string() and found.numbers == {"x": {"b": 1.0, "a": 2.0}}
    assert {name: list(vector) for name, vector in found.vectors["v"].items()} == {"b": [1.0, 0.0], "a": [0.0, 1.0]}
    pool = Pool(pa.array(["a", "c", "b"]), {}, (), {}, {}, ())
    assert pool.places(pq.read_table(path)["id"].combine_chunks()).tolist() == [2, 0]


def test_tables_that_cannot_be_used_are_named(tmp_path, rows):
    bad = tmp_path / "bad.parquet"
    with pytest.raises(ConfigError, match="no such file"):
        check_table(str(bad))
    bad.write_text("no parquet")
    with pytest.raises(ConfigError, match="not a parquet file"):
        check_table(str(bad))
    pq.write_table(pa.table({"trace": ["a"], "x": [1.0]}), bad)
    with pytest.raises(ConfigError, match="string column 'id'"):
        check_table(str(bad))
    pq.write_table(pa.table({"id": ["a"], "x": ["text"]}), bad)
    with pytest.raises(ConfigError, match="no column of numbers"):
        check_table(str(bad))
    pq.write_table(pa.table({"id": ["a", "b", "a"], "x": [1.0, 2.0, 3.0]}), bad)
    with pytest.raises(ConfigError, match=r"bad\.parquet': id 'a' is there more than once"):
        check_table(str(bad))
    with pytest.raises(ConfigError, match="vectors of 1 to 2 numbers"):
        read_columns([pa.table({"id": ["a", "b"], "v": [[1.0], [1.0, 2.0]]})])
    with pytest.raises(ConfigError, match="'nll' is there twice"):
        read_columns([pa.table({"id": ["a"], "nll": [1.0]})] * 2)
    with pytest.raises(ConfigError, match="'curve' is not at hand"):
        check(tiny_config(select__steps=({"name": "kcenter", "vector": "curve", "rows": 2},)), devices=False)
