"""One optimizer step: (state, batch) -> (state, metrics), compiled once, with the state donated.

The state is a plain dict ``{"params", "opt", "step"}``, and what no step changes (`CONSTANTS`): ``"frozen"`` where only adapters
are trained (``params`` are these, and the model is `lora.join` of both), ``"teacher"`` where its distributions are learned.
Trained parameters and moments are float32 (the first moment as ``train.moment_dtype`` says); activations use the compute dtype. All
arrays live on an Explicit mesh, so gradients carry exactly the parameters' shardings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import P

from dccot_jax.config import ConfigError
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.lora import join
from dccot_jax.model.sharding import BATCH
from dccot_jax.train.losses import Distillation, weighted_loss
from dccot_jax.train.optimizer import clip_scale, make_optimizer, make_schedule

CONSTANTS = ("frozen", "teacher")

State = dict[str, Any]
Metrics = dict[str, tuple[jax.Array, jax.Array]]


def abstract_state(params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, constants: Any = None) -> State:
    """Shapes and shardings of a state, without memory: moments are laid out as their parameters, scalars are replicated.

    Args:
      params: trained tree of arrays or ShapeDtypeStructs with shardings on `mesh`. constants: such trees by names of `CONSTANTS`.
    """
    with jax.set_mesh(mesh):
        shapes = jax.eval_shape(lambda p: {"params": p, "opt": optimizer.init(p), "step": jnp.zeros((), jnp.int32)}, params)

    def bind(leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = P() if leaf.sharding is None else leaf.sharding.spec
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=jax.NamedSharding(mesh, spec))

    state = jax.tree.map(bind, shapes)
    return with_constants(state, jax.tree.map(bind, jax.eval_shape(lambda tree: tree, constants or {})))


def init_state(params: Any, optimizer: optax.GradientTransformation, mesh: jax.sharding.Mesh, constants: Any = None) -> State:
    """State before step 0, each array made in its sharding."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(params, optimizer, mesh))

    def rest(p: Any) -> State:
        return {"opt": optimizer.init(p), "step": jnp.zeros((), jnp.int32)}

    with jax.set_mesh(mesh):
        made = jax.jit(rest, out_shardings={"opt": shardings["opt"], "step": shardings["step"]})(params)
    return with_constants({"params": params, **made}, constants or {})


def with_constants(state: State, constants: Mapping[str, Any]) -> State:
    """`state` with these parts that no step changes, and no others."""
    return {**{name: value for name, value in state.items() if name not in CONSTANTS}, **constants}


def split_rows(batch: Mapping[str, jax.Array], microbatches: int) -> dict[str, jax.Array]:
    """[G, T, ...] arrays as [k, G/k, T, ...]: row r goes to micro-batch r mod k, so that no row leaves its device.

    Raises ValueError if k·(devices along the batch) does not divide G.
    """

    def split(x: jax.Array) -> jax.Array:
        rows = x.shape[0]
        out = jnp.reshape(x, (rows // microbatches, microbatches, *x.shape[1:]), out_sharding=P(BATCH, *(None,) * x.ndim))
        return jnp.moveaxis(out, 1, 0)

    return {name: split(x) for name, x in batch.items()}


def loss_and_grads(
    params: Any,
    mc: ModelConfig,
    batch: Mapping[str, jax.Array],
    *,
    microbatches: int = 1,
    compute_dtype: Any = jnp.float32,
    remat: str,
    constants: Mapping[str, Any] = MappingProxyType({}),
    dropout_key: jax.Array | None = None,
    attention: str = "xla",
    distill: Distillation | None = None,
) -> tuple[jax.Array, jax.Array, Any]:
    """The sum of the loss, Σ w, and the sum's gradient with respect to `params` (not yet divided), over all micro-batches.

    Sums are accumulated, never means: micro-batches with different numbers of trained tokens count by their tokens.
    """

    def loss_sum(p: Any, rows: Mapping[str, jax.Array], key: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        whole = join(p, constants.get("frozen"))
        settings: Any = {"compute_dtype": compute_dtype, "remat": remat, "dropout_key": key, "attention": attention}
        return weighted_loss(whole, mc, rows, **settings, distill=distill, teacher=constants.get("teacher"))

    grad = jax.value_and_grad(loss_sum, has_aux=True)
    if microbatches == 1:
        (total, weight), grads = grad(params, batch, dropout_key)
        return total, weight, grads

    def accumulate(carry: Any, part: tuple[Mapping[str, jax.Array], jax.Array | None]) -> tuple[Any, None]:
        (total, weight), grads = grad(params, *part)
        # Apart, or compilers add up whole gradients and scatter only the sums, which takes a whole float32 head more.
        return jax.tree.map(jnp.add, carry, jax.lax.optimization_barrier((total, weight, grads))), None

    zero = jnp.zeros((), jnp.float32)
    keys = None if dropout_key is None else jax.random.split(dropout_key, microbatches)
    parts = (split_rows(batch, microbatches), keys)
    sums, _ = jax.lax.scan(accumulate, (zero, zero, jax.tree.map(jnp.zeros_like, params)), parts)
    return sums


def make_train_step(
    mc: ModelConfig,
    mesh: jax.sharding.Mesh,
    train: Any,
    compute_dtype: Any,
    *,
    steps: int,
    seed: int = 0,
    attention: str = "xla",
    distill: Distillation | None = None,
) -> Callable[[State, Mapping[str, jax.Array]], tuple[State, Metrics]]:
    """The jitted step. Call it (and lower it) under ``jax.set_mesh(mesh)``.

    Args:
      mc, mesh: model and mesh. train: the config's ``train`` group. compute_dtype: dtype of activations.
      steps: steps of the whole training; the learning-rate schedule ends there.
      seed: of the adapters' dropout; what is dropped is a function of it and of the step number.
      attention: backend, one of `model.backends.registry.BACKENDS`.
      distill: what is learned from a teacher, whose parameters are in the state then.

    Returns:
      A function of (state, batch) with `state` donated; batch arrays are [G, T, ...], sharded over ("data", "fsdp").
      Metrics are (sum, weight): ``loss`` (nats, per unit of weight), ``grad_norm`` (before clipping), ``learning_rate``,
      ``tokens`` (non-padding, per step), ``trained_tokens`` (weight > 0), ``skipped``, ``empty``. A step whose gradient is not
      finite, or that has nothing to train on (Σ w = 0, ``empty``), changes neither parameters nor moments and counts as skipped; the step
      number still rises.

    Raises:
      ConfigError: the rows of a step cannot be split evenly over micro-batches and devices.
    """
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if train.rows_per_step % (train.microbatches * shards):
        raise ConfigError(
            f"config.train.rows_per_step: {train.rows_per_step} is not a multiple of train.microbatches × (devices along data and fsdp) = "
            f"{train.microbatches} × {shards}"
        )
    optimizer = make_optimizer(train)
    schedule = make_schedule(train, steps)

    def step(state: State, batch: Mapping[str, jax.Array]) -> tuple[State, Metrics]:
        params, constants = state["params"], {name: state[name] for name in CONSTANTS if name in state}
        drops = mc.lora is not None and mc.lora.dropout > 0
        total, weight, grads = loss_and_grads(
            params,
            mc,
            batch,
            microbatches=train.microbatches,
            compute_dtype=compute_dtype,
            remat=train.remat,
            attention=attention,
            constants=constants,
            distill=distill,
            dropout_key=jax.random.fold_in(jax.random.key(seed), state["step"]) if drops else None,
        )
        grads = jax.tree.map(lambda g: g / jnp.where(weight > 0, weight, 1.0), grads)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(norm) & jnp.isfinite(total)
        learn = finite & (weight > 0)
        scale = clip_scale(norm, train.clip_norm)
        rate = schedule(state["step"])
        updates, opt = optimizer.update(jax.tree.map(lambda g: g * scale, grads), state["opt"], params)
        moved = jax.tree.map(lambda p, u: p - rate * u, params, updates)
        new = {
            "params": jax.tree.map(lambda a, b: jnp.where(learn, a, b), moved, params),
            "opt": jax.tree.map(lambda a, b: jnp.where(learn, a, b), opt, state["opt"]),
            "step": state["step"] + 1,
        }
        one = jnp.ones((), jnp.float32)
        metrics = {
            "loss": (jnp.where(learn, total, 0.0), jnp.where(learn, weight, 0.0)),
            "grad_norm": (jnp.where(learn, norm, 0.0), learn.astype(jnp.float32)),
            "learning_rate": (rate, one),
            "tokens": (jnp.sum(batch["segment_ids"] > 0).astype(jnp.float32), one),
            "trained_tokens": (jnp.sum(batch["weights"] > 0).astype(jnp.float32), one),
            "skipped": ((~learn).astype(jnp.float32), one),
            "empty": ((finite & (weight == 0)).astype(jnp.float32), one),
        }
        return with_constants(new, constants), metrics

    return jax.jit(step, donate_argnums=0)
