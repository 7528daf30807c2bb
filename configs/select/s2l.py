"""S2L: the same number of rows from every kind of curve.

Source: SmallToLarge (arXiv 2403.07384): losses of a small model at saved checkpoints of a training on all rows, 100 clusters, sampled
evenly. The warm-up training is that training. To use a smaller model than the student, score with a train artifact of it
(`score.student`, made with `train.snapshots`) or join curves of your own, a column of lists in a file of `select.tables`.
Cost: the warm-up on all rows, and C forward passes per row for C snapshots (8).
Keeps: 11 % of the rows.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_s2l"
    c.score.student = "warmup"
    c.score.warmup.share = 1.0
    c.score.warmup.steps = 200
    c.score.over_time.snapshots = 8
    c.score.signals = ("s2l",)
    c.select.steps = ({"name": "s2l", "vector": "s2l", "clusters": 100, "share": 0.11},)
    return c
