"""Divergences from a teacher: float64 closed forms, TRL, chunks, gradients, sharded vocabularies, k stored tokens."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_cases import TINY, UNTIED, host_params, mesh, params_on

from dccot_jax.model.config import ModelError
from dccot_jax.model.divergence import divergence, weighted_divergence, weighted_topk_divergence

BETAS = (0.0, 0.3, 0.5, 1.0)
TEACHER = dataclasses.replace(UNTIED, hidden_size=20, num_heads=2, head_dim=10)
B, T = 4, 7


def _inputs():
    rng = np.random.default_rng(0)
    hidden = rng.standard_normal((B, T, TINY.hidden_size)).astype(np.float32)
    theirs = rng.standard_normal((B, T, TEACHER.hidden_size)).astype(np.float32)
    weights = (rng.random((B, T)) * (rng.random((B, T)) > 0.3)).astype(np.float32)
    return hidden, theirs, weights


def _logits():
    """Student's and teacher's, float64 [B, T, V]."""
    hidden, theirs, _ = _inputs()
    table, head = np.asarray(host_params(TINY)["embed"], np.float64), np.asarray(host_params(TEACHER, 1)["head"], np.float64)
    return hidden.astype(np.float64) @ table.T, theirs.astype(np.float64) @ head


def _log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _closed(log_p, log_q, beta):
    p, q = np.exp(log_p), np.exp(log_q)
    if beta in (0.0, 1.0):
        return (p * np.log(p / q) if beta == 0.0 else q * np.log(q / p)).sum(-1)
    m = beta * p + (1 - beta) * q
    return (beta * p * np.log(p / m) + (1 - beta) * q * np.log(q / m)).sum(-1)


@pytest.mark.parametrize("beta", BETAS)
def test_the_weighted_sum_equals_float64_whatever_the_chunk(beta):
    hidden, theirs, weights = _inputs()
    own, teacher = _logits()
    expected = float((_closed(_log_softmax(teacher / 2.0), _log_softmax(own / 2.0), beta) * weights).sum())
    student, other = (jax.tree.map(jnp.asarray, host_params(mc, seed)) for mc, seed in ((TINY, 0), (TEACHER, 1)))
    for chunk in (None, 3):
        total, weight = weighted_divergence(
            student, TINY, hidden, other, TEACHER, theirs, jnp.asarray(weights), beta=beta, temperature=2.0, chunk=chunk
        )
        assert float(total) == pytest.approx(expected, rel=1e-5) and float(weight) == pytest.approx(weights.sum(), rel=1e-6)


@pytest.mark.parity
@pytest.mark.parametrize("beta", BETAS)
def test_values_and_gradients_equal_those_of_trl(beta):
    torch = pytest.importorskip("torch")
    gkd = pytest.importorskip("trl.experimental.gkd.gkd_trainer")

    own, teacher = (x.astype(np.float32) for x in _logits())
    leaf = torch.tensor(own, requires_grad=True)
    labels = torch.zeros((B, T), dtype=torch.long)
    loss = gkd.GKDTrainer.generalized_jsd_loss(leaf, torch.tensor(teacher), labels=labels, beta=beta, temperature=1.5)
    loss.backward()

    def ours(z):
        log_p = jax.nn.log_softmax(jnp.asarray(teacher) / 1.5)
        return jnp.mean(divergence(log_p, jax.nn.log_softmax(z / 1.5), beta))

    value, grad = jax.value_and_grad(ours)(jnp.asarray(own))
    assert float(value) == pytest.approx(float(loss.detach()), rel=1e-5)
    np.testing.assert_allclose(grad, leaf.grad.numpy(), rtol=1e-4, atol=1e-7)


def test_gradients_reach_the_student_alone_and_are_the_same_on_eight_devices():
    hidden, theirs, weights = _inputs()

    def loss(own, other):
        return weighted_divergence(own, TINY, hidden, other, TEACHER, theirs, weights, beta=0.3)[0]

    found = {}
    for sizes in ((1, 1, 1), (2, 2, 2)):
        on = mesh(*sizes)
        with jax.set_mesh(on):
            grads = jax.jit(jax.grad(loss, argnums=(0, 1)))(params_on(TINY, on), params_on(TEACHER, on, 1))
        found[sizes] = jax.device_get(grads)
        assert all(not np.asarray(leaf).any() for leaf in jax.tree.leaves(found[sizes][1]))
    for a, b in zip(jax.tree.leaves(found[(2, 2, 2)][0]), jax.tree.leaves(found[(1, 1, 1)][0]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_with_k_stored_tokens_all_others_are_one_outcome(beta):
    hidden, _, weights = _inputs()
    own, teacher = _logits()
    log_p, log_q = _log_softmax(teacher), _log_softmax(own)
    k = 5
    ids = np.argsort(-log_p, axis=-1)[..., :k]

    def reduced(x):
        picked = np.take_along_axis(x, ids, -1)
        return np.concatenate([picked, np.log(1 - np.exp(picked).sum(-1, keepdims=True))], -1)

    values = _closed(reduced(log_p), reduced(log_q), beta)
    assert np.all(values <= _closed(log_p, log_q, beta) + 1e-12)
    stored = jnp.asarray(reduced(log_p), jnp.float32)
    for sizes in ((1, 1, 1), (2, 2, 2)):
        on = mesh(*sizes)
        with jax.set_mesh(on):
            run = jax.jit(lambda params: weighted_topk_divergence(params, TINY, hidden, ids, stored, weights, beta=beta, chunk=3)[0])
            total = run(params_on(TINY, on))
        assert float(total) == pytest.approx(float((values * weights).sum()), rel=1e-5)


def test_all_tokens_stored_is_the_whole_divergence():
    hidden, _, weights = _inputs()
    own, teacher = _logits()
    log_p = _log_softmax(teacher)
    ids = np.broadcast_to(np.arange(TINY.vocab_size), log_p.shape)
    params = jax.tree.map(jnp.asarray, host_params(TINY))
    stored = np.concatenate([log_p, np.full((B, T, 1), -1e30)], -1).astype(np.float32)
    for beta in BETAS:
        total, _ = weighted_topk_divergence(params, TINY, hidden, ids, jnp.asarray(stored), jnp.asarray(weights), beta=beta)
        assert float(total) == pytest.approx(float((_closed(log_p, _log_softmax(own), beta) * weights).sum()), rel=1e-5)


def test_other_vocabularies_are_refused():
    hidden, theirs, weights = _inputs()
    with pytest.raises(ModelError, match="48 tokens and the teacher 50"):
        weighted_divergence({}, TINY, hidden, {}, dataclasses.replace(TEACHER, vocab_size=50), theirs, weights, beta=0.0)
