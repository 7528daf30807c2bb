"""k-center: a core set that leaves no trace far from a kept one.

Source: Sener and Savarese, Active Learning for Convolutional Neural Networks: A Core-Set Approach (arXiv 1708.00489).
Cost: 1 forward pass per row, O(N k D) for the search.
Keeps: 1,000 rows.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_kcenter"
    c.score.signals = ("embedding_rationale",)
    c.select.steps = ({"name": "kcenter", "vector": "embedding_rationale", "rows": 1000},)
    return c
