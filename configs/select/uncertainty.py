"""Uncertainty: prefer traces on which the student is unsure.

Source: DC-CoT v2 (arXiv 2505.18759), entropy of the student above 0.5, with neither the entropy nor the unit defined. Here it
is the mean entropy in nats of the student's next token along the teacher's trace, not along an answer of its own.
Cost: 1 forward pass per row.
Keeps: rows with an entropy of at least 0.5 nats.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_uncertainty"
    c.score.student = "warmup"
    c.score.signals = ("entropy",)
    c.select.steps = ({"name": "threshold", "signal": "entropy", "min": 0.5},)
    return c
