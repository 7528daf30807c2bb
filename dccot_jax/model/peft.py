"""Adapters as a PEFT directory: adapter_config.json and adapter_model.safetensors, which `peft.PeftModel` loads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from dccot_jax.model.config import ModelConfig, ModelError
from dccot_jax.model.decoder import Params
from dccot_jax.model.hf_export import on_host
from dccot_jax.model.hf_files import write_json
from dccot_jax.model.hf_names import LAYER
from dccot_jax.model.lora import MODULES
from dccot_jax.model.safetensors_io import write_safetensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def save_peft(adapters: Params, mc: ModelConfig, base: str | None, out_dir: str | os.PathLike[str]) -> None:
    """Write the adapters of `mc.lora` in float32. Every process must call it; process 0 writes.

    Args:
      adapters: {"layers": {name + "_a": [L, D, r], name + "_b": [L, r, F]}}. base: what they were trained on: hub id or
        directory; None: no such thing, as for weights drawn from a seed (PEFT's own default; its `AutoPeftModel` needs a base).

    Raises ModelError if the model has none.
    """
    lora = mc.lora
    if lora is None:
        raise ModelError("save_peft: the model has no adapters")
    out, main = Path(out_dir), jax.process_index() == 0
    names = {}  # PEFT's name -> (our leaf, layer, shape as torch keeps it)
    for layer in range(mc.num_layers):
        for target in lora.targets:
            module = LAYER[target][0].removesuffix(".weight")
            for part, theirs in (("_a", "lora_A"), ("_b", "lora_B")):
                leaf = adapters["layers"][target + part]
                names[f"base_model.model.model.layers.{layer}.{module}.{theirs}.weight"] = (leaf, layer, leaf.shape[:0:-1])

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for name, (leaf, layer, _) in names.items():
            yield name, on_host(leaf, layer).astype(np.float32).T

    if not main:  # takes part in the gathers
        for _ in tensors():
            pass
        return
    out.mkdir(parents=True, exist_ok=True)
    write_safetensors(out / WEIGHTS, {name: shape for name, (_, _, shape) in names.items()}, np.dtype(np.float32), tensors())
    modules = [module for module, target in MODULES.items() if target in lora.targets]
    write_json(
        out / CONFIG,
        {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": base,
            "r": lora.rank,
            "lora_alpha": lora.alpha,
            "lora_dropout": lora.dropout,
            "target_modules": modules,
            "bias": "none",
            "fan_in_fan_out": False,
            "inference_mode": True,
            "init_lora_weights": True,
            "use_rslora": False,
            "use_dora": False,
        },
    )
