"""Muon (Jordan 2024; arXiv 2502.16982): momentum made orthogonal, for the stacked matrices of the layers.

Every device orthogonalises whole matrices of its own share of the layers: the momentum is moved from the parameters'
sharding to one over the layer axis and back, so no product is computed twice and none is split.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import P

from dccot_jax.model.sharding import explicit_mesh

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5
RMS = 0.2  # root mean square of an AdamW update, to which a Muon update is scaled (arXiv 2502.16982, eq. 4)


class MuonState(NamedTuple):
    """Updates so far, and the mean gradient of each matrix, laid out as the matrix."""

    count: jax.Array
    mu: Any


def scale_by_muon(beta: float, eps: float = 1e-8, mu_dtype: Any = jnp.float32) -> optax.GradientTransformation:
    """Nesterov momentum, orthogonalised and scaled to the size of an AdamW update: one learning rate fits both.

    update = 0.2 · sqrt(max(m, n)) · NS(m̂), with NS as in `orthogonalize` and m̂ the bias-corrected Nesterov mean; all leaves
    are stacks of matrices [L, m, n]. The mean gradient is stored in `mu_dtype` between updates, and computed with in float32.
    """

    def init(params: Any) -> MuonState:
        return MuonState(jnp.zeros((), jnp.int32), jax.tree.map(lambda p: jnp.zeros_like(p, dtype=mu_dtype), params))

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, MuonState]:
        del params
        count = state.count + 1
        mu = jax.tree.map(lambda m, g: beta * m.astype(jnp.float32) + (1 - beta) * g, state.mu, updates)
        ahead = beta / (1 - beta ** (count + 1).astype(jnp.float32))
        now = (1 - beta) / (1 - beta ** count.astype(jnp.float32))

        def scaled(m: jax.Array, g: jax.Array) -> jax.Array:
            return RMS * math.sqrt(max(m.shape[1:])) * orthogonalize(ahead * m + now * g, eps)

        return jax.tree.map(scaled, mu, updates), MuonState(count, jax.tree.map(lambda m: m.astype(mu_dtype), mu))

    return optax.GradientTransformation(init, update)


def orthogonalize(x: jax.Array, eps: float = 1e-8) -> jax.Array:
    """Nearly U·Vᵀ of every matrix U·S·Vᵀ in a stack [L, m, n], float32, in the sharding of `x`.

    Five steps of the quintic Newton-Schulz iteration from x / |x|; singular values end in about 0.7 to 1.2.
    """
    mesh = explicit_mesh()
    if mesh is None:
        return _newton_schulz(x, eps)
    kept, layers = jax.typeof(x).sharding.spec, x.shape[0]
    whole = jnp.pad(x, ((0, -layers % math.prod(mesh.shape.values())), (0, 0), (0, 0)))
    done = _newton_schulz(jax.reshard(whole, P(mesh.axis_names, None, None)), eps)
    return jax.reshard(done, kept)[:layers]


def _newton_schulz(x: jax.Array, eps: float) -> jax.Array:
    wide = x.shape[1] <= x.shape[2]
    x = x if wide else jnp.swapaxes(x, 1, 2)  # the products are of the shorter side
    x = x / (jnp.sqrt(jnp.sum(x * x, axis=(1, 2), keepdims=True)) + eps)
    a, b, c = COEFFICIENTS
    product = jax.lax.Precision.HIGHEST
    for _ in range(ITERATIONS):
        gram = jnp.einsum("lij,lkj->lik", x, x, precision=product)
        mixed = b * gram + c * jnp.einsum("lij,ljk->lik", gram, gram, precision=product)
        x = a * x + jnp.einsum("lij,ljk->lik", mixed, x, precision=product)
    return x if wide else jnp.swapaxes(x, 1, 2)
