"""DEITA with its own score: complexity x quality, best first, unless something like it is kept already.

Source: DEITA (arXiv 2312.15685): expected value of a six-way softmax over the logits of "1".."6", largest cosine 0.9, 6,000 rows. Its
two graders are trained models: name them with `score.deita.complexity_model` and `quality_model`, set the prompts to those of their
model cards and `score.deita.chat` to False. Without them, as here, the warmed-up student grades by a prompt of ours: a proxy.
Embeddings are the student's own hidden states, where the paper uses a language model's.
Cost: 1 forward pass of each grader per row and 1 of the student, the warm-up, and O(N |kept| D) for the comparisons.
Keeps: at most 6,000 rows, no two of which have a cosine above 0.9.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_deita_scorers"
    c.score.student = "warmup"
    c.score.signals = ("deita_complexity", "deita_quality", "embedding_rationale")
    graded = ("deita_complexity", "deita_quality")
    c.select.steps = ({"name": "deita", "signals": graded, "vector": "embedding_rationale", "tau": 0.9, "rows": 6000},)
    return c
