"""Margin sampling: where the two most probable tokens are close.

Source: Scheffer et al. 2001, Active Hidden Markov Models; as an uncertainty score for language models a mean over tokens.
Cost: 1 forward pass per row.
Keeps: the half of the rows with the smallest mean margin.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_margin"
    c.score.student = "warmup"
    c.score.signals = ("margin",)
    c.select.steps = ({"name": "bottom", "signal": "margin", "share": 0.5},)
    return c
