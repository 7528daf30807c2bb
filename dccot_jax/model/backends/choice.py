"""The choice of a backend for a run: what was asked for, what can be, and whether it says here what the reference says.

A kernel is tried once per process on this very device before it is used: packed rows that are partly and wholly padding, values and
gradients, with the model's heads, windows and cap. Drivers and kernels differ, and a kernel that lets packed documents see each
other trains without complaint.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from dccot_jax.model.backends.meaning import NO_WINDOW, Form
from dccot_jax.model.backends.registry import AttentionError, Need, maker, resolve
from dccot_jax.model.config import ModelConfig

_TOKENS = 256
_TOLERANCE = 0.04  # of the largest value; products in bfloat16 stay below a quarter of it, a leak is far above


def choose(asked: str, mc: ModelConfig, tokens: int, dtype: str, *, packed: bool) -> tuple[str, str]:
    """(backend, a remark or "") for rows of `tokens` tokens on this process's devices; call it outside a mesh, on all processes alike.

    Raises:
      AttentionError: the backend asked for cannot do it, or fails its trial. Where `auto` was asked, xla is taken then, with a remark.
    """
    name = resolve(asked, Need.of(mc, tokens, dtype, packed=packed))
    if name == "xla":
        return name, ""
    problem = trial(name, mc, dtype, packed)
    if jax.process_count() > 1 and np.any(multihost_utils.process_allgather(np.asarray(bool(problem)))):
        problem = problem or "it fails its trial on another process"
    if not problem:
        return name, ""
    if asked != "auto":
        raise AttentionError(f"config.attention: {name!r} cannot be used on this device: {problem}; 'xla' works everywhere")
    return "xla", f"attention: xla, because {name} cannot be used on this device: {problem}"


@functools.lru_cache(maxsize=32)
def trial(name: str, mc: ModelConfig, dtype: str, packed: bool) -> str:
    """What is wrong with a backend on this device, in one line; "": nothing."""
    windows = tuple(dict.fromkeys(min(window, _TOKENS // 3) for window in mc.layer_windows))
    form = Form(mc.attn_scale, mc.attn_softcap, windows, packed)
    rng = np.random.default_rng(0)
    shape = (3, _TOKENS, 1, mc.num_groups, mc.head_dim)
    q, k, v, error = (jnp.asarray(rng.normal(size=s), dtype) for s in (shape, (*shape[:3], mc.head_dim), (*shape[:3], mc.head_dim), shape))
    segments = np.zeros(shape[:2], np.int32)
    segments[0, : _TOKENS // 2], segments[1, :20] = 1, 1
    if packed:
        segments[0, 60:100], segments[0, 100:240] = 2, 3

    def results(backend: str, own: int | None, *inputs: jax.Array) -> list[np.ndarray]:
        window = None if own is None else jnp.asarray(own or NO_WINDOW, jnp.int32)

        def both(error: jax.Array, *inputs: jax.Array) -> Any:
            out, back = jax.vjp(lambda q, k, v: maker(backend)(jnp.asarray(segments), form)(q, k, v, window), *inputs)
            return out, *back(error.astype(out.dtype))

        return [np.asarray(x, np.float32) for x in jax.jit(both)(error, *inputs)]

    try:
        for own in windows if len(windows) > 1 else (None,):
            wanted = results("xla", own, *(x.astype(jnp.float32) for x in (q, k, v)))
            found = results(name, own, q, k, v)
            for what, x, y in zip(("values", "gradients of q", "gradients of k", "gradients of v"), wanted, found, strict=True):
                worst = float(np.max(np.abs(x - y)) / np.max(np.abs(x)))
                if not worst <= _TOLERANCE:
                    return f"its {what} are {worst:.2g} of the largest away from the reference's"
    except Exception as problem:  # a driver, a compiler or a kernel that refuses: whatever it raises, the backend is of no use here
        return f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:200] if str(problem).strip() else 'no message'}"
    return ""
