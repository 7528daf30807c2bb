"""LIMO: few chains that reason at length, check themselves and draw conclusions.

Source: LIMO (arXiv 2502.03387): questions a good model fails at, then the 800 best chains by length and by the share of words of
checking, caution and conclusion. The paper keeps questions with 1 to 3 successes of 32; here those that the student's one
greedy answer misses.
Cost: one greedy generation of the student per question; counting words.
Keeps: 800 rows.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_limo"
    c.score.signals = ("student_error",)
    c.select.steps = ({"name": "teacher_correct"}, {"name": "student_error"}, {"name": "limo", "rows": 800})
    return c
