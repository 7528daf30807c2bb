"""Training with TRL's `SFTTrainer`: a worker for `benchmarks/train_step.py`. It imports nothing of dccot_jax.

It reads one JSON request per line and answers with one JSON line:
  {"do": "load", "model": DIR, "tokenizer": DIR, "rows": FILE, "row_tokens": int, "settings": {...}} -> {"versions", "threads", "packed"}
  {"do": "train", "dtype": "float32" | "bfloat16", "batch": int, "steps": int}      -> {"seconds": [per step], "losses": [...]}
FILE holds [{"input_ids", "prompt_tokens"}]; `packed` is what packing="bfd" made of it: [[input ids, labels, lengths] per row],
in the order in which training reads it. Weights and moments are float32; bfloat16 is torch's autocast. Every training starts
from the weights of DIR. `seconds` are the times between the ends of steps, from the second step on: the first warms up.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time

ANSWERS = os.fdopen(os.dup(1), "w")  # the trainer prints its own lines
os.dup2(2, 1)

import datasets  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
import trl  # noqa: E402


class Clock(transformers.TrainerCallback):
    def __init__(self):
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(time.perf_counter())


def make_trainer(loaded, dtype, batch, steps, folder, clock):
    settings = loaded["settings"]
    config = trl.SFTConfig(
        output_dir=folder,
        packing=True,
        packing_strategy="bfd",
        shuffle_dataset=True,
        max_length=loaded["row_tokens"],
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=settings["rows_per_step"] // batch,
        max_steps=steps,
        learning_rate=settings["learning_rate"],
        lr_scheduler_type="constant",
        adam_beta1=settings["b1"],
        adam_beta2=settings["b2"],
        adam_epsilon=settings["eps"],
        weight_decay=0.0,
        max_grad_norm=settings["clip_norm"],
        bf16=dtype == "bfloat16",
        gradient_checkpointing=False,
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_drop_last=True,
        optim="adamw_torch_fused",
    )
    with open(loaded["rows"]) as file:
        rows = json.load(file)
    examples = [
        {"input_ids": row["input_ids"], "labels": [-100] * row["prompt_tokens"] + row["input_ids"][row["prompt_tokens"] :]} for row in rows
    ]
    model = transformers.AutoModelForCausalLM.from_pretrained(loaded["model"], dtype=torch.float32)
    return trl.SFTTrainer(
        model=model,
        args=config,
        train_dataset=datasets.Dataset.from_list(examples),
        processing_class=transformers.AutoTokenizer.from_pretrained(loaded["tokenizer"]),
        callbacks=[clock],
    )


def main() -> None:
    loaded: dict = {}
    datasets.disable_progress_bars()
    for line in sys.stdin:
        request = json.loads(line)
        with tempfile.TemporaryDirectory() as folder:
            if request["do"] == "load":
                loaded = request
                packed = make_trainer(loaded, "float32", 1, 1, folder, Clock()).train_dataset
                versions = {"torch": torch.__version__, "trl": trl.__version__, "transformers": transformers.__version__}
                rows = [[row["input_ids"], row["labels"], row["seq_lengths"]] for row in packed]
                answer = {"versions": versions, "threads": torch.get_num_threads(), "packed": rows}
            else:
                clock = Clock()
                trainer = make_trainer(loaded, request["dtype"], request["batch"], request["steps"], folder, clock)
                trainer.train()
                losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
                answer = {"seconds": [b - a for a, b in zip(clock.ends, clock.ends[1:])], "losses": losses}
                del trainer
        print(json.dumps(answer), file=ANSWERS, flush=True)


if __name__ == "__main__":
    main()
