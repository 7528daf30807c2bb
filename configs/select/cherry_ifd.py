"""Instruction-following difficulty: traces whose question helps the student least, of those it helps at all.

Source: Cherry LLM (arXiv 2308.12032): ratio of mean token losses with and without the question. The scoring student is warmed
up on a random tenth, as the paper's pre-experienced model is on a clustered one.
Cost: 2 forward passes per row (one without the prompt), and the warm-up.
Keeps: of the rows with a ratio of at most 1 the highest tenth.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_cherry_ifd"
    c.score.student = "warmup"
    c.score.signals = ("ifd_loss",)
    c.select.steps = ({"name": "threshold", "signal": "ifd_loss", "max": 1.0}, {"name": "top", "signal": "ifd_loss", "share": 0.1})
    return c
