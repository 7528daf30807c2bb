"""The report on made-up artifacts: numbers against hand counts, lm-eval's shape, the page's self-containment."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from report_fixture import OVERLAP, TASKS, make_runs
from rich.console import Console

from dccot_jax.context import Context
from dccot_jax.evaluate.metrics import small_n_note, task_metrics
from dccot_jax.report.build import build_report
from dccot_jax.report.evaluations import read_evaluations
from dccot_jax.report.html import choose_samples
from dccot_jax.report.results import compare_arms

ARMS = ("no_cot", "vanilla_noisy", "correct_noisy")


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any], dict[str, Any], str]:
    root = tmp_path_factory.mktemp("run")
    config, runs = make_runs(root, ARMS, items=210)
    config = config.copy_and_resolve_references().unlock()
    config.report.compare = (("correct_noisy", "vanilla_noisy"),)
    printed = io.StringIO()
    results = build_report(runs, root / "report", config.lock(), Context(workdir=root, console=Console(file=printed, width=150)))
    return root / "report", runs, results, printed.getvalue()


def test_results_json_is_a_superset_of_lm_evals(built):
    folder, _, results, _ = built
    loaded = json.loads((folder / "results.json").read_text())
    lm_eval = {
        *("results", "group_subtasks", "configs", "versions", "n-shot", "higher_is_better", "n-samples"),
        *("config", "git_hash", "date", "model_name", "chat_template_sha", "task_hashes"),
    }
    assert lm_eval <= set(loaded)
    entry = loaded["results"]["synth_arithmetic"]
    assert {"exact_match,strict-match", "exact_match,flexible-extract", "exact_match_stderr,flexible-extract"} <= set(entry)
    assert loaded["n-samples"]["synth_arithmetic"] == {"original": 210, "effective": 210}
    assert loaded["results_of"]["arm"] == "no_cot" and set(loaded["results"]) == set(TASKS)
    one = json.loads((folder / "lm_eval" / "correct_noisy-seed1.json").read_text())
    assert one["results"]["synth_arithmetic"]["exact_match,flexible-extract"] == pytest.approx(
        results["arms"]["correct_noisy"]["synth_arithmetic"]["seeds"]["1"]["accuracy_flexible"]
    )


def test_cells_agree_with_the_samples(built):
    folder, _, results, _ = built
    assert len(results["cells"]) == (2 * len(ARMS) + 1) * len(TASKS)
    for cell in results["cells"]:
        rows = [json.loads(line) for line in (folder / "samples" / f"{cell['arm']}-seed{cell['seed']}.jsonl").read_text().splitlines()]
        rows = [row for row in rows if row["task"] == cell["task"]]
        assert cell["n"] == len(rows)
        assert cell["accuracy_flexible"] == pytest.approx(np.mean([row["correct_flexible"] for row in rows]))
        assert cell["no_answer_rate"] == pytest.approx(np.mean([row["answer_flexible"] is None for row in rows]))
        assert cell["format_failure"] == (cell["no_answer_rate"] > 0.2)
        assert cell["n"] >= 200 or cell["small_n"]
    mean = results["arms"]["correct_noisy"]["synth_arithmetic"]
    assert mean["mean"]["accuracy_flexible"] == pytest.approx(np.mean([one["accuracy_flexible"] for one in mean["seeds"].values()]))
    assert mean["interval"][0] < mean["mean"]["accuracy_flexible"] < mean["interval"][1]


def test_comparisons_cover_declared_pairs_the_first_arm_and_the_base(built):
    results = built[2]
    rows = results["comparisons"]
    assert {(row["first"], row["second"]) for row in rows if row["kind"] == "declared"} == {("correct_noisy", "vanilla_noisy")}
    reference = {(row["first"], row["second"]) for row in rows if row["kind"] == "reference"}
    assert reference == {(arm, "no_cot") for arm in ARMS[1:]} | {(arm, "base") for arm in ARMS}
    row = next(row for row in rows if row["kind"] == "declared" and row["task"] == "synth_arithmetic")
    arms = results["arms"]
    expected = (
        arms["correct_noisy"]["synth_arithmetic"]["mean"]["accuracy_flexible"]
        - arms["vanilla_noisy"]["synth_arithmetic"]["mean"]["accuracy_flexible"]
    )
    assert row["difference"] == pytest.approx(expected) and row["verdict"] == "higher" and row["low"] > 0
    assert row["p_holm"] >= row["p_value"] and set(row["per_seed"]) == set(row["mcnemar_p"]) == {"0", "1"}
    assert row["gold_nll"]["high"] < 0


def test_a_null_result_is_shown_as_null_and_a_missing_arm_as_undefined(built):
    runs = built[1]
    evaluations = read_evaluations(runs)
    same = compare_arms(evaluations, [("no_cot", "no_cot"), ("no_cot", "absent")], resamples=50, seed=0)
    equal = [row for row in same if row["second"] == "no_cot" and row["kind"] == "declared"]
    assert equal and all(row["verdict"] == "equal" and row["difference"] == 0 and row["p_value"] == 1.0 for row in equal)
    absent = [row for row in same if row["second"] == "absent"]
    assert absent and all("absent" in row["undefined"] and row["p_value"] is None and "difference" not in row for row in absent)


def test_terminal_table_marks_failures_and_small_cells(built):
    folder, _, _, printed = built
    for text in (printed, (folder / "table.txt").read_text()):
        assert "IID" in text and "Cross-domain" in text and "correct_noisy" in text
        assert "† format failure" in text and "fewer than 200 items (synth_calendar: n = 60: the test split holds 60 items)" in text
        assert "no difference shown" in text


def test_lineage_leads_from_traces_to_students(built):
    folder, runs, results, _ = built
    table = pq.read_table(folder / "lineage.parquet")
    run = next(run for run in runs if run.arm == "correct_noisy" and run.seed == 1)
    mine = [row for row in table.to_pylist() if row["arm"] == "correct_noisy" and row["seed"] == 1]
    planned = run.artifacts["plan"].table("plan")
    assert {row["id"] for row in mine} == set(planned.column("id").to_pylist())
    assert sum(row["uses"] for row in mine) == planned.num_rows
    known = set(run.artifacts["verify"].table("traces").column("id").to_pylist())
    assert {row["id"] for row in mine} <= known
    assert all((folder.parent / row["traces"] / "traces.parquet").exists() for row in mine[:1])
    sample = json.loads((folder / "samples" / "correct_noisy-seed1.jsonl").read_text().splitlines()[0])
    assert (folder.parent / sample["plan"] / "plan.parquet").exists() and sample["train"].startswith("artifacts/train-")
    assert {(entry["arm"], entry["seed"]) for entry in results["lineage"]} == {(run.arm, run.seed) for run in runs}


def test_funnel_and_score_histograms_count_every_row(built):
    results = built[2]
    row = next(entry for entry in results["data"]["funnel"] if entry["arm"] == "correct_noisy")
    stages = {stage["stage"]: stage for stage in row["stages"]}
    assert stages["select"]["rows_in"] - sum(stages["select"]["dropped"].values()) == stages["select"]["rows_out"]
    assert stages["verify"]["dropped"] == {"leak:synth_objects": 7} and row["plan"]["completion_tokens"]["unique"] == 31_000
    for entry in results["selection"]["recipes"]:
        for signal in entry["histograms"].values():
            assert sum(signal["kept"]) + sum(signal["dropped"]) + signal["outside"] == signal["n"] == 590
    chosen = next(entry for entry in results["selection"]["recipes"] if "correct_noisy" in entry["arms"])
    assert sum(chosen["histograms"]["nll"]["dropped"]) > 100


def test_overlap_with_test_sets_is_shown_with_its_spans(built):
    folder, _, results, _ = built
    entries = results["data"]["overlap"]
    assert sorted(arm for entry in entries for arm in entry["arms"]) == sorted(set(results["arms"]) - {"base"})
    entry = entries[0]
    assert entry["sizes"] == ["8"] and entry["clean"] == ["synth_calendar"] and list(entry["tasks"]) == ["synth_objects"]
    assert entry["tasks"]["synth_objects"] == {**OVERLAP["synth_objects"], "leaked": 7}
    assert entry["examples"][0]["spans"] == ["start with nine and add <ten>"]
    page = (folder / "report.html").read_text()
    assert (
        "Overlap with test sets" in page and "start with nine and add &lt;ten&gt;" in page and "Nothing shared with synth_calendar" in page
    )


class _Page(HTMLParser):
    """Collects tags, references and ids, and checks that tags close in order."""

    VOID = frozenset({"meta", "br", "hr", "img", "input", "link", "wbr", "use", "path", "line", "circle", "rect"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.references: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("href", "src", "xlink:href"):
                self.references.append(value or "")
            if name == "id":
                self.ids.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
            self.handle_starttag(tag, attrs)
            self.open.pop()
            self.open.pop()
        else:
            self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"


def test_page_is_self_contained_well_formed_and_escaped(built):
    text = (built[0] / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.open
    assert "script" not in page.tags and "link" not in page.tags and "img" not in page.tags
    assert all(reference.startswith("#") for reference in page.references)
    missing = {reference[1:] for reference in page.references} - set(page.ids)
    assert not missing, missing
    assert len(page.ids) == len(set(page.ids))
    assert not re.findall(r"url\((?!#)|@import", text)
    assert "&lt;script&gt;alert(1)" in text and "<script>" not in text
    assert "prefers-color-scheme: dark" in text and text.count("<svg") >= 4
    for arm in (*ARMS, "base"):
        assert arm in text


def test_samples_are_chosen_by_rule(built):
    runs, results = built[1], built[2]
    evaluations = read_evaluations(runs)
    shown = choose_samples(evaluations, results["groups"], 6)
    assert len(shown) == 6 and [sample["task"] for sample in shown[:5]] == [task for tasks in results["groups"].values() for task in tasks]
    assert shown == choose_samples(list(evaluations), results["groups"], 6)
    assert [reply["arm"] for reply in shown[0]["replies"]] == ["base", *ARMS]
    assert len({reply["correct_flexible"] for reply in shown[0]["replies"] if reply["arm"] != "base"}) == 2


def test_report_without_training_or_data(tmp_path: Path):
    """`dccot eval` reports one student with nothing else at hand."""
    config, runs = make_runs(tmp_path, ("vanilla_clean",), seeds=(0,), items=20)
    only = [type(runs[1])("checkpoint", 0, runs[1].config, {"evaluate": runs[1].artifacts["evaluate"]})]
    results = build_report(only, tmp_path / "report", config, Context(workdir=tmp_path, console=Console(file=io.StringIO())))
    assert results["comparisons"] == [] and results["data"]["funnel"] == [] and results["training"] == []
    assert "checkpoint" in (tmp_path / "report" / "report.html").read_text()


def test_report_before_any_evaluation(tmp_path: Path):
    config, runs = make_runs(tmp_path, ("vanilla_clean",), seeds=(0,), items=5)
    early = [type(runs[1])("a", 0, runs[1].config, {name: runs[1].artifacts[name] for name in ("traces", "verify")})]
    build_report(early, tmp_path / "report", config, Context(workdir=tmp_path, console=Console(file=io.StringIO())))
    assert "No evaluation is finished yet" in (tmp_path / "report" / "report.html").read_text()


def test_metrics_of_nothing_and_of_one_are_undefined_not_zero():
    none = task_metrics([], group="iid", available=0, limit=0)
    assert none["accuracy_flexible"] is None and none["accuracy_flexible_interval"] is None and none["no_answer_rate"] is None
    assert none["gold_nll"] is None and none["small_n"] and not none["format_failure"]
    row = {
        "completion_tokens": 3,
        "finish_reason": "stop",
        "answer_flexible": "1",
        "answer_strict": None,
        "reason": "correct",
        "correct_strict": False,
        "correct_flexible": True,
        "n_steps": 4,
        "gold_nll_nats": 6.0,
        "gold_nll_tokens": 3,
    }
    one = task_metrics([row], group="iid", available=1, limit=0)
    assert one["accuracy_flexible"] == 1.0 and one["accuracy_strict"] == 0.0 and one["accuracy_flexible_stderr"] is None
    assert one["gold_nll"] == {"mean": 2.0, "stderr": None, "items": 1, "tokens": 3}
    assert [step["n_steps"] for step in one["by_steps"]] == [4]
    late = row | {"reason": "timeout", "correct_flexible": False}
    two = task_metrics([row, late], group="iid", available=2, limit=0)  # an answer that took too long to judge: wrong, and counted
    assert two["accuracy_flexible"] == 0.5 and two["reasons"] == {"correct": 1, "timeout": 1} and two["no_answer_rate"] == 0.0


def test_small_n_says_why():
    assert small_n_note(200, 200, 0) is None
    assert small_n_note(120, 120, 0) == "n = 120: the test split holds 120 items"
    assert small_n_note(50, 1000, 50) == "n = 50: limited by evaluate.limit = 50"
    assert small_n_note(190, 230, 0) == "n = 190 of 230 items"
    assert small_n_note(199, 500, 200, {"prompt_too_long": 1}) == "n = 199: limited by evaluate.limit = 200; dropped: prompt_too_long 1"
    assert small_n_note(199, 500, 0, {"prompt_too_long": 301}) == "n = 199: dropped: prompt_too_long 301"
    assert small_n_note(148, 150, 0, {"bad_gold": 9}) == "n = 148: the test split holds 150 usable items; dropped: bad_gold 9"
    assert small_n_note(200, 500, 200, {"bad_gold": 1}) is None
