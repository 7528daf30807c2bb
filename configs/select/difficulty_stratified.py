"""Difficulty-stratified control: the same spread of difficulty as the pool, or an even one.

Source: the cheap control beside `random`; strata are quartiles of the student's loss.
Cost: 1 forward pass per row.
Keeps: a tenth of the rows, as many of each quartile.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_difficulty_stratified"
    c.score.student = "warmup"
    c.score.signals = ("nll",)
    c.select.steps = ({"name": "stratified", "by": "nll", "bins": 4, "share": 0.1, "allocation": "equal"},)
    return c
