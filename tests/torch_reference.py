"""Outputs of Hugging Face torch for a tiny model of every family, kept in torch_reference.json for machines without torch.

`python tests/torch_reference.py` writes the file anew; it needs torch.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from family_cases import CASES
from test_model import packed_batch, random_params

from dccot_jax.model.config import ModelConfig

FILE = Path(__file__).with_suffix(".json")
NAMES = ("gemma", "gemma2", "gemma3", "llama-3", "mistral", "qwen2-window", "qwen3-biased", "smollm3-window")  # one of each family
DEVIATION = 0.17  # of the weights: D^-1/2
POSITIONS, TOKENS = (0, 11, 39), (0, 17, 48, 95)  # whose logits are kept


def batch_of(mc: ModelConfig) -> dict[str, np.ndarray]:
    """Two rows of 40 tokens, the second with padding."""
    return packed_batch(mc, [[40], [33]], 40)


def torch_outputs(mc: ModelConfig, folder: Path) -> dict[str, Any]:
    """{"logits": [2][positions][tokens], "loss": the weighted mean, "gradient_norms": {Hugging Face name: norm}}, float32."""
    import torch
    from transformers import AutoModelForCausalLM

    from dccot_jax.model.hf import save_hf

    save_hf(random_params(mc, deviation=DEVIATION), mc, None, folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    batch = batch_of(mc)
    logits = model(torch.tensor(batch["tokens"]), attention_mask=torch.tensor(batch["segment_ids"])).logits
    weights = torch.tensor(batch["weights"])
    nll = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.tensor(batch["labels"]).long().flatten(), reduction="none")
    loss = (nll.view_as(weights) * weights).sum() / weights.sum()
    loss.backward()
    kept = logits.detach().numpy()[:, POSITIONS][:, :, TOKENS]
    kept[1, np.array(POSITIONS) >= 33] = 0.0  # padding
    return {
        "logits": kept.tolist(),
        "loss": loss.item(),
        "gradient_norms": {name: float(weight.grad.norm()) for name, weight in model.named_parameters()},
    }


def main() -> None:
    found = {}
    for name in NAMES:
        with tempfile.TemporaryDirectory() as folder:
            found[name] = torch_outputs(CASES[name], Path(folder))
    FILE.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
