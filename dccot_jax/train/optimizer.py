"""AdamW, Adafactor or Muon with warm-up, decay to a floor, clipping by global norm, and no weight decay on norms, biases and embeddings."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dccot_jax.config import SCHEDULES, ConfigError
from dccot_jax.model.sharding import WEIGHT_AXES
from dccot_jax.train.adafactor import scale_by_adafactor
from dccot_jax.train.muon import scale_by_muon


def make_schedule(train: Any, steps: int) -> Callable[[jax.Array], jax.Array]:
    """Learning rate of step n (0-based) out of `steps`, a pure function of n.

    Linear warm-up reaches ``learning_rate`` at step ``warmup_steps`` - 1 (the first step already learns); afterwards, with
    x running from 0 to 1 over the remaining steps and f = ``final_lr_share``:
    constant 1; linear 1 - (1 - f)·x; cosine f + (1 - f)·(1 + cos πx)/2; wsd (warm-up, stable, decay; arXiv 2404.06395) 1, then
    linear to f over the last ``decay_share`` of all steps.

    Raises ConfigError on an unknown schedule name.
    """
    if train.schedule not in SCHEDULES:
        raise ConfigError(f"config.train.schedule: {train.schedule!r} is not one of {', '.join(SCHEDULES)}")
    warmup = train.warmup_steps
    remaining = max(steps - warmup, 1)
    floor = train.final_lr_share
    decaying = max(min(round(train.decay_share * steps), remaining), 1)

    def schedule(step: jax.Array) -> jax.Array:
        n = step.astype(jnp.float32)
        x = jnp.clip((n - warmup) / remaining, 0.0, 1.0)
        if train.schedule == "constant":
            share = jnp.ones_like(x)
        elif train.schedule == "linear":
            share = 1.0 - (1.0 - floor) * x
        elif train.schedule == "wsd":
            share = 1.0 - (1.0 - floor) * jnp.clip((n - (steps - decaying)) / decaying, 0.0, 1.0)
        else:
            share = floor + (1.0 - floor) * 0.5 * (1.0 + jnp.cos(math.pi * x))
        rising = jnp.minimum((n + 1.0) / warmup, 1.0) if warmup > 0 else 1.0
        return train.learning_rate * rising * share

    return schedule


def decay_mask(params: Any) -> Any:
    """Same tree as `params`, True where weight decay applies: matrices other than the embedding table.

    A decayed norm or bias shrinks the residual stream, a decayed table the tokens that are rarely seen.
    """

    def decayed(path: tuple[Any, ...], _leaf: Any) -> bool:
        name = path[-1].key
        return name != "embed" and len(WEIGHT_AXES[name]) > 1

    return jax.tree_util.tree_map_with_path(decayed, params)


def make_optimizer(train: Any) -> optax.GradientTransformation:
    """The optimizer up to the learning rate and the sign, which the step applies: update = -lr(n) · transform(gradient).

    "adamw" or "adafactor" for every parameter, or "muon" for the layers' matrices and AdamW for the rest. Decoupled weight
    decay (arXiv 1711.05101) is scaled by the learning rate, as in torch and optax. Moments are laid out as the parameters; the
    first is kept in ``moment_dtype``, as optax's `mu_dtype`, all others in float32.
    """
    if train.optimizer == "adafactor":
        return optax.chain(scale_by_adafactor(), optax.add_decayed_weights(train.weight_decay, mask=decay_mask))
    dtype = jnp.dtype(train.moment_dtype)
    transform = optax.scale_by_adam(b1=train.b1, b2=train.b2, eps=train.eps, mu_dtype=dtype)
    if train.optimizer == "muon":
        parts: dict[Any, optax.GradientTransformation] = {"muon": scale_by_muon(train.momentum, mu_dtype=dtype), "adamw": transform}
        transform = optax.partition(parts, lambda params: jax.tree.map(lambda p: "muon" if p.ndim == 3 else "adamw", params))
    return optax.chain(transform, optax.add_decayed_weights(train.weight_decay, mask=decay_mask))


def clip_scale(norm: jax.Array, clip_norm: float) -> jax.Array:
    """Factor that brings a gradient of global norm `norm` to at most `clip_norm`; 0 means no clipping."""
    if clip_norm <= 0:
        return jnp.ones_like(norm)
    return jnp.minimum(1.0, clip_norm / jnp.maximum(norm, 1e-12))
