"""Meshes, and the one table from weight name to mesh axes.

All axes are Explicit: a gradient has exactly its parameter's sharding, and the all-gather of a weight before its use is
a visible `reshard`. Outside a mesh, or in one with Auto axes, the helpers here do nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from dccot_jax.model.config import ADAPTED, ModelConfig
from dccot_jax.records import InputError

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # mesh axes over which rows of a batch are spread

# Axes of each weight as it is stored; layers are stacked in front of these dimensions.
# D hidden, F intermediate, V vocabulary, N query heads, K key/value heads, H head size.
_STORED: Mapping[str, tuple[str | None, ...]] = {
    "embed": ("tensor", "fsdp"),  # [V, D]
    "head": ("fsdp", "tensor"),  # [D, V], absent where tied
    "final_norm": (None,),  # [D]
    "attn_norm": (None,),  # [D]
    "wq": ("fsdp", "tensor"),  # [D, N*H]
    "wk": ("fsdp", "tensor"),  # [D, K*H]
    "wv": ("fsdp", "tensor"),  # [D, K*H]
    "bq": ("tensor",),  # [N*H]
    "bk": ("tensor",),  # [K*H]
    "bv": ("tensor",),  # [K*H]
    "q_norm": (None,),  # [H]
    "k_norm": (None,),  # [H]
    "wo": ("tensor", "fsdp"),  # [N*H, D]
    "bo": (None,),  # [D]
    "attn_post_norm": (None,),  # [D]
    "mlp_norm": (None,),  # [D]
    "w_gate": ("fsdp", "tensor"),  # [D, F]
    "w_up": ("fsdp", "tensor"),  # [D, F]
    "w_down": ("tensor", "fsdp"),  # [F, D]
    "b_gate": ("tensor",),  # [F]
    "b_up": ("tensor",),  # [F]
    "b_down": (None,),  # [D]
    "mlp_post_norm": (None,),  # [D]
}
# A low-rank adapter is laid out as the matrix it belongs to: A [D, r] as its rows, B [r, F] as its columns.
WEIGHT_AXES: Mapping[str, tuple[str | None, ...]] = {
    **_STORED,
    **{f"{name}_a": (_STORED[name][0], None) for name in ADAPTED},
    **{f"{name}_b": (None, _STORED[name][-1]) for name in ADAPTED},
}


class MeshError(InputError):
    """Mesh sizes that cannot be, or that do not fit the devices."""


def make_mesh(sizes: Mapping[str, int], devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with Explicit axes (data, fsdp, tensor).

    On several TPU slices `data` runs over them, and fsdp and tensor stay inside one: only sums of gradients cross the data-centre
    network. Devices of other platforms are ordered by host (`slice_index`), so that the inner axes stay inside one where they fit.

    Args:
      sizes: devices per axis; a missing axis is 1, and one axis may be -1: all remaining devices.
      devices: defaults to all devices of all processes; those of one slice are taken in the order given.

    Raises:
      MeshError: an unknown axis, two axes of -1, sizes that do not multiply to the number of devices, or a `data` that is not a
        multiple of the number of slices.
    """
    found = list(jax.devices() if devices is None else devices)
    slices = slice_count(found)
    shape = mesh_shape(sizes, len(found), slices)
    if slices > 1:
        inside = (shape[0] // slices, *shape[1:])
        placed = mesh_utils.create_hybrid_device_mesh(inside, (slices, 1, 1), found, allow_split_physical_axes=True)
    elif devices is None and found[0].platform == "tpu":
        placed = mesh_utils.create_device_mesh(shape, found, allow_split_physical_axes=True)
    elif devices is None:  # not jax.make_mesh, which refuses devices of several hosts
        placed = np.array(sorted(found, key=lambda device: (getattr(device, "slice_index", 0), device.id))).reshape(shape)
    else:
        placed = np.array(found).reshape(shape)
    return Mesh(placed, AXES, axis_types=(AxisType.Explicit,) * len(AXES))


def slice_count(devices: Sequence[Any] | None = None) -> int:
    """TPU slices that the devices (default: all of all processes) are of; 1 on other platforms.

    Raises MeshError where the slices have different numbers of devices.
    """
    found = list(jax.devices() if devices is None else devices)
    members = Counter(getattr(device, "slice_index", 0) for device in found if device.platform == "tpu")
    if len(set(members.values())) > 1:
        sizes = ", ".join(str(members[index]) for index in sorted(members))
        raise MeshError(f"mesh: the slices have {sizes} devices; they must be equal")
    return max(len(members), 1)


def mesh_shape(sizes: Mapping[str, int], devices: int | None = None, slices: int = 1) -> tuple[int, ...]:
    """Devices per axis, in the order of AXES; with `devices` None only what holds for any number of devices is checked.

    slices: TPU slices that the devices are of (`slice_count`). Raises MeshError as `make_mesh` does.
    """
    unknown = sorted(set(sizes) - set(AXES))
    if unknown:
        raise MeshError(f"mesh: unknown axis {', '.join(unknown)}; the axes are {', '.join(AXES)}")
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise MeshError(f"mesh: sizes {dict(sizes)} must be at least 1, and at most one may be -1")
    if devices is None:
        return tuple(shape)
    if -1 in shape:
        rest = math.prod(size for size in shape if size != -1)
        if devices % rest:
            raise MeshError(f"mesh: {devices} devices cannot be split by {dict(sizes)}")
        shape[shape.index(-1)] = devices // rest
    if math.prod(shape) != devices:
        raise MeshError(f"mesh: {dict(sizes)} needs {math.prod(shape)} devices, {devices} are there")
    if shape[0] % slices:
        raise MeshError(
            f"mesh: {dict(sizes)} on {slices} slices of {devices // slices} devices: data = {shape[0]} must be a multiple of {slices},"
            f" so that fsdp × tensor = {shape[1]} × {shape[2]} stays inside a slice, such as mesh.data={slices} mesh.fsdp=-1"
        )
    return tuple(shape)


def weight_shapes(mc: ModelConfig) -> dict[str, Any]:
    """Shapes of all parameters, in the tree that `init_params` and `load_hf` return."""
    d, f, n, k, h = mc.hidden_size, mc.intermediate_size, mc.num_heads * mc.head_dim, mc.num_kv_heads * mc.head_dim, mc.num_layers
    layers: dict[str, tuple[int, ...]] = {"attn_norm": (h, d), "wq": (h, d, n), "wk": (h, d, k), "wv": (h, d, k)}
    if mc.qkv_bias:
        layers |= {"bq": (h, n), "bk": (h, k), "bv": (h, k)}
    if mc.arch.qk_norm:
        layers |= {"q_norm": (h, mc.head_dim), "k_norm": (h, mc.head_dim)}
    layers |= {"wo": (h, n, d), "mlp_norm": (h, d), "w_gate": (h, d, f), "w_up": (h, d, f), "w_down": (h, f, d)}
    if mc.o_bias:
        layers |= {"bo": (h, d)}
    if mc.mlp_bias:
        layers |= {"b_gate": (h, f), "b_up": (h, f), "b_down": (h, d)}
    if mc.arch.post_norms:
        layers |= {"attn_post_norm": (h, d), "mlp_post_norm": (h, d)}
    if mc.lora is not None:
        for name in mc.lora.targets:
            _, rows, columns = layers[name]
            layers |= {f"{name}_a": (h, rows, mc.lora.rank), f"{name}_b": (h, mc.lora.rank, columns)}
    shapes: dict[str, Any] = {"embed": (mc.vocab_size, d), "layers": layers, "final_norm": (d,)}
    if not mc.tie_embeddings:
        shapes["head"] = (d, mc.vocab_size)
    return shapes


def param_specs(mc: ModelConfig, mesh: Any = None) -> dict[str, Any]:
    """Tree of PartitionSpecs for the parameters of `mc`.

    A dimension that its axis does not divide is replicated; attention is split over `tensor` only by whole key/value
    heads. `mesh` defaults to the mesh in use.
    """
    axes = dict((jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape)
    shapes = weight_shapes(mc)
    layers = {name: P(None, *_weight_spec(mc, name, shape[1:], axes)) for name, shape in shapes["layers"].items()}
    return {name: layers if name == "layers" else P(*_weight_spec(mc, name, shapes[name], axes)) for name in shapes}


def param_shardings(mc: ModelConfig, mesh: Mesh) -> dict[str, Any]:
    """`param_specs` bound to a mesh."""
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), param_specs(mc, mesh), is_leaf=lambda leaf: isinstance(leaf, P))


def use_spec(mc: ModelConfig, name: str) -> P | None:
    """Spec of one layer's weight at the point of use: its `tensor` axis kept, `fsdp` gathered; None outside a mesh."""
    mesh = explicit_mesh()
    if mesh is None:
        return None
    shapes = weight_shapes(mc)
    shape = shapes["layers"][name][1:] if name in shapes["layers"] else shapes[name]
    return P(*(axis if axis == "tensor" else None for axis in _weight_spec(mc, name, shape, dict(mesh.shape))))


def batch_axes(rows: int, mesh: Any = None) -> tuple[str, ...] | None:
    """Mesh axes over which `rows` rows can be spread evenly: both of BATCH, one of them, or None (replicated)."""
    axes = dict((jax.sharding.get_abstract_mesh() if mesh is None else mesh).shape)
    if not axes:
        return None
    for names in (BATCH, ("fsdp",), ("data",)):
        if rows % math.prod(axes[name] for name in names) == 0:
            return names
    return None


def batch_spec(rows: int, ndim: int = 2, mesh: Any = None) -> P:
    """Spec of a batch array of `ndim` dimensions whose first holds `rows` rows."""
    return P(batch_axes(rows, mesh), *(None,) * (ndim - 1))


def activation_spec(rows: int, *rest: str | None) -> P | None:
    """Spec of an activation: rows over the batch axes, then `rest`; None outside an Explicit mesh."""
    return None if explicit_mesh() is None else P(batch_axes(rows), *rest)


def platform() -> str:
    """Platform that a program is traced for: of the mesh in use, which another machine may have, else this process's own."""
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return getattr(device, "platform", None) or jax.default_backend()


def explicit_mesh() -> Any:
    """The mesh in use if all its axes are Explicit, else None."""
    mesh = jax.sharding.get_abstract_mesh()
    return mesh if not mesh.empty and all(kind == AxisType.Explicit for kind in mesh.axis_types) else None


def reshard(x: jax.Array, spec: P | None) -> jax.Array:
    """Move `x` to `spec`; `x` itself where spec is None."""
    return x if spec is None else jax.reshard(x, spec)


def _weight_spec(mc: ModelConfig, name: str, shape: tuple[int, ...], axes: Mapping[str, int]) -> tuple[str | None, ...]:
    heads = name.removesuffix("_a").removesuffix("_b") in ("wq", "wk", "wv", "bq", "bk", "bv", "wo")
    spec = []
    for axis, size in zip(WEIGHT_AXES[name], shape, strict=True):
        parts = mc.num_kv_heads if heads and axis == "tensor" else size
        spec.append(axis if axis is not None and axis in axes and parts % axes[axis] == 0 else None)
    return tuple(spec)
