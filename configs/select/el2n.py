"""EL2N: the error norm early in training.

Source: Deep Learning on a Data Diet (arXiv 2107.07075), |p - one-hot(y)| averaged over about ten early runs; here the mean over a
completion's tokens by one student after a short warm-up.
Cost: 1 forward pass per row, and the warm-up.
Keeps: the half of the rows with the largest error, without the top 5 %, where noise gathers (the paper's offset).
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_el2n"
    c.score.student = "warmup"
    c.score.signals = ("el2n",)
    c.select.steps = ({"name": "quantile", "signal": "el2n", "low": 0.45, "high": 0.95},)
    return c
