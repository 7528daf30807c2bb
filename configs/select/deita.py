"""DEITA: best score first, unless something like it is kept already.

Source: DEITA (arXiv 2312.15685), score = complexity x quality by two trained scorers, largest cosine 0.9, 6,000 rows. The scorers
are not part of this package: instruction-following difficulty stands in for them as a proxy, and the student's own hidden
states for the embeddings. Scores of your own join through `select.tables`.
Cost: 2 forward passes per row, and O(N |kept| D) for the comparisons.
Keeps: at most 6,000 rows, no two of which have a cosine above 0.9.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_deita"
    c.score.student = "warmup"
    c.score.signals = ("embedding_rationale", "ifd_loss")
    c.select.steps = ({"name": "deita", "signals": ("ifd_loss",), "vector": "embedding_rationale", "tau": 0.9, "rows": 6000},)
    return c
