"""Per-example gradients of LoRA factors with Hugging Face torch: one row at a time, as they are published.

A worker for `benchmarks/gradients.py`: it reads one JSON request per line and answers with one JSON line. It imports nothing
of dccot_jax. The adapters are as PEFT applies them (y = x·W + scale·(x·A)·B on frozen W), in the dtype of the model.
  {"do": "load", "model": DIR, "adapters": FILE, "dtype": "float32" | "bfloat16"} -> {"versions": ..., "threads": ...}
  {"do": "grand" | "less", "rows": FILE, "first": int, "out": FILE | null}         -> {"seconds": ...}
`adapters` (npz) holds, stacked over the layers, A [L, D, r] and B [L, r, F] of q_proj and v_proj as wq_a, wq_b, wv_a, wv_b,
their Adam moments with "mu." and "nu." before these names, and scale, b1, b2, eps. Both ways make each row's gradient and
collect it: `grand` its norm, `less` the vector preconditioned by Adam (princeton-nlp/LESS, `collect_grad_reps.py`), in the
order layer, name. `out` (npy) gets the results [rows, ...]; without it they are made and dropped.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
import torch
import transformers

NAMES = ("wq_a", "wq_b", "wv_a", "wv_b")


class Adapted(torch.nn.Module):
    """A frozen linear layer with a low-rank adapter beside it."""

    def __init__(self, base, a, b, scale):
        super().__init__()
        self.base, self.scale = base, scale
        self.a, self.b = torch.nn.Parameter(a), torch.nn.Parameter(b)

    def forward(self, x):
        return self.base(x) + (x @ self.a @ self.b) * self.scale


def load(request):
    dtype = getattr(torch, request["dtype"])
    model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=dtype).eval()
    model.requires_grad_(False)
    data = np.load(request["adapters"])
    factors = []
    for n, layer in enumerate(model.model.layers):
        for short, name in (("wq", "q_proj"), ("wv", "v_proj")):
            a, b = (torch.tensor(data[short + part][n]).to(dtype) for part in ("_a", "_b"))
            adapted = Adapted(getattr(layer.self_attn, name), a, b, float(data["scale"]))
            setattr(layer.self_attn, name, adapted)
            factors += [adapted.a, adapted.b]
    moments = [
        torch.tensor(np.concatenate([data[f"{m}.{name}"][n].ravel() for n in range(len(factors) // 4) for name in NAMES]))
        for m in ("mu", "nu")
    ]
    return model, factors, moments, {name: float(data[name]) for name in ("b1", "b2", "eps")}


def gradient(model, factors, ids, prompt):
    """The gradient of the mean loss over the completion, one float32 vector over all factors."""
    model.zero_grad(set_to_none=True)
    tokens = torch.tensor([ids])
    labels = tokens.clone()
    labels[:, :prompt] = -100
    model(tokens, labels=labels, use_cache=False).loss.backward()
    return torch.cat([factor.grad.reshape(-1) for factor in factors]).float()


def main() -> None:
    state = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            state = load(request)
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            answer = {"versions": versions, "threads": torch.get_num_threads()}
        else:
            assert state is not None
            model, factors, (mu, nu), adam = state
            with open(request["rows"]) as file:
                rows = json.load(file)["rows"][: request.get("first")]
            found = []
            started = time.perf_counter()
            for row in rows:
                g = gradient(model, factors, row["input_ids"], row["prompt_tokens"])
                if request["do"] == "grand":
                    value = g.norm()
                else:
                    mean = adam["b1"] * mu + (1 - adam["b1"]) * g
                    value = mean / torch.sqrt(adam["b2"] * nu + (1 - adam["b2"]) * g * g + adam["eps"])
                found.append(value)
            answer = {"seconds": time.perf_counter() - started}
            if request.get("out"):
                np.save(request["out"], torch.stack(found).numpy())
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
