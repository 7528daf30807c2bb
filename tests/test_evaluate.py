"""Protocol, samples and gold NLL of the evaluate stage, with a student that needs no training and replies that are known."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import tiny_config

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, finish
from dccot_jax.config import ConfigError
from dccot_jax.context import Context
from dccot_jax.data import student as student_stage
from dccot_jax.data.template import render, render_prompt
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.evaluate import gold_nll, stage
from dccot_jax.evaluate.protocol import evaluation_groups, load_panels, make_panel, make_questions
from dccot_jax.generate.sampler import Generated
from dccot_jax.model import decoder, head
from dccot_jax.model.sharding import make_mesh
from dccot_jax.tasks.base import make_item
from dccot_jax.tasks.registry import build_prompt, build_target, get_task, load_items
from dccot_jax.train.checkpoint import Student, load_student

ITEMS = 30


class FakeSampler:
    """Writes the gold rationale for items whose hash is even, nothing readable for the rest; counts what it is asked."""

    asked: list[int]
    rows: list[int]
    fail_after: int = 10**9

    def __init__(self, tokenizer: Any, answers: dict[tuple[int, ...], str]):
        self.tokenizer, self.answers, self.asked, self.rows = tokenizer, answers, [], []

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, *, row_ids: list[int], entropy: bool = False, on_batch: Any
    ) -> list[Generated]:
        self.rows += row_ids
        if sum(self.asked) + len(prompts) > self.fail_after:
            raise KeyboardInterrupt
        self.asked.append(len(prompts))
        found = []
        for prompt in prompts:
            tokens = self.tokenizer(self.answers[tuple(prompt)], add_special_tokens=False)["input_ids"]
            found.append(Generated(tokens[:max_new_tokens], "length" if len(tokens) > max_new_tokens else "stop"))
        on_batch(list(enumerate(found)))
        return found


@pytest.fixture(scope="module")
def config():
    return tiny_config(evaluate__limit=ITEMS, evaluate__max_new_tokens=160)


@pytest.fixture(scope="module")
def student(tmp_path_factory: pytest.TempPathFactory, config) -> Artifact:
    root = tmp_path_factory.mktemp("student")
    writer = ArtifactWriter(root)
    result = student_stage.run(config, {}, writer, Context(workdir=root))
    return _finish(writer, "student", result)


def _finish(writer: ArtifactWriter, kind: str, result: StageResult) -> Artifact:
    return finish(writer, kind=kind, identity=kind * 4, version=1, config={}, inputs={}, result=result, wall_seconds=0.0, recorded={})


def _fake(student: Artifact) -> tuple[FakeSampler, set[str]]:
    """A sampler that knows the tiny config's items, and the ids it answers right."""
    tokenizer = load_tokenizer(student.file("tokenizer"))
    answers, right = {}, set()
    for name in ("synth_arithmetic", "synth_arithmetic_long"):
        task = get_task(name)
        for item in load_items(name, "test", None, ITEMS):
            prompt = tuple(render_prompt(tokenizer, build_prompt(task, item.question, item.choices)))
            good = int(item.id, 16) % 2 == 0
            answers[prompt] = build_target(task, item.rationale or "", item.gold or "") if good else "hm"
            if good:
                right.add(item.id)
    return FakeSampler(tokenizer, answers), right


@functools.cache
def _load(path: str, mesh: Any) -> Student:
    return load_student(path, mesh)


def _loaded(source: Artifact, mesh: Any) -> Student:
    return _load(str(source.path), mesh)


def _evaluate(
    config, student: Artifact, folder: Path, sampler: FakeSampler, monkeypatch: pytest.MonkeyPatch
) -> tuple[Artifact, StageResult]:
    monkeypatch.setattr(stage, "make_sampler", lambda *_: sampler)
    monkeypatch.setattr(stage, "load_student", _loaded)  # compiles its initialiser anew at every call
    writer = ArtifactWriter(folder)
    result = stage.run(config, {"student": student}, writer, Context(workdir=folder))
    return _finish(writer, "evaluate", result), result


def test_groups_default_to_the_training_tasks_relations():
    task = get_task("synth_arithmetic")
    groups = evaluation_groups(tiny_config(evaluate__iid=(), evaluate__ood=()))
    assert groups == {"iid": task.iid, "ood": task.ood, "cross": task.cross} and groups["cross"]
    assert evaluation_groups(tiny_config(evaluate__ood=()))["ood"] == ()
    with pytest.raises(ConfigError, match="listed more than once"):
        evaluation_groups(tiny_config(evaluate__ood=("synth_arithmetic",)))
    with pytest.raises(ConfigError, match=r"evaluate\.limits: 'svamp' is not evaluated"):
        load_panels(tiny_config(evaluate__limits={"svamp": 3}), None)


def test_items_are_chosen_by_id_and_unusable_ones_are_counted():
    task = get_task("synth_arithmetic")
    items = [make_item(task.name, "test", f"q {n}?", gold=str(n)) for n in range(20)]
    bad = [make_item(task.name, "test", "a?", gold=None), make_item(task.name, "test", "b?", gold="many"), items[3]]
    panel = make_panel(task, "iid", [*items, *bad], 5)
    assert [item.id for item in panel.items] == sorted(item.id for item in items)[:5] and panel.available == 20
    assert sorted(row.reason for row in panel.dropped) == ["bad_gold", "duplicate", "missing_gold"]
    shuffled = make_panel(task, "iid", [*bad, *items[::-1]], 5)
    assert shuffled.items == panel.items and shuffled.task_hash == panel.task_hash
    assert len(make_panel(task, "iid", items, 0).items) == 20


def test_prompts_are_those_of_training_and_never_cut(student: Artifact):
    tokenizer = load_tokenizer(student.file("tokenizer"))
    panels = load_panels(tiny_config(evaluate__limit=8), None)
    questions, dropped = make_questions(panels, tokenizer, max_positions=1024, max_new_tokens=100)
    assert len(questions) == 16 and not dropped
    for question in questions:
        row = render(tokenizer, question.user, build_target(question.panel.task, question.item.rationale or "", question.item.gold or ""))
        assert tuple(row.input_ids[: row.prompt_tokens]) == question.prompt_ids
    longest = max(len(question.prompt_ids) for question in questions)
    fewer, dropped = make_questions(panels, tokenizer, max_positions=longest + 99, max_new_tokens=100)
    assert dropped and {row.reason for row in dropped} == {"prompt_too_long"} and len(fewer) + len(dropped) == 16


def test_stage_counts_what_the_student_wrote(config, student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sampler, right = _fake(student)
    artifact, result = _evaluate(config, student, tmp_path, sampler, monkeypatch)
    rows = [json.loads(line) for line in artifact.file("samples.jsonl").read_text().splitlines()]
    assert len(rows) == result.rows_in == result.rows_out == 2 * ITEMS and not result.dropped
    assert sampler.rows == list(range(2 * ITEMS))
    assert {row["item_id"] for row in rows if row["correct_strict"]} == {row["item_id"] for row in rows if row["correct_flexible"]} == right
    metrics = artifact.json("metrics")
    for name, group in (("synth_arithmetic", "iid"), ("synth_arithmetic_long", "ood")):
        mine = [row for row in rows if row["task"] == name]
        cell = metrics["tasks"][name]
        assert cell["group"] == group and cell["n"] == ITEMS and [row["doc_id"] for row in mine] == list(range(ITEMS))
        assert cell["accuracy_flexible"] == pytest.approx(np.mean([row["item_id"] in right for row in mine]))
        assert cell["no_answer_rate"] == pytest.approx(1 - cell["accuracy_flexible"]) and cell["format_failure"]
        assert sum(step["n"] for step in cell["by_steps"]) == ITEMS and sum(cell["reasons"].values()) == ITEMS
        assert cell["small_n"] == f"n = {ITEMS}: limited by evaluate.limit = {ITEMS}"
        assert cell["gold_nll"]["items"] == ITEMS and 3 < cell["gold_nll"]["mean"] < 12  # untrained: about log(vocabulary)
    assert metrics["protocol"]["name"] == "sound" and len(metrics["protocol"]["chat_template_sha256"]) == 64
    assert {"resps", "filtered_resps", "doc_hash", "prompt_hash", "target_hash", "arguments", "target"} <= set(rows[0])
    assert not artifact.has("chunks")


def test_every_item_asked_for_is_evaluated_or_dropped_with_a_reason(
    config, student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """One panel with unusable items, a limit, long prompts and gold rationales that do not fit."""
    tokenizer = load_tokenizer(student.file("tokenizer"))
    task = get_task("synth_arithmetic")
    good = load_items(task.name, "test", None, ITEMS)
    long = make_item(task.name, "test", "Ann has 2 and gets 3. " * 300 + "How many?", gold="5")
    unfit = make_item(task.name, "test", "Bob has 2 and gets 3. How many?", gold="5", rationale="2+3=5. " * 800)
    bad = [make_item(task.name, "test", "a?", gold=None), make_item(task.name, "test", "b?", gold="many")]
    panel = make_panel(task, "iid", [*good, long, unfit, *bad], ITEMS + 2)
    monkeypatch.setattr(stage, "load_panels", lambda *_: [panel])
    sampler, _ = _fake(student)
    sampler.answers[tuple(render_prompt(tokenizer, build_prompt(task, unfit.question)))] = "The answer is 5."
    artifact, result = _evaluate(config, student, tmp_path, sampler, monkeypatch)
    assert (result.rows_in, result.rows_out) == (ITEMS + 4, ITEMS + 1)
    assert result.dropped == {"bad_gold": 1, "missing_gold": 1, "prompt_too_long": 1}
    assert {row["reason"] for row in artifact.table("dropped").to_pylist()} == set(result.dropped)
    assert result.facts["gold_nll_lost"] == {"gold_too_long": 1}
    assert [row["id"] for row in artifact.table("gold_dropped").to_pylist()] == [unfit.id]
    note = artifact.json("metrics")["tasks"][task.name]["small_n"]
    assert note == f"n = {ITEMS + 1}: the test split holds {ITEMS + 2} usable items; dropped: bad_gold 1, missing_gold 1, prompt_too_long 1"


def test_cut_replies_count_as_truncated_and_wrong(config, student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    sampler, right = _fake(student)
    short = tiny_config(evaluate__limit=ITEMS, evaluate__max_new_tokens=4, evaluate__gold_nll=False)
    artifact, _ = _evaluate(short, student, tmp_path, sampler, monkeypatch)
    cells = artifact.json("metrics")["tasks"]
    rows = [json.loads(line) for line in artifact.file("samples.jsonl").read_text().splitlines()]
    assert sum(cell["truncation_rate"] for cell in cells.values()) * ITEMS == pytest.approx(len(right))
    assert not any(row["correct_strict"] for row in rows) and all(row["completion_tokens"] <= 4 for row in rows)
    assert all(cell["gold_nll"] is None for cell in cells.values()) and rows[0]["gold_nll_nats"] is None


def test_a_killed_evaluation_goes_on_and_ends_the_same(config, student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stage, "CHUNK_ROWS", 16)
    whole, _ = _fake(student)
    _, expected = _evaluate(config, student, tmp_path / "whole", whole, monkeypatch)
    first, _ = _fake(student)
    first.fail_after = 40
    with pytest.raises(KeyboardInterrupt):
        _evaluate(config, student, tmp_path / "killed", first, monkeypatch)
    assert sum(first.asked) == 32
    chunks = sorted((tmp_path / "killed" / "chunks").iterdir())
    torn = bytes(Path(chunks[1]).read_bytes()[:40])
    Path(chunks[1]).write_bytes(torn)
    again, _ = _fake(student)
    _, result = _evaluate(config, student, tmp_path / "killed", again, monkeypatch)
    assert sum(again.asked) == 2 * ITEMS - 16  # only the first chunk was whole
    assert result.logical_hash == expected.logical_hash
    assert (tmp_path / "killed" / "metrics.json").read_bytes() == (tmp_path / "whole" / "metrics.json").read_bytes()


def test_gold_nll_equals_one_row_at_a_time(student: Artifact):
    """Padded tiles over a sharded mesh against plain log-softmax of one unpadded row, in float32."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 1}, jax.devices()[:4])
    loaded = load_student(student, mesh)
    tokenizer = load_tokenizer(student.file("tokenizer"))
    questions, _ = make_questions(load_panels(tiny_config(evaluate__limit=9), None), tokenizer, max_positions=1024, max_new_tokens=8)
    rows, dropped = gold_nll.gold_rows(questions, tokenizer, max_positions=1024)
    assert len(rows) == 18 and not dropped
    batches = gold_nll.tiles(rows, mesh)
    assert [row for batch in batches for row in batch] == rows
    scored = np.concatenate(list(gold_nll.score(loaded.params, loaded.mc, mesh, batches, compute_dtype="float32", pad_id=loaded.pad_id)))

    plain = jax.tree.map(lambda leaf: jnp.asarray(np.asarray(leaf)), loaded.params)

    @jax.jit
    def logp(ids: jax.Array) -> jax.Array:
        hidden = decoder.forward(plain, loaded.mc, ids, jnp.ones_like(ids), jnp.arange(ids.shape[1])[None])
        return jax.nn.log_softmax(head.logits(plain, loaded.mc, hidden)[0])

    for index in (0, 10, 17):
        row = rows[index]
        found = np.asarray(logp(jnp.asarray([row.input_ids])), np.float64)
        expected = -sum(found[t - 1, row.input_ids[t]] for t in range(row.prompt_tokens, len(row.input_ids)))
        assert scored[index] == pytest.approx(expected, rel=1e-5)


def test_items_without_a_rationale_have_no_gold_nll(student: Artifact):
    tokenizer = load_tokenizer(student.file("tokenizer"))
    task = get_task("synth_arithmetic")
    items = [make_item(task.name, "test", "Ann has 2 and gets 3. How many?", gold="5")]
    items.append(make_item(task.name, "test", "Ann has 4 and gets 3. How many?", gold="7", rationale="Start with 4. 4+3=7."))
    questions, _ = make_questions([make_panel(task, "iid", items, 0)], tokenizer, max_positions=1024, max_new_tokens=8)
    rows, dropped = gold_nll.gold_rows(questions, tokenizer, max_positions=1024)
    assert [questions[row.question].item.gold for row in rows] == ["7"] and not dropped
    none, dropped = gold_nll.gold_rows(questions, tokenizer, max_positions=20)
    assert not none and [row.reason for row in dropped] == ["gold_too_long"]


def test_an_untrained_student_runs_through(student: Artifact, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The real sampler, twice with different chunks: the same replies, none beyond the budget."""
    config = tiny_config(evaluate__limit=4, evaluate__max_new_tokens=8, evaluate__gold_nll=False, evaluate__ood=())
    monkeypatch.setattr(stage, "load_student", _loaded)
    results = []
    for size in (256, 4):
        monkeypatch.setattr(stage, "CHUNK_ROWS", size)
        writer = ArtifactWriter(tmp_path / str(size))
        results.append(stage.run(config, {"student": student}, writer, Context(workdir=tmp_path)))
        artifact = _finish(writer, "evaluate", results[-1])
        cell = artifact.json("metrics")["tasks"]["synth_arithmetic"]
        assert cell["n"] == 4 and 1 <= cell["mean_completion_tokens"] <= 8
    assert results[0].logical_hash == results[1].logical_hash
