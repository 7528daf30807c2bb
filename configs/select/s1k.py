"""s1K: quality, difficulty, diversity, down to a thousand rows.

Source: s1: Simple test-time scaling (arXiv 2501.19393). Difficulty: drop what the student already answers (the paper: what a 7B or a
32B model does). Diversity: draw a domain, in it a trace with weight 2^-rank by length. The paper's domains are named by an
LLM; here `by` is a label of the traces: the task's subjects, and without any all rows are one domain.
Cost: one greedy generation of the student per question.
Keeps: 1,000 rows.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_s1k"
    c.score.signals = ("student_error",)
    c.select.steps = (
        {"name": "teacher_correct"},
        {"name": "student_error"},
        {"name": "s1k", "by": "meta.subject", "rows": 1000},
    )
    return c
