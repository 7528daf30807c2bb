"""Excess loss: rows that a model of good data finds much easier than the student does.

  DCCOT_REFERENCE=DIR dccot run --config=configs/select/excess.py --workdir=runs/excess

Source: the excess loss of Rho-1 (arXiv 2404.07965), there per token, and of DoReMi (arXiv 2305.10429), there per domain and clipped at 0;
here the mean per row. DIR is a train artifact or a Hugging Face directory with the student's tokenizer, trained on data to resemble.
Cost: 1 forward pass of the student and 1 of the reference model per row.
Keeps: the 60 % of the rows with the largest excess loss (Rho-1's share of tokens).
"""

import os

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_excess"
    c.score.signals = ("excess",)
    c.score.models.reference = os.environ.get("DCCOT_REFERENCE", "reference")
    c.select.steps = ({"name": "top", "signal": "excess", "share": 0.6},)
    return c
