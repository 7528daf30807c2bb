"""Artifacts and records: whole or not there, hashes that mean content, ids that mean identity."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dccot_jax import artifact, records
from dccot_jax.artifact import ArtifactError, ArtifactWriter, StageResult, Store


def _trace(**changes):
    fields = {"task": "t", "split": "train", "question": "1 + 1?", "target": "It is 2.", "answer_type": "number", "gold_answer": "2"}
    return records.make_trace(**{**fields, **changes})


def _finish(store, identity="a" * 64, rows=3):
    writer = store.writer("traces", identity)
    table = pa.table({"id": [f"x{i}" for i in range(rows)], "v": list(range(rows))})
    writer.write_table("traces", table)
    return artifact.finish(
        writer,
        kind="traces",
        identity=identity,
        version=1,
        config={},
        inputs={},
        result=StageResult(artifact.table_hash(table), rows, rows),
        wall_seconds=0.0,
        recorded={},
    )


def test_id_hashes_what_a_trace_is_and_nothing_else():
    trace = _trace()
    assert _trace(verdict=True, verdict_reason="x", prompt_tokens=5, meta='{"a":1}', source="elsewhere").id == trace.id
    for name, value in [
        ("target", "It is 3."),
        ("teacher", "other"),
        ("sample_index", 1),
        ("split", "test"),
        ("parent_ids", ("p",)),
        ("part", "x"),
    ]:
        assert _trace(**{name: value}).id != trace.id
    assert trace.id == records.trace_id(trace) == trace.group_id


def test_trace_table_round_trip():
    traces = [_trace(choices=("a", "b"), n_steps=None), _trace(target="x", verdict=False, parent_ids=("p", "q"), n_steps=3)]
    assert records.table_to_traces(records.traces_to_table(traces)) == traces
    with pytest.raises(ValueError, match="gold_answer"):
        records.table_to_traces(records.traces_to_table(traces).drop_columns(["gold_answer"]))


def test_seeds_of_neighbours_are_unrelated():
    seeds = {records.derive_seed(root, name) for root in range(100) for name in ("a", "b")}
    assert len(seeds) == 200
    assert all(0 <= seed < 1 << 63 for seed in seeds)


def test_normalised_questions_join():
    assert records.normalise_question("How  MANY apples?\n") == records.normalise_question("how many apples")
    assert records.normalise_question("3 apples") != records.normalise_question("4 apples")
    assert records.normalise_question("1.5 m") != records.normalise_question("15 m")


def test_table_hash_ignores_order_and_chunking_and_sees_values():
    table = pa.table({"id": ["b", "a", "c"], "x": [1.0, None, 3.0], "l": [[1, 2], [], None], "s": ["ü", "", None]})
    shuffled = pa.concat_tables([table.slice(2, 1), table.slice(0, 2)])
    assert artifact.table_hash(table) == artifact.table_hash(shuffled)
    for column, values in [("x", [1.0, 0.0, 3.0]), ("l", [[1], [2], None]), ("s", ["ü", None, None]), ("l", [[1, 2], None, None])]:
        changed = table.set_column(table.column_names.index(column), column, pa.array(values, table.schema.field(column).type))
        assert artifact.table_hash(changed) != artifact.table_hash(table)


def test_tree_hash_sees_names_shapes_and_bytes():
    tree = {"a": {"w": np.arange(6.0).reshape(2, 3)}, "b": np.float32(1)}
    assert artifact.tree_hash(tree) == artifact.tree_hash({"b": np.float32(1), "a": {"w": np.arange(6.0).reshape(2, 3)}})
    assert artifact.tree_hash(tree) != artifact.tree_hash({"a": {"w": np.arange(6.0).reshape(3, 2)}, "b": np.float32(1)})


def test_unfinished_is_not_there(tmp_path):
    store = Store(tmp_path)
    store.writer("traces", "a" * 64).write_text("traces.parquet", "half")
    assert store.find("traces", "a" * 64) is None
    _finish(store)
    assert store.find("traces", "a" * 64, full=True) is not None


@pytest.mark.parametrize("damage", ["truncate", "remove", "flip", "manifest"])
def test_damage_is_found_and_named(tmp_path, damage):
    store = Store(tmp_path)
    done = _finish(store)
    path = done.file("traces.parquet")
    data = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(data[:-1])
    elif damage == "remove":
        path.unlink()
    elif damage == "flip":
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    else:
        done.file("manifest.json").write_text('{"files": ')
    with pytest.raises(ArtifactError, match="manifest" if damage == "manifest" else r"traces\.parquet"):
        store.find("traces", "a" * 64, full=True)


def test_torn_chunk_counts_as_missing(tmp_path):
    writer = Store(tmp_path).writer("score", "b" * 64)
    writer.commit_chunk("s", 0, pa.table({"id": ["a"]}))
    writer.commit_chunk("s", 1, pa.table({"id": ["b"]}))
    writer.chunk_path("s", 1).write_bytes(b"PAR1 torn")
    first, second = writer.read_chunk("s", 0), writer.read_chunk("s", 1)
    assert first is not None and first.num_rows == 1
    assert second is None and not writer.chunk_path("s", 1).exists()


def test_chunks_stay_until_the_manifest_is_written(tmp_path, monkeypatch):
    store = Store(tmp_path)
    writer = store.writer("traces", "a" * 64)
    writer.commit_chunk("s", 0, pa.table({"id": ["a"]}))
    write = artifact.write_atomic

    def killed(path, data):
        if str(path).endswith(artifact.MANIFEST):
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(artifact, "write_atomic", killed)
    with pytest.raises(KeyboardInterrupt):
        _finish(store)
    assert writer.read_chunk("s", 0) is not None
    monkeypatch.setattr(artifact, "write_atomic", write)
    assert not any("chunks" in name for name in _finish(store).manifest["files"])
    assert not (writer.path / "chunks").exists()


def test_row_groups_are_written_one_at_a_time_and_whole(tmp_path):
    writer = ArtifactWriter(tmp_path)
    tables = [pa.table({"id": [str(i)], "x": [float(i)]}) for i in range(3)]
    writer.write_row_groups("features", iter(tables))
    assert pq.ParquetFile(tmp_path / "features.parquet").num_row_groups == 3
    assert pq.read_table(tmp_path / "features.parquet").equals(pa.concat_tables(tables))

    def failing():
        yield tables[0]
        raise RuntimeError

    with pytest.raises(RuntimeError):
        writer.write_row_groups("torn", failing())
    assert not (tmp_path / "torn.parquet").exists()


def test_manifest_says_what_was_dropped(tmp_path):
    writer = Store(tmp_path).writer("verify", "c" * 64)
    counts = writer.write_dropped([records.Dropped("a", "leak", "x"), records.Dropped("b", "leak"), records.Dropped("c", "no_gold")])
    assert counts == {"leak": 2, "no_gold": 1}
    assert json.loads(json.dumps(counts)) == counts


def test_trace_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        _trace().target = "other"  # type: ignore[misc]
