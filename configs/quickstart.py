"""The embedded default: word arithmetic, a scripted teacher, a student of under a million parameters.

  dccot run --config=configs/quickstart.py --workdir=runs/quickstart

Needs no downloads. Two CPU cores, about three minutes with a cold compilation cache. Expected: the trained student
answers 97 % or more of the 500 IID test questions (numbers in 0..19, 2 to 6 steps), the untrained one none.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "quickstart"
    c.traces.task = "synth_arithmetic"
    c.traces.questions = 8000
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"},)
    c.score.student = "warmup"
    c.score.signals = ("nll", "ifd_loss", "ifd_ppl", "entropy")
    c.score.warmup.steps = 60
    c.select.steps = ({"name": "teacher_correct"}, {"name": "threshold", "signal": "ifd_ppl", "max": 1.0})
    c.train.steps = 600
    c.train.rows_per_step = 8
    c.train.optimizer = "muon"
    c.train.learning_rate = 4e-3
    c.train.warmup_steps = 30
    c.train.remat = "none"
    c.evaluate.limit = 200
    c.evaluate.limits = {"synth_arithmetic": 500, "synth_arithmetic_long": 600}  # 200 for each of 7, 8 and 9 steps
    c.evaluate.max_new_tokens = 160
    c.evaluate.batch_rows = 128
    return c
