"""Pass rate: train on questions that the student can answer, but not yet every time.

Source: difficulty as the share of right answers among sampled ones, as in Kimi k1.5 (arXiv 2501.12599); leaving out questions that are
always solved is half of the filter of DAPO (arXiv 2503.14476). What is never solved stays, ranked last: a student before any training may
solve nothing.
Cost: `score.sampling.samples` generations of the student per question, at temperature 1.
Keeps: of the correct traces of questions that are not always solved, the half with the highest pass rate.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_pass_rate"
    c.score.signals = ("pass_rate",)
    c.select.steps = (
        {"name": "teacher_correct"},
        {"name": "threshold", "signal": "pass_rate", "max": 0.99},
        {"name": "top", "signal": "pass_rate", "share": 0.5},
    )
    return c
