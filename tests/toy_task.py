"""A tiny task and teachers with controllable mistakes, for tests of teachers, augmentation and verification."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, finish
from dccot_jax.config import default_config, override
from dccot_jax.context import Context
from dccot_jax.records import Request, Response, Trace, content_hash, traces_to_table
from dccot_jax.tasks import registry
from dccot_jax.tasks.base import Item, Task, make_item
from dccot_jax.teachers import build

PAIRS = [(3, 4), (10, 5), (7, 7), (20, 1), (6, 9), (2, 30)]


def question(a, b):
    return f"Ann has {a} pens and gets {b} more. How many pens has Ann?"


def items(split: str) -> list[Item]:
    pairs = PAIRS if split == "train" else [(100, 1), (100, 2)]
    return [make_item("toy", split, question(a, b), gold=str(a + b), n_steps=1) for a, b in pairs]


TOY = Task(
    name="toy",
    answer_type="number",
    domain="math",
    description="sums",
    load=lambda split, data_dir: items(split),
    prompt_suffix="\nThink, then write 'The answer is N.'",
    iid=("toy",),
)


class FakeTeacher:
    """Solves sums; what it gets wrong, cuts or fails at is given per test as functions of (kind, text, sample_index).

    kinds: solve, rephrase, new question, backward question, consistency.
    """

    style = "fake"

    def __init__(self, name="fake", reply=None, fail_at=0):
        self.name = name
        self.cache_key = content_hash(name)
        self.override = reply or (lambda kind, text, index: None)
        self.fail_at = fail_at
        self.asked: list[Request] = []

    async def complete(self, request: Request) -> Response:
        await asyncio.sleep(0)
        if self.fail_at and len(self.asked) + 1 >= self.fail_at:
            raise ConnectionError("gone")
        self.asked.append(request)
        text = request.messages[-1].content
        found = re.match(r"Task: (.*)", text)
        kind = found[1] if found else "solve"
        own = self.override(kind, text, request.sample_index)
        if isinstance(own, Response):
            return own
        return Response(own if own is not None else self.reply(kind, text, request.sample_index), prompt_tokens=5, completion_tokens=7)

    def reply(self, kind: str, text: str, index: int) -> str:
        asked = text.rpartition("Question: ")[2] if kind != "solve" else text
        numbers = [int(number) for number in re.findall(r"\d+", asked)]
        if kind == "rephrase":
            return f"Rephrased question: Ann owned {numbers[0]} pens, {numbers[1]} came along. What is her total? (way {index})"
        if kind == "new question":
            return f'New question: "Bob has {numbers[0] + 1} hats and finds {numbers[1] + 2} hats. How many hats?"'
        if kind == "backward question":
            backward = f"Ann has {numbers[0]} pens and gets x more. Now she has {numbers[2]}. What is x?"
            return f"Backward question: {backward} The answer is ({numbers[1]})."
        if kind == "consistency":
            return "The number stands in question 1.\nTrue"
        if "What is x" in text:
            return f"{numbers[1]}-{numbers[0]}={numbers[1] - numbers[0]}.\nThe answer is {numbers[1] - numbers[0]}."
        total = numbers[0] + numbers[1]
        return f"{'So ' * index}{numbers[0]}+{numbers[1]}={total}.\nThe answer is {total}."


def install(monkeypatch, *teachers: FakeTeacher, tasks=(TOY,)) -> None:
    """Make tasks and teachers known (teacher kind = its name) for one test."""
    registry.get_task("synth_arithmetic")  # registers the real ones first
    for task in tasks:
        monkeypatch.setitem(registry._TASKS, task.name, task)
    for teacher in teachers:
        monkeypatch.setitem(build._FACTORIES, teacher.name, lambda teacher=teacher: teacher)


def config(**changes):
    """The default config on the toy task; keys with ``__`` for dots."""
    flat = {"traces.task": "toy", "traces.teachers": ({"kind": "fake"},), "augment.teacher": {"kind": "fake"}}
    return override(default_config(), flat | {key.replace("__", "."): value for key, value in changes.items()})


def run_stage(stage, cfg, tmp_path: Path, name: str, **inputs: Artifact) -> tuple[Artifact, StageResult]:
    """Run one stage and finish its artifact, as the pipeline does."""
    writer = ArtifactWriter(tmp_path / name)
    result = stage.run(cfg, inputs, writer, Context(workdir=tmp_path))
    artifact = finish(writer, kind=name, identity=name, version=1, config={}, inputs={}, result=result, wall_seconds=0.0, recorded={})
    return artifact, result


def traces_artifact(tmp_path: Path, name: str, traces: list[Trace]) -> Artifact:
    """An artifact that holds `traces`, as the traces stage leaves it."""
    writer = ArtifactWriter(tmp_path / name)
    writer.write_table("traces", traces_to_table(traces))
    return finish(
        writer, kind="traces", identity=name, version=1, config={}, inputs={}, result=StageResult(""), wall_seconds=0.0, recorded={}
    )
