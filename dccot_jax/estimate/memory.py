"""Bytes per device of one train step: what it is given, and the most that is alive beside that at one time.

Given (arguments): float32 parameters, optimizer state and the batch, each as the one table from weight to mesh axes splits it
(`model/sharding.py`); the state is donated, so the outputs take no memory of their own. Alive beside that: the gradients, what
the forward pass keeps for the backward pass, and the working memory of whichever part of the step needs most:

  layers     the backward pass of one layer, which recomputes what remat threw away: attention scores, the MLP's inner
             activations, the weights gathered over fsdp
  head       the gathered head and its gradient
  embedding  the gathered table and its gradient
  optimizer  the gradients, and with Muon whole momentum matrices

Terms and counts are stated where they are computed; docs/scale.md compares them with the TPU compiler's figures.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dccot_jax.estimate.topologies import Topology
from dccot_jax.estimate.training import Training, Weight, weights
from dccot_jax.model.head import default_chunk
from dccot_jax.train.losses import BATCH_FIELDS

FLOAT32 = 4


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, batch: the arguments. gradients, activations: alive through the backward pass. logits: one chunk, float32.
      temporaries: the other working memory of the part named `peak`, where most is alive.
      phases: part of the step -> everything alive there beside the arguments.
    """

    parameters: int
    optimizer: int
    batch: int
    gradients: int
    activations: int
    logits: int
    temporaries: int
    phases: dict[str, int]

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.batch

    @property
    def peak(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak_temporaries(self) -> int:
        return self.phases[self.peak]

    @property
    def total(self) -> int:
        return self.arguments + self.peak_temporaries

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "arguments": self.arguments,
            "peak": self.peak,
            "peak_temporaries": self.peak_temporaries,
            "total": self.total,
        }


def fits(memory: Memory, topology: Topology) -> bool:
    """Whether a step's memory is there."""
    return memory.total <= topology.chip.memory


def step_memory(training: Training) -> Memory:
    """Memory of one train step on each device."""
    parameters = sum(weight.local for weight in weights(training.mc, training.mesh)) * FLOAT32
    chunk = chunk_bytes(training)
    phases = {
        "layers": _layers(training),
        "head": _head(training),
        "embedding": _embedding(training),
        "optimizer": parameters + _muon(training),
    }
    kept = saved_activations(training)
    gradients = _gradients(training)
    peak = max(phases, key=lambda name: phases[name])
    alive = {"layers": gradients + kept + chunk, "head": kept, "embedding": gradients, "optimizer": parameters}[peak]
    return Memory(
        parameters=parameters,
        optimizer=optimizer_bytes(training),
        batch=batch_bytes(training),
        gradients=gradients,
        activations=kept,
        logits=chunk,
        temporaries=max(phases[peak] - alive, 0),
        phases=phases,
    )


def optimizer_bytes(training: Training) -> int:
    """Two float32 moments per parameter, one where Muon trains: the layers' matrices."""
    found = weights(training.mc, training.mesh)
    muon = training.optimizer == "muon"
    return sum(weight.local * FLOAT32 * (1 if muon and weight.stacked and weight.matrix else 2) for weight in found)


def batch_bytes(training: Training) -> int:
    """The arrays of all micro-batches' rows, four bytes each position."""
    return len(BATCH_FIELDS) * training.device_rows * training.microbatches * training.tokens * 4


def head_chunks(training: Training) -> tuple[int, int]:
    """Chunks of the head per micro-batch, and positions of a row in each (`model/head.py`)."""
    size = min(default_chunk(training.mc, training.device_rows * training.shards, training.devices), training.tokens)
    count = math.ceil(training.tokens / size)
    return count, math.ceil(training.tokens / count)


def chunk_bytes(training: Training) -> int:
    """Float32 logits of one chunk of the head on one device."""
    vocab = training.mc.vocab_size // _split(training.mc.vocab_size, training.mesh[2])
    return training.device_rows * head_chunks(training)[1] * vocab * FLOAT32


def saved_activations(training: Training) -> int:
    """What the forward pass of one micro-batch keeps for the backward pass.

    Per layer and position, in the compute dtype: "nothing_saveable" the layer's input (D); "dots" also the seven projections;
    "none" also both normed inputs, the rotated queries and keys, attention's output and the MLP's inner product, and per head and key
    the float32 softmax and its copy in the compute dtype.
    """
    mc, size = training.mc, training.compute_bytes
    heads, kv_heads, inner = _shares(training)
    query, key = heads * mc.head_dim, kv_heads * mc.head_dim
    width = mc.hidden_size
    if training.remat != "nothing_saveable":
        width += query + 2 * key + 2 * mc.hidden_size + 2 * inner
    position = width * size
    if training.remat == "none":
        position += (2 * mc.hidden_size + 2 * query + key + 2 * inner) * size + heads * training.tokens * (FLOAT32 + size)
    return mc.num_layers * training.device_rows * training.tokens * position


def _layers(training: Training) -> int:
    """The backward pass of one layer beside all gradients and what was kept.

    Attention: per head and pair of positions the recomputed float32 probabilities, their copy in the compute dtype and the
    gradient in the compute dtype. MLP: gate, up, their product and the gradients of the three. The two are never alive together.
    Alive beside them: the int32 index of a chunk's logits, and a tied table's state a second time, in the layout of its update.
    """
    size = training.compute_bytes
    heads, _, inner = _shares(training)
    positions = training.device_rows * training.tokens
    attention = positions * heads * training.tokens * (FLOAT32 + 2 * size)
    mlp = positions * inner * 6 * size
    beside = chunk_bytes(training) + (3 * head_table(training).local * FLOAT32 if training.mc.tie_embeddings else 0)
    work = max(attention, mlp) + _largest(training, size + FLOAT32)
    return _gradients(training) + saved_activations(training) + work + beside


def _head(training: Training) -> int:
    """The gathered head, its whole float32 gradient before and after a sum over devices, beside what was kept."""
    table = head_table(training)
    held = _gradients(training) if training.microbatches > 1 else table.local * FLOAT32
    return held + saved_activations(training) + table.used * (training.compute_bytes + _sums(training) * FLOAT32)


def _embedding(training: Training) -> int:
    """All gradients and the whole table's, before and after a sum over devices."""
    table = next(weight.used for weight in weights(training.mc, training.mesh) if weight.name == "embed")
    return _gradients(training) + _sums(training) * table * FLOAT32


def _sums(training: Training) -> int:
    """Copies of a gradient while it is summed over the devices that share a batch."""
    return 2 if training.shards > 1 else 1


def head_table(training: Training) -> Weight:
    """The weight of the output head: the embedding table where it is tied."""
    name = "embed" if training.mc.tie_embeddings else "head"
    return next(weight for weight in weights(training.mc, training.mesh) if weight.name == name)


def _gradients(training: Training) -> int:
    """Float32 gradients, and with several micro-batches their sums."""
    stored = sum(weight.local for weight in weights(training.mc, training.mesh)) * FLOAT32
    return stored * (2 if training.microbatches > 1 else 1)


def _muon(training: Training) -> int:
    """Whole float32 matrices of this device's layers: the largest stack three times."""
    if training.optimizer != "muon":
        return 0
    found = [weight for weight in weights(training.mc, training.mesh) if weight.stacked and weight.matrix]
    return 3 * FLOAT32 * max(math.ceil(weight.layers / training.devices) * math.prod(weight.matrix) for weight in found)


def _largest(training: Training, size: int) -> int:
    """The largest matrix of one layer where it is used."""
    return size * max(weight.used // weight.layers for weight in weights(training.mc, training.mesh) if weight.stacked)


def _shares(training: Training) -> tuple[int, int, int]:
    """Query heads, key/value heads and inner width on one device; heads are split by whole key/value heads."""
    mc, tensor = training.mc, training.mesh[2]
    parts = _split(mc.num_kv_heads, tensor)
    return mc.num_heads // parts, mc.num_kv_heads // parts, mc.intermediate_size // _split(mc.intermediate_size, tensor)


def _split(size: int, tensor: int) -> int:
    """Parts a dimension has over the tensor axis: all or one (`model/sharding.py`)."""
    return tensor if size % tensor == 0 else 1
