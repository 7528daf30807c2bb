"""Parameters to a Hugging Face directory, from any mesh; no process holds more than a few tensors.

Where the model is spread over processes, each writes files of its own: a stacked leaf is laid out anew over its layers
(`layer_program`: all-to-all, one whole tensor on each device), and every device's process writes that tensor. The few tensors
that are not stacked (`block_program`) are gathered some rows at a time.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from etils import epath
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.decoder import Params
from dccot_jax.model.hf_config import to_hf
from dccot_jax.model.hf_files import GENERATION_CONFIG, TOKENIZER_FILES, read_json, write_json
from dccot_jax.model.hf_names import Source, tensors
from dccot_jax.model.hf_read import block_rows, file_sharding, row_shards
from dccot_jax.model.safetensors_io import INDEX, SINGLE, SafetensorsFile, safetensors_bytes
from dccot_jax.model.sharding import weight_shapes

EXPORT_DTYPES: Mapping[str, np.dtype] = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
_BLOCK_BYTES = 8 << 20  # of an embedding or head, gathered at a time
_NUMBERED = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


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
    Every process must call it, with a directory that all share. Each writes the weights it owns, at least one file where the model
    is spread over processes; then process 0 the rest, config.json last. The tensors' bytes do not depend on mesh or processes.
    `dtype`: "float32" or "bfloat16". Raises ModelError on another dtype, on parameters whose shapes are not those of `mc`, and
    where process 0 does not see the files of the others.
    """
    if dtype not in EXPORT_DTYPES:
        raise ModelError(f"save_hf: dtype {dtype!r} is not one of {', '.join(EXPORT_DTYPES)}")
    if jax.tree.map(lambda x: tuple(x.shape), params) != weight_shapes(mc):
        raise ModelError("save_hf: the parameters do not have the shapes of the model config")
    out, main, kind = Path(out_dir), jax.process_index() == 0, EXPORT_DTYPES[dtype]
    out.mkdir(parents=True, exist_ok=True)
    if main:
        (out / INDEX).unlink(missing_ok=True)  # of an earlier export; what is written now is whole when it names all files
    spread = not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(params))
    transport = _Transport(params, mc) if spread else None
    files = _files(tensors(mc), transport.owners if transport else {}, kind.itemsize, max_shard_bytes)
    mine = {}
    for file in files:
        if file.owner == jax.process_index():
            written = SafetensorsFile(out / file.name, file.shapes, kind)
            mine |= dict.fromkeys(file.shapes, written)
    if transport:
        transport.send(mine)
    else:
        for name, file in mine.items():
            file.put(name, _on_this_host(params, tensors(mc)[name]))
    _barrier(spread)
    if not main:
        return
    _check_whole(out, files, kind)
    if len(files) > 1:
        weight_map = {name: file.name for file in files for name in file.shapes}
        write_json(out / INDEX, {"metadata": {"total_size": mc.num_params() * kind.itemsize}, "weight_map": weight_map})
    for name in (*TOKENIZER_FILES, GENERATION_CONFIG):
        if tokenizer_dir is not None and (epath.Path(tokenizer_dir) / name).exists():
            (out / name).write_bytes((epath.Path(tokenizer_dir) / name).read_bytes())
    _add_stops(out / GENERATION_CONFIG, mc, stop_ids)
    write_json(out / "config.json", to_hf(mc, dtype))


def on_host(leaf: jax.Array, layer: int | None) -> np.ndarray:
    """One small tensor, gathered to every process: leaf, or leaf[layer]."""
    if leaf.is_fully_addressable:
        return np.asarray(leaf) if layer is None else _pick_local(leaf, layer)
    mesh: Any = _mesh_of(leaf)
    with jax.set_mesh(mesh):
        return np.asarray(_gather(leaf, layer).addressable_data(0))


# --- which file a tensor goes to --------------------------------------------------------------------------------------


@dataclasses.dataclass
class _File:
    """A weight file: the process that writes it, and the shapes of its tensors in order."""

    owner: int
    shapes: dict[str, tuple[int, ...]]
    name: str = ""


def _files(found: Mapping[str, Source], owners: Mapping[str, int], itemsize: int, limit: int) -> list[_File]:
    """Tensors into files of at most `limit` bytes of data (or one tensor), each of one process; the same list on all of them."""
    files: list[_File] = []
    for owner in sorted(set(owners.values())) or [0]:
        room = 0
        for name, source in found.items():
            size = math.prod(source.shape) * itemsize
            if owners.get(name, owner) != owner:
                continue
            if size > room:
                files.append(_File(owner, {}))
                room = max(limit, size)
            files[-1].shapes[name] = source.shape
            room -= size
    for i, file in enumerate(files, 1):
        file.name = SINGLE if len(files) == 1 else f"model-{i:05d}-of-{len(files):05d}.safetensors"
    return files


def _check_whole(out: Path, files: Sequence[_File], dtype: np.dtype) -> None:
    """All files are there; those of an earlier export are not any more."""
    sizes = {file.name: safetensors_bytes(file.shapes, dtype) for file in files}
    absent = [name for name, size in sizes.items() if not (out / name).exists() or (out / name).stat().st_size != size]
    if absent:
        raise ModelError(f"save_hf: {out} lacks {', '.join(absent[:5])}, which other processes wrote; give a directory that all share")
    for path in out.glob("model*.safetensors"):
        if path.name not in sizes and (path.name == SINGLE or _NUMBERED.fullmatch(path.name)):
            path.unlink()


def _barrier(needed: bool) -> None:
    if needed:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices("save_hf")


# --- tensors to the processes that write them -------------------------------------------------------------------------


class _Transport:
    """Who writes which tensor of a model that is spread over processes, and the sending of it.

    owners: tensor name -> process. The layers of all leaves are dealt out to the devices in turn.
    """

    def __init__(self, params: Params, mc: ModelConfig):
        self._layers, self._tops = params["layers"], {name: leaf for name, leaf in params.items() if name != "layers"}
        self._mesh = _mesh_of(params["embed"])
        self._names = {(source.name, source.layer): name for name, source in tensors(mc).items()}
        self._sources = tensors(mc)
        self._devices = self._mesh.size
        over_layers = NamedSharding(self._mesh, P(self._mesh.axis_names))
        places = over_layers.devices_indices_map((self._devices,))
        process = {index[0].indices(self._devices)[0]: device.process_index for device, index in places.items()}
        self._slots: dict[tuple[str, int | None], int] = {}
        for name, leaf in self._layers.items():
            self._slots |= {(name, layer): len(self._slots) + layer for layer in range(leaf.shape[0])}
        self._slots |= {(name, None): len(self._slots) + i for i, name in enumerate(self._tops)}
        self._slots = {key: slot % self._devices for key, slot in self._slots.items()}
        self.owners = {name: process[self._slots[key]] for key, name in self._names.items()}

    def send(self, mine: Mapping[str, SafetensorsFile], block_bytes: int = _BLOCK_BYTES) -> None:
        """Move every tensor to its owner; it puts it into `mine`. Every process calls this. block_bytes: of what is not stacked."""
        for name, leaf in self._layers.items():
            for first in range(0, leaf.shape[0], self._devices):
                self._send_layers(name, leaf, range(first, min(first + self._devices, leaf.shape[0])), mine)
        for name, leaf in self._tops.items():
            self._send_rows(name, leaf, mine, block_bytes)

    def _send_layers(self, name: str, leaf: jax.Array, layers: range, mine: Mapping[str, SafetensorsFile]) -> None:
        layer_at = {self._slots[name, layer]: layer for layer in layers}
        wanted = np.array([layer_at.get(slot, layers[0]) for slot in range(self._devices)], np.int32)
        sent = layer_program(_named(leaf))(leaf, wanted)
        for shard in sent.addressable_shards:
            layer = layer_at.get(shard.index[0].indices(self._devices)[0])
            if layer is not None:
                tensor = self._names[name, layer]
                array = np.asarray(shard.data)[0]
                mine[tensor].put(tensor, array.T if self._sources[tensor].transposed else array)

    def _send_rows(self, name: str, leaf: jax.Array, mine: Mapping[str, SafetensorsFile], block_bytes: int) -> None:
        tensor = self._names[name, None]
        shape, transposed = self._sources[tensor].shape, self._sources[tensor].transposed
        sharding = _named(leaf)
        theirs = file_sharding(sharding, leaf.ndim, leaf.ndim, transposed)
        shards = row_shards(theirs)
        for first, count in block_rows(shape, leaf.dtype.itemsize, theirs, block_bytes):
            block = block_program(sharding, leaf.ndim, count, transposed)(leaf, np.int32(first))
            block.block_until_ready()
            if tensor in mine:
                rows = np.asarray(block.addressable_data(0))
                for shard in range(shards):
                    mine[tensor].put(tensor, rows[shard * count : (shard + 1) * count], shard * (shape[0] // shards) + first)


@functools.lru_cache(maxsize=64)
def layer_program(sharding: NamedSharding) -> Callable[[jax.Array, np.ndarray], jax.Array]:
    """(leaf [L, ...], layers int32 [n]) -> [n, ...]: layer `layers[i]` whole on device i of the mesh's n, in the order of its axes.

    Only all-to-all, each device sends and receives one tensor; an axis over which the leaf is replicated moves nothing.
    """
    mesh, dims = sharding.mesh, {axis: dim for dim, axis in enumerate(sharding.spec) if axis is not None}
    if any(isinstance(axis, tuple) for axis in dims) or 0 in dims.values():
        raise ModelError(f"save_hf: a stacked leaf laid out as {sharding.spec}; one mesh axis per dimension and none for layers is needed")

    def local(leaf: jax.Array, layers: jax.Array) -> jax.Array:
        x = leaf[layers]
        for axis in mesh.axis_names:
            if axis in dims:
                x = jax.lax.all_to_all(x, axis, split_axis=0, concat_axis=dims[axis], tiled=True)
            else:
                count = x.shape[0] // mesh.shape[axis]
                x = jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(axis) * count, count)
        return x

    return jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(sharding.spec, P(None)), out_specs=P(mesh.axis_names)))


@functools.lru_cache(maxsize=64)
def block_program(sharding: NamedSharding, ndim: int, count: int, transposed: bool) -> Callable[[jax.Array, Any], jax.Array]:
    """(leaf, first) -> `count` rows, from row `first` on, of every device's shard, as the file keeps them, on every device."""

    def local(leaf: jax.Array, first: jax.Array) -> jax.Array:
        rows = jax.lax.dynamic_slice_in_dim(leaf, first, count, axis=ndim - 1 if transposed else 0)
        return rows.T if transposed else rows

    theirs = file_sharding(sharding, ndim, ndim, transposed)
    cut = jax.shard_map(local, mesh=sharding.mesh, in_specs=(sharding.spec, P()), out_specs=theirs.spec)
    whole = NamedSharding(sharding.mesh, P(*(None,) * ndim))
    return jax.jit(lambda leaf, first: jax.reshard(cut(leaf, first), whole))


def _mesh_of(leaf: jax.Array) -> Mesh:
    mesh = _named(leaf).mesh
    assert isinstance(mesh, Mesh)
    return mesh


def _named(leaf: jax.Array) -> NamedSharding:
    if not isinstance(leaf.sharding, NamedSharding):
        raise ModelError(f"save_hf: a leaf over several processes has {type(leaf.sharding).__name__}; NamedSharding is needed")
    return leaf.sharding


@jax.jit
def _gather(leaf: jax.Array, layer: int | None) -> jax.Array:
    picked = leaf if layer is None else jax.lax.dynamic_index_in_dim(leaf, layer, keepdims=False)
    return jax.reshard(picked, P(*(None,) * picked.ndim))


def _on_this_host(params: Params, source: Source) -> np.ndarray:
    """A tensor of a model that this process holds whole, as torch keeps it."""
    array = on_host(params[source.name] if source.layer is None else params["layers"][source.name], source.layer)
    return array.T if source.transposed else array


def _pick_local(leaf: jax.Array, layer: int) -> np.ndarray:
    out = np.empty(leaf.shape[1:], leaf.dtype)
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            out[shard.index[1:]] = np.asarray(shard.data[layer])
    return out


# --- the rest of the directory ----------------------------------------------------------------------------------------


def _add_stops(path: Path, mc: ModelConfig, stop_ids: Sequence[int]) -> None:
    """Make a generation_config.json list every token that ends a reply; one that does stays as its authors wrote it."""
    fields = read_json(path) if path.exists() else {"bos_token_id": mc.bos_token_id, "pad_token_id": mc.pad_token_id}
    listed = fields.get("eos_token_id")
    listed = [] if listed is None else listed if isinstance(listed, list) else [listed]
    stops = list(dict.fromkeys((*listed, *mc.eos_token_ids, *stop_ids)))
    if stops != listed:
        write_json(path, {**fields, "eos_token_id": stops[0] if len(stops) == 1 else stops})
