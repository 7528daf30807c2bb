"""Training with Tunix's `PeftTrainer` (all weights): a worker for `benchmarks/train_step.py`. It imports nothing of dccot_jax.

It reads one JSON request per line and answers with one JSON line:
  {"do": "load", "model": DIR, "batches": FILE.npz, "settings": {...}}            -> {"versions"} or {"missing": why}
  {"do": "train", "dtype": "float32" | "bfloat16", "batch": int, "steps": int} -> {"seconds": [per step], "losses": [...]}
FILE holds tokens, positions, segment_ids and trained [steps x rows, T], `trained` where a token is to be predicted. Tunix has no
mixed precision for this model: in bfloat16 weights and moments are bfloat16 too. Every training starts from the weights of
DIR. `seconds` are the times between the ends of steps, from the second step on: the first compiles.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import time

ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
os.environ.setdefault("JAX_PLATFORMS", "cpu")

try:
    import jax
    import jax.numpy as jnp
    import numpy as np
    import optax
    import tunix
    from tunix.models.llama3 import model as llama
    from tunix.models.llama3 import params as llama_params
    from tunix.sft import hooks, peft_trainer

    MISSING = ""
except Exception as error:  # not installed, or not for this JAX
    MISSING = f"{type(error).__name__}: {error}"


def make_model(folder, dtype):
    with open(os.path.join(folder, "config.json")) as file:
        c = json.load(file)
    heads = c["num_attention_heads"]
    theta = c.get("rope_theta") or c["rope_parameters"]["rope_theta"]
    # This version's Llama does not hand its rope_theta on.
    llama.apply_rope = functools.partial(APPLY_ROPE, rope_theta=theta)
    config = llama.ModelConfig(
        num_layers=c["num_hidden_layers"],
        vocab_size=c["vocab_size"],
        embed_dim=c["hidden_size"],
        hidden_dim=c["intermediate_size"],
        num_heads=heads,
        head_dim=c.get("head_dim") or c["hidden_size"] // heads,
        num_kv_heads=c["num_key_value_heads"],
        rope_theta=theta,
        norm_eps=c["rms_norm_eps"],
        weight_tying=True,
    )
    return llama_params.create_model_from_safe_tensors(folder, config, dtype=jnp.dtype(dtype))


def model_input(x):
    segments = x["segment_ids"]
    length = segments.shape[1]
    seen = (segments[:, :, None] == segments[:, None, :]) & jnp.tril(jnp.ones((length, length), bool)) & (segments > 0)[:, :, None]
    return {"input_tokens": x["tokens"], "input_mask": x["trained"], "positions": x["positions"], "attention_mask": seen}


def train(loaded, request):
    settings = loaded["settings"]
    data = np.load(loaded["batches"])
    rows, batch, steps = settings["rows_per_step"], request["batch"], request["steps"]
    parts = [{name: data[name][at : at + batch] for name in data.files} for at in range(0, rows * steps, batch)]
    adam = optax.adamw(settings["learning_rate"], b1=settings["b1"], b2=settings["b2"], eps=settings["eps"], weight_decay=0.0)
    accumulate = rows // batch
    config = peft_trainer.TrainingConfig(
        eval_every_n_steps=10**9, max_steps=steps, gradient_accumulation_steps=accumulate if accumulate > 1 else None
    )
    optimizer = optax.chain(optax.clip_by_global_norm(settings["clip_norm"]), adam)
    trainer = peft_trainer.PeftTrainer(make_model(loaded["model"], request["dtype"]), optimizer, config)
    trainer = trainer.with_gen_model_input_fn(model_input)
    losses, starts = [], []

    class Clock(hooks.TrainingHooks):
        def on_train_start(self, trainer): ...
        def on_train_end(self, trainer): ...
        def on_train_step_start(self, trainer):
            if trainer.iter_steps % accumulate == 0 and trainer.train_steps == 1:
                jax.block_until_ready(trainer.optimizer.opt_state)  # all of the step before, once: at the start of the clock
                starts.append(time.perf_counter())

        def on_train_step_end(self, trainer, train_step, train_loss):
            losses.append(float(train_loss))

        def on_eval_step_start(self, trainer): ...
        def on_eval_step_end(self, trainer, eval_loss): ...

    trainer.with_training_hooks(Clock())
    trainer.train(parts)
    jax.block_until_ready((jax.tree.leaves(trainer.optimizer.opt_state), jax.tree.leaves(trainer.model)))
    spent = time.perf_counter() - starts[0]
    return {"seconds": [spent / (steps - 1)] * (steps - 1), "losses": losses}


def main() -> None:
    loaded: dict = {}
    for line in sys.stdin:
        request = json.loads(line)
        if MISSING:
            answer = {"missing": MISSING}
        elif request["do"] == "load":
            loaded = request
            answer = {"versions": {"tunix": getattr(tunix, "__version__", ""), "jax": jax.__version__}}
        else:
            answer = train(loaded, request)
        print(json.dumps(answer), file=ANSWERS, flush=True)


if not MISSING:
    APPLY_ROPE = llama.apply_rope

if __name__ == "__main__":
    main()
