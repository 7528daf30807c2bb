"""Predicted step time: the largest of three times, each at its peak rate, as if they overlapped perfectly.

  compute    executed FLOPs / peak rate of matrix products
  memory     bytes that must pass between memory and the cores / memory bandwidth
  links      bytes that a device receives from others / bandwidth of its links one way

It is a bound: a real step is slower (2023-26 trainers reach 35-65 % MFU at 7B and more, less for small students). Counted:
  memory     per micro-batch and pass, every weight of the layers as used and the activations around its product, the head for every
             chunk, float32 logits twice; attention by its backend (`estimate/attention.py`); once per step gradients and optimizer state.
  links      per micro-batch, over fsdp: every weight of the layers gathered once forward and once backward in the compute dtype, its
             gradient scattered in float32; the head gathered once for all its chunks, its gradient scattered once; the rows looked
             up in the table exchanged, and their gradients. Over data: gradients summed in float32. Over tensor: four sums of
             the residual stream per layer, two more where it is recomputed, in float32. A gather or a scatter over n devices moves
             (n-1)/n of the array, a sum twice that.
A teacher beside the student counts in all three with its forward pass (the head's chunks twice), and not in MFU.
"""

from __future__ import annotations

from typing import Any

from dccot_jax.estimate.flops import Part, executed_flops, model_flops, models
from dccot_jax.estimate.memory import FLOAT32, gradient_bytes, head_chunks, head_table, optimizer_bytes
from dccot_jax.estimate.topologies import Topology
from dccot_jax.estimate.training import Training, tensor_parts, weights


def predict(training: Training, topology: Topology) -> dict[str, Any]:
    """Step time in seconds, what bounds it, the three times, MFU and tokens/s per chip (all positions of the rows)."""
    times = {
        "compute": compute_seconds(training, topology),
        "memory": memory_bytes_moved(training) / topology.chip.memory_bandwidth,
        "links": link_bytes(training) / topology.link_bandwidth,
    }
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    peak = topology.chip.peak_bf16 if training.compute_dtype == "bfloat16" else topology.chip.peak_float32
    return {
        "step_seconds": seconds,
        "bound": bound,
        "seconds": times,
        "mfu": model_flops(training) / (seconds * training.devices * peak),
        "tokens_per_second_per_chip": training.rows * training.tokens / (seconds * training.devices),
    }


def compute_seconds(training: Training, topology: Topology) -> float:
    """Executed FLOPs at the peak rate of their dtype."""
    work = executed_flops(training)
    peak = topology.chip.peak_bf16 if training.compute_dtype == "bfloat16" else topology.chip.peak_float32
    return work["compute"] / peak + work["float32"] / topology.chip.peak_float32


def memory_bytes_moved(training: Training) -> float:
    """Bytes between memory and cores of one device in a step."""
    moved = sum(_moved(training, part) for part in models(training)) * training.microbatches
    return moved + 3 * gradient_bytes(training) + 2 * optimizer_bytes(training)  # gradients read, parameters and moments read and written


def _moved(training: Training, part: Part) -> float:
    """Of one model in one micro-batch."""
    mc, size, positions = part.mc, training.compute_bytes, training.device_rows * training.tokens
    vocab = mc.vocab_size / tensor_parts(mc.vocab_size, training.mesh[2])
    moved = part.head * head_chunks(training)[0] * head_table(training, mc).used * float(size)
    for weight in weights(mc, training.mesh):
        if weight.stacked and weight.matrix:
            share = weight.used / weight.elements
            around = positions * weight.layers * (weight.matrix[0] + weight.matrix[1] * share)
            moved += part.linear * (weight.used + around) * size
    moved += part.attended * mc.num_layers * part.attention.moved_bytes()
    return moved + part.head * positions * vocab * 2 * FLOAT32


def link_bytes(training: Training) -> float:
    """Bytes one device receives in a step."""
    data, fsdp, tensor = training.mesh
    size, head = training.compute_bytes, head_table(training, training.mc)
    residual = training.device_rows * training.tokens * training.mc.hidden_size
    found = 0.0
    for weight in weights(training.mc, training.mesh):
        summed = FLOAT32 if weight.trained else 0
        split = weight.local != weight.used  # over fsdp
        if weight.name == "embed":
            found += (fsdp - 1) / fsdp * (2 * residual * size if split else 2 * weight.used * summed)
        if weight.name != "embed" or weight.name == head.name:
            gathers = 1 if weight.name == head.name else 2
            found += (fsdp - 1) / fsdp * weight.used * (gathers * size + summed if split else 2 * summed)
        found += (data - 1) / data * weight.local * 2 * summed
    if tensor > 1:
        sums = 4 + (2 if training.remat == "nothing_saveable" else 0)
        found += sums * training.mc.num_layers * 2 * (tensor - 1) / tensor * residual * FLOAT32
    return (found + _teacher_links(training)) * training.microbatches


def _teacher_links(training: Training) -> float:
    """Of a teacher's forward pass in one micro-batch: its weights gathered once, rows of its table exchanged, two sums per layer."""
    if training.teacher is None:
        return 0.0
    _, fsdp, tensor = training.mesh
    head, residual = head_table(training, training.teacher), training.device_rows * training.tokens * training.teacher.hidden_size
    found = 0.0
    for weight in weights(training.teacher, training.mesh):
        if weight.local == weight.used:  # not split over fsdp
            continue
        looked_up = residual if weight.name == "embed" else 0
        gathered = weight.used if weight.name != "embed" or weight.name == head.name else 0
        found += (fsdp - 1) / fsdp * (looked_up + gathered) * training.compute_bytes
    return found + 2 * training.teacher.num_layers * 2 * (tensor - 1) / tensor * residual * FLOAT32
