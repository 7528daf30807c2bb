"""Teacher-student gap: leave out what is natural to the teacher alone.

  DCCOT_TEACHER=DIR dccot run --config=configs/select/teacher_student_gap.py --workdir=runs/gap

Source: the learnability gap (Li et al., arXiv 2502.12143: small models learn badly from reasoning far above them), measured as the loss
under the student minus that under the teacher; this measure and the window are our choice. DIR is the teacher, or a model like it, with
the student's tokenizer: a larger model of the student's family.
Cost: 1 forward pass of the student and 1 of the teacher model per row.
Keeps: the half of the rows with the smallest gap.
"""

import os

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_teacher_student_gap"
    c.score.signals = ("teacher_student_gap",)
    c.score.models.teacher = os.environ.get("DCCOT_TEACHER", "teacher")
    c.select.steps = ({"name": "bottom", "signal": "teacher_student_gap", "share": 0.5},)
    return c
