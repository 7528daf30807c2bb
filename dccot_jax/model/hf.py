"""Hugging Face import and export.

Import reads every device's slice of every tensor straight from the safetensors files into the target sharding: no
process holds a whole array where it should hold a shard. Export streams one tensor at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.decoder import Params
from dccot_jax.model.hf_config import from_hf, to_hf
from dccot_jax.model.hf_files import GENERATION_CONFIG, TOKENIZER_FILES
from dccot_jax.model.safetensors_io import INDEX, SINGLE, TensorReader, write_safetensors
from dccot_jax.model.sharding import param_shardings, weight_shapes

# Our name -> (Hugging Face name, transposed). torch keeps a projection as [out, in], we keep [in, out].
TOP: Mapping[str, tuple[str, bool]] = {
    "embed": ("model.embed_tokens.weight", False),
    "final_norm": ("model.norm.weight", False),
    "head": ("lm_head.weight", True),
}
LAYER: Mapping[str, tuple[str, bool]] = {
    "attn_norm": ("input_layernorm.weight", False),
    "wq": ("self_attn.q_proj.weight", True),
    "wk": ("self_attn.k_proj.weight", True),
    "wv": ("self_attn.v_proj.weight", True),
    "bq": ("self_attn.q_proj.bias", False),
    "bk": ("self_attn.k_proj.bias", False),
    "bv": ("self_attn.v_proj.bias", False),
    "q_norm": ("self_attn.q_norm.weight", False),
    "k_norm": ("self_attn.k_norm.weight", False),
    "wo": ("self_attn.o_proj.weight", True),
    "bo": ("self_attn.o_proj.bias", False),
    "mlp_norm": ("post_attention_layernorm.weight", False),
    "w_gate": ("mlp.gate_proj.weight", True),
    "w_up": ("mlp.up_proj.weight", True),
    "w_down": ("mlp.down_proj.weight", True),
    "b_gate": ("mlp.gate_proj.bias", False),
    "b_up": ("mlp.up_proj.bias", False),
    "b_down": ("mlp.down_proj.bias", False),
}
# Where there are norms on both sides, theirs have other names: what they call "post_attention" is then just that.
POST_NORMS: Mapping[str, str] = {
    "attn_post_norm": "post_attention_layernorm.weight",
    "mlp_norm": "pre_feedforward_layernorm.weight",
    "mlp_post_norm": "post_feedforward_layernorm.weight",
}
EXPORT_DTYPES: Mapping[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def read_config(path: str | os.PathLike) -> ModelConfig:
    """The ModelConfig of a Hugging Face directory. Raises ModelError: no config.json, one that does not read, or cannot be represented."""
    file = Path(path) / "config.json"
    if not file.exists():
        raise ModelError(f"no config.json in {path}; not a Hugging Face model directory")
    fields = _read_json(file)
    generation = Path(path) / GENERATION_CONFIG
    if generation.exists():
        # Where the two differ, generation_config.json lists every token that ends an answer.
        eos = _read_json(generation).get("eos_token_id")
        fields = {**fields, "eos_token_id": fields.get("eos_token_id") if eos is None else eos}
    return from_hf(fields)


def load_hf(
    path: str | os.PathLike, mesh: Mesh | None = None, *, dtype: Any = jnp.float32, reader: TensorReader | None = None
) -> tuple[ModelConfig, Params]:
    """Read a Hugging Face directory into parameters of `dtype`.

    Args:
      mesh: where the parameters go, see `param_shardings`; None: the default device.
      reader: for tests that count bytes; defaults to a new TensorReader(path).

    Raises:
      ModelError: an unsupported config, or missing, unexpected and misshapen tensors, all named together.
    """
    mc = read_config(path)
    reader = reader or TensorReader(path)
    _check(mc, reader)
    shapes = weight_shapes(mc)
    if mesh is None:
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        shardings: Any = jax.tree.map(lambda _: single, shapes, is_leaf=lambda x: isinstance(x, tuple))
    else:
        shardings = param_shardings(mc, mesh)
    layers = {}
    for name, shape in shapes["layers"].items():
        names = [_layer_name(mc, layer, name) for layer in range(mc.num_layers)]
        layers[name] = _read(reader, names, _transposed(name), shape, shardings["layers"][name], dtype, stacked=True)
    params: Params = {"layers": layers}
    for name in shapes.keys() - {"layers"}:
        hf_name, transposed = TOP[name]
        params[name] = _read(reader, [hf_name], transposed, shapes[name], shardings[name], dtype, stacked=False)
    return mc, params


def save_hf(
    params: Params,
    mc: ModelConfig,
    tokenizer_dir: str | os.PathLike | None,
    out_dir: str | os.PathLike,
    *,
    dtype: str = "float32",
    max_shard_bytes: int = 4 << 30,
    stop_ids: Sequence[int] = (),
) -> None:
    """Write a directory that `transformers` loads: configs, safetensors (several files beyond `max_shard_bytes`), tokenizer.

    generation_config.json is the one beside the tokenizer, where there is one, and names the model's eos tokens and `stop_ids`.
    Every process must call it; process 0 writes. `dtype`: "float32" or "bfloat16". Raises ModelError on another dtype or
    on parameters whose shapes are not those of `mc`.
    """
    if dtype not in EXPORT_DTYPES:
        raise ModelError(f"save_hf: dtype {dtype!r} is not one of {', '.join(EXPORT_DTYPES)}")
    shapes = weight_shapes(mc)
    if jax.tree.map(lambda x: tuple(x.shape), params) != shapes:
        raise ModelError("save_hf: the parameters do not have the shapes of the model config")
    out = Path(out_dir)
    main = jax.process_index() == 0
    groups = _export_groups(mc, EXPORT_DTYPES[dtype].itemsize, max_shard_bytes)
    files = [SINGLE] if len(groups) == 1 else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    if main:
        out.mkdir(parents=True, exist_ok=True)
    for file, group in zip(files, groups):
        tensors = _export_tensors(params, group, EXPORT_DTYPES[dtype])
        if main:
            write_safetensors(out / file, {name: shape for name, shape, _ in group}, EXPORT_DTYPES[dtype], tensors)
        else:  # takes part in the gathers
            for _ in tensors:
                pass
    if not main:
        return
    if len(groups) > 1:
        weight_map = {name: file for file, group in zip(files, groups) for name, _, _ in group}
        write_json(out / INDEX, {"metadata": {"total_size": mc.num_params() * EXPORT_DTYPES[dtype].itemsize}, "weight_map": weight_map})
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if tokenizer_dir is not None and (epath.Path(tokenizer_dir) / name).exists():
            (out / name).write_bytes((epath.Path(tokenizer_dir) / name).read_bytes())
    _add_stops(out / GENERATION_CONFIG, mc, stop_ids)
    write_json(out / "config.json", to_hf(mc, dtype))


def _add_stops(path: Path, mc: ModelConfig, stop_ids: Sequence[int]) -> None:
    """Make a generation_config.json list every token that ends a reply; one that does stays as its authors wrote it."""
    fields = _read_json(path) if path.exists() else {"bos_token_id": mc.bos_token_id, "pad_token_id": mc.pad_token_id}
    listed = fields.get("eos_token_id")
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    stops = list(dict.fromkeys((*listed, *mc.eos_token_ids, *stop_ids)))
    if stops != listed:
        write_json(path, {**fields, "eos_token_id": stops[0] if len(stops) == 1 else stops})


def _layer_name(mc: ModelConfig, layer: int, name: str) -> str:
    inner = POST_NORMS[name] if mc.arch.post_norms and name in POST_NORMS else LAYER[name][0]
    return f"model.layers.{layer}.{inner}"


def _transposed(name: str) -> bool:
    return name in LAYER and LAYER[name][1]


def _expected(mc: ModelConfig) -> dict[str, tuple[tuple[int, ...], tuple[str, int | None]]]:
    """Hugging Face name -> (torch shape, (our name, layer or None)), in file order."""
    shapes = weight_shapes(mc)
    found = {}
    for name in ("embed", "layers", "final_norm", "head"):
        if name == "layers":
            for layer in range(mc.num_layers):
                for inner, (_, *shape) in shapes["layers"].items():
                    found[_layer_name(mc, layer, inner)] = (tuple(shape[::-1] if _transposed(inner) else shape), (inner, layer))
        elif name in shapes:
            found[TOP[name][0]] = (tuple(shapes[name][::-1] if TOP[name][1] else shapes[name]), (name, None))
    return found


def _check(mc: ModelConfig, reader: TensorReader) -> None:
    expected = _expected(mc)
    problems = [f"{name} is missing" for name in expected if name not in reader.names]
    problems += [
        f"{name} has shape {list(reader.shape(name))}, the config says {list(shape)}"
        for name, (shape, _) in expected.items()
        if name in reader.names and reader.shape(name) != shape
    ]
    # Old exports carry the rotary frequencies, and some tied models a copy of their table: neither is read by transformers.
    ignored = {TOP["head"][0]} if mc.tie_embeddings else set()
    extra = sorted(name for name in reader.names - expected.keys() - ignored if not name.endswith("rotary_emb.inv_freq"))
    problems += [f"{name} is unexpected" for name in extra]
    if problems:
        shown = problems[:20] + ([f"and {len(problems) - 20} more"] if len(problems) > 20 else [])
        raise ModelError(f"{reader.directory}: " + "; ".join(shown))


def _read(
    reader: TensorReader, names: list[str], transposed: bool, shape: tuple[int, ...], sharding: Any, dtype: Any, *, stacked: bool
) -> jax.Array:
    """One parameter leaf; each distinct slice that this process's devices need is read once."""
    seen: dict[tuple, np.ndarray] = {}

    def fetch(index: Any) -> np.ndarray:
        bounds = tuple(axis.indices(size)[:2] for axis, size in zip(index, shape, strict=True))
        if bounds not in seen:
            seen[bounds] = assemble(tuple(slice(*pair) for pair in bounds))
        return seen[bounds]

    def assemble(index: tuple[slice, ...]) -> np.ndarray:
        inner = index[1:] if stacked else index
        wanted = inner[::-1] if transposed else inner
        parts = names[index[0]] if stacked else names
        out = np.empty((len(parts), *(axis.stop - axis.start for axis in inner)), dtype)
        for i, name in enumerate(parts):
            part = reader.read(name, wanted)
            out[i] = part.T if transposed else part
        return out if stacked else out[0]

    return jax.make_array_from_callback(shape, sharding, fetch)


def _export_groups(mc: ModelConfig, itemsize: int, limit: int) -> list[list[tuple[str, tuple[int, ...], tuple[str, int | None]]]]:
    groups: list[list[tuple[str, tuple[int, ...], tuple[str, int | None]]]] = [[]]
    used = 0
    for name, (shape, source) in _expected(mc).items():
        size = int(np.prod(shape)) * itemsize
        if groups[-1] and used + size > limit:
            groups.append([])
            used = 0
        groups[-1].append((name, shape, source))
        used += size
    return groups


def _export_tensors(params: Params, group: list[tuple[str, tuple[int, ...], tuple[str, int | None]]], dtype: np.dtype) -> Iterator[Any]:
    for hf_name, _, (name, layer) in group:
        leaf = params[name] if layer is None else params["layers"][name]
        array = on_host(leaf, layer).astype(dtype)
        transposed = TOP[name][1] if layer is None else _transposed(name)
        yield hf_name, array.T if transposed else array


def on_host(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """One tensor, gathered to every process: leaf, or leaf[layer]."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf) if layer is None else _pick_local(leaf, layer)
    if not isinstance(leaf.sharding, NamedSharding):
        raise ModelError(f"save_hf: a leaf over several processes has {type(leaf.sharding).__name__}; NamedSharding is needed")
    mesh: Any = leaf.sharding.mesh
    with jax.set_mesh(mesh):
        return np.asarray(_gather(leaf, layer).addressable_data(0))


@jax.jit
def _gather(leaf: jax.Array, layer: int | None) -> jax.Array:
    picked = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jax.reshard(picked, P(*(None,) * picked.ndim))


def _pick_local(leaf: jax.Array, layer: int) -> np.ndarray:
    out = np.empty(leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index[1:]] = np.asarray(shard.data[layer])
    return out


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise ModelError(f"{path}: not JSON ({error})") from None


def write_json(path: Path, value: Any) -> None:
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n")
    os.replace(beside, path)
