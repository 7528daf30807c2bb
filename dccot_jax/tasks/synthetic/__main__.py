"""``python -m dccot_jax.tasks.synthetic`` prints how many items and skeletons train and test hold and share."""

from __future__ import annotations

from dccot_jax.tasks.synthetic import disjointness_report

for task, counts in disjointness_report().items():
    print(task, " ".join(f"{name}={count}" for name, count in counts.items()))
