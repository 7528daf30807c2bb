"""A student that learns a teacher's distributions: the loss, a whole training, microbatches, and teachers that do not fit."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, host_params, mesh, pack, params_on, place, run_config, sequences

from dccot_jax.model import decoder, head
from dccot_jax.train.losses import Distillation, distillation, weighted_loss
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import init_state, loss_and_grads, make_train_step

TEACHER = dataclasses.replace(TINY, hidden_size=24, num_heads=2, num_kv_heads=1, head_dim=12)
HALF = Distillation(TEACHER, beta=0.0, temperature=1.0, weight=0.5)


def _batch():
    rng = np.random.default_rng(3)
    return pack([sequences(rng, 1 + g % 3) for g in range(8)], 48)


def _by_name(kind):
    """Loss and weight of a batch under `train.distill.kind`; teacher's and student's logits [G, T, V] over τ = 1/2; the weights."""
    train = run_config().train
    train.distill.update({"kind": kind, "temperature": 0.5, "beta": 0.3})
    params, theirs = (jax.tree.map(jnp.asarray, host_params(mc, seed)) for mc, seed in ((TINY, 0), (TEACHER, 1)))
    batch = _batch()
    total, weight = weighted_loss(params, TINY, batch, distill=distillation(TEACHER, train.distill), teacher=theirs)
    places = (batch["tokens"], batch["segment_ids"], batch["positions"])
    found = [head.logits(p, mc, decoder.forward(p, mc, *places)) for p, mc in ((theirs, TEACHER), (params, TINY))]
    return float(total), float(weight), *(np.asarray(logits, np.float64) / 0.5 for logits in found), batch["weights"].astype(np.float64)


def _softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


FORMULAS = {  # p the teacher's distribution, q the student's
    "forward_kl": lambda p, q: (p * np.log(p / q)).sum(-1),
    "reverse_kl": lambda p, q: (q * np.log(q / p)).sum(-1),
    "jsd": lambda p, q: (0.3 * p * np.log(p / (0.3 * p + 0.7 * q)) + 0.7 * q * np.log(q / (0.3 * p + 0.7 * q))).sum(-1),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_a_kind_is_the_divergence_of_its_name(kind):
    total, weight, theirs, own, weights = _by_name(kind)
    p, q = _softmax(theirs), _softmax(own)
    values = {name: float((formula(p, q) * weights).sum()) for name, formula in FORMULAS.items()}
    assert total == pytest.approx(values[kind], rel=1e-4) and weight == pytest.approx(weights.sum(), rel=1e-6)
    assert all(total != pytest.approx(value, rel=0.02) for name, value in values.items() if name != kind)


@pytest.mark.parity
@pytest.mark.parametrize(("kind", "beta"), [("forward_kl", 0.0), ("reverse_kl", 1.0), ("jsd", 0.3)])
def test_a_kind_is_trls_loss_at_its_beta(kind, beta):
    """TRL, GKDConfig: beta 0 is the forward divergence, 1 the reverse."""
    torch = pytest.importorskip("torch")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")
    total, _, theirs, own, weights = _by_name(kind)
    student, teacher = (torch.tensor(z[weights > 0][None]) for z in (own, theirs))
    labels = torch.zeros(student.shape[:2], dtype=torch.long)
    loss = gkd.GKDTrainer.generalized_jsd_loss(student, teacher, labels=labels, beta=beta, reduction="sum")
    assert set(weights[weights > 0]) == {1.0} and total == pytest.approx(float(loss), rel=1e-4)


def test_the_loss_is_the_stated_mixture_and_sums_over_microbatches_and_devices():
    found = {}
    for sizes, microbatches in (((1, 1, 1), 1), ((2, 2, 2), 2)):
        on = mesh(*sizes)
        with jax.set_mesh(on):
            params, constants, batch = params_on(TINY, on), {"teacher": params_on(TEACHER, on, 1)}, place(_batch(), on)
            run = functools.partial(loss_and_grads, mc=TINY, microbatches=microbatches, remat="none", distill=HALF)
            found[sizes] = jax.device_get(jax.jit(run)(params, batch=batch, constants=constants))
    on = mesh(1, 1, 1)
    with jax.set_mesh(on):
        params, batch = params_on(TINY, on), place(_batch(), on)
        run = functools.partial(weighted_loss, mc=TINY, distill=HALF._replace(weight=1.0))
        divergence, _ = jax.jit(run)(params, batch=batch, teacher=params_on(TEACHER, on, 1))
        plain, weights = jax.jit(functools.partial(weighted_loss, mc=TINY))(params, batch=batch)
    assert float(found[(1, 1, 1)][0]) == pytest.approx(0.5 * float(plain) + 0.5 * float(divergence), rel=1e-5)
    assert float(found[(1, 1, 1)][1]) == float(weights)
    (one, weight, grads), (eight, again, sharded) = found.values()
    assert float(eight) == pytest.approx(float(one), rel=1e-5) and float(again) == pytest.approx(float(weight))
    for a, b in zip(jax.tree.leaves(sharded), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def test_a_student_comes_nearer_to_its_teacher_and_the_teacher_stays():
    train = run_config(steps=30, learning_rate=0.03).train
    on = mesh(1, 2, 1)
    settings = HALF._replace(weight=1.0)
    optimizer = make_optimizer(train)
    with jax.set_mesh(on):
        teacher = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params_on(TEACHER, on, 1))
        before = jax.device_get(teacher)
        state = init_state(params_on(TINY, on), optimizer, on, {"teacher": teacher})
        step = make_train_step(TINY, on, train, jnp.float32, steps=30, distill=settings)
        losses = []
        for _ in range(30):
            state, metrics = step(state, place(_batch(), on))
            losses.append(float(metrics["loss"][0] / metrics["loss"][1]))
    assert losses[-1] < 0.5 * losses[0] and min(losses) >= 0.0
    for a, b in zip(jax.tree.leaves(jax.device_get(state["teacher"])), jax.tree.leaves(before), strict=True):
        np.testing.assert_array_equal(a, b)
