"""Correct, diverse and helpful rationales.

Source: MoRSD (arXiv 2509.23574): accuracy, then diversity, then how much a rationale helps the student to the answer. The exact
form of its last criterion is not public; here it is the gain in log p(answer | question) from the rationale.
Cost: 2 forward passes per row, one of them without the rationale and shared by all traces of a question.
Keeps: correct traces without near-duplicates, the most helpful one of every question.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_morsd"
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "concise"})
    c.score.student = "warmup"
    c.score.signals = ("answer_gain",)
    c.select.steps = (
        {"name": "teacher_correct"},
        {"name": "minhash", "text": "target", "threshold": 0.7, "signal": "answer_gain"},
        {"name": "per_question_best", "signal": "answer_gain"},
    )
    return c
