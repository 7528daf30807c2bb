"""Seven arms on the embedded tasks: what does the data do to the same student, at the same number of steps?

  dccot run --config=configs/tiny_arms.py --workdir=runs/tiny_arms

Two seeds each, one table; about 20 minutes on two CPU cores. The noisy teacher is wrong in a way that depends on the
question (tasks/synthetic/teachers.py states how often), so a student learns its errors; `correct_noisy` keeps the traces whose answer is
right, `random_noisy` keeps as many at random.
"""

from dccot_jax.config import default_config

VERBOSE = {"kind": "scripted", "style": "verbose"}
CONCISE = {"kind": "scripted", "style": "concise"}
NOISY = {"kind": "scripted", "style": "noisy"}
CORRECT = {"name": "teacher_correct"}


def get_config():
    c = default_config()
    c.name = "tiny_arms"
    c.seeds = (0, 1)
    c.traces.task = "synth_arithmetic"
    c.traces.questions = 8000
    c.traces.teachers = (VERBOSE,)
    c.train.steps = 400
    c.train.rows_per_step = 8
    c.train.optimizer = "muon"
    c.train.learning_rate = 5e-3
    c.train.warmup_steps = 30
    c.train.remat = "none"
    c.evaluate.limit = 200
    c.evaluate.limits = {"synth_arithmetic": 500}
    c.evaluate.max_new_tokens = 160
    c.evaluate.batch_rows = 128
    c.arms = (
        {"name": "no_cot", "tokens.format": "no_cot"},
        {"name": "vanilla_clean"},
        {"name": "vanilla_noisy", "traces.teachers": (NOISY,)},
        {"name": "correct_noisy", "traces.teachers": (NOISY,), "select.steps": (CORRECT,)},
        {"name": "random_noisy", "traces.teachers": (NOISY,), "select.steps": ({"name": "random", "match": CORRECT},)},
        {
            "name": "length_mix",
            "traces.teachers": (VERBOSE, CONCISE),
            "mix.kind": "length",
            "mix.mode": "per_question",
            "mix.long": ("verbose",),
        },
        {"name": "staged", "curriculum.kind": "staged", "curriculum.stages": 3},
    )
    c.report.compare = (
        ("vanilla_clean", "no_cot"),
        ("correct_noisy", "vanilla_noisy"),
        ("correct_noisy", "random_noisy"),
        ("length_mix", "vanilla_clean"),
        ("staged", "vanilla_clean"),
    )
    return c
