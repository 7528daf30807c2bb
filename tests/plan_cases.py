"""Small made-up trace and token tables for the tests of mixing, planning and loading."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dccot_jax.artifact import Artifact, ArtifactWriter, open_artifact, table_hash
from dccot_jax.config import default_config, override
from dccot_jax.data.tokenize import TokenRow, tokens_table
from dccot_jax.mix.groups import Group, build_groups
from dccot_jax.records import Trace, make_trace, traces_to_table

PARTS = ("forward", "backward_question", "backward_reasoning")


def config(**changes: Any):
    """The default config with dotted keys changed, `__` standing for the dot."""
    return override(default_config(), {key.replace("__", "."): value for key, value in changes.items()})


def case(
    n: int,
    *,
    reverse: bool = False,
    seed: int = 0,
    tasks: Sequence[str] = ("a",),
    teachers: Sequence[str] = ("t",),
    max_length: int = 60,
    n_steps: bool = True,
) -> tuple[list[Trace], pa.Table]:
    """n questions, each asked of every teacher: traces and their token table (sorted by id), with random tokens.

    With `reverse` every (question, teacher) is a group of three parts. Token ids are 5..511, lengths random.
    """
    rng = np.random.default_rng(seed)
    traces: list[Trace] = []
    for number in range(n):
        for teacher in teachers:
            fields: Mapping[str, Any] = {
                "task": tasks[number % len(tasks)],
                "split": "train",
                "question": f"question {number}?",
                "teacher": teacher,
                "style": teacher,
                "answer_type": "number",
                "gold_answer": str(number),
                "n_steps": 2 + number % 5 if n_steps else None,
            }
            if reverse:
                group = f"g{number:04d}{teacher}"
                traces += [make_trace(**fields, target=f"{part} {number}", part=part, method="reverse", group_id=group) for part in PARTS]
            else:
                traces.append(make_trace(**fields, target=f"target {number} {teacher}"))
    traces.sort(key=lambda trace: trace.id)
    rows = []
    for trace in traces:
        prompt, completion = int(rng.integers(3, max_length // 3)), int(rng.integers(2, max_length - max_length // 3))
        ids = rng.integers(5, 512, prompt + completion)
        rows.append(TokenRow(trace.id, trace.group_id, [int(token) for token in ids], prompt))
    return traces, tokens_table(rows)


def groups_of(traces: Sequence[Trace], tokens: pa.Table) -> list[Group]:
    """All groups of a case."""
    groups, dropped = build_groups([trace.id for trace in traces], traces_to_table(traces).to_batches(), tokens.to_batches())
    assert not dropped
    return groups


def fake(path: Path, kind: str, tables: Mapping[str, pa.Table], facts: Mapping[str, Any] | None = None) -> Artifact:
    """A finished-looking artifact holding `tables`."""
    writer = ArtifactWriter(path / kind)
    for name, table in tables.items():
        writer.write_table(name, table)
    logical = json.dumps({name: table_hash(table, by=("id",)) for name, table in tables.items()})
    writer.write_text(
        "manifest.json", json.dumps({"kind": kind, "identity": kind, "logical_hash": logical, "facts": facts or {}, "files": {}})
    )
    return open_artifact(writer.path)
