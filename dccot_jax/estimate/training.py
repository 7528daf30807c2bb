"""What decides the cost of a training step: the model, the batch, the mesh, and the few settings that trade memory for time."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

from jax.sharding import AbstractMesh
from ml_collections import ConfigDict

from dccot_jax.config import to_plain
from dccot_jax.estimate.tiles import tiled_elements
from dccot_jax.estimate.topologies import Topology
from dccot_jax.model.backends.registry import Need, resolve
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.lora import adapter_names
from dccot_jax.model.sharding import AXES, MeshError, mesh_shape, param_specs, weight_shapes
from dccot_jax.train.adapters import trained_model

BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Training:
    """One training step on a mesh.

    Attributes:
      mc: the student, with its adapters where only these are trained. mesh: devices along (data, fsdp, tensor).
      rows, tokens: packed rows of one optimizer step over all devices, and tokens per row.
      microbatches, remat, optimizer, compute_dtype, moment_dtype: as in the config.
      frozen_dtype: of what adapters leave alone. teacher, teacher_dtype: the model beside the student whose distributions are learned,
        or None. top_k: of its likeliest tokens that come with every position of the batch in its place, or 0.
      attention, teacher_attention: backends, of `model.backends.registry.BACKENDS`.
      tiled: arrays are padded to tiles, as TPUs do (`estimate/tiles.py`).
    """

    mc: ModelConfig
    mesh: tuple[int, int, int]
    rows: int
    tokens: int
    microbatches: int
    remat: str
    optimizer: str
    compute_dtype: str
    moment_dtype: str = "float32"
    frozen_dtype: str = "float32"
    teacher: ModelConfig | None = None
    teacher_dtype: str = "bfloat16"
    top_k: int = 0
    attention: str = "xla"
    teacher_attention: str = "xla"
    tiled: bool = False

    @property
    def devices(self) -> int:
        return math.prod(self.mesh)

    @property
    def shards(self) -> int:
        """Devices over which the rows of a batch are spread."""
        return self.mesh[0] * self.mesh[1]

    @property
    def device_rows(self) -> int:
        """Rows of one micro-batch on one device; rounded up where they do not divide."""
        return math.ceil(self.rows / (self.microbatches * self.shards))

    @property
    def compute_bytes(self) -> int:
        return BYTES[self.compute_dtype]

    @property
    def mesh_sizes(self) -> dict[str, int]:
        return dict(zip(AXES, self.mesh))

    def problem(self) -> str:
        """Why the trainer would refuse it, or ""."""
        if self.rows % (self.microbatches * self.shards):
            return (
                f"config.train.rows_per_step: {self.rows} is not a multiple of train.microbatches × (devices along data and fsdp) = "
                f"{self.microbatches} × {self.shards}"
            )
        return ""


@dataclasses.dataclass(frozen=True)
class Weight:
    """One weight of the model, for its layers together where it is stacked.

    Attributes:
      elements: in all. local: on one device as stored. used: on one device where it is used, gathered over fsdp; all its layers.
      layers: 1, or how many are stacked. matrix: (m, n) of one layer, () for vectors; share: that of one device as stored.
      trained: False for what adapters leave alone. stored: what one device holds, all layers stacked.
    """

    name: str
    elements: int
    local: int
    used: int
    layers: int
    stacked: bool
    matrix: tuple[int, ...]
    share: tuple[int, ...]
    trained: bool
    stored: tuple[int, ...]

    def held(self, tiled: bool) -> int:
        """`local`, with its padding where arrays are tiled."""
        return tiled_elements(self.stored) if tiled else self.local


def training_of(config: ConfigDict, mc: ModelConfig, topology: Topology, teacher: ModelConfig | None = None) -> tuple[Training, str]:
    """The training of a config's student `mc` on a machine, and why its mesh or its batch cannot be, or "".

    Attention backends are those that the trainer takes there, unless one fails its trial on the device itself. Where the mesh does not
    fit the devices the figures are those of all devices along fsdp.

    Raises AttentionError: `config.attention` names a backend that the machine does not have, or that cannot do it.
    """
    train, problem = config.train, ""

    def backend(model: ModelConfig) -> str:
        return resolve(config.attention, Need.of(model, train.row_tokens, config.compute_dtype, packed=True, device=topology.chip))

    try:
        shape = mesh_shape(to_plain(config.mesh), topology.chips)
    except MeshError as error:
        shape, problem = (1, topology.chips, 1), f"config.{error}"
    found = Training(
        mc=trained_model(mc, train),
        mesh=(shape[0], shape[1], shape[2]),
        rows=train.rows_per_step,
        tokens=train.row_tokens,
        microbatches=train.microbatches,
        remat=train.remat,
        optimizer=train.optimizer,
        compute_dtype=config.compute_dtype,
        moment_dtype=train.moment_dtype,
        frozen_dtype=train.lora.frozen_dtype,
        teacher=teacher,
        teacher_dtype=train.distill.teacher_dtype,
        top_k=train.distill.top_k,
        attention=backend(mc),
        teacher_attention="xla" if teacher is None else backend(teacher),
        tiled=topology.chip.platform == "tpu",
    )
    return found, problem or found.problem()


def tensor_parts(size: int, tensor: int) -> int:
    """Parts a dimension has over the tensor axis: all or one (`model/sharding.py`)."""
    return tensor if size % tensor == 0 else 1


@functools.lru_cache(maxsize=1024)
def weights(mc: ModelConfig, mesh: tuple[int, int, int]) -> tuple[Weight, ...]:
    """Every weight with its share per device, by the one table from weight to mesh axes (`model/sharding.py`)."""
    sizes = dict(zip(AXES, mesh))
    shapes, specs = weight_shapes(mc), param_specs(mc, AbstractMesh(mesh, AXES))
    adapters = adapter_names(mc)
    found = []
    for name, shape, spec, stacked in _flat(shapes, specs):
        axes = [axis for axis in spec if axis is not None]
        elements = math.prod(shape)
        own = shape[1:] if stacked else shape
        split = spec[1:] if stacked else spec
        found.append(
            Weight(
                name=name,
                elements=elements,
                local=elements // math.prod(sizes[axis] for axis in axes),
                used=elements // (sizes["tensor"] if "tensor" in axes else 1),
                layers=shape[0] if stacked else 1,
                stacked=stacked,
                matrix=tuple(own) if len(own) == 2 else (),
                share=tuple(size // sizes.get(axis, 1) for size, axis in zip(own, split)) if len(own) == 2 else (),
                trained=mc.lora is None or name in adapters,
                stored=tuple(size // sizes.get(axis, 1) for size, axis in zip(shape, spec, strict=True)),
            )
        )
    return tuple(found)


def _flat(shapes: dict[str, Any], specs: dict[str, Any]) -> list[tuple[str, tuple[int, ...], Any, bool]]:
    top = [(name, shape, specs[name], False) for name, shape in shapes.items() if name != "layers"]
    return top + [(name, shape, specs["layers"][name], True) for name, shape in shapes["layers"].items()]
