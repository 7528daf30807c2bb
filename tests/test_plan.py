"""The plan: packing rules, counts, weights, hashes, and the stage itself."""

from __future__ import annotations

import collections
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from plan_cases import case, config, fake, groups_of

from dccot_jax import artifact
from dccot_jax.artifact import Artifact, ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.mix.groups import TOKEN_COLUMNS, TRACE_COLUMNS, PlanError
from dccot_jax.mix.plan import make_plan, plan_document, plan_table, run
from dccot_jax.records import Dropped, dropped_to_table, traces_to_table

SMALL = {"train__rows_per_step": 4, "train__row_tokens": 64, "tokens__max_length": 60}


def plan_of(groups, **changes):
    cfg = config(**{**SMALL, **changes})
    plan = make_plan(cfg, groups, {})
    table = plan_table(plan.steps, cfg)
    return plan, table, plan_document(cfg, plan, table, tokens_hash="t", tokenizer_hash="k")


@pytest.fixture(scope="module")
def single():
    return groups_of(*case(60))


@pytest.fixture(scope="module")
def triples():
    return groups_of(*case(24, reverse=True))


@pytest.mark.parametrize("name", ["single", "triples"])
def test_rows_hold_what_they_can(name, request):
    groups = request.getfixturevalue(name)
    _, table, document = plan_of(groups, train__steps=30)
    length = {row.id: row.length for group in groups for row in group.rows}
    used: dict[tuple[int, int], int] = collections.Counter()
    slots: dict[tuple[int, int], list[int]] = collections.defaultdict(list)
    for entry in table.to_pylist():
        used[entry["step"], entry["row"]] += length[entry["id"]]
        slots[entry["step"], entry["row"]].append(entry["slot"])
    assert max(used.values()) <= 64
    assert all(values == list(range(len(values))) for values in slots.values())
    assert {step for step, _ in used} == set(range(30))
    assert all(0 <= row < 4 for _, row in used)
    assert document["fill_rate"] == pytest.approx(sum(used.values()) / (30 * 4 * 64))
    assert document["fill_rate"] > 0.8


def test_a_group_stays_inside_one_step(triples):
    _, table, _ = plan_of(triples, train__steps=20)
    group_of = {row.id: group.id for group in triples for row in group.rows}
    found = collections.Counter((entry["step"], group_of[entry["id"]]) for entry in table.to_pylist())
    assert all(count % 3 == 0 for count in found.values())


@pytest.mark.parametrize("epochs", [1.0, 2.0, 0.5, 1.5])
def test_epochs_are_exact(triples, epochs):
    plan, table, _ = plan_of(triples, train__epochs=epochs)
    counts = collections.Counter(table["id"].to_pylist())
    whole, part = divmod(epochs, 1)
    assert sum(counts.values()) == round(epochs * 24) * 3
    assert set(counts.values()) <= {int(whole), int(whole) + 1} - {0}
    assert sum(count == whole + 1 for count in counts.values()) == round(part * 24) * 3
    assert collections.Counter(row.reason for row in plan.dropped) == ({"not_reached": 36} if epochs < 1 else {})


def test_no_repeats_within_a_pass(single):
    _, table, _ = plan_of(single, train__steps=40)
    ids = table["id"].to_pylist()
    first_pass = ids[: len(single) - 32]  # groups set aside may trail into the next pass
    assert len(set(first_pass)) == len(first_pass)
    counts = collections.Counter(ids)
    assert max(counts.values()) - min(counts.values()) <= 2 and len(counts) == 60


def test_steps_are_exact_and_the_rest_is_counted(single):
    plan, table, document = plan_of(single, train__steps=3)
    assert document["steps"] == 3 and set(table["step"].to_pylist()) == {0, 1, 2}
    used = set(table["id"].to_pylist())
    assert len(used) + sum(row.reason == "not_reached" for row in plan.dropped) == 60


def test_curriculum_draws_from_its_pool(single):
    steps = 24
    plan, _, document = plan_of(single, train__steps=steps, curriculum__kind="staged")
    for number, step in enumerate(plan.steps):
        pool = {group.id for group in plan.curriculum.order[: plan.curriculum.pool_size(number, steps)]}
        assert {placed.group.id for placed in step} <= pool
    assert document["pool_sizes"] == [[0, 20], [8, 40], [16, 60]]
    hardest = {group.id for group in plan.curriculum.order[40:]}
    assert any(placed.group.id in hardest for placed in plan.steps[16])


def test_curriculum_in_epochs_takes_the_steps_of_the_plain_plan(single):
    _, _, plain = plan_of(single, train__epochs=2.0)
    for kind in ("staged", "competence", "anti", "random_growing"):
        assert plan_of(single, train__epochs=2.0, curriculum__kind=kind)[2]["steps"] == plain["steps"]


def test_controls_share_the_pool_sizes(single):
    known = plan_of(single, train__steps=20, curriculum__kind="competence")[2]["pool_sizes"]
    for kind in ("anti", "random_growing"):
        assert plan_of(single, train__steps=20, curriculum__kind=kind, curriculum__pacing="competence")[2]["pool_sizes"] == known


def test_weights(triples, single):
    for groups, parts in ((triples, 3), (single, 1)):
        n = {row.id: row.completion_tokens for group in groups for row in group.rows}
        length = {row.id: row.length for group in groups for row in group.rows}
        expected = {"token": lambda i: 1.0, "sequence": lambda i: 1.0 / n[i], "reverse": lambda i: 1.0 / (parts * n[i])}  # noqa: B023
        for kind, rule in expected.items():
            _, table, _ = plan_of(groups, train__loss_weight=kind)
            np.testing.assert_allclose(table["weight"].to_numpy(), [rule(i) for i in table["id"].to_pylist()], rtol=1e-7)
        _, table, _ = plan_of(groups, train__loss_weight="sequence", train__loss_mask="full")
        np.testing.assert_allclose(table["weight"].to_numpy(), [1.0 / (length[i] - 1) for i in table["id"].to_pylist()], rtol=1e-7)


def test_hash_follows_what_is_trained(single):
    def digest(groups, **changes):
        return plan_of(groups, **changes)[2]["hash"]

    known = digest(single)
    assert digest(single[::-1]) == known
    assert digest(single, seed=1) != known
    assert digest(single, train__loss_weight="sequence") != known
    assert digest(single, train__loss_mask="full") != known
    assert digest(single[1:]) != known
    cfg = config(**SMALL)
    plan = make_plan(cfg, single, {})
    table = plan_table(plan.steps, cfg)
    assert plan_document(cfg, plan, table, tokens_hash="other", tokenizer_hash="k")["hash"] != known
    assert plan_document(cfg, plan, table, tokens_hash="t", tokenizer_hash="other")["hash"] != known
    document = plan_document(cfg, plan, table, tokens_hash="t", tokenizer_hash="k")
    [segment] = document["segments"]
    assert segment == {"first_step": 0, "steps": document["steps"], "previous": "", "hash": known}


def test_group_wider_than_a_step_is_dropped(triples):
    plan, table, _ = plan_of(triples, train__rows_per_step=1, train__epochs=1.0)
    lost = {row.id for row in plan.dropped}
    assert {row.reason for row in plan.dropped} == {"exceeds_step"}
    assert set(table["id"].to_pylist()) == {row.id for group in triples for row in group.rows} - lost
    for group in triples:
        assert (sum(row.length for row in group.rows) > 64) == (group.rows[0].id in lost)


# --- the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture
def inputs(tmp_path):
    traces, tokens = case(40, tasks=("a", "b"), teachers=("big", "small"))
    return {
        "verify": fake(tmp_path, "verify", {"traces": traces_to_table(traces)}),
        "tokenize": fake(tmp_path, "tokenize", {"tokens": tokens}, {"tokenizer_hash": "k"}),
        "select": fake(tmp_path, "select", {"kept": pa.table({"id": [trace.id for trace in traces[:60]]})}),
        "score": fake(
            tmp_path, "score", {"scores": pa.table({"id": [trace.id for trace in traces], "nll": [float(i) for i in range(80)]})}
        ),
    }


def test_stage(inputs, tmp_path):
    cfg = config(**SMALL, curriculum__kind="competence", curriculum__difficulty="nll", mix__kind="teacher", mix__strong=("big",))
    out = ArtifactWriter(tmp_path / "plan")
    result = run(cfg, inputs, out, Context(tmp_path))
    table = Artifact(out.path, {}).table("plan")
    assert result.rows_in == 60
    assert result.rows_out == len(set(table["id"].to_pylist()))
    assert result.rows_out + sum(result.dropped.values()) == 60
    assert result.dropped["mix_quota"] > 0
    assert Artifact(out.path, {}).table("dropped").num_rows == sum(result.dropped.values())
    again = run(cfg, inputs, ArtifactWriter(tmp_path / "again"), Context(tmp_path))
    assert again.logical_hash == result.logical_hash
    assert (out.path / "plan.parquet").read_bytes() == (tmp_path / "again" / "plan.parquet").read_bytes()
    assert run(cfg, inputs, ArtifactWriter(tmp_path / "other"), Context(tmp_path, process_index=1, process_count=2)).logical_hash == ""


def test_rows_a_stored_teacher_could_not_read_go_with_their_groups_and_reasons(tmp_path):
    traces, tokens = case(8, reverse=True)
    unread = traces[0]
    elsewhere = next(trace for trace in traces if trace.group_id != unread.group_id)
    lost = [Dropped(unread.id, "exceeds_positions", "61 tokens"), Dropped(elsewhere.id, "exceeds_positions", "62 tokens")]
    kept = [trace.id for trace in traces if trace.group_id != elsewhere.group_id]
    inputs = {
        "verify": fake(tmp_path, "verify", {"traces": traces_to_table(traces)}),
        "tokenize": fake(tmp_path, "tokenize", {"tokens": tokens}, {"tokenizer_hash": "k"}),
        "select": fake(tmp_path, "select", {"kept": pa.table({"id": kept})}),
        "distill": fake(tmp_path, "distill", {"dropped": dropped_to_table(lost)}),
    }
    out = ArtifactWriter(tmp_path / "plan")
    result = run(config(**SMALL), inputs, out, Context(tmp_path))
    assert result.dropped == {"teacher_exceeds_positions": 1, "group_incomplete": 2}
    assert result.rows_in == len(kept) == result.rows_out + 3
    of_group = {trace.id for trace in traces if trace.group_id == unread.group_id}
    dropped = {row["id"]: row for row in Artifact(out.path, {}).table("dropped").to_pylist()}
    assert set(dropped) == of_group and dropped[unread.id]["detail"] == "61 tokens"
    assert not of_group & set(Artifact(out.path, {}).table("plan")["id"].to_pylist())


def spoil(whole: Artifact, name: str, columns: Sequence[str]) -> None:
    """Overwrite all of a table's column chunks but those of `columns`; the file keeps its size and its footer."""
    path = whole.file(f"{name}.parquet")
    data, about = bytearray(path.read_bytes()), pq.read_metadata(str(path))
    for group in range(about.num_row_groups):
        for chunk in (about.row_group(group).column(place) for place in range(about.num_columns)):
            if chunk.path_in_schema.split(".")[0] not in columns:
                start = chunk.dictionary_page_offset or chunk.data_page_offset
                data[start : start + chunk.total_compressed_size] = b"\xff" * chunk.total_compressed_size
    path.write_bytes(data)


def test_only_ids_lengths_and_what_groups_are_made_of_is_read(inputs, tmp_path, monkeypatch):
    cfg = config(**SMALL)
    known = run(cfg, inputs, ArtifactWriter(tmp_path / "whole"), Context(tmp_path))
    spoil(inputs["tokenize"], "tokens", TOKEN_COLUMNS)
    spoil(inputs["verify"], "traces", TRACE_COLUMNS)
    for name, table in (("tokenize", "tokens"), ("verify", "traces")):
        with pytest.raises((pa.ArrowException, OSError)):
            inputs[name].table(table)
    monkeypatch.setattr(artifact, "BATCH_ROWS", 7)
    assert [len(batch) for batch in inputs["tokenize"].batches("tokens", ("id",))] == [7] * 11 + [3]
    assert run(cfg, inputs, ArtifactWriter(tmp_path / "lean"), Context(tmp_path)).logical_hash == known.logical_hash


def test_empty_selection_is_a_clear_error(inputs, tmp_path):
    inputs["select"] = fake(tmp_path / "none", "select", {"kept": pa.table({"id": pa.array([], pa.string())})})
    with pytest.raises(PlanError, match="empty selection"):
        run(config(**SMALL), inputs, ArtifactWriter(tmp_path / "plan"), Context(tmp_path))


def test_unscored_difficulty_is_a_clear_error(inputs, tmp_path):
    cfg = config(**SMALL, curriculum__kind="staged", curriculum__difficulty="ifd_loss")
    with pytest.raises(PlanError, match="no row has a value for 'ifd_loss'"):
        run(cfg, inputs, ArtifactWriter(tmp_path / "plan"), Context(tmp_path))
