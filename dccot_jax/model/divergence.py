"""How far a student's next-token distributions are from a teacher's, chunked over positions like the cross-entropy.

With p the teacher's and q the student's distribution at one position, both softmax(z / τ), the generalised Jensen-Shannon
divergence (arXiv 2306.13649, Eq. 1; TRL's `generalized_jsd_loss`) is

    D(β) = β · KL(p ‖ m) + (1 - β) · KL(q ‖ m),  m = β·p + (1 - β)·q,

and at its ends, by definition, D(0) = KL(p ‖ q), the forward, and D(1) = KL(q ‖ p), the reverse divergence. Nats; not
multiplied by τ².

Where only the teacher's k largest log-probabilities are stored (`model/top_tokens.py`), both distributions are reduced to k + 1
outcomes: these k tokens and "any other". Nothing is renormalised, every D(β) stays finite, and none exceeds the one over the
whole vocabulary; with k = V it is that one.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from dccot_jax.model import head
from dccot_jax.model.attention import NEGATIVE
from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.sharding import activation_spec, reshard


def divergence(log_p: jax.Array, log_q: jax.Array, beta: float) -> jax.Array:
    """D(β) [...] of teacher and student log-probabilities [..., V]."""
    if beta == 0.0:
        return _kl(log_p, log_q)
    if beta == 1.0:
        return _kl(log_q, log_p)
    log_m = jnp.logaddexp(log_p + jnp.log(beta), log_q + jnp.log1p(-beta))
    return beta * _kl(log_p, log_m) + (1.0 - beta) * _kl(log_q, log_m)


def weighted_divergence(
    params: Any,
    mc: ModelConfig,
    hidden: jax.Array,
    teacher: Any,
    teacher_mc: ModelConfig,
    teacher_hidden: jax.Array,
    weights: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(Σ w·D(β), Σ w), float32 scalars over the whole batch; no gradient reaches the teacher.

    Args:
      hidden: [B, T, D] of the student. teacher_hidden: [B, T, D'] of the teacher, at the same tokens.
      weights: float [B, T], 0 where nothing is predicted. chunk: positions per chunk; None picks one by size.

    Raises ModelError if the two vocabularies differ in size.
    """
    check_vocabularies(mc, teacher_mc)
    student_logits, hidden = head.open_head(params, mc, hidden)
    teacher_logits, teacher_hidden = head.open_head(teacher, teacher_mc, teacher_hidden)

    def body(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        own, theirs, w = part
        log_q = jax.nn.log_softmax(student_logits(own) / temperature)
        log_p = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_logits(theirs) / temperature))
        return total + jnp.sum(jnp.where(w != 0, divergence(log_p, log_q, beta) * w, 0.0)), None

    weights = weights.astype(jnp.float32)
    zero = jnp.zeros((), jnp.float32)
    total, _ = head.scan_chunks(mc, body, zero, hidden, (jax.lax.stop_gradient(teacher_hidden), weights), chunk)
    return total, jnp.sum(weights)


def weighted_topk_divergence(
    params: Any,
    mc: ModelConfig,
    hidden: jax.Array,
    ids: jax.Array,
    logp: jax.Array,
    weights: jax.Array,
    *,
    beta: float,
    temperature: float = 1.0,
    chunk: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(Σ w·D(β), Σ w) over k + 1 outcomes, with the teacher's k largest log-probabilities at this temperature.

    Args:
      hidden: [B, T, D]. ids: int [B, T, k], different tokens.
      logp: float [B, T, k + 1], their log-probabilities under the teacher and, last, that of every other token together.
      weights: float [B, T], 0 where nothing is predicted. chunk: positions per chunk; None picks one by size.
    """

    read, hidden = head.open_head(params, mc, hidden)

    def body(total: jax.Array, part: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        own, i, theirs, w = part
        log_q = jax.nn.log_softmax(read(own) / temperature)
        log_q = reshard(log_q, activation_spec(log_q.shape[0], None, None))  # tokens are picked from the whole vocabulary
        value = divergence(theirs.astype(jnp.float32), jax.vmap(jax.vmap(_with_rest))(log_q, i), beta)
        return total + jnp.sum(jnp.where(w != 0, value * w, 0.0)), None

    weights = weights.astype(jnp.float32)
    total, _ = head.scan_chunks(mc, body, jnp.zeros((), jnp.float32), hidden, (ids, logp, weights), chunk)
    return total, jnp.sum(weights)


def check_vocabularies(mc: ModelConfig, teacher: ModelConfig) -> None:
    """Raises ModelError if distributions of the two models cannot be compared token by token."""
    if mc.vocab_size != teacher.vocab_size:
        raise ModelError(f"distillation: the student has {mc.vocab_size} tokens and the teacher {teacher.vocab_size}; they must share them")


def _kl(log_a: jax.Array, log_b: jax.Array) -> jax.Array:
    return jnp.sum(jnp.exp(log_a) * (log_a - log_b), axis=-1)


def _with_rest(logp: jax.Array, ids: jax.Array) -> jax.Array:
    """Log-probabilities of the tokens ids [k] among logp [V] and, behind them, that of every other token together: [k + 1].

    That one is a sum, not one minus a sum: it keeps its digits where the k tokens have nearly all of the mass.
    """
    rest = jax.nn.logsumexp(logp.at[ids].set(NEGATIVE), keepdims=True)
    return jnp.concatenate([logp[ids], rest])
