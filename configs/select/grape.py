"""GRAPE: for every question the response that the student finds most natural.

Source: GRAPE (arXiv 2502.04194), highest mean log-probability of the response given the question.
Cost: 1 forward pass per response.
Keeps: one correct trace per question, of those of several teachers.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_grape"
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "concise"})
    c.score.signals = ("grape",)
    c.select.steps = ({"name": "teacher_correct"}, {"name": "per_question_best", "signal": "grape"})
    return c
