"""Batched generation: prompts wait in a queue, slots generate together, a finished slot takes the next prompt.

Two compiled programs: prefill reads a group of prompts into free slots, decode advances all slots up to
STEPS_PER_CALL tokens before the host looks again. Shapes are bucketed, so there are few compilations; they are shared by
all samplers of one model config. A row's tokens depend on its prompt, the seed and its row id, not on its neighbours
(up to rounding, which differs with the shapes a row is computed in).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dccot_jax.generate.cache import State, attend_cached, auto_mesh, bucket, fill_slots, new_state, state_shardings, visible, write_column
from dccot_jax.model.attention import rope_divisors, rope_tables
from dccot_jax.model.backends.registry import make_attention
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.decoder import Params, embed, finish_layer, layer_differences, make_layer, project_qkv, rms_norm
from dccot_jax.model.head import logits
from dccot_jax.model.sharding import make_mesh, param_specs

STEPS_PER_CALL = 16
_GATHER_BYTES = 4 << 30  # weights up to this size are gathered over `fsdp` once instead of at every step


@dataclasses.dataclass(frozen=True)
class Generated:
    """What one prompt got.

    Attributes:
      tokens: generated ids, the stop token included. finish_reason: "stop" or "length".
      entropy: mean entropy of the model's next-token distribution (temperature 1) where it wrote them, nats; None: not asked for.
    """

    tokens: list[int]
    finish_reason: str
    entropy: float | None = None


class Sampler:
    """Generates from one set of parameters."""

    def __init__(
        self,
        mc: ModelConfig,
        params: Params,
        mesh: Mesh | None = None,
        *,
        compute_dtype: Any = "float32",
        batch_rows: int = 64,
        eos_id: int | Sequence[int],
        pad_id: int = 0,
    ):
        """
        Args:
          params: as from `init_params` or `load_hf`, placed on `mesh` (None: the first device). A copy of the weights in
            `compute_dtype`, laid out for decoding, is held besides.
          batch_rows: slots, i.e. rows generated together.
          eos_id: one token id or several; any of them ends a row.
        """
        if batch_rows < 1:
            raise ValueError(f"batch_rows = {batch_rows} must be at least 1")
        mesh = mesh or make_mesh({}, jax.local_devices()[:1])
        self._mc, self._mesh, self._dtype = mc, auto_mesh(mesh), jnp.dtype(compute_dtype)
        self._batch_rows, self._pad_id = batch_rows, pad_id
        self._eos = np.array([eos_id] if isinstance(eos_id, (int, np.integer)) else list(eos_id), np.int32)
        self._columns = (0, 0)
        with jax.set_mesh(self._mesh):
            specs = param_specs(mc, mesh)
            self._params = jax.tree.map(lambda x, spec: jax.device_put(x, NamedSharding(self._mesh, spec)), params, specs)
            self._step_params = _unstack(self._params, mc, self._mesh, self._dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        seed: int = 0,
        *,
        row_ids: Sequence[int] | None = None,
        entropy: bool = False,
        on_batch: Callable[[list[tuple[int, Generated]]], None] | None = None,
    ) -> list[Generated]:
        """Generate for every prompt, in input order.

        Args:
          prompts: token ids, at least one each. temperature: 0 is greedy.
          row_ids: numbers that, with `seed`, decide each row's random draws; default: the position in `prompts`.
          entropy: also measure it, see `Generated`; a pass over the logits of every token.
          on_batch: called with [(position, result)] whenever rows finish.

        Raises:
          ValueError: an empty prompt, or one that with `max_new_tokens` exceeds the model's positions.
        """
        self._check(prompts, max_new_tokens)
        if not prompts:
            return []
        ids = np.array(row_ids if row_ids is not None else range(len(prompts)), np.int32)
        # Longest first, so that the prompts of one group have like lengths; position breaks ties.
        queue = sorted(range(len(prompts)), key=lambda row: (-len(prompts[row]), row))[::-1]
        slots = self._slots(len(prompts))
        found: dict[int, Generated] = {}
        with jax.set_mesh(self._mesh):
            state = self._new_state(slots, len(prompts[queue[-1]]), max_new_tokens)
            draw = {"temperature": np.float32(temperature or 1.0), "seed": np.uint32(seed & 0xFFFFFFFF)}
            prefill, decode = programs(self._mc, self._mesh, slots, self._dtype, temperature == 0, entropy)
            limit = np.int32(max_new_tokens)
            group = max(1, slots // 4)
            holds = np.full(slots, -1)  # the prompt in each slot, -1: free
            while queue or (holds >= 0).any():
                while queue and _should_fill(holds, group, len(queue)):
                    free = np.flatnonzero(holds < 0)[:group]
                    rows = [queue.pop() for _ in free[: len(queue)]]
                    holds[free[: len(rows)]] = rows
                    batch = self._group([prompts[row] for row in rows], free, ids[rows], group, slots)
                    state = prefill(self._params, state, batch, self._eos, limit, draw)
                    jax.block_until_ready(state["active"])
                state = decode(self._step_params, state, self._eos, limit, draw)
                active, count, answer, spread = (_host(state[name]) for name in ("active", "new_tokens", "answer", "entropy"))
                done = np.flatnonzero((holds >= 0) & ~active)
                means = spread / np.maximum(count, 1) if entropy else [None] * slots
                finished = [(int(holds[slot]), self._result(answer[slot, : count[slot]], means[slot])) for slot in done]
                holds[done] = -1
                found.update(finished)
                if finished and on_batch is not None:
                    on_batch(finished)
        return [found[row] for row in range(len(prompts))]

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens = {max_new_tokens} must be at least 1")
        for row, prompt in enumerate(prompts):
            if not len(prompt):
                raise ValueError(f"prompt {row} is empty")
            if len(prompt) + max_new_tokens > self._mc.max_positions:
                room = f"{len(prompt)} tokens and {max_new_tokens} new ones exceed the model's {self._mc.max_positions} positions"
                raise ValueError(f"prompt {row}: {room}")

    def _slots(self, rows: int) -> int:
        """batch_rows, halved while half would do."""
        slots = self._batch_rows
        while slots % 2 == 0 and rows <= slots // 2:
            slots //= 2
        return slots

    def _new_state(self, slots: int, longest: int, max_new_tokens: int) -> State:
        """Columns of an earlier call are used again where they fit without much waste: no new compilation."""
        needed = (bucket(longest), bucket(max_new_tokens))
        if not all(need <= have <= 2 * need for need, have in zip(needed, self._columns)):
            self._columns = needed
        return _state_maker(self._mc, self._mesh, slots, *self._columns, self._dtype)()

    def _group(self, prompts: list[Sequence[int]], free: np.ndarray, ids: np.ndarray, group: int, slots: int) -> dict[str, np.ndarray]:
        """Host arrays of one prefill call, padded to `group` rows; a padding row goes to slot `slots`, i.e. nowhere."""
        length = min(bucket(max(len(prompt) for prompt in prompts)), self._columns[0])
        batch = {
            "tokens": np.full((group, length), self._pad_id, np.int32),
            "prompt_length": np.ones(group, np.int32),
            "row_id": np.zeros(group, np.int32),
            "slots": np.full(group, slots, np.int32),
        }
        for i, prompt in enumerate(prompts):
            batch["tokens"][i, : len(prompt)] = prompt
            batch["prompt_length"][i], batch["row_id"][i], batch["slots"][i] = len(prompt), ids[i], free[i]
        return batch

    def _result(self, tokens: np.ndarray, entropy: float | None) -> Generated:
        reason = "stop" if tokens[-1] in self._eos else "length"
        return Generated(tokens.tolist(), reason, None if entropy is None else float(entropy))


def _should_fill(holds: np.ndarray, group: int, waiting: int) -> bool:
    """A prefill costs the same for one prompt as for a group: wait for a whole group unless fewer are left."""
    free = int((holds < 0).sum())
    return free >= min(group, waiting)


def _host(x: jax.Array) -> np.ndarray:
    return np.asarray(x.addressable_data(0))  # replicated: any one copy is the whole


@lru_cache(maxsize=16)
def programs(mc: ModelConfig, mesh: Mesh, slots: int, dtype: Any, greedy: bool, entropy: bool) -> tuple[Any, Any]:
    """The jitted (prefill, decode) for one model and mesh; jit compiles each once per shape of its arguments."""
    found = []
    for body in (_prefill, _decode):
        fixed = partial(body, mc=mc, dtype=dtype, greedy=greedy, entropy=entropy)
        found.append(jax.jit(fixed, donate_argnums=(1,), out_shardings=state_shardings(mc, mesh, slots)))
    return found[0], found[1]


@lru_cache(maxsize=16)
def _state_maker(mc: ModelConfig, mesh: Mesh, slots: int, prompt_columns: int, ring_columns: int, dtype: Any) -> Callable[[], State]:
    make = partial(new_state, mc, slots, prompt_columns, ring_columns, dtype)
    return jax.jit(make, out_shardings=state_shardings(mc, mesh, slots))


@partial(jax.jit, static_argnums=(1, 2, 3))
def _unstack(params: Params, mc: ModelConfig, mesh: Mesh, dtype: Any) -> Params:
    """Weights for decoding: one dict per layer, cast once. A slice of a stacked array would be copied at every step."""
    gather = mc.num_params() * dtype.itemsize // mesh.shape["tensor"] <= _GATHER_BYTES

    def prepare(name: str, x: jax.Array, spec: P) -> jax.Array:
        spec = P(*(None if gather and axis == "fsdp" else axis for axis in spec))
        return jax.lax.with_sharding_constraint(x if name.endswith("norm") else x.astype(dtype), spec)

    specs = param_specs(mc, mesh)
    inner = {name: P(*spec[1:]) for name, spec in specs["layers"].items()}
    layers = [{name: prepare(name, x[layer], inner[name]) for name, x in params["layers"].items()} for layer in range(mc.num_layers)]
    return {"layers": layers, **{name: prepare(name, x, specs[name]) for name, x in params.items() if name != "layers"}}


def _prefill(
    params: Params,
    state: State,
    batch: dict[str, jax.Array],
    eos: jax.Array,
    limit: jax.Array,
    draw: dict[str, jax.Array],
    *,
    mc: ModelConfig,
    dtype: Any,
    greedy: bool,
    entropy: bool,
) -> State:
    """Read prompts `batch["tokens"]` [B, T] into slots and draw the first token of each."""
    tokens, lengths = batch["tokens"], batch["prompt_length"]
    rows, length = tokens.shape
    x = embed(params, mc, tokens, dtype)
    positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
    segment_ids = (positions < lengths[:, None]).astype(jnp.int32)
    layer = make_layer(mc, positions, make_attention("xla", mc, segment_ids, packed=False))
    x, (ks, vs) = jax.lax.scan(layer, x, (params["layers"], layer_differences(mc)))
    last = jnp.take_along_axis(x, (lengths - 1)[:, None, None], axis=1)
    z = logits(params, mc, rms_norm(last, params["final_norm"], mc))[:, 0]
    first = _draw(z, batch["row_id"], jnp.zeros(rows, jnp.int32), draw, greedy)
    fields = {
        "token": first,
        "prompt_length": lengths,
        "new_tokens": jnp.ones(rows, jnp.int32),
        "entropy": _entropy(z) if entropy else jnp.zeros(rows, jnp.float32),
        "row_id": batch["row_id"],
        "active": ~_stops(first, eos) & (limit > 1),
        "answer": jnp.zeros((rows, state["answer"].shape[1]), jnp.int32).at[:, 0].set(first),
    }
    return fill_slots(state, batch["slots"], ks, vs, fields)


def _decode(
    params: Params,
    state: State,
    eos: jax.Array,
    limit: jax.Array,
    draw: dict[str, jax.Array],
    *,
    mc: ModelConfig,
    dtype: Any,
    greedy: bool,
    entropy: bool,
) -> State:
    """Advance all active slots by up to STEPS_PER_CALL tokens; ends early when none is active."""

    def step(carry: tuple[jax.Array, State]) -> tuple[jax.Array, State]:
        count, state = carry
        position = state["prompt_length"] + state["new_tokens"] - 1
        ropes, windows = mc.layer_ropes, mc.layer_windows
        tables = {rope: rope_tables(position[:, None], rope_divisors(rope, mc.head_dim)) for rope in dict.fromkeys(ropes)}
        masks = {window: visible(state, window) for window in dict.fromkeys(windows)}
        x = embed(params, mc, state["token"][:, None], dtype)
        ks, vs = [], []
        for layer, p in enumerate(params["layers"]):
            q, k, v = project_qkv(p, mc, x, *tables[ropes[layer]])
            ks.append(write_column(state["k"][layer], k, state))
            vs.append(write_column(state["v"][layer], v, state))
            attended = attend_cached(q, ks[-1], vs[-1], masks[windows[layer]], scale=mc.attn_scale, softcap=mc.attn_softcap)
            x = finish_layer(p, mc, x, attended)
        z = logits(params, mc, rms_norm(x, params["final_norm"], mc))[:, 0]
        active, made = state["active"], state["new_tokens"]
        token = jnp.where(active, _draw(z, state["row_id"], made, draw, greedy), state["token"])
        here = active[:, None] & (jnp.arange(state["answer"].shape[1])[None] == made[:, None])
        new = {
            **state,
            "k": ks,
            "v": vs,
            "token": token,
            "answer": jnp.where(here, token[:, None], state["answer"]),
            "new_tokens": made + active,
            "entropy": state["entropy"] + jnp.where(active, _entropy(z), 0.0) if entropy else state["entropy"],
            "active": active & ~_stops(token, eos) & (made + 1 < limit),
            "step": state["step"] + 1,
        }
        return count + 1, new

    def more(carry: tuple[jax.Array, State]) -> jax.Array:
        return (carry[0] < STEPS_PER_CALL) & jnp.any(carry[1]["active"])

    return jax.lax.while_loop(more, step, (jnp.zeros((), jnp.int32), state))[1]


def _stops(token: jax.Array, eos: jax.Array) -> jax.Array:
    return jnp.any(token[:, None] == eos[None], axis=1)


def _entropy(z: jax.Array) -> jax.Array:
    """Entropy of softmax(z), nats: z [S, V] -> [S]."""
    logp = jax.nn.log_softmax(z, axis=-1)
    return -jnp.sum(jnp.exp(logp) * logp, axis=-1)


def _draw(z: jax.Array, row_id: jax.Array, index: jax.Array, draw: dict[str, jax.Array], greedy: bool) -> jax.Array:
    """Next token of each row from float32 logits z [S, V]; randomness depends on (seed, row id, index of the token) only."""
    if greedy:
        return jnp.argmax(z, axis=-1).astype(jnp.int32)
    root = jax.random.key(draw["seed"])
    keys = jax.vmap(lambda row, i: jax.random.fold_in(jax.random.fold_in(root, row), i))(row_id, index)
    return jax.vmap(jax.random.categorical)(keys, z / draw["temperature"]).astype(jnp.int32)
