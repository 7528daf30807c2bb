"""`less` features: each row's gradient of some weights, preconditioned as Adam would, projected to a few thousand numbers.

LESS (Xia et al., arXiv 2402.04333; princeton-nlp/LESS, `collect_grad_reps.py`). With g the gradient of a row's mean
token loss at a checkpoint, m and v the checkpoint's Adam moments,
    training side    Gamma = (b1 m + (1 - b1) g) / sqrt(b2 v + (1 - b2) g^2 + eps)      (eps inside the root, no bias correction)
    validation side  g itself (the SGD form)
and the feature is R^T Gamma / sqrt(dim), R as in `projection.py`, the same for both sides. Gradient, preconditioning and
projection happen weight by weight inside the backward pass, a few rows of the matrix at a time, so neither the gradients of
all rows nor R are ever held.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import P

from dccot_jax.model.config import ModelConfig
from dccot_jax.model.linear import dot
from dccot_jax.model.sharding import BATCH, activation_spec, explicit_mesh, reshard
from dccot_jax.select.gradients.projection import BLOCK, project, weight_key
from dccot_jax.select.gradients.rows import Arrays, backward, by_stream

_SLAB_ELEMENTS = 1 << 23  # gradient numbers held at a time, over the rows of one device: 32 MiB


@dataclasses.dataclass(frozen=True)
class Adam:
    """The optimizer's constants as the checkpoint was trained with."""

    b1: float
    b2: float
    eps: float


@dataclasses.dataclass(frozen=True)
class Projection:
    """Numbers per feature, seed and kind of the projection."""

    dim: int
    seed: int
    kind: str


@dataclasses.dataclass(frozen=True)
class Feature:
    """The measure: R^T Gamma of one weight. `aux` holds ``layer``, an int32 scalar, and with `adam` the moments ``mu`` and ``nu``."""

    name: str
    projection: Projection
    adam: Adam | None

    @property
    def width(self) -> int:
        return self.projection.dim

    def product(self, x: jax.Array, g: jax.Array, aux: Any) -> jax.Array:
        batch, _, d = x.shape
        f = g.shape[-1]
        spec = activation_spec(batch, None, None)
        x, g = reshard(x, spec), reshard(g, spec)
        # Slabs of whole rows of the matrix whose numbers fill whole blocks of the projection.
        unit = BLOCK // math.gcd(f, BLOCK)
        shards = math.prod(explicit_mesh().shape[axis] for axis in BATCH) if explicit_mesh() is not None else 1
        size = unit * min(-(-d // unit), max(1, _SLAB_ELEMENTS * shards // (batch * f * unit)))
        count = -(-d // size)
        extra = count * size - d
        x = jnp.pad(x, ((0, 0), (0, 0), (0, extra)))
        moments = {name: jnp.pad(_whole(aux[name]), ((0, extra), (0, 0))) for name in ("mu", "nu") if self.adam}
        key = weight_key(self.projection.seed, self.name, aux["layer"])

        def slab(i: jax.Array, total: jax.Array) -> jax.Array:
            inputs = jax.lax.dynamic_slice_in_dim(x, i * size, size, axis=2)
            own = {name: jax.lax.dynamic_slice_in_dim(moment, i * size, size, axis=0) for name, moment in moments.items()}
            step = self._precondition(dot("btd,btf->bdf", inputs, g, spec), own)
            return total + self._project(step.reshape(batch, size * f), key, i * (size * f // BLOCK))

        zero = jnp.zeros((batch, self.width), jnp.float32, out_sharding=activation_spec(batch, None))
        return jax.lax.fori_loop(0, count, slab, zero)

    def vector(self, grad: jax.Array, aux: Any) -> jax.Array:
        moments = {name: _whole(aux[name]) for name in ("mu", "nu") if self.adam}
        key = weight_key(self.projection.seed, self.name, aux["layer"])
        return self._project(self._precondition(reshard(grad, activation_spec(len(grad), None)), moments), key, 0)

    def _precondition(self, grad: jax.Array, moments: Mapping[str, jax.Array]) -> jax.Array:
        if self.adam is None:
            return grad
        b1, b2 = self.adam.b1, self.adam.b2
        mean, square = b1 * moments["mu"] + (1 - b1) * grad, b2 * moments["nu"] + (1 - b2) * grad * grad
        return mean / jnp.sqrt(square + self.adam.eps)

    def _project(self, values: jax.Array, key: jax.Array, first: jax.Array | int) -> jax.Array:
        return project(values, key, first, self.width, self.projection.kind)


@functools.lru_cache(maxsize=8)
def make_features(
    mc: ModelConfig, names: tuple[str, ...], projection: Projection, adam: Adam | None, compute_dtype: str, remat: str
) -> Callable[[Any, Arrays], jax.Array]:
    """The jitted function (state, arrays of `layout.stream_arrays`) -> features [B, S, dim] float32; call it under a mesh.

    `state` is {"params"} and, with `adam`, {"mu", "nu"}: trees laid out as the parameters. `names`: weights that count, in the
    layers or the last norm.
    """

    @jax.jit
    def program(state: Any, x: Arrays) -> jax.Array:
        def aux(name: str) -> dict[str, jax.Array]:
            inside = name in state["params"]["layers"]
            layer = jnp.arange(mc.num_layers, dtype=jnp.int32) if inside else jnp.zeros((), jnp.int32)
            sides = ("mu", "nu") if adam else ()
            return {"layer": layer} | {side: (state[side]["layers"] if inside else state[side])[name] for side in sides}

        measures = {name: (Feature(name, projection, adam), aux(name)) for name in names}
        found = backward(state["params"], mc, x, measures, compute_dtype=compute_dtype, remat=remat)
        parts = [jnp.sum(report, axis=0) if report.ndim == 3 else report for report in found.reports.values()]
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return by_stream(total / math.sqrt(projection.dim), x)

    return program


def _whole(x: jax.Array) -> jax.Array:
    return reshard(x, None if explicit_mesh() is None else P(*(None,) * x.ndim))
