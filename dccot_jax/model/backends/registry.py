"""Which attention backends there are, what each can do, and which one `auto` takes.

A backend is a function (segment_ids [B, T], Form) -> Attention; all mean the same (`meaning`). Modules are imported when they are used.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from dccot_jax.model.backends.meaning import Attention, Form
from dccot_jax.model.config import ModelConfig
from dccot_jax.records import InputError

BACKENDS = ("xla", "splash", "cudnn", "tokamax")
_WORTH_A_KERNEL = 512  # tokens of a row below which `auto` stays with xla: a kernel's blocks would be few and partly empty


class AttentionError(InputError):
    """An attention backend that cannot do what is asked of it; the message says what it needs."""


@dataclasses.dataclass(frozen=True)
class Need:
    """What is asked of a backend.

    Attributes:
      platform: "cpu", "gpu" or "tpu". device_kind: as JAX names it, e.g. "NVIDIA H100 80GB HBM3".
      tokens: length of a row. head_dim, softcap: of the model. dtype: of activations.
      packed: rows may hold several segments. tokamax: the package is installed.
    """

    platform: str
    device_kind: str
    tokens: int
    head_dim: int
    softcap: float
    dtype: str
    packed: bool
    tokamax: bool = False

    @classmethod
    def of(cls, mc: ModelConfig, tokens: int, dtype: str, *, packed: bool, device: Any = None) -> Need:
        """What `mc` asks for on `device`, anything with a `platform` and a `device_kind`; None: the first of this process."""
        device = device or jax.local_devices()[0]
        installed = importlib.util.find_spec("tokamax") is not None
        return cls(device.platform, device.device_kind, tokens, mc.head_dim, mc.attn_softcap, dtype, packed, installed)

    @property
    def nvidia(self) -> bool:
        return self.platform in ("gpu", "cuda") and "NVIDIA" in self.device_kind


def refusal(name: str, need: Need) -> str | None:
    """Why backend `name` cannot do this, in one line that says what it needs; None: it can."""
    if name == "splash" and need.platform != "tpu":
        return f"'splash' needs a TPU; this is {need.device_kind or need.platform}"
    if name in ("cudnn", "tokamax") and not need.nvidia:
        return f"{name!r} needs an NVIDIA GPU; this is {need.device_kind or need.platform}"
    if name == "tokamax" and not need.tokamax:
        return "'tokamax' needs the package tokamax (Python >= 3.12: pip install tokamax), which is not installed"
    if name != "cudnn":
        return None
    if need.dtype not in ("bfloat16", "float16"):
        return f"'cudnn' needs compute_dtype = 'bfloat16'; it is {need.dtype!r}"
    if need.softcap:
        return f"'cudnn' has no soft cap of the scores; this model's is {need.softcap}"
    most = 128 if any(kind in need.device_kind for kind in ("A100", "A10", "A30", "A40", "RTX 30", "RTX 40", "L4", "L40")) else 256
    if need.head_dim % 8 or need.head_dim > most:
        return f"'cudnn' needs heads of at most {most} dimensions, a multiple of 8; this model's have {need.head_dim}"
    if need.packed and need.tokens % 2:
        return f"'cudnn' needs packed rows of an even number of tokens; these have {need.tokens}"
    return None


def automatic(need: Need) -> str:
    """The backend that `auto` stands for: the platform's kernel where it can do what is needed and rows are long enough, else xla."""
    if need.dtype == "float32" or need.tokens < _WORTH_A_KERNEL:  # kernels multiply float32 in fewer bits than they are given
        return "xla"
    return next((name for name in ("splash", "cudnn", "tokamax") if refusal(name, need) is None), "xla")


def resolve(name: str, need: Need) -> str:
    """The backend to use for `config.attention` = `name`. Raises AttentionError: there is none of this name, or it cannot do this."""
    if name == "auto":
        return automatic(need)
    if name not in BACKENDS:
        raise AttentionError(f"config.attention: {name!r} is not one of auto, {', '.join(BACKENDS)}")
    problem = refusal(name, need)
    if problem is not None:
        raise AttentionError(f"config.attention: {problem}; 'auto' takes {automatic(need)!r} here")
    return name


def make_attention(name: str, mc: ModelConfig, segment_ids: jax.Array, *, packed: bool = True) -> Attention:
    """The attention of model `mc` over rows with these segment ids [B, T], by the backend `name`."""
    windows = tuple(dict.fromkeys(mc.layer_windows))
    return maker(name)(segment_ids.astype(jnp.int32), Form(mc.attn_scale, mc.attn_softcap, windows, packed))


def maker(name: str) -> Callable[[jax.Array, Form], Attention]:
    """The function (segment_ids, Form) -> Attention of a backend. Raises AttentionError if there is none of this name."""
    if name not in BACKENDS:
        raise AttentionError(f"attention: {name!r} is not one of {', '.join(BACKENDS)}")
    return importlib.import_module(f"dccot_jax.model.backends.{name}").make
