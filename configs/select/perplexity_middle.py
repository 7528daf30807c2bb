"""The middle of perplexity: neither what the model knows nor what it cannot read.

Source: Marion et al., When Less is More (arXiv 2309.04564).
Cost: 1 forward pass per row.
Keeps: the half of the rows nearest to the median perplexity of the completion given the prompt.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_perplexity_middle"
    c.score.student = "warmup"
    c.score.signals = ("ppl",)
    c.select.steps = ({"name": "middle", "signal": "ppl", "share": 0.5},)
    return c
