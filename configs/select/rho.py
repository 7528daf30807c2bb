"""RHO-LOSS, offline: what the student can still learn and a holdout model knows.

  DCCOT_HOLDOUT=DIR dccot run --config=configs/select/rho.py --workdir=runs/rho

Source: RHO-LOSS (arXiv 2206.07137): the loss under the student minus that under a model trained on held-out rows, top 10 %. The paper
scores 320 candidates anew at every step; here all rows are scored once, by the warmed-up student. DIR is a train artifact made on
other rows of the task, or a Hugging Face directory, with the student's tokenizer.
Cost: 1 forward pass of the student and 1 of the holdout model per row, the warm-up, and the training of the holdout model.
Keeps: the tenth of the rows with the largest reducible loss.
"""

import os

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_rho"
    c.score.student = "warmup"
    c.score.signals = ("rho",)
    c.score.models.holdout = os.environ.get("DCCOT_HOLDOUT", "holdout")
    c.select.steps = ({"name": "top", "signal": "rho", "share": 0.1},)
    return c
