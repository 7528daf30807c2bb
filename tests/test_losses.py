"""The loss equals its formula: packed or not, accumulated or not, on one device or eight."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from training_cases import TINY, UNTIED, Sequence_, mesh, pack, params_on, place, sequence_nll, sequences

from dccot_jax.train.losses import weighted_loss
from dccot_jax.train.step import loss_and_grads

forward_only = jax.jit(weighted_loss, static_argnums=1)


def _loss(params, mc, batch, on, microbatches=1):
    with jax.set_mesh(on):
        run = jax.jit(functools.partial(loss_and_grads, mc=mc, microbatches=microbatches, remat="none"))
        total, weight, grads = run(params, batch=place(batch, on))
    return float(total), float(weight), jax.device_get(grads)


def test_reverse_loss_equals_its_formula_packed_accumulated_and_sharded():
    rng = np.random.default_rng(5)
    # Groups of (forward reasoning, backward question, backward reasoning); a part of n trained tokens weighs (1/3)/n per token.
    groups = [[Sequence_(s.ids, s.prompt, 1 / (3 * (len(s.ids) - s.prompt))) for s in sequences(rng, 3)] for _ in range(8)]
    one, eight = mesh(1, 1, 1), mesh(2, 2, 2)
    params = params_on(UNTIED, one)
    # L = 1/(3n) Σ_i [CE(R_f|Q) + CE(Q_b|Q) + CE(R_b|Q_b)], every CE a token mean of a sequence that is alone in its batch.
    means = [[sequence_nll(params, UNTIED, part, one).mean() for part in group] for group in groups]
    expected = sum(sum(group) for group in means) / (3 * len(groups))

    packed = pack(groups, 48)
    shuffled = pack([[groups[i][0], groups[(i + 3) % 8][1], groups[(i + 5) % 8][2]] for i in range(8)], 48)
    found = {
        "packed": _loss(params, UNTIED, packed, one),
        "accumulated": _loss(params, UNTIED, shuffled, one, microbatches=4),
        "sharded and accumulated": _loss(params_on(UNTIED, eight), UNTIED, shuffled, eight, microbatches=2),
    }
    reference = jax.tree.leaves(found["packed"][2])
    for name, (total, weight, grads) in found.items():
        assert weight == pytest.approx(len(groups), rel=5e-6), name
        assert total / weight == pytest.approx(expected, rel=5e-6), name
        for leaf, other in zip(jax.tree.leaves(grads), reference, strict=True):
            np.testing.assert_allclose(leaf, other, rtol=2e-5, atol=1e-5 * np.abs(other).max(), err_msg=name)


@pytest.mark.parametrize("kind", ["token", "sequence"])
def test_token_and_sequence_means(kind):
    rng = np.random.default_rng(1)
    one = mesh(1, 1, 1)
    params = params_on(TINY, one)
    plain = sequences(rng, 6)
    nll = [sequence_nll(params, TINY, s, one) for s in plain]
    expected = np.concatenate(nll).mean() if kind == "token" else np.mean([x.mean() for x in nll])
    rows = [Sequence_(s.ids, s.prompt, 1.0 if kind == "token" else 1 / (len(s.ids) - s.prompt)) for s in plain]
    with jax.set_mesh(one):
        total, weight = forward_only(params, TINY, place(pack([rows[:3], rows[3:]], 48), one))
    assert float(total) / float(weight) == pytest.approx(expected, rel=5e-6)


def test_labels_across_a_border_and_on_padding_do_not_matter():
    rng = np.random.default_rng(2)
    one = mesh(1, 1, 1)
    params = params_on(TINY, one)
    rows = sequences(rng, 6)
    batch = pack([rows[:3], rows[3:]], 48)
    other = {name: x.copy() for name, x in batch.items()}
    other["labels"][batch["weights"] == 0] = 7
    other["tokens"][batch["segment_ids"] == 0] = 9
    with jax.set_mesh(one):
        first, second = (forward_only(params, TINY, place(b, one))[0] for b in (batch, other))
    assert float(first) == float(second)
