"""Random control: the same share of rows, chosen by chance. No published selector means anything without it.

Source: DC-CoT (arXiv 2505.18759) has none; every report of a selection here should.
Cost: no model pass.
Keeps: a tenth of the rows, by a hash of seed and id; with `match` as many as another step would keep (configs/tiny_arms.py).
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_random_control"
    c.select.steps = ({"name": "random", "share": 0.1},)
    return c
