"""The loader: layout of packed rows, masks, the Reverse formula, processes, resume."""

from __future__ import annotations

import numpy as np
import pytest
from plan_cases import case, config, groups_of

from dccot_jax.data.loader import PlanSource, batches
from dccot_jax.data.token_store import TokenStore
from dccot_jax.mix.plan import make_plan, plan_table

ROWS, TOKENS = 4, 64


def build(traces_and_tokens, rows=None, loss_mask="response", **changes):
    """A source over a planned case, and the case's token rows by id."""
    traces, tokens = traces_and_tokens
    settings = {"train__rows_per_step": ROWS, "train__row_tokens": TOKENS, "tokens__max_length": 60, "train__loss_mask": loss_mask}
    cfg = config(**settings, **changes)
    plan = make_plan(cfg, groups_of(traces, tokens), {})
    table = plan_table(plan.steps, cfg)
    source = PlanSource(
        table,
        tokens.to_batches(max_chunksize=3),
        steps=len(plan.steps),
        rows_per_step=ROWS,
        row_tokens=TOKENS,
        loss_mask=loss_mask,
        rows=rows,
    )
    return source, plan, table, {row["id"]: row for row in tokens.to_pylist()}


@pytest.mark.parametrize("loss_mask", ["response", "full"])
def test_layout_token_by_token(loss_mask):
    source, _, table, rows = build(case(40), loss_mask=loss_mask, train__loss_weight="sequence")
    entries = table.to_pylist()
    for step in range(len(source)):
        batch = source[step]
        assert {name: (value.dtype, value.shape) for name, value in batch.items()} == {
            **{name: (np.dtype(np.int32), (ROWS, TOKENS)) for name in ("tokens", "labels", "segment_ids", "positions")},
            "weights": (np.dtype(np.float32), (ROWS, TOKENS)),
        }
        seen = np.zeros((ROWS, TOKENS), bool)
        start = [0] * ROWS
        for entry in (entry for entry in entries if entry["step"] == step):
            r, row = entry["row"], rows[entry["id"]]
            ids, n, prompt = row["input_ids"], len(row["input_ids"]), row["prompt_tokens"]
            for place in range(n):
                t = start[r] + place
                seen[r, t] = True
                assert batch["tokens"][r, t] == ids[place]
                assert batch["segment_ids"][r, t] == entry["slot"] + 1
                assert batch["positions"][r, t] == place
                trained = place + 1 < n and (loss_mask == "full" or place + 1 >= prompt)
                assert batch["weights"][r, t] == (np.float32(entry["weight"]) if trained else 0)
                assert batch["labels"][r, t] == (ids[place + 1] if place + 1 < n else 0)
            start[r] += n
        for value in batch.values():
            assert not value[~seen].any()


def test_every_completion_token_is_trained_once():
    source, _, table, rows = build(case(30))
    trained = sum((source[step]["weights"] > 0).sum() for step in range(len(source)))
    assert trained == sum(rows[identity]["completion_tokens"] for identity in table["id"].to_pylist())


def test_unpacked_holds_the_same_documents():
    source, _, _, _ = build(case(30), train__loss_weight="sequence")
    for step in range(len(source)):
        packed, single = source[step], source.unpacked(step)
        assert single["segment_ids"].max() == 1
        for name in ("tokens", "labels", "positions", "weights"):
            inside = packed["segment_ids"] > 0
            order = np.lexsort((packed["segment_ids"][inside], np.nonzero(inside)[0]))
            np.testing.assert_array_equal(packed[name][inside][order], single[name][single["segment_ids"] > 0])


def nll_of(ids: list[int], place: int) -> float:
    """A made-up NLL of the token at `place`, which depends on everything before it in its document."""
    context = np.asarray(ids[: place + 1], np.float64)
    return float(np.abs(np.sin(context @ np.arange(1, place + 2))) + 0.1)


def test_reverse_loss_equals_its_formula():
    """1/(3n) sum_i [CE(R_f|Q) + CE(Q_b|Q) + CE(R_b|Q_b)] = sum(w nll) / sum(w) over the packed step, in float64."""
    source, plan, _, rows = build(case(20, reverse=True), train__loss_weight="reverse")
    for step in range(len(source)):
        groups = {placed.group.id: placed.group for placed in plan.steps[step]}
        losses = []
        for group in groups.values():
            for row in group.rows:
                ids, prompt = rows[row.id]["input_ids"], rows[row.id]["prompt_tokens"]
                losses.append(np.mean([nll_of(ids, place) for place in range(prompt, len(ids))]))
        formula = np.sum(losses) / (3 * len(groups))
        batch = source[step]
        total = weight = 0.0
        for r in range(ROWS):
            for segment in range(1, batch["segment_ids"][r].max() + 1):
                where = np.nonzero(batch["segment_ids"][r] == segment)[0]
                ids = batch["tokens"][r, where].tolist()
                for place, t in enumerate(where[:-1]):
                    assert batch["labels"][r, t] == ids[place + 1]
                    total += float(batch["weights"][r, t]) * nll_of(ids, place + 1)
                    weight += float(batch["weights"][r, t])
        assert weight == pytest.approx(len(groups), rel=1e-6)  # every group weighs 1
        assert total / weight == pytest.approx(formula, rel=1e-6)  # weights are stored in float32


@pytest.mark.parametrize("parts", [([0, 1], [2, 3]), ([0, 2], [1, 3]), ([3], [0, 1, 2])])
def test_processes_build_their_rows_of_the_same_batch(parts):
    data = case(40)
    whole, *_ = build(data)
    sources = [build(data, rows=part)[0] for part in parts]
    for step in range(len(whole)):
        full = whole[step]
        for part, source in zip(parts, sources):
            mine = source[step]
            assert mine["tokens"].shape == (len(part), TOKENS)
            for name, value in full.items():
                np.testing.assert_array_equal(mine[name], value[part])


def test_iteration_resumes_at_any_step():
    source, *_ = build(case(60), train__epochs=2.0)
    everything = list(batches(source))
    assert len(everything) == len(source) > 5
    for step, batch in enumerate(everything):
        for name, value in source[step].items():
            np.testing.assert_array_equal(batch[name], value)
    for first in (3, len(source) - 1, len(source)):
        rest = list(batches(source, first))
        assert len(rest) == len(source) - first
        for batch, known in zip(rest, everything[first:]):
            np.testing.assert_array_equal(batch["tokens"], known["tokens"])


def test_a_full_length_row_loses_nothing():
    traces, tokens = case(6, max_length=60)
    longest = max(len(ids) for ids in tokens["input_ids"].to_pylist())
    cfg = config(train__rows_per_step=2, train__row_tokens=longest, tokens__max_length=longest)
    plan = make_plan(cfg, groups_of(traces, tokens), {})
    assert not plan.dropped
    source = PlanSource(plan_table(plan.steps, cfg), tokens.to_batches(), steps=len(plan.steps), rows_per_step=2, row_tokens=longest)
    rows = [batch["segment_ids"][r] for batch in batches(source) for r in range(2)]
    assert any(row.min() == 1 and row.max() == 1 for row in rows)


def test_bad_arguments():
    source, _, table, _ = build(case(6))
    with pytest.raises(IndexError, match="of a plan of"):
        source[len(source)]
    tokens = case(6)[1]
    with pytest.raises(ValueError, match="loss_mask"):
        PlanSource(table, tokens.to_batches(max_chunksize=3), steps=1, rows_per_step=ROWS, row_tokens=TOKENS, loss_mask="half")
    with pytest.raises(ValueError, match="rows"):
        PlanSource(table, tokens.to_batches(max_chunksize=3), steps=1, rows_per_step=ROWS, row_tokens=TOKENS, rows=[ROWS])


def test_the_token_store_keeps_what_was_wanted_and_no_more():
    _, tokens = case(23)
    rows = tokens.to_pylist()
    for wanted in ([], [0], [5, 6, 17], list(range(len(rows)))):
        for size in (1, 4, 100):
            store = TokenStore(tokens.to_batches(max_chunksize=size), np.array(wanted, np.int64))
            order = np.array(wanted[::-1], np.int64)
            for place, own in zip(order, store.index(order), strict=True):
                ids, prompt = store.row(own)
                assert ids.tolist() == rows[place]["input_ids"] and prompt == rows[place]["prompt_tokens"]
            assert len(store._flat) == sum(len(rows[place]["input_ids"]) for place in wanted)
    with pytest.raises(ValueError, match="row 23 of a token table of 23 rows"):
        TokenStore(tokens.to_batches(), np.array([3, 23]))
