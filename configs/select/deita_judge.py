"""DEITA by a judge: complexity x quality as a teacher grades them, best first, unless something like it is kept already.

Source: DEITA (arXiv 2312.15685). A proxy: its graders are trained models that return expected values; here a teacher gives whole
numbers from 1 to 6, so that many rows tie (by id). The scripted judge stands in for a language model.
Cost: one request per row, 1 forward pass of the student for the embeddings, and O(N |kept| D) for the comparisons.
Keeps: at most 6,000 rows, no two of which have a cosine above 0.9.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_deita_judge"
    c.score.signals = ("embedding_rationale", "proxy_complexity", "proxy_quality")
    c.score.judge.judges = ({"kind": "scripted", "style": "verbose"},)
    graded = ("proxy_complexity", "proxy_quality")
    c.select.steps = ({"name": "deita", "signals": graded, "vector": "embedding_rationale", "tau": 0.9, "rows": 6000},)
    return c
