"""Packed scoring: plans and arrays by their definitions, hidden states against float64, and the same scores as in buckets."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from family_cases import CASES
from kept_cases import assert_kept_agree
from reference_decoder import reference_hidden
from test_score_engine import CONTEXT, SIGNALS, assert_close, is_shape, make_rows
from test_score_engine import host as host
from test_score_engine import stage as stage

from dccot_jax.model import decoder
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import weight_shapes
from dccot_jax.select.packing import BLOCK, Reading, bin_rows, bin_tokens, find_reading, packed_arrays, plan_packed
from dccot_jax.select.signals import VIEWS
from dccot_jax.select.views import Row, chunk_tiles

BIN = 192


def grouped_rows(vocab: int = 97, seed: int = 0) -> list[Row]:
    """Eleven tokens shared by all; prompts with 1, 2 or 9 rows; one prompt that is the shared part; completions from one token on."""
    rng = np.random.default_rng(seed)

    def draw(n: int) -> np.ndarray:
        return rng.integers(8, vocab, n).astype(np.int32)

    root, found = draw(11), []
    for question, count in enumerate((1, 2, 9, 1, 3, 1, 1)):
        prompt = np.concatenate([root, draw(0 if question == 4 else 3 + 9 * question)])
        for sample in range(count):
            completion = draw(1 if sample == 1 else int(rng.integers(2, 50)))
            found.append(Row(f"{sample}{question}", np.concatenate([prompt, completion]), len(prompt)))
    return found


def read_path(arrays: dict, token: int) -> list[int]:
    """Ids on the path of a token of the first bin, the token last, from what its query may see."""
    at = int(arrays["back"][0, token])
    for block in arrays["blocks"]:
        _, rows, size = block["queries"].shape
        if at < rows * size:
            row = at // size
            assert block["queries"][0, row, at % size] == token
            seen = [int(k) for k in block["keys"][0, row] if k >= 0 and arrays["positions"][0, k] <= arrays["positions"][0, token]]
            assert [int(arrays["positions"][0, k]) for k in seen] == list(range(len(seen)))
            return [int(arrays["tokens"][0, k]) for k in seen]
        at -= rows * size
    raise AssertionError(token)


@pytest.mark.parametrize("context", [CONTEXT, None])
@pytest.mark.parametrize("whole", [False, True])
def test_every_label_is_predicted_from_its_own_row_alone(context, whole):
    rows = grouped_rows()
    reading = find_reading(rows, context, whole=whole)
    assert reading.root.tolist() == rows[0].input_ids[:11].tolist()
    tiles = plan_packed(rows, reading, shards=1, tile_tokens=BIN)
    assert sorted(i for tile in tiles for i in tile.rows) == list(range(len(rows)))
    assert len(tiles) > 2 and any(len(group.rows) > 1 for tile in tiles for group in tile.bins[0])
    for tile in tiles:
        arrays = packed_arrays(rows, reading, tile, ("embedding_prompt", "embedding_rationale") if whole else ())
        assert bin_tokens(rows, reading, tile.bins[0]) <= tile.shape.tokens == arrays["tokens"].shape[1]
        for slot, i in enumerate(bin_rows(tile.bins[0])):
            row, count = rows[i], rows[i].completion_tokens
            places = arrays["rows"][0, slot, :count]
            assert arrays["mask"][0, slot].sum() == count and arrays["labels"][0, places].tolist() == row.input_ids[-count:].tolist()
            for view in VIEWS[: 1 if context is None else 2]:
                ids = row.input_ids.tolist() if view == "conditional" else [*CONTEXT, *row.input_ids[-count:].tolist()]
                for n, place in enumerate(places):
                    assert read_path(arrays, int(arrays["index"][view][0, place])) == ids[: len(ids) - count + n]
            for name, ids in (("embedding_prompt", row.input_ids[:-count]), ("embedding_rationale", row.input_ids[-count:])):
                if whole:
                    weights = arrays["pools"][name][0, slot]
                    assert arrays["tokens"][0, weights > 0].tolist() == ids.tolist() and np.allclose(weights[weights > 0], 1 / len(ids))


def test_a_prefix_stands_once_in_a_bin_and_bins_are_full():
    rng = np.random.default_rng(0)
    root = rng.integers(8, 97, 20).astype(np.int32)
    rows = []
    for i in range(600):
        prompt = np.concatenate([root, rng.integers(8, 97, rng.integers(30, 90)).astype(np.int32)])
        rows.append(Row(f"{i:03d}", np.concatenate([prompt, rng.integers(8, 97, rng.integers(5, 120)).astype(np.int32)]), len(prompt)))
    reading = find_reading(rows, CONTEXT, whole=False)
    tiles = plan_packed(rows, reading, shards=2, tile_tokens=2048)
    assert len({tile.shape for tile in tiles}) == 1 and all(len(tile.bins) == 2 for tile in tiles)
    used = [bin_tokens(rows, reading, groups) for tile in tiles for groups in tile.bins if groups]
    assert max(used) <= 2048 and np.mean(sorted(used)[2:]) > 0.92 * 2048
    unshared = sum(len(r.input_ids) + len(CONTEXT) + r.completion_tokens for r in rows)
    assert sum(used) == unshared - (len(rows) - len(used)) * (20 + len(CONTEXT)) - 2 * len(rows)
    keys = sum(count * keys for keys, count in tiles[0].shape.blocks) * BLOCK
    assert keys < 2048 * 2048 / 4  # what one causal mask over the stream would cost is eight times that

    order = rng.permutation(len(rows))
    shuffled = [rows[i] for i in order]
    again = plan_packed(shuffled, find_reading(shuffled, CONTEXT, whole=False), shards=2, tile_tokens=2048)
    assert [[shuffled[i].id for i in tile.rows] for tile in again] == [[rows[i].id for i in tile.rows] for tile in tiles]
    assert [tile.shape for tile in again] == [tile.shape for tile in tiles]
    assert sum(len(tile.rows) for chunk in chunk_tiles(tiles, 50) for tile in tiles[chunk.start : chunk.stop]) == 600


def test_long_rows_get_a_program_of_their_own():
    rng = np.random.default_rng(0)
    rows = [Row(f"{i}", rng.integers(8, 97, n).astype(np.int32), 5) for i, n in enumerate((60, 70, 900, 80, 700))]
    reading = find_reading(rows, None, whole=False)
    assert len(reading.root) == 0
    tiles = plan_packed(rows, reading, shards=1, tile_tokens=256)
    assert [sorted(tile.rows) for tile in tiles] == [[0, 1, 3], [2], [4]] or [sorted(tile.rows) for tile in tiles] == [[0, 1, 3], [4], [2]]
    assert tiles[0].shape.tokens == 256 and 900 < tiles[1].shape.tokens <= 1024 and max(keys for keys, _ in tiles[0].shape.blocks) <= 96


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "smollm3-window"])
def test_hidden_states_of_a_stream_equal_float64_row_by_row(family):
    mc: ModelConfig = CASES[family]
    rng = np.random.default_rng(3)
    params = jax.tree.map(lambda s: (0.2 * rng.normal(size=s)).astype(np.float32), weight_shapes(mc), is_leaf=is_shape)
    rows = grouped_rows(mc.vocab_size)
    reading = find_reading(rows, CONTEXT, whole=True)
    tile = plan_packed(rows, reading, shards=1, tile_tokens=512)[0]
    x = packed_arrays(rows, reading, tile)
    run = jax.jit(lambda p: decoder.forward_blocks(p, mc, x["tokens"], x["positions"], x["blocks"], x["back"]))
    hidden = np.asarray(run(params))[0]
    assert np.isfinite(hidden).all()
    for slot, i in list(enumerate(bin_rows(tile.bins[0])))[:5]:
        count = rows[i].completion_tokens
        places = x["rows"][0, slot, :count]
        for view, ids in (("conditional", rows[i].input_ids), ("unconditional", np.concatenate([CONTEXT, rows[i].input_ids[-count:]]))):
            expected = reference_hidden(params, mc, ids)[len(ids) - count - 1 : len(ids) - 1]
            np.testing.assert_allclose(hidden[x["index"][view][0, places]], expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("rows", [grouped_rows(), make_rows(12)], ids=["shared", "alone"])
def test_packed_equals_bucketed(stage, rows):
    names = (*SIGNALS, "embedding_prompt", "embedding_rationale")
    packed, _, result = stage(rows, name="packed", signals=names)
    bucketed, _, other = stage(rows, name="bucketed", signals=names, layout="bucketed")
    assert_close(packed, bucketed)
    assert_kept_agree(packed, bucketed, SIGNALS)
    assert result.facts["tokens"] < other.facts["tokens"] and result.facts["programs"] == 1


def test_shared_prefixes_on_eight_devices(stage):
    rows = grouped_rows()
    single, _, _ = stage(rows, name="one")
    many, _, _ = stage(rows, name="many", devices=8, mesh={"data": 2, "fsdp": 2, "tensor": 2})
    assert_close(many, single)
    assert isinstance(find_reading(rows, CONTEXT, whole=False), Reading)
