"""Superfiltering: instruction-following difficulty by a small untrained model, then a subset that represents the rest.

Source: Superfiltering (arXiv 2402.00530), its diverse variant: ratio of perplexities by GPT-2 124M, the top fifth, then facility
location to 2 %. Set `student.path` to a small model to do the same; embeddings are the scoring model's own (mean hidden
states of the prompt), where the paper uses a sentence encoder.
Cost: 2 forward passes per row of the small model; facility location O(N^2 D) on what is left.
Keeps: 2 % of the rows with a ratio of at most 1.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_superfiltering"
    c.score.signals = ("embedding_prompt", "ifd_ppl")
    c.select.steps = (
        {"name": "threshold", "signal": "ifd_ppl", "max": 1.0},
        {"name": "top", "signal": "ifd_ppl", "share": 0.2},
        {"name": "facility_location", "vector": "embedding_prompt", "share": 0.1},
    )
    return c
