"""Learning speed: leave out what is learned at once and what is hardly learned.

Source: the cumulative accuracy of Jiang et al. (arXiv 2002.03206, a learning-speed proxy of the consistency score): mean token accuracy
over 8 snapshots of a warm-up on all rows. The window is our choice: regular rows on its one side, noisy ones on the other.
Cost: the warm-up on all rows, and 1 forward pass per row and snapshot.
Keeps: the half of the rows between the 20 % learned last and the 30 % learned first.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_learning_speed"
    c.score.student = "warmup"
    c.score.warmup.share = 1.0
    c.score.warmup.steps = 200
    c.score.over_time.snapshots = 8
    c.score.signals = ("learning_speed",)
    c.select.steps = ({"name": "quantile", "signal": "learning_speed", "low": 0.2, "high": 0.7},)
    return c
