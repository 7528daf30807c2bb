"""Rank-surprisal ratio: for every question the response that surprises the student without being far-fetched.

Source: Rank-Surprisal Ratio (arXiv 2601.14249), sum of token ranks (at most 100) over sum of surprisals; lower is better.
Cost: 1 forward pass per response.
Keeps: one correct trace per question.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_rank_surprisal"
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "concise"})
    c.score.signals = ("rank_surprisal",)
    c.select.steps = ({"name": "teacher_correct"}, {"name": "per_question_best", "signal": "rank_surprisal", "prefer": "low"})
    return c
