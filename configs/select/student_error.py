"""Student error: train on what the student cannot do yet.

Source: the second selector of DC-CoT (arXiv 2505.18759).
Cost: one greedy generation of the student per question.
Keeps: correct traces of questions that the untrained student answers wrongly.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_student_error"
    c.score.signals = ("student_error",)
    c.select.steps = ({"name": "teacher_correct"}, {"name": "student_error"})
    return c
