"""The sampled signals: which question is asked for which row, how answers count, resume. The sampler is scripted."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import pytest
from etils import epath
from rich.console import Console

from dccot_jax import config as config_lib
from dccot_jax.artifact import ArtifactWriter
from dccot_jax.context import Context
from dccot_jax.generate import greedy
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh
from dccot_jax.records import make_trace
from dccot_jax.select import sampled
from dccot_jax.tasks import latex_worker
from dccot_jax.tasks.plain import plain_task_name
from dccot_jax.tasks.registry import build_prompt, get_task
from dccot_jax.train.checkpoint import Student

MC = ModelConfig("llama", 300, 32, 48, 2, 4, 2, 16, max_positions=600)


def trace(question: str, gold: str | None, **fields: Any):
    defaults = {"task": "svamp", "split": "train", "target": "x", "answer_type": "number", "gold_answer": gold}
    return make_trace(question=question, **{**defaults, **fields})


class Tokens:
    """A tokenizer of UTF-8 bytes."""

    def decode(self, tokens: list[int], skip_special_tokens: bool) -> str:
        assert skip_special_tokens
        return bytes(tokens).decode()


@dataclasses.dataclass
class Reply:
    tokens: list[int]
    finish_reason: str
    entropy: float | None = None


class Scripted:
    """Answers from a table by a word of the prompt; counts what it is asked."""

    replies: ClassVar[dict[str, tuple[Any, str]]] = {}
    draws: ClassVar[list[tuple[float, int]]] = []
    asked: ClassVar[list[str]] = []
    budgets: ClassVar[set[int]] = set()
    rows: ClassVar[list[int]] = []
    fail_after: int | None = None

    def __init__(self, mc, params, mesh, *, compute_dtype, batch_rows, eos_id, pad_id):
        assert (eos_id, pad_id) == ((3, 4), 0)

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, temperature: float = 0.0, seed: int = 0, *,
        row_ids: Sequence[int], entropy: bool = False, on_batch: Any,
    ) -> list[Reply]:  # fmt: skip
        assert len(row_ids) == len(prompts)
        self.draws.append((temperature, seed))
        on_batch([])
        self.rows.extend(row_ids)
        self.budgets.add(max_new_tokens)
        found = []
        for prompt in prompts:
            if self.fail_after is not None and len(self.asked) >= self.fail_after:
                raise KeyboardInterrupt
            text = bytes(prompt).decode()
            self.asked.append(text)
            answer, finish = next(value for key, value in self.replies.items() if key in text)
            if isinstance(answer, list):  # drawn: the next of them
                answer = answer[sum(text == said for said in self.asked) - 1]
            found.append(Reply(list(answer.encode()), finish, len(answer) / 10 if entropy else None))
        return found


@pytest.fixture
def ask(monkeypatch, tmp_path):
    monkeypatch.setattr(greedy, "Sampler", Scripted)
    monkeypatch.setattr(sampled, "load_tokenizer", lambda _: Tokens())
    monkeypatch.setattr(sampled, "render_prompt", lambda _, prompt: list(prompt.encode()))
    Scripted.asked, Scripted.rows, Scripted.draws, Scripted.budgets, Scripted.fail_after = [], [], [], set(), None
    student = Student(mc=MC, params={}, tokenizer_dir=epath.Path("."), eos_id=3, stop_ids=(3, 4), pad_id=0, source="test")
    mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])

    def run(traces, name: str = "score", signals: tuple[str, ...] = ("student_error",), file: str = "samples", **changes):
        cfg = config_lib.override(config_lib.default_config(), {"evaluate.max_new_tokens": 40, "score.chunk_rows": 2, **changes})
        out = ArtifactWriter(tmp_path / name)
        columns, dropped, facts = sampled.score(cfg, signals, student, mesh, traces, out, Context(tmp_path, console=Console(quiet=True)))
        samples = [json.loads(line) for line in (out.path / f"{file}.jsonl").read_text().splitlines()]
        return columns[signals[0]] if len(signals) == 1 else columns, {d.id: d.reason for d in dropped}, facts, samples

    return run


def test_wrong_missing_and_cut_answers_are_errors(ask):
    Scripted.replies = {
        "right": ("2 + 3 = 5\nThe answer is 5.", "stop"),
        "loose": ("I get 5", "stop"),
        "wrong": ("The answer is 6.", "stop"),
        "silent": ("hm", "length"),
    }
    rows = {name: trace(f"{name} question?", "5") for name in Scripted.replies}
    again = trace("right question?", "5", teacher="another")
    column, dropped, facts, samples = ask([*rows.values(), again])
    assert {name: column[row.id] for name, row in rows.items()} == {"right": 0.0, "loose": 0.0, "wrong": 1.0, "silent": 1.0}
    assert column[again.id] == 0.0 and not dropped
    assert len(Scripted.asked) == 4 and Scripted.budgets == {40}  # one answer per question, evaluation's budget
    task = get_task("svamp")
    assert set(Scripted.asked) == {build_prompt(task, f"{name} question?", ()) for name in rows}
    by_text = {s["question"].split()[0]: s for s in samples}
    assert set(by_text["right"]["trace_ids"]) == {rows["right"].id, again.id}
    assert by_text["silent"]["reason"] == "no_answer" and by_text["silent"]["finish_reason"] == "length"
    assert (by_text["loose"]["correct"], by_text["loose"]["correct_strict"]) == (True, False)
    assert facts["questions"] == 4 and facts["student_error_rate"] == 0.5


def test_groups_ask_their_forward_question_and_unusable_rows_have_reasons(ask):
    Scripted.replies = {"forward": ("The answer is 1.", "stop"), "lone": ("The answer is 9.", "stop"), "odd": ("The answer is 2.", "stop")}
    forward = trace("forward?", "1", group_id="G", method="reverse")
    backward = trace("backward?", None, group_id="G", method="reverse", part="backward_question")
    orphan = trace("orphan?", "1", group_id="H", part="backward_reasoning")
    no_gold = trace("lone?", None)
    bad_gold = trace("odd?", "many")
    long = trace("long" * 200 + "?", "3")
    column, dropped, _, samples = ask([forward, backward, orphan, no_gold, bad_gold, long])
    assert column == {forward.id: 0.0, backward.id: 0.0}
    assert dropped == {orphan.id: "no_forward_part", no_gold.id: "missing_gold", bad_gold.id: "bad_gold", long.id: "prompt_too_long"}
    assert len(samples) == 2


@pytest.fixture
def slow_judge(monkeypatch):
    """Comparing with a power of nine runs out of time; no child process is started."""
    monkeypatch.setattr(latex_worker, "ask", lambda request, limit: (None if "9^" in request["left"] else False, limit / 2))


def test_an_answer_that_took_too_long_to_judge_is_no_error(ask, slow_judge):
    endless, wrong = r"\boxed{9^{9^{x}}}", r"\boxed{x^2}"
    Scripted.replies = {"slow": (endless, "stop"), "wrong": (wrong, "stop"), "odd": (wrong, "stop")}
    slow, again = (trace("slow question?", "3+x", answer_type="latex", teacher=teacher) for teacher in ("one", "two"))
    known, odd = trace("wrong question?", "3+x", answer_type="latex"), trace("odd question?", "many")
    column, dropped, facts, samples = ask([slow, again, known, odd])
    assert column == {known.id: 1.0} and dropped == {slow.id: "timeout", again.id: "timeout", odd.id: "bad_gold"}
    assert facts["student_error_rate"] == 1.0 and facts["questions"] == 1
    assert facts["sample_reasons"] == {"bad_gold": 1, "timeout": 1, "wrong": 1}
    [sample] = [sample for sample in samples if sample["reason"] == "timeout"]
    assert (sample["correct"], sample["correct_strict"], sample["answer"]) == (None, None, "9^{9^{x}}")
    entropy, dropped, _, _ = ask([slow, again, known, odd], "entropy", ("student_entropy",))  # which compares nothing
    assert set(entropy) == {slow.id, again.id, known.id, odd.id} and not dropped


def test_one_draw_without_a_verdict_leaves_the_pass_rate_unknown(ask, slow_judge):
    endless, right, wrong = r"\boxed{9^{9^{x}}}", r"\boxed{3+x}", r"\boxed{x^2}"
    Scripted.replies = {"slow": ([right, endless, wrong, endless], "stop"), "known": ([right, wrong, right, right], "stop")}
    slow, known = (trace(f"{name} question?", "3+x", answer_type="latex") for name in Scripted.replies)
    settings = {"score.sampling.samples": 4, "score.chunk_rows": 8}
    column, dropped, facts, _ = ask([slow, known], signals=("pass_rate",), file="draws", **settings)
    assert column == {known.id: 0.75} and dropped == {slow.id: "timeout"}
    assert facts["pass_at_k"]["1"] == 0.75 and facts["draw_questions"] == 1 and facts["draw_sample_reasons"]["timeout"] == 2


def test_resume_asks_no_committed_question_again(ask):
    Scripted.replies = {"?": ("The answer is 5.", "stop")}
    rows = [trace(f"question {i}?", str(i)) for i in range(9)]
    whole = ask(rows, "whole")
    assert Scripted.rows == list(range(9))  # numbered through all chunks
    Scripted.asked, Scripted.fail_after = [], 5
    with pytest.raises(KeyboardInterrupt):
        ask(rows, "torn")
    first, Scripted.asked, Scripted.fail_after = list(Scripted.asked), [], None
    resumed = ask(list(reversed(rows)), "torn")
    assert resumed[0] == whole[0] and resumed[3] == whole[3]
    assert len(Scripted.asked) == 9 - 4 and not set(Scripted.asked) & set(first[:4])  # two chunks of two were committed


def test_a_row_with_its_own_prompt_is_asked_with_it(ask):
    Scripted.replies = {"own": ("The answer is 5.", "stop"), "question": ("The answer is 6.", "stop")}
    plain, own = trace("question?", "5", task=plain_task_name("number")), trace("question?", "5", prompt="own words?", target="y")
    column, _, _, samples = ask([plain, own])
    assert sorted(Scripted.asked) == ["own words?", "question?"] and len(samples) == 2
    assert (column[plain.id], column[own.id]) == (1.0, 0.0)


def test_the_pass_rate_counts_right_answers_among_drawn_ones(ask):
    right, wrong = "The answer is 5.", "The answer is 6."
    Scripted.replies = {"easy": ([right] * 4, "stop"), "hard": ([wrong, right, wrong, wrong], "stop"), "no": ([wrong] * 4, "stop")}
    rows = [trace(f"{name} question?", "5") for name in Scripted.replies]
    again, lost = trace("hard question?", "5", teacher="another"), trace("odd question?", None)
    settings = {"score.sampling.samples": 4, "score.sampling.temperature": 0.7, "score.chunk_rows": 8}
    column, dropped, facts, samples = ask([*rows, again, lost], signals=("pass_rate",), file="draws", **settings)
    assert column == {rows[0].id: 1.0, rows[1].id: 0.25, rows[2].id: 0.0, again.id: 0.25} and dropped == {lost.id: "missing_gold"}
    assert Scripted.rows == list(range(12))  # every draw of the stage has a number of its own, through all chunks
    assert {temperature for temperature, _ in Scripted.draws} == {0.7} and len({seed for _, seed in Scripted.draws}) == 1
    assert len(samples) == 12 and facts["draws_per_question"] == 4 and facts["draw_questions"] == 3
    assert facts["pass_at_k"] == {"1": round(1.25 / 3, 4), "2": 0.5, "4": round(2 / 3, 4)}


def test_the_entropy_needs_no_gold_answer_and_shares_the_greedy_one(ask):
    Scripted.replies = {"known": ("The answer is 5.", "stop"), "open": ("hm", "stop")}
    known, unknown = trace("known?", "5"), trace("open?", None)
    column, dropped, facts, samples = ask([known, unknown], signals=("student_entropy",))
    assert column == {known.id: 1.6, unknown.id: 0.2} and not dropped and facts["sample_reasons"]["no_gold"] == 1
    assert [sample["correct"] for sample in samples if sample["question"] == "open?"] == [None]
    Scripted.asked = []
    columns, dropped, _, _ = ask([known, unknown], "both", ("student_entropy", "student_error"))
    assert len(Scripted.asked) == 1 and dropped == {unknown.id: "missing_gold"}
    assert columns == {"student_entropy": {known.id: 1.6}, "student_error": {known.id: 0.0}}


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 2), (6, 5), (7, 7)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n, c):
    for k in range(1, n + 1):
        subsets = list(itertools.combinations([True] * c + [False] * (n - c), k))
        assert sampled.pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)
    for bad in ((n, c, n + 1), (n, n + 1, 1), (n, c, 0)):
        with pytest.raises(ValueError, match="pass@"):
            sampled.pass_at_k(*bad)
