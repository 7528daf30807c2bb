"""Training steps of a Llama in Hugging Face torch (sdpa, compiled): a worker for `benchmarks/gpu.py`. It imports nothing of dccot_jax.

One request, a line of JSON, and one line of answer:
  {"shape": {config fields}, "rows": FILE.npz, "batches": [rows at a time], "steps": int, "cpu": bool}
    -> {"versions", "device", "by_batch": {batch: {"seconds": per step, "peak_gb"} or {"error"}}}
FILE holds tokens and positions [rows, T]. Weights and moments are float32, the step runs under bfloat16 autocast, the optimizer is
torch's fused AdamW.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
import transformers


def measure(request, data, batch, device):
    config = transformers.LlamaConfig(**request["shape"], attn_implementation="sdpa")
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    forward = model if request["cpu"] else torch.compile(model)
    parts = [
        {name: torch.from_numpy(data[name][at : at + batch]).long().to(device) for name in data.files}
        for at in range(0, len(data["tokens"]), batch)
    ]
    share = 1 / len(parts)

    def step():
        for part in parts:
            with torch.autocast(device, dtype=torch.bfloat16):
                loss = forward(input_ids=part["tokens"], position_ids=part["positions"], labels=part["tokens"], use_cache=False).loss
            (loss * share).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)  # waits

    for _ in range(2):
        step()
    if not request["cpu"]:
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    for _ in range(request["steps"]):
        step()
    spent = time.perf_counter() - started
    peak = 0.0 if request["cpu"] else torch.cuda.max_memory_allocated() / 1e9
    return {"seconds": spent / request["steps"], "peak_gb": peak}


def main() -> None:
    request = json.loads(sys.stdin.readline())
    device = "cpu" if request["cpu"] else "cuda"
    data = np.load(request["rows"])
    found = {}
    for batch in request["batches"]:
        try:
            found[str(batch)] = measure(request, data, batch, device)
        except torch.OutOfMemoryError as error:
            found[str(batch)] = {"error": str(error).splitlines()[0]}
        torch.compiler.reset()
        if not request["cpu"]:
            torch.cuda.empty_cache()
    name = "cpu" if request["cpu"] else torch.cuda.get_device_name()
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "device": name, "by_batch": found}), flush=True)


if __name__ == "__main__":
    main()
