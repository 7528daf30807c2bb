"""SemDeDup: drop what means the same.

Source: SemDeDup (arXiv 2303.09540), near-duplicates of embeddings inside k-means clusters, the one far from the centroid kept. The
embeddings are the student's mean hidden states over the trace.
Cost: 1 forward pass per row, clustering O(N K D), comparisons inside clusters.
Keeps: what has no cosine above 0.95 to a harder one of its cluster.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_semdedup"
    c.score.signals = ("embedding_rationale",)
    c.select.steps = ({"name": "semdedup", "vector": "embedding_rationale", "epsilon": 0.05},)
    return c
