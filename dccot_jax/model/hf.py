"""Hugging Face directories and GGUF files to parameters, and back to Hugging Face directories (`save_hf`)."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.decoder import Params
from dccot_jax.model.gguf_config import read_gguf_config
from dccot_jax.model.gguf_io import GgufReader, is_gguf
from dccot_jax.model.hf_config import from_hf
from dccot_jax.model.hf_export import save_hf as save_hf
from dccot_jax.model.hf_files import GENERATION_CONFIG, read_json
from dccot_jax.model.hf_names import TOP, layer_name, tensors, transposed
from dccot_jax.model.hf_read import Reader, default_block_bytes, read_leaf
from dccot_jax.model.safetensors_io import TensorReader
from dccot_jax.model.sharding import param_shardings, weight_shapes


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory or a GGUF file.

    Raises ModelError: no config.json, one that does not read, or a model that cannot be represented.
    """
    if is_gguf(path):
        return read_gguf_config(path)
    file = Path(path) / "config.json"
    if not file.exists():
        raise ModelError(f"no config.json in {path}; not a Hugging Face model directory")
    fields = read_json(file)
    generation = Path(path) / GENERATION_CONFIG
    if generation.exists():
        # Where the two differ, generation_config.json lists every token that ends an answer.
        eos = read_json(generation).get("eos_token_id")
        fields = {**fields, "eos_token_id": fields.get("eos_token_id") if eos is None else eos}
    return from_hf(fields)


def load_hf(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    *,
    dtype: Any = jnp.float32,
    reader: Reader | None = None,
    block_bytes: int = 0,
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face directory or a GGUF file into parameters of `dtype`, see `hf_read`.

    Args:
      mesh: where the parameters go, see `param_shardings`; None: the default device.
      reader: for tests that count bytes; defaults to a new reader of the path. block_bytes: see `read_leaf`; 0: by the model's size.

    Raises:
      ModelError: an unsupported config, or missing, misshapen and unexpected tensors: the first of each kind and their number.
    """
    mc = read_config(path)
    reader = reader or open_weights(path, mc)
    _check(path, mc, reader)
    shapes = weight_shapes(mc)
    if not block_bytes:
        sizes = (math.prod(shape) * reader.dtype(layer_name(mc, 0, name)).itemsize for name, shape in shapes["layers"].items())
        block_bytes = default_block_bytes(max(sizes))
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings: Any = jax.tree.map(lambda _: single, shapes, is_leaf=lambda x: isinstance(x, tuple))
    else:
        shardings = param_shardings(mc, mesh)

    def leaf(name: str, names: list[str], shape: tuple[int, ...], sharding: Any) -> jax.Array:
        return read_leaf(reader, names, shape, sharding, dtype, transposed=transposed(name), block_bytes=block_bytes)

    layers = {}
    for name, shape in shapes["layers"].items():
        names = [layer_name(mc, layer, name) for layer in range(mc.num_layers)]
        layers[name] = leaf(name, names, shape, shardings["layers"][name])
    params: Params = {"layers": layers}
    for name in (name for name in shapes if name != "layers"):
        params[name] = leaf(name, [TOP[name][0]], shapes[name], shardings[name])
    return mc, params


def check_weights(path: str | os.PathLike, mc: ModelConfig) -> None:
    """Raises ModelError unless the files hold the tensors of `mc`, whole; headers and sizes are looked at, no weights."""
    _check(path, mc, open_weights(path, mc))


def open_weights(path: str | os.PathLike, mc: ModelConfig) -> Reader:
    """Raises ModelError if the files do not read."""
    if is_gguf(path):
        return GgufReader(path, mc)
    return TensorReader(path)


def _check(path: str | os.PathLike, mc: ModelConfig, reader: Reader) -> None:
    expected = tensors(mc)
    missing = [f"{name} is missing" for name in expected if name not in reader.names]
    misshapen = [
        f"{name} has shape {list(reader.shape(name))}, the config says {list(source.shape)}"
        for name, source in expected.items()
        if name in reader.names and reader.shape(name) != source.shape
    ]
    # Old exports carry the rotary frequencies, and some tied models a copy of their table: neither is read by transformers.
    ignored = {TOP["head"][0]} if mc.tie_embeddings else set()
    extra = sorted(name for name in reader.names - expected.keys() - ignored if not name.endswith("rotary_emb.inv_freq"))
    kinds = [kind for kind in (missing, misshapen, [f"{name} is unexpected" for name in extra]) if kind]
    if kinds:
        said = (kind[0] + (f" (and {len(kind) - 1:,} more like it)" if kind[1:] else "") for kind in kinds)
        raise ModelError(f"{path}: " + "; ".join(said))
