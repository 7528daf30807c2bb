"""Local naturalness: for every question the response whose steps follow most naturally from the few before them.

Source: local average log probability, LALP (arXiv 2510.03988); a repair of GRAPE for long chains of several teachers. The width of
the window, four steps, is our choice.
Cost: 1 forward pass per step, over the question and at most five steps.
Keeps: one correct trace per question.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_local_naturalness"
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "concise"})
    c.score.signals = ("local_naturalness",)
    c.select.steps = ({"name": "teacher_correct"}, {"name": "per_question_best", "signal": "local_naturalness"})
    return c
