"""Teacher correctness: rejection of wrong chains.

Source: Fine-tune-CoT (Ho et al., arXiv 2212.10071); the first selector of DC-CoT (arXiv 2505.18759).
Cost: no model pass; the verify stage judges every answer.
Keeps: traces whose stated answer equals the gold answer.
"""

from dccot_jax.config import default_config


def get_config():
    c = default_config()
    c.name = "select_teacher_correct"
    c.select.steps = ({"name": "teacher_correct"},)
    return c
