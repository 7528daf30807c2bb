"""GGUF files (llama.cpp): metadata, and de-quantised slices of tensors under their Hugging Face names.

What llama.cpp's converter does to the weights is undone: rows of q and k of the architecture "llama" are interleaved within each
head there (its rotary positions pair neighbours), and Gemma's norms hold 1 + w. Needs the extra ``gguf``.
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.hf_names import Source, tensors

# Our name -> theirs; a layer's is prefixed by its block.
TENSORS: Mapping[str, str] = {
    "embed": "token_embd.weight",
    "final_norm": "output_norm.weight",
    "head": "output.weight",
    "attn_norm": "attn_norm.weight",
    "wq": "attn_q.weight",
    "wk": "attn_k.weight",
    "wv": "attn_v.weight",
    "bq": "attn_q.bias",
    "bk": "attn_k.bias",
    "bv": "attn_v.bias",
    "q_norm": "attn_q_norm.weight",
    "k_norm": "attn_k_norm.weight",
    "wo": "attn_output.weight",
    "bo": "attn_output.bias",
    "attn_post_norm": "post_attention_norm.weight",
    "mlp_norm": "ffn_norm.weight",
    "w_gate": "ffn_gate.weight",
    "w_up": "ffn_up.weight",
    "w_down": "ffn_down.weight",
    "b_gate": "ffn_gate.bias",
    "b_up": "ffn_up.bias",
    "b_down": "ffn_down.bias",
    "mlp_post_norm": "post_ffw_norm.weight",
}
ROPE_FACTORS = "rope_freqs.weight"  # by what each rotary wavelength is stretched; read into the config
INTERLEAVED = ("wq", "wk", "bq", "bk")  # in the architecture "llama"


class GgufTensor(NamedTuple):
    """One tensor: its shape as torch keeps it, its ggml type, and a memory map of its rows."""

    shape: tuple[int, ...]
    kind: Any
    data: np.ndarray


class GgufFile(NamedTuple):
    """metadata: plain values by key. tensors: by llama.cpp's names."""

    metadata: dict[str, Any]
    tensors: dict[str, GgufTensor]


def is_gguf(path: str | os.PathLike) -> bool:
    """Whether a path names a GGUF file."""
    return str(path).endswith(".gguf")


def open_gguf(path: str | os.PathLike) -> GgufFile:
    """Metadata and tensor table of a file; nothing of the tensors is read.

    Raises ModelError: no such file, one that does not read, one part of several, a tensor type that cannot be de-quantised, or the
    package gguf is missing.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise ModelError(f"{file}: no such file")
    about = file.stat()
    return _open(str(file), about.st_mtime_ns, about.st_size)


class GgufReader:
    """Slices of the tensors of a GGUF file, in float32, named and laid out as in a Hugging Face directory of the model `mc`.

    Attributes:
      bytes_read: bytes of the file fetched per tensor name, for tests and for progress.
    """

    def __init__(self, path: str | os.PathLike, mc: ModelConfig):
        """Raises ModelError as `open_gguf` does."""
        self.bytes_read: Counter[str] = Counter()
        self._mc = mc
        found = dict(open_gguf(path).tensors)
        if mc.rope_scaling is not None and mc.rope_scaling.kind == "llama3":
            found.pop(ROPE_FACTORS, None)
        self._sources: dict[str, Source] = {}
        self._tensors: dict[str, GgufTensor] = {}
        for name, source in tensors(mc).items():
            theirs = TENSORS[source.name] if source.layer is None else f"blk.{source.layer}.{TENSORS[source.name]}"
            if theirs in found:
                self._sources[name], self._tensors[name] = source, found.pop(theirs)
        self._tensors |= found  # what the model does not have keeps the name it has there

    @property
    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._tensors[name].shape

    def dtype(self, name: str) -> np.dtype:
        return np.dtype(np.float32)

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A copy of tensor[index] in float32; of a matrix only the rows and quantisation blocks that hold it are read."""
        tensor, source = self._tensors[name], self._sources[name]
        rows = np.arange(*index[0].indices(tensor.shape[0]))
        if self._mc.family == "llama" and source.name in INTERLEAVED:
            rows = _interleaved(rows, self._mc.head_dim)
        if len(tensor.shape) == 1:
            values = self._values(name, tensor, tensor.data)[rows]
        else:
            first, last = (index[1].indices(tensor.shape[1]))[:2]
            block, width = _block(tensor.kind)
            if tensor.data.dtype != np.uint8:  # one element of the map is one value
                block = width = 1
            start = first // block
            held = tensor.data[rows, start * width : -(-last // block) * width]
            values = self._values(name, tensor, held)[:, first - start * block : last - start * block]
        return values - np.float32(1) if self._mc.arch.norm_offset and source.name.endswith("norm") else values

    def _values(self, name: str, tensor: GgufTensor, held: np.ndarray) -> np.ndarray:
        import gguf

        data = np.ascontiguousarray(held)
        self.bytes_read[name] += data.nbytes
        return gguf.dequantize(data, tensor.kind)


def _interleaved(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Where rows (head, half, i) of transformers lie in the file: (head, i, half)."""
    head, inside = np.divmod(rows, head_dim)
    half, i = np.divmod(inside, head_dim // 2)
    return head * head_dim + 2 * i + half


@functools.lru_cache(maxsize=2)  # a run asks several times, and the vocabulary takes seconds
def _open(path: str, _modified: int, _size: int) -> GgufFile:
    try:
        import gguf
    except ImportError:
        raise ModelError(f"{path}: reading GGUF files needs the package gguf: pip install 'dccot-jax[gguf]'") from None
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, KeyError, IndexError) as error:
        why = " ".join(str(error).split())
        raise ModelError(f"{path}: does not read as GGUF ({why}); it is damaged, or newer than the package gguf knows") from None
    metadata = {name: _value(field) for name, field in reader.fields.items()}
    problems = []
    if reader.byte_order != "I":
        problems.append("it was written for the other byte order")
    if (metadata.get("split.count") or 1) > 1:
        problems.append(f"split.count = {metadata['split.count']}: it is one part of several; merge them first (llama-gguf-split --merge)")
    found = {t.name: GgufTensor(tuple(int(n) for n in reversed(t.shape)), t.tensor_type, t.data) for t in reader.tensors}
    for kind in sorted({tensor.kind for tensor in found.values()}):
        if not _known(kind):
            name = next(name for name, tensor in found.items() if tensor.kind == kind)
            problems.append(f"{name} has type {kind.name}, which the package gguf does not de-quantise")
    if problems:
        raise ModelError(f"{path}: " + "; ".join(problems))
    return GgufFile(metadata, found)


def _value(field: Any) -> Any:
    """A plain value; a float32 as the decimal number it was written from (1e-6, not 9.99999997e-7)."""
    value = field.contents()
    return float(str(np.float32(value))) if isinstance(value, float) and field.types[0].name == "FLOAT32" else value


def _block(kind: Any) -> tuple[int, int]:
    """Values per quantisation block, and its bytes."""
    import gguf

    return gguf.GGML_QUANT_SIZES[kind]


def _known(kind: Any) -> bool:
    import gguf

    try:
        gguf.dequantize(np.zeros((1, _block(kind)[1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True
