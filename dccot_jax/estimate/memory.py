"""Bytes per device of one train step: what it is given, and the most that is alive beside that at one time.

Given (arguments): parameters (trained ones in float32), optimizer state, a teacher's parameters and the batch, each as the one
table from weight to mesh axes splits it (`model/sharding.py`); the state is donated, so the outputs take no memory of their own.
Alive beside that: copies of the layers' stored matrices in the compute dtype, which compilers make before the scan over layers; the
gradients; what the forward pass keeps for the backward pass; and the working memory of whichever part of the step needs most:

  layers     the backward pass of one layer, which recomputes what remat threw away: attention's working memory by its backend, the
             MLP's inner activations, the weights gathered over fsdp
  head       the gathered head, its whole gradient and one chunk's part of it, and the chunk's logits
  teacher    one layer of a teacher's forward pass
  optimizer  the gradients, and with Muon whole momentum matrices

Terms and counts are stated where they are computed; docs/scale.md compares them with the TPU compiler's figures.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from dccot_jax.estimate.attention import FLOAT32, student_attention, teacher_attention
from dccot_jax.estimate.tiles import LANES, tiled_elements, up
from dccot_jax.estimate.topologies import Topology
from dccot_jax.estimate.training import BYTES, Training, Weight, tensor_parts, weights
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.head import default_chunk
from dccot_jax.train.losses import BATCH_FIELDS


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on one device.

    Attributes:
      parameters, optimizer, teacher, batch: the arguments. gradients, activations: alive through the backward pass.
      copies: the layers' matrices in the compute dtype. logits: one chunk, float32.
      temporaries: the other working memory of the part named `peak`, where most is alive.
      phases: part of the step -> everything alive there beside the arguments.
      loops: what loops write into, see `loop_bytes`.
    """

    parameters: int
    optimizer: int
    teacher: int
    batch: int
    gradients: int
    activations: int
    copies: int
    logits: int
    temporaries: int
    phases: dict[str, int]
    loops: int

    @property
    def arguments(self) -> int:
        return self.parameters + self.optimizer + self.teacher + self.batch

    @property
    def peak(self) -> str:
        return max(self.phases, key=lambda name: self.phases[name])

    @property
    def peak_temporaries(self) -> int:
        return self.phases[self.peak]

    @property
    def allocated(self) -> int:
        """What a device must have."""
        return self.arguments + self.peak_temporaries

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {
            "arguments": self.arguments,
            "peak": self.peak,
            "peak_temporaries": self.peak_temporaries,
            "allocated": self.allocated,
        }


def fits(memory: Memory, topology: Topology) -> bool:
    """Whether a step's memory is there."""
    return memory.allocated <= topology.chip.memory


def step_memory(training: Training) -> Memory:
    """Memory of one train step on each device."""
    phases = {"layers": _layers(training), "head": _head(training), "optimizer": gradient_bytes(training) + _muon(training)}
    if training.teacher is not None:
        phases["teacher"] = _teacher(training, training.teacher)
    peak = max(phases, key=lambda name: phases[name])
    parts = {
        "gradients": gradient_bytes(training) if peak == "optimizer" else _held(training, peak),
        "activations": saved_activations(training) if peak != "optimizer" else 0,
        "copies": copy_bytes(training) if peak != "optimizer" else 0,
        "logits": chunk_bytes(training) if peak in ("layers", "head") else 0,
    }
    return Memory(
        parameters=parameter_bytes(training),
        optimizer=optimizer_bytes(training),
        teacher=teacher_bytes(training),
        batch=batch_bytes(training),
        **parts,
        temporaries=phases[peak] - sum(parts.values()),
        phases=phases,
        loops=loop_bytes(training),
    )


def parameter_bytes(training: Training) -> int:
    """Float32, or the frozen dtype where adapters are trained in their place."""
    frozen = BYTES[training.frozen_dtype]
    return sum(weight.held(training.tiled) * (FLOAT32 if weight.trained else frozen) for weight in weights(training.mc, training.mesh))


def teacher_bytes(training: Training) -> int:
    if training.teacher is None:
        return 0
    return sum(weight.held(training.tiled) for weight in weights(training.teacher, training.mesh)) * BYTES[training.teacher_dtype]


def optimizer_bytes(training: Training) -> int:
    """Two moments per trained parameter, the first in the moment dtype; that one alone where Muon trains, the layers' matrices; with
    Adafactor a row and a column of second moments per matrix, and one per element of a vector. Second moments are float32.
    """
    total, first = 0, BYTES[training.moment_dtype]
    for weight in weights(training.mc, training.mesh):
        if not weight.trained:
            continue
        if training.optimizer == "adafactor":
            total += (weight.layers * sum(weight.share) if weight.matrix else weight.held(training.tiled)) * FLOAT32
        else:
            muon = training.optimizer == "muon" and weight.stacked and weight.matrix
            total += weight.held(training.tiled) * (first if muon else first + FLOAT32)
    return total


def batch_bytes(training: Training) -> int:
    """The arrays of all micro-batches' rows, four bytes each element; of tokens stored ahead k ids and k + 1 log-probabilities each."""
    shape = (training.device_rows * training.microbatches, training.tokens)
    shapes = [shape] * len(BATCH_FIELDS)
    if training.top_k:
        shapes += [(*shape, training.top_k), (*shape, training.top_k + 1)]
    return sum(tiled_elements(each) if training.tiled else math.prod(each) for each in shapes) * 4


def head_chunks(training: Training) -> tuple[int, int]:
    """Chunks of the head per micro-batch, and positions of a row in each (`model/head.py`)."""
    size = min(default_chunk(training.mc, training.device_rows * training.shards, training.devices), training.tokens)
    count = math.ceil(training.tokens / size)
    return count, math.ceil(training.tokens / count)


def chunk_bytes(training: Training) -> int:
    """Float32 logits of one chunk of the head on one device."""
    vocab = training.mc.vocab_size // tensor_parts(training.mc.vocab_size, training.mesh[2])
    return training.device_rows * head_chunks(training)[1] * vocab * FLOAT32


def saved_activations(training: Training) -> int:
    """What the forward pass of one micro-batch keeps for the backward pass.

    Per layer and position, in the compute dtype: "nothing_saveable" the layer's input (D); "dots" also the projections, but for the
    last where no norm follows it. "none": the inputs of the projections, gate and up, what attention keeps, and of every norm in float32
    what it is given, that over its root mean square, and two numbers of that.
    """
    mc, size = training.mc, training.compute_bytes
    heads, kv_heads, inner = _shares(training)
    query, key = heads * mc.head_dim, kv_heads * mc.head_dim
    position, beside = mc.hidden_size * size, 0
    if training.remat == "dots":
        position += (query + 2 * key + (1 + mc.arch.post_norms) * mc.hidden_size + 2 * inner) * size
    elif training.remat == "none":
        norms, normed = 2 + 2 * mc.arch.post_norms, (2 + 2 * mc.arch.post_norms) * mc.hidden_size
        if mc.arch.qk_norm:
            norms, normed = norms + heads + kv_heads, normed + query + key
        position = (2 * mc.hidden_size + query + 3 * inner) * size + 2 * (normed + norms) * FLOAT32
        beside = student_attention(training).kept_bytes()
    return mc.num_layers * (training.device_rows * training.tokens * position + beside)


def loop_bytes(training: Training) -> int:
    """Arrays that loops write into piece by piece: what the layers keep, the head's whole gradient, sums over micro-batches.

    They are alive once; the temporaries of libtpu's memory analysis (0.0.50) exceed what it lays out by about their size (docs/scale.md).
    """
    table = head_table(training, training.mc)
    head = table.used * FLOAT32 if table.trained else 0
    return saved_activations(training) + head + sum_bytes(training)


def gradient_bytes(training: Training) -> int:
    """Float32, as the trained parameters are stored."""
    return sum(weight.held(training.tiled) for weight in weights(training.mc, training.mesh) if weight.trained) * FLOAT32


def sum_bytes(training: Training) -> int:
    """Sums of gradients over micro-batches; in tiles the table's columns, which are looked up by rows, are the lanes."""
    if training.microbatches == 1:
        return 0
    table = next(weight for weight in weights(training.mc, training.mesh) if weight.name == "embed")
    if not training.tiled or not table.trained:
        return gradient_bytes(training)
    rows, columns = table.stored
    return gradient_bytes(training) + (rows * up(columns, LANES) - table.held(tiled=True)) * FLOAT32


def copy_bytes(training: Training) -> int:
    """The stored shares of the layers' matrices in the compute dtype, where they are stored in another."""
    total = _copies(training.mc, training, training.frozen_dtype)
    return total if training.teacher is None else total + _copies(training.teacher, training, training.teacher_dtype)


def _copies(mc: ModelConfig, training: Training, dtype: str) -> int:
    """`dtype`: of a student's frozen weights, or of all weights of a teacher."""
    found = [weight for weight in weights(mc, training.mesh) if weight.stacked and weight.matrix]
    student = mc is training.mc
    cast = [w for w in found if ("float32" if student and w.trained else dtype) != training.compute_dtype]
    return sum(weight.held(training.tiled) for weight in cast) * training.compute_bytes


def _held(training: Training, part: str) -> int:
    """Gradients alive beside a part of the step: their sums over micro-batches, and in the layers' backward pass those it makes."""
    return sum_bytes(training) + (gradient_bytes(training) if part == "layers" else 0)


def _layers(training: Training) -> int:
    """The backward pass of one layer beside all gradients and what was kept.

    MLP: gate, up, their product and the gradients of the three. It and attention are never alive together. Alive beside them: the
    largest matrix gathered, and its whole gradient where it is trained; the int32 index of a chunk's logits; and a tied table's
    state a second time, in the layout of its update.
    """
    size, inner = training.compute_bytes, _shares(training)[2]
    positions = training.device_rows * training.tokens
    work = student_attention(training)
    attention = max(work.forward_bytes(), work.backward_bytes())
    mlp = positions * inner * 6 * size
    largest = max(
        weight.used // weight.layers * (size + (FLOAT32 if weight.trained else 0))
        for weight in weights(training.mc, training.mesh)
        if weight.stacked
    )
    table = head_table(training, training.mc)
    beside = chunk_bytes(training) + (3 * table.local * FLOAT32 if training.mc.tie_embeddings and table.trained else 0)
    return _held(training, "layers") + copy_bytes(training) + saved_activations(training) + max(attention, mlp) + largest + beside


def _head(training: Training) -> int:
    """The gathered head, the sum of its whole float32 gradient over the chunks so far and this chunk's, and the chunk's logits
    twice, beside what was kept; of a teacher the gathered head, its hidden states and one chunk too.

    Gaps: where the gathered head was made, libtpu leaves between nothing and as much again unused (docs/scale.md); half is counted.
    """
    table = head_table(training, training.mc)
    gaps = table.used * training.compute_bytes // 2 if training.tiled and table.used != table.local else 0
    work = gaps + table.used * (training.compute_bytes + (2 * FLOAT32 if table.trained else 0)) + 2 * chunk_bytes(training)
    if training.teacher is not None:
        positions = training.device_rows * training.tokens
        gathered = head_table(training, training.teacher).used
        work += (gathered + positions * training.teacher.hidden_size) * training.compute_bytes + 2 * chunk_bytes(training)
    return _held(training, "head") + copy_bytes(training) + saved_activations(training) + work


def _teacher(training: Training, teacher: ModelConfig) -> int:
    """One layer of a teacher's forward pass, of which nothing is kept."""
    size, positions = training.compute_bytes, training.device_rows * training.tokens
    inner = teacher.intermediate_size // tensor_parts(teacher.intermediate_size, training.mesh[2])
    work = max(teacher_attention(training, teacher).forward_bytes(), positions * inner * 3 * size)
    largest = max(weight.used // weight.layers for weight in weights(teacher, training.mesh) if weight.stacked) * size
    return _held(training, "teacher") + copy_bytes(training) + saved_activations(training) + work + largest


def head_table(training: Training, mc: ModelConfig) -> Weight:
    """The weight of the output head of the student or the teacher `mc`: the embedding table where it is tied."""
    name = "embed" if mc.tie_embeddings else "head"
    return next(weight for weight in weights(mc, training.mesh) if weight.name == name)


def _muon(training: Training) -> int:
    """Whole float32 matrices of this device's layers: the largest stack three times."""
    if training.optimizer != "muon":
        return 0
    found = [weight for weight in weights(training.mc, training.mesh) if weight.stacked and weight.matrix and weight.trained]
    return 3 * FLOAT32 * max(math.ceil(weight.layers / training.devices) * math.prod(weight.matrix) for weight in found)


def _shares(training: Training) -> tuple[int, int, int]:
    """Query heads, key/value heads and inner width on one device; heads are split by whole key/value heads."""
    mc, tensor = training.mc, training.mesh[2]
    parts = tensor_parts(mc.num_kv_heads, tensor)
    return mc.num_heads // parts, mc.num_kv_heads // parts, mc.intermediate_size // tensor_parts(mc.intermediate_size, tensor)
