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

`mix/pack.py` computes the weights when the plan is made. They are zero on prompts, on padding and across the border of two
packed sequences, where a position would have to predict the first token of another sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig

# The arrays of a batch, all [G, T]: G packed rows of T tokens.
BATCH_FIELDS = ("tokens", "labels", "segment_ids", "positions", "weights")


def weighted_loss(
    params: Any,
    mc: ModelConfig,
    batch: Mapping[str, jax.Array],
    *,
    compute_dtype: Any = jnp.float32,
    remat: str = "nothing_saveable",
    dropout_key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Σ w·nll and Σ w of a packed batch.

    Args:
      params: parameter tree. mc: its model config.
      batch: `BATCH_FIELDS`, each [G, T]. ``labels[g, t]`` is the token that position t predicts; ``weights`` is float32;
        ``segment_ids`` are 1-based, 0 is padding; ``positions`` restart at 0 in every segment.
      compute_dtype: dtype of activations; the head's logits and the loss are float32 in any case.
      remat: what the backward pass recomputes: ``nothing_saveable``, ``dots`` or ``none``.
      dropout_key: randomness of the adapters' dropout; None: nothing is dropped.

    Returns:
      (sum, weight), float32 scalars; the sum is in nats.
    """
    hidden = decoder.forward(
        params,
        mc,
        batch["tokens"],
        batch["segment_ids"],
        batch["positions"],
        compute_dtype=compute_dtype,
        remat=remat,
        dropout_key=dropout_key,
    )
    return head.weighted_nll(params, mc, hidden, batch["labels"], batch["weights"])
