"""Arithmetic of a training step, counted from the shapes (compilers count the body of a scan once).

Two counts:
  model FLOPs     what the student's mathematics needs, for MFU (Chowdhery et al. 2022, arXiv 2204.02311, appendix B): 2 per
                  multiply-add, the backward pass twice the forward pass, attention over half of every row because it is
                  causal. The head counts, the embedding table's look-up does not. Rows count as if each were one document,
                  so packing several into a row makes the figure an upper bound.
  executed FLOPs  what the program does: what the backward pass recomputes, the blocks of attention on the diagonal, which the mask
                  discards in part (`estimate/attention.py`), the forward pass of a teacher beside the student, and the
                  orthogonalisation of Muon.
"""

from __future__ import annotations

import dataclasses
import math

from dccot_jax.estimate.attention import Attention, student_attention, teacher_attention
from dccot_jax.estimate.training import Training, tensor_parts, weights
from dccot_jax.model.config import ModelConfig
from dccot_jax.train.muon import ITERATIONS

# Forward passes' worth of work in a step: 1 forward, 2 backward, and what is recomputed. The head's chunks are in any case.
LINEAR_PASSES = {"nothing_saveable": 4, "dots": 3, "none": 3}
HEAD_PASSES = 4
TEACHER_HEAD_PASSES = 2  # its logits are made again for the student's gradient


@dataclasses.dataclass(frozen=True)
class Part:
    """A model in the step, its attention in one micro-batch, and forward passes' worth of work of its layers, attention and head."""

    mc: ModelConfig
    attention: Attention
    linear: int
    attended: float
    head: int


def models(training: Training) -> list[Part]:
    """The student and, of which only the forward pass is made, a teacher beside it. Of the layers "dots" keeps the projections alone."""
    own = student_attention(training)
    attended = own.passes(recomputed=training.remat != "none")
    found = [Part(training.mc, own, LINEAR_PASSES[training.remat], attended, HEAD_PASSES)]
    if training.teacher is not None:
        found.append(Part(training.teacher, teacher_attention(training, training.teacher), 1, 1.0, TEACHER_HEAD_PASSES))
    return found


@dataclasses.dataclass(frozen=True)
class Forward:
    """FLOPs of one token's forward pass. attention: over half of a row."""

    linear: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def forward_per_token(mc: ModelConfig, tokens: int) -> Forward:
    """FLOPs of one token in a row of `tokens`: 2 per weight of the layers' matrices and of the head, and 2·T·N·H per layer for attention.

    Scores and their product with the values are 2·N·H each per key seen; a token sees T/2 keys on average.
    """
    linear = sum(2 * weight.elements for weight in weights(mc, (1, 1, 1)) if weight.stacked and weight.matrix)
    attention = mc.num_layers * 4 * mc.num_heads * mc.head_dim * tokens // 2
    return Forward(linear, attention, 2 * mc.vocab_size * mc.hidden_size)


def model_flops(training: Training) -> int:
    """Model FLOPs of one optimizer step over all devices: 3 × forward."""
    return 3 * forward_per_token(training.mc, training.tokens).total * training.rows * training.tokens


def executed_flops(training: Training) -> dict[str, int]:
    """FLOPs that one device executes in a step: "compute" in the compute dtype, and "float32" at full precision (Muon).

    Heads are split over ``tensor`` only where the axis divides the key/value heads, and the vocabulary and the hidden layer only
    where it divides them; what is not split is computed by every device.
    """
    rows, work = training.device_rows * training.microbatches, 0
    for part in models(training):
        mc, layer = part.mc, part.attention
        linear = sum(2 * weight.used for weight in weights(mc, training.mesh) if weight.stacked and weight.matrix)
        head = forward_per_token(mc, training.tokens).head // tensor_parts(mc.vocab_size, training.mesh[2])
        work += rows * training.tokens * (part.linear * linear + part.head * head)
        work += round(part.attended * rows * mc.num_layers * 4 * layer.heads * layer.head_dim * layer.pairs())
    return {"compute": work, "float32": muon_flops(training) if training.optimizer == "muon" else 0}


def muon_flops(training: Training) -> int:
    """FLOPs of orthogonalising the layers' matrices on one device, which takes whole layers (`train/muon.py`).

    Per matrix of s ≤ l: five times X·Xᵀ (2·s²·l), its square (2·s³) and the product with X (2·s²·l).
    """
    total = 0
    for weight in weights(training.mc, training.mesh):
        if weight.stacked and weight.matrix:
            short, long = sorted(weight.matrix)
            total += math.ceil(weight.layers / training.devices) * ITERATIONS * (4 * short * short * long + 2 * short**3)
    return total
