"""A real pretrained student on real teacher traces: SmolLM2-135M-Instruct, three teachers, two levels each, SVAMP.

  DCCOT_SMOLLM2=DIR dccot run --config=configs/smollm2_svamp.py --workdir=runs/smollm2 --config.data_dir=../shared/data

DIR is a Hugging Face directory of the student (default ~/.cache/dccot_jax/smollm2-135m-instruct). Use Python 3.12: its JAX
runs bfloat16 matrix products about five times faster than float32 on CPUs that have them. At most 60 minutes on two
cores; every stage resumes. Traces are selected by IFD (correct, ratio below 1, then the highest 60 %: those whose
question helps the student least) and length-mixed to 1,000, one in five long; evaluation is greedy with 192 new
tokens for every arm, beside the untrained student.
"""

import os

from dccot_jax.config import default_config


def _replay(name, level, file):
    return {"kind": "replay", "name": name, "level": level, "files": (f"svamp/eit/SVAMP_{file}_level{level}_ranked.json.gz",)}


def get_config():
    c = default_config()
    c.name = "smollm2_svamp"
    c.compute_dtype = "bfloat16"
    c.student.path = os.environ.get("DCCOT_SMOLLM2", "~/.cache/dccot_jax/smollm2-135m-instruct")
    c.traces.task = "svamp"
    c.traces.teachers = (
        _replay("gpt-4o", "3", "ChatGPT"),
        _replay("gpt-4o", "6", "ChatGPT"),
        _replay("gemini-1.5-flash", "3", "gemini"),
        _replay("gemini-1.5-flash", "6", "gemini"),
        _replay("llama-3-70b", "2", "llama"),
        _replay("llama-3-70b", "4", "llama"),
    )
    c.tokens.max_length = 384
    c.score.signals = ("nll", "ifd_loss", "ifd_ppl", "entropy")
    c.select.steps = (
        {"name": "teacher_correct"},
        {"name": "threshold", "signal": "ifd_ppl", "max": 1.0},
        {"name": "top", "signal": "ifd_loss", "share": 0.6},
    )
    c.mix.kind = "length"
    c.mix.mode = "pooled"
    c.mix.alpha = 0.2
    c.mix.total_examples = 1000
    c.mix.long = ("6", "4")
    c.train.epochs = 2.0
    c.train.row_tokens = 512
    c.train.rows_per_step = 8
    c.train.microbatches = 2
    c.train.remat = "dots"
    c.train.learning_rate = 1e-4
    c.train.warmup_steps = 10
    c.train.clip_norm = 1.0
    c.train.checkpoint_every = 25
    c.evaluate.iid = ("svamp",)
    c.evaluate.ood = ("asdiv", "mawps")
    c.evaluate.cross = ("strategyqa", "date_understanding")
    c.evaluate.limit = 200
    c.evaluate.limits = {"svamp": 300}
    c.evaluate.max_new_tokens = 192
    c.evaluate.batch_rows = 64
    return c
