"""A Qwen2.5-Instruct student of 0.5B to 32B parameters on the SVAMP traces of three teachers, packed to 4,096 tokens.

  dccot estimate --config=configs/qwen2_5_svamp.py:1.5b --topology=v5e-16
  DCCOT_STUDENT=DIR dccot run --config=configs/qwen2_5_svamp.py:1.5b --workdir=runs/qwen --config.data_dir=../shared/data

DIR is the student's Hugging Face directory. Without it the student is known by its config.json alone (configs/students), which is
enough for an estimate and for nothing else. Sizes: 0.5b, 1.5b, 3b, 32b.
"""

import os
from pathlib import Path

from dccot_jax.config import default_config

LEVELS = (("gpt-4o", "ChatGPT", ("3", "6")), ("gemini-1.5-flash", "gemini", ("3", "6")), ("llama-3-70b", "llama", ("2", "4")))


def get_config(size="1.5b"):
    c = default_config()
    c.name = f"qwen2_5_{size}_svamp"
    c.compute_dtype = "bfloat16"
    c.student.path = os.environ.get("DCCOT_STUDENT", str(Path(__file__).parent / "students" / f"qwen2.5-{size}"))
    c.traces.task = "svamp"
    c.traces.teachers = tuple(
        {"kind": "replay", "name": name, "level": level, "files": (f"svamp/eit/SVAMP_{file}_level{level}_ranked.json.gz",)}
        for name, file, levels in LEVELS
        for level in levels
    )
    c.tokens.max_length = 1024
    c.select.steps = ({"name": "teacher_correct"},)
    c.train.epochs = 2.0
    c.train.row_tokens = 4096
    c.train.rows_per_step = 16
    c.train.learning_rate = 1e-5
    c.train.warmup_steps = 10
    c.evaluate.iid = ("svamp",)
    c.evaluate.ood = ("asdiv", "mawps")
    c.evaluate.max_new_tokens = 512
    return c
