"""One estimate: config and machine in, every figure out."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.config import to_plain
from dccot_jax.estimate.advise import advise
from dccot_jax.estimate.data import data_totals
from dccot_jax.estimate.flops import model_flops
from dccot_jax.estimate.memory import fits, step_memory
from dccot_jax.estimate.roofline import predict
from dccot_jax.estimate.student import student_model, teacher_model
from dccot_jax.estimate.topologies import Topology, TopologyError, find_topology
from dccot_jax.estimate.training import training_of

_GPU_SHARE = 0.75


def assess(
    config: ConfigDict, topology_name: str, *, compile_for: bool | None = None, log: Callable[[str], None] = print
) -> dict[str, Any]:
    """Everything about a config's training on a machine, JSON-able; bytes are per device.

    Of arms that train differently the one that needs most memory is shown. memory: what must be there is "allocated"; "total" is
    arguments + temporaries + outputs - aliases as a compiler's memory analysis has them, larger by about `loops` in libtpu's.

    Args:
      compile_for: ask the TPU compiler too; None: where libtpu is installed and the machine is a TPU. log: told before a compilation.

    Raises:
      TopologyError: unknown machine, or `compile_for` without libtpu or a TPU. ConfigError: a student that cannot be built.
      AttentionError: an attention backend that is asked for by name and cannot be used there.
    """
    topology = find_topology(topology_name)
    arms = config_lib.arms(config)
    found = {name: _arm(arm, topology) for name, arm in arms.items()}
    name = max(found, key=lambda arm: found[arm]["memory"]["allocated"])
    result = {"config": config.name, "arm": name, **found[name], "data": data_totals(config)}
    installed = importlib.util.find_spec("libtpu") is not None
    if compile_for and not installed:
        raise TopologyError("--aot: libtpu is not installed; pip install -e '.[aot]'")
    wanted = installed and topology.chip.platform == "tpu" if compile_for is None else compile_for
    result["compiler"] = None
    if wanted and not result["problem"]:
        from dccot_jax.estimate.aot import compiler_memory  # slow to import

        log(f"compiling the train step for {topology.name}: minutes; --noaot leaves it out")
        training, _ = training_of(arms[name], student_model(arms[name])[0], topology, teacher_model(arms[name]))
        result["compiler"] = compiler_memory(arms[name], training, topology)
    return result


def _arm(config: ConfigDict, topology: Topology) -> dict[str, Any]:
    mc, remarks = student_model(config)
    training, problem = training_of(config, mc, topology, teacher_model(config))
    memory = step_memory(training)
    fit = fits(memory, topology) and not problem
    prediction = predict(training, topology)
    steps = config.train.steps or None
    chip = topology.chip
    if chip.nominal:
        remarks.append("rates of this CPU are nominal: 100 GFLOP/s and 10 GB/s per core")
    if chip.platform == "gpu" and fit and memory.allocated > _GPU_SHARE * chip.memory:
        remarks.append(
            f"JAX takes {_GPU_SHARE:.0%} of a GPU's memory unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise; this needs more"
        )
    return {
        "topology": {
            "name": topology.name,
            "chip": chip.name,
            "chips": topology.chips,
            "hosts": topology.hosts,
            "shape": list(topology.shape),
            "memory_bytes_per_chip": chip.memory,
            "peak_flops_per_chip": chip.peak_bf16 if training.compute_dtype == "bfloat16" else chip.peak_float32,
            "memory_bandwidth_per_chip": chip.memory_bandwidth,
            "link_bandwidth_per_chip": topology.link_bandwidth,
        },
        "student": {
            "family": mc.family,
            "parameters": mc.num_params(),
            "layers": mc.num_layers,
            "hidden_size": mc.hidden_size,
            "vocab_size": mc.vocab_size,
        },
        "training": {
            "mesh": training.mesh_sizes,
            "rows_per_step": training.rows,
            "row_tokens": training.tokens,
            "microbatches": training.microbatches,
            "remat": training.remat,
            "optimizer": training.optimizer,
            "moment_dtype": training.moment_dtype,
            "compute_dtype": training.compute_dtype,
            "attention": training.attention,
            "steps": steps,
        },
        "fits": fit,
        "problem": problem or None,
        "memory": memory.as_dict() | {"total": memory.allocated + memory.loops * (chip.platform == "tpu"), "available": chip.memory},
        "flops_per_step": model_flops(training),
        "tokens_per_step": training.rows * training.tokens,
        "prediction": prediction | {"training_seconds": steps and steps * prediction["step_seconds"]},
        "advice": [] if fit else [option.as_dict() for option in advise(training, to_plain(config.mesh), topology)],
        "remarks": remarks,
    }
