"""GraNd: the norm of each row's gradient early in training.

Source: Deep Learning on a Data Diet (arXiv 2107.07075), the expected norm over about ten early runs; here one student after a short
warm-up, over all its weights, by the ghost form (equal to the norm of the full gradient, which is never made).
Cost: 1 forward and 1 backward pass per row, and the warm-up.
Keeps: the half of the rows with the largest norm, without the top 5 %, where noise gathers (the paper's offset).
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_grand"
    c.score.student = "warmup"
    c.score.signals = ("grand",)
    c.select.steps = ({"name": "quantile", "signal": "grand", "low": 0.45, "high": 0.95},)
    return c
