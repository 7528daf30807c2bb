"""What a decoder is: sizes and the settings that tell models of one family apart."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from dccot_jax.model.families import FAMILIES, Family
from dccot_jax.records import InputError

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim", "max_positions")
# Left out of `to_dict` where they are off: artifacts of students that know nothing of them keep their hashes.
_OPTIONAL = (
    "mlp_bias",
    "sliding_window",
    "window_layers",
    "no_rope_layers",
    "rope_scaling",
    "rope_local_theta",
    "query_scalar",
    "attn_softcap",
    "final_softcap",
    "lora",
)
_SCALINGS = ("linear", "llama3")
ADAPTED = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")  # matrices that may have a low-rank adapter


class ModelError(InputError):
    """A model description or a weight file that this decoder cannot represent; names every problem found."""


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched. kind "linear" uses `factor`; "llama3" all of them, see `model/attention.py`."""

    kind: str
    factor: float
    low_freq_factor: float = 0.0
    high_freq_factor: float = 0.0
    original_positions: int = 0


@dataclasses.dataclass(frozen=True)
class Lora:
    """Low-rank adapters, see `model/lora.py`. targets: the matrices that have one, by their names in the layers' tree."""

    rank: int
    alpha: float
    dropout: float
    targets: tuple[str, ...]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


class Rope(NamedTuple):
    """Rotary positions of one layer."""

    theta: float
    scaling: RopeScaling | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and settings of a pre-norm decoder with RMSNorm, rotary positions, grouped-query attention and a gated MLP.

    Attributes:
      family: a key of `FAMILIES`, which says what its architecture fixes (`arch`).
      num_kv_heads: key/value heads K; divides num_heads N.
      head_dim: H; N * H need not equal hidden_size.
      qkv_bias: biases on the query, key and value projections, and on the output projection where the family has them.
      max_positions: longest sequence that may be trained or generated.
      eos_token_ids, bos_token_id, pad_token_id: carried through import and export; the decoder does not read them.
      mlp_bias: biases on the three MLP projections.
      sliding_window: tokens, itself among them, that a token sees in the layers `window_layers` (indices); 0: there are none.
      no_rope_layers: indices of layers without rotary positions.
      rope_scaling: of all layers but those with a base of their own.
      rope_local_theta: rotary base of the layers with a window; 0: the same as elsewhere.
      query_scalar: attention scores are divided by its square root; 0: head_dim.
      attn_softcap, final_softcap: attention scores and final logits z become cap * tanh(z / cap); 0: they stay.
      lora: adapters beside the weights; None: there are none.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float = 10000.0
    rms_eps: float = 1e-5
    tie_embeddings: bool = True
    qkv_bias: bool = False
    max_positions: int = 2048
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None
    pad_token_id: int | None = None
    mlp_bias: bool = False
    sliding_window: int = 0
    window_layers: tuple[int, ...] = ()
    no_rope_layers: tuple[int, ...] = ()
    rope_scaling: RopeScaling | None = None
    rope_local_theta: float = 0.0
    query_scalar: float = 0.0
    attn_softcap: float = 0.0
    final_softcap: float = 0.0
    lora: Lora | None = None

    def __post_init__(self) -> None:
        for name in ("eos_token_ids", "window_layers", "no_rope_layers"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if isinstance(self.rope_scaling, Mapping):
            object.__setattr__(self, "rope_scaling", RopeScaling(**self.rope_scaling))
        if isinstance(self.lora, Mapping):
            object.__setattr__(self, "lora", Lora(**{**self.lora, "targets": tuple(self.lora["targets"])}))
        if self.query_scalar == self.head_dim:  # said or not, it is one model
            object.__setattr__(self, "query_scalar", 0.0)
        problems = self._size_problems()
        if self.family not in FAMILIES:
            problems.append(f"family {self.family!r} is not one of {', '.join(FAMILIES)}")
        else:
            problems += self._family_problems()
        if problems:
            raise ModelError("model config: " + "; ".join(problems))

    @property
    def arch(self) -> Family:
        return FAMILIES[self.family]

    @property
    def num_groups(self) -> int:
        """Query heads per key/value head, G."""
        return self.num_heads // self.num_kv_heads

    @property
    def o_bias(self) -> bool:
        return self.qkv_bias and self.arch.o_bias

    @property
    def attn_scale(self) -> float:
        """Factor of the attention scores."""
        return (self.query_scalar or self.head_dim) ** -0.5

    @property
    def layer_windows(self) -> tuple[int, ...]:
        """Tokens that each layer sees; 0: all."""
        return tuple(self.sliding_window if layer in self.window_layers else 0 for layer in range(self.num_layers))

    @property
    def layer_ropes(self) -> tuple[Rope | None, ...]:
        """Rotary positions of each layer; None: it has none."""
        found: list[Rope | None] = []
        for layer in range(self.num_layers):
            local = self.rope_local_theta and layer in self.window_layers
            rope = Rope(self.rope_local_theta, None) if local else Rope(self.rope_theta, self.rope_scaling)
            found.append(None if layer in self.no_rope_layers else rope)
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able fields; `from_dict` reads them back."""
        off = {field.name: field.default for field in dataclasses.fields(self) if field.name in _OPTIONAL}
        fields = {name: value for name, value in dataclasses.asdict(self).items() if name not in off or value != off[name]}
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> ModelConfig:
        """Raises ModelError on missing or unknown fields."""
        try:
            return cls(**dict(fields))
        except TypeError as error:
            raise ModelError(f"model config: {error}") from None

    def num_params(self) -> int:
        """Parameters, a tied head counted once, adapters left out."""
        d, f, h = self.hidden_size, self.intermediate_size, self.head_dim
        qkv = (self.num_heads + 2 * self.num_kv_heads) * h
        norms = (4 if self.arch.post_norms else 2) * d + (2 * h if self.arch.qk_norm else 0)
        biases = (qkv if self.qkv_bias else 0) + (d if self.o_bias else 0) + (2 * f + d if self.mlp_bias else 0)
        layer = norms + biases + d * qkv + self.num_heads * h * d + 3 * d * f
        return self.num_layers * layer + d + self.vocab_size * d * (1 if self.tie_embeddings else 2)

    def _size_problems(self) -> list[str]:
        problems = [f"{name} = {getattr(self, name)} must be at least 1" for name in _SIZES if getattr(self, name) < 1]
        if self.num_kv_heads > 0 and self.num_heads % self.num_kv_heads:
            problems.append(f"num_kv_heads = {self.num_kv_heads} does not divide num_heads = {self.num_heads}")
        refuses = self.family in ("llama", "gemma2", "gemma3_text")
        if refuses and self.num_heads > 0 and self.hidden_size % self.num_heads:
            problems.append(f"num_heads = {self.num_heads} does not divide hidden_size = {self.hidden_size}, which transformers refuses")
        if self.head_dim % 2:
            problems.append(f"head_dim = {self.head_dim} must be even (rotary positions)")
        for name in ("sliding_window", "rope_local_theta", "query_scalar", "attn_softcap", "final_softcap"):
            if getattr(self, name) < 0:
                problems.append(f"{name} = {getattr(self, name)} must be at least 0 (0: off)")
        for name in ("window_layers", "no_rope_layers"):
            layers = getattr(self, name)
            if sorted(set(layers) & set(range(self.num_layers))) != list(layers):
                problems.append(f"{name} = {layers} must be ascending indices below num_layers = {self.num_layers}")
        if bool(self.sliding_window) != bool(self.window_layers):
            problems.append(f"sliding_window = {self.sliding_window} does not fit window_layers = {self.window_layers}")
        lora = self.lora
        if lora is not None:
            unknown = sorted(set(lora.targets) - set(ADAPTED))
            if unknown or not lora.targets:
                problems.append(f"lora targets {', '.join(unknown) or '(none)'}: name some of {', '.join(ADAPTED)}")
            if lora.rank < 1 or not lora.alpha > 0 or not 0 <= lora.dropout < 1:
                problems.append(f"{lora}: rank must be at least 1, alpha above 0, dropout in [0, 1)")
        scaling = self.rope_scaling
        if scaling is not None and scaling.kind not in _SCALINGS:
            problems.append(f"rope_scaling = {scaling.kind!r} is not one of {', '.join(_SCALINGS)}")
        elif scaling is not None and (scaling.factor <= 0 or (scaling.kind == "llama3" and not scaling.original_positions > 0)):
            problems.append(f"rope_scaling = {scaling}: factor and original_positions must be above 0")
        elif scaling is not None and scaling.kind == "llama3" and not 0 < scaling.low_freq_factor < scaling.high_freq_factor:
            problems.append(f"rope_scaling = {scaling}: low_freq_factor must lie above 0 and below high_freq_factor")
        return problems

    def _family_problems(self) -> list[str]:
        arch = self.arch
        fits = {
            "qkv_bias": self.qkv_bias in arch.qkv_bias,
            "mlp_bias": arch.mlp_bias or not self.mlp_bias,
            "sliding_window": arch.windows != "none" or not self.sliding_window,
            "window_layers": arch.windows != "all" or len(self.window_layers) in (0, self.num_layers),
            "no_rope_layers": arch.no_rope_every > 0 or not self.no_rope_layers,
            "rope_local_theta": bool(self.rope_local_theta) == bool(arch.local_theta and self.window_layers),
            "query_scalar": arch.query_scalar or not self.query_scalar,
            "attn_softcap": arch.attn_softcap or not self.attn_softcap,
            "final_softcap": arch.final_softcap or not self.final_softcap,
        }
        return [f"{name} = {getattr(self, name)} does not fit family {self.family!r}" for name, right in fits.items() if not right]


def from_config(model: Mapping[str, Any], vocab_size: int, **token_ids: Any) -> ModelConfig:
    """A ModelConfig from `config.student.model` and the tokenizer's vocabulary size; what it does not say is the family's own.

    Raises ModelError.
    """
    fields = {**model, "vocab_size": vocab_size, **token_ids}
    arch = FAMILIES.get(str(fields.get("family")))
    if arch is not None:
        layers = int(fields.get("num_layers", 0))
        no_rope = no_rope_by_default(arch, layers)
        windows = windows_by_default(arch, layers, no_rope) if fields.get("sliding_window") else ()
        own = {"qkv_bias": arch.qkv_bias == (True,), "no_rope_layers": no_rope, "window_layers": windows}
        fields = {**own, "rope_local_theta": arch.local_theta if windows else 0.0, **fields}
    return ModelConfig.from_dict(fields)


def no_rope_by_default(arch: Family, num_layers: int, every: int | None = None) -> tuple[int, ...]:
    """Layers without rotary positions: every n-th, n the family's own or `every`."""
    every = arch.no_rope_every if every is None else every
    return tuple(layer for layer in range(num_layers) if every and (layer + 1) % every == 0)


def windows_by_default(arch: Family, num_layers: int, no_rope: Sequence[int], every: int | None = None) -> tuple[int, ...]:
    """Layers with a window: those without rotary positions where a family has such, else all but every n-th."""
    if arch.no_rope_every:
        return tuple(no_rope)
    every = arch.full_every if every is None else every
    return tuple(layer for layer in range(num_layers) if not (every and (layer + 1) % every == 0))
