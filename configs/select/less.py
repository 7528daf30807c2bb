"""LESS: the rows whose gradient points where a few examples of the task would have the student go.

Source: LESS (arXiv 2402.04333): Adam-preconditioned gradients at four checkpoints of a short training on 5 % of the rows, projected to
8,192 numbers, cosine with the plain gradients of validation examples, weighted by learning rate, largest over sub-tasks. Of LoRA factors
with `--config.train.lora.preset=r32_all`, as there; without, of the query and value projections (docs/gradients.md).
Cost: per row 1 forward and 1 backward pass and the projection at each of 4 checkpoints; and the short training.
Keeps: the 5 % of the rows with the largest influence on any sub-task.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_less"
    c.score.student = "warmup"
    c.score.warmup.share = 0.05
    c.score.warmup.steps = 100
    c.score.signals = ("less",)
    # Training questions of the task that no trace asks; with traces for all of them, hold some out: ({"traces": 32},).
    c.score.gradients.validation = ({"task": c.traces.task, "split": "train", "rows": 32},)
    c.select.steps = ({"name": "less_topk", "share": 0.05},)
    return c
