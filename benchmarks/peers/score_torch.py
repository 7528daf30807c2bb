"""Scoring with Hugging Face torch: nll, entropy, ifd_loss and ifd_ppl, the way it is published and the best way we know.

A worker for `benchmarks/scoring.py`: it reads one JSON request per line and answers with one JSON line. It imports nothing
of dccot_jax.
  {"do": "load", "model": DIR, "dtype": "float32" | "bfloat16"} -> {"versions": ..., "threads": ...}
  {"do": "score", "rows": FILE, "way": "published" | "single" | "batched", "batch": int, "first": int}
    -> {"seconds": ..., "scores": [[4 numbers]]}
FILE holds {"context": token ids of the unconditional view's beginning, "rows": [{"input_ids", "prompt_tokens"}]}.
"""

from __future__ import annotations

import json
import sys
import time

import torch
import transformers

HEAD_POSITIONS = 512  # completion positions whose logits exist at a time in the batched way


def stats(model, hidden, labels):
    """Per position: log p(label) and the entropy, in float32, from hidden states [n, D] after the final norm."""
    logp = torch.log_softmax(model.lm_head(hidden).float(), -1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def published(model, rows, context):
    """One row at a time, as Cherry LLM's data_analysis.py does: the model's own loss from labels, and the loss of every token, token
    by token, in the model's dtype; the entropy, which that script lacks, comes from the same distributions.
    """
    found = []
    for ids, prompt in rows:
        losses, entropies = [], []
        for text, start in ((ids, prompt), (context + ids[prompt:], len(context))):
            tokens = torch.tensor([text])
            labels = tokens.clone()
            labels[0, :start] = -100
            out = model(tokens, labels=labels, output_hidden_states=True)
            losses.append(out.loss)
            per_token = []  # what the script saves; its mean is the loss
            for i in range(1, len(text)):
                logp = torch.log_softmax(out.logits[0, i - 1], -1)
                per_token.append(torch.nn.functional.nll_loss(logp[None], tokens[0, i : i + 1], reduction="none").item())
                if len(losses) == 1 and i >= start:
                    entropies.append(-(logp.exp() * logp).sum().item())
        found.append((losses[0], torch.tensor(entropies).mean(), losses[1]))
    return found


def single(model, rows, context):
    """One row at a time without loops over tokens: logits of every position, and what is asked of them, in float32."""
    found = []
    for ids, prompt in rows:
        values = []
        for text, start in ((ids, prompt), (context + ids[prompt:], len(context))):
            tokens = torch.tensor([text])
            logits = model(tokens).logits[0].float()
            logp = torch.log_softmax(logits, -1)
            label = logp[start - 1 : -1].gather(1, tokens[0, start:, None])[:, 0]
            values.append((-label.mean(), logp, start))
        logp, start = values[0][1], values[0][2]
        chosen = logp[start - 1 : -1]
        found.append((values[0][0], -(chosen.exp() * chosen).sum(-1).mean(), values[1][0]))
    return found


def batched(model, rows, context, batch):
    """Sorted by length, padded to the longest of the batch, and logits of completion positions only."""
    found: list = [[None, None, None] for _ in rows]
    for view in ("conditional", "unconditional"):
        texts = [(ids, prompt) if view == "conditional" else (context + ids[prompt:], len(context)) for ids, prompt in rows]
        order = sorted(range(len(rows)), key=lambda i: -len(texts[i][0]))
        for at in range(0, len(order), batch):
            chosen = order[at : at + batch]
            length = max(len(texts[i][0]) for i in chosen)
            tokens = torch.zeros(len(chosen), length, dtype=torch.long)
            mask = torch.zeros(len(chosen), length, dtype=torch.long)
            scored = torch.zeros(len(chosen), length, dtype=torch.bool)
            for slot, i in enumerate(chosen):
                text, start = texts[i]
                tokens[slot, : len(text)] = torch.tensor(text)
                mask[slot, : len(text)] = 1
                scored[slot, start - 1 : len(text) - 1] = True
            hidden = model.model(tokens, attention_mask=mask).last_hidden_state[scored]
            labels = tokens[:, 1:][scored[:, :-1]]
            parts = [stats(model, h, y) for h, y in zip(hidden.split(HEAD_POSITIONS), labels.split(HEAD_POSITIONS))]
            label, entropy = (torch.cat(x) for x in zip(*parts))
            counts = scored.sum(1).tolist()
            for i, logp, ent in zip(chosen, label.split(counts), entropy.split(counts)):
                if view == "conditional":
                    found[i][0], found[i][1] = -logp.mean(), ent.mean()
                else:
                    found[i][2] = -logp.mean()
    return found


def main() -> None:
    torch.set_grad_enabled(False)
    model = None
    for line in sys.stdin:
        request = json.loads(line)
        if request["do"] == "load":
            model = transformers.AutoModelForCausalLM.from_pretrained(request["model"], dtype=getattr(torch, request["dtype"])).eval()
            versions = {"torch": torch.__version__, "transformers": transformers.__version__}
            answer = {"versions": versions, "threads": torch.get_num_threads()}
        else:
            with open(request["rows"]) as file:
                data = json.load(file)
            rows = [(row["input_ids"], row["prompt_tokens"]) for row in data["rows"][: request.get("first")]]
            started = time.perf_counter()
            if request["way"] == "batched":
                found = batched(model, rows, data["context"], request["batch"])
            else:
                found = {"published": published, "single": single}[request["way"]](model, rows, data["context"])
            scores = [[float(n), float(e), float(n / u), float(torch.exp(n - u))] for n, e, u in found]
            answer = {"seconds": time.perf_counter() - started, "scores": scores}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
