"""Forgetting events: rows that were learned and lost again, or never learned.

Source: Toneva et al. (arXiv 1812.05159): flips from correct to wrong between presentations of an example; the never forgotten can be left
out. For a language model a row counts as learned where at least 80 % of its tokens are the most probable ones (token accuracy as in arXiv
2205.10770; the threshold is ours), measured at 8 snapshots of a warm-up on all rows.
Cost: the warm-up on all rows, and 1 forward pass per row and snapshot.
Keeps: the half of the rows that is forgotten most often; those never learned come first. Ties, which are many, by id.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_forgetting"
    c.score.student = "warmup"
    c.score.warmup.share = 1.0
    c.score.warmup.steps = 200
    c.score.over_time.snapshots = 8
    c.score.signals = ("forgetting",)
    c.select.steps = ({"name": "top", "signal": "forgetting", "share": 0.5},)
    return c
