"""Student entropy: train on questions at which the student is unsure of its own answer.

Source: the uncertainty selector of DC-CoT (arXiv 2505.18759, v2), which defines neither the entropy nor its unit.
Cost: one greedy generation of the student per question.
Keeps: correct traces of questions whose greedy answer the student writes at a mean entropy of at least 0.5 nats per token.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_student_entropy"
    c.score.signals = ("student_entropy",)
    c.select.steps = ({"name": "teacher_correct"}, {"name": "threshold", "signal": "student_entropy", "min": 0.5})
    return c
