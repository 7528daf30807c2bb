"""The embedded default: word arithmetic, a scripted teacher, a student of under a million parameters.

  dccot run --config=configs/quickstart.py --workdir=runs/quickstart

Needs no downloads. Two CPU cores, about four minutes with a cold compilation cache. Expected: the trained student
answers at least 95 % of the 500 IID test questions; the untrained one answers none.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "quickstart"
    c.traces.task = "synth_arithmetic"
    c.traces.questions = 8000
    c.traces.teachers = ({"kind": "scripted", "style": "verbose"}, {"kind": "scripted", "style": "concise"})
    c.score.signals = ("nll", "ifd_loss", "ifd_ppl", "entropy")
    c.score.student = "warmup"
    c.select.steps = ({"name": "teacher_correct"},)
    c.train.steps = 600
    c.evaluate.limit = 500
    return c
