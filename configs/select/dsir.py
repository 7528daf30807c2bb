"""DSIR: resample the pool until its words look like a target task's.

Source: DSIR (arXiv 2302.03169), importance weights from hashed words and pairs of words, Gumbel top-k. The published code drops
texts under 100 tokens; short questions are kept here.
Cost: no model pass.
Keeps: half of the rows, those whose questions resemble the training questions of `target`; never a test set.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_dsir"
    c.select.steps = ({"name": "dsir", "target": "synth_objects", "text": "question", "share": 0.5},)
    return c
