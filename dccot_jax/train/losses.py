"""The training loss of a packed batch as (sum, weight).

One formula covers every objective of this package. With nll_t the negative log-likelihood of the label at position t (nats)
and w_t ≥ 0 the weight the plan gave to that position,

    L = Σ_t w_t · nll_t / Σ_t w_t        over all positions of the *global* batch of an optimizer step.

Numerator and denominator travel apart and are divided once, after micro-batches, devices and processes have been added up,
so packing, accumulation and sharding cannot change the value. The objectives differ in w only:

- ``token``: w = 1 on every trained token: the token mean (TRL's and most trainers' loss).
- ``sequence``: w = 1 / n for the n trained tokens of a sequence: the mean over sequences of their token means.
- ``reverse`` (RevThink, arXiv 2411.19865, Eq. 1; the same in DC-CoT): a group has three parts, forward reasoning R_f given Q,
  backward question Q_b given Q, backward reasoning R_b given Q_b;
      L = 1/(3n) Σ_i [ CE(R_f | Q) + CE(Q_b | Q) + CE(R_b | Q_b) ],   CE = token mean over its own sequence.
  That is w = (1/3) / n_part on the tokens of each part: a whole group weighs 1, and L is the formula above.

Where a student also learns from the distributions of a teacher (``train.distill``), nll_t is replaced by
(1 - λ)·nll_t + λ·D_t, D_t a divergence between the two (`model/divergence.py`), under the same weights.

`mix/pack.py` computes the weights when the plan is made. They are zero on prompts, on padding and across the border of two
packed sequences, where a position would have to predict the first token of another sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.divergence import weighted_divergence, weighted_topk_divergence

# The arrays of a batch, all [G, T]: G packed rows of T tokens.
BATCH_FIELDS = ("tokens", "labels", "segment_ids", "positions", "weights")
# Beside them, where a teacher's k likeliest tokens were stored ahead: int32 [G, T, k], and float32 [G, T, k + 1].
TEACHER_FIELDS = ("teacher_ids", "teacher_logp")


class Distillation(NamedTuple):
    """A divergence from a teacher in the loss: D(β) of `model/divergence.py`, and its share of the loss."""

    teacher: ModelConfig | None  # None: its likeliest tokens come with the batch, in `TEACHER_FIELDS`
    beta: float
    temperature: float
    weight: float
    attention: str = "xla"  # the teacher's backend


def distillation(teacher: ModelConfig | None, distill: Any) -> Distillation:
    """What the config's ``train.distill`` group asks for."""
    beta = {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": float(distill.beta)}[distill.kind]
    return Distillation(teacher, beta, float(distill.temperature), float(distill.weight))


def weighted_loss(
    params: Any,
    mc: ModelConfig,
    batch: Mapping[str, jax.Array],
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "nothing_saveable",
    dropout_key: jax.Array | None = None,
    attention: str = "xla",
    distill: Distillation | None = None,
    teacher: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Σ w·nll and Σ w of a packed batch; with `distill` Σ w·((1 - λ)·nll + λ·D(β)), λ its weight.

    Args:
      params: parameter tree. mc: its model config.
      batch: `BATCH_FIELDS`, each [G, T], and `TEACHER_FIELDS` where they stand for the teacher. ``labels[g, t]`` is the token
        that position t predicts; ``weights`` is float32; ``segment_ids`` are 1-based, 0 is padding; ``positions`` restart at 0 in
        every segment.
      compute_dtype: dtype of activations; the head's logits and the loss are float32 in any case.
      remat: what the backward pass recomputes: ``nothing_saveable``, ``dots`` or ``none``.
      dropout_key: randomness of the adapters' dropout; None: nothing is dropped.
      attention: backend, one of `model.backends.registry.BACKENDS`.
      teacher: parameters of `distill.teacher`.

    Returns:
      (sum, weight), float32 scalars; the sum is in nats.
    """
    places = (batch["tokens"], batch["segment_ids"], batch["positions"])
    hidden = decoder.forward(params, mc, *places, compute_dtype=compute_dtype, remat=remat, dropout_key=dropout_key, attention=attention)
    if distill is None:
        return head.weighted_nll(params, mc, hidden, batch["labels"], batch["weights"])
    how: Any = {"beta": distill.beta, "temperature": distill.temperature}
    if distill.teacher is None:
        ids, logp = (batch[name] for name in TEACHER_FIELDS)
        total, weight = weighted_topk_divergence(params, mc, hidden, ids, logp, batch["weights"], **how)
    else:
        theirs = decoder.forward(teacher, distill.teacher, *places, compute_dtype=compute_dtype, remat="none", attention=distill.attention)
        theirs = jax.lax.stop_gradient(theirs)
        total, weight = weighted_divergence(params, mc, hidden, teacher, distill.teacher, theirs, batch["weights"], **how)
    if distill.weight < 1.0:
        nll, _ = head.weighted_nll(params, mc, hidden, batch["labels"], batch["weights"])
        total = (1.0 - distill.weight) * nll + distill.weight * total
    return total, weight
