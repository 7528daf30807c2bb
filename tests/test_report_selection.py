"""What the report says about selection, on small artifacts with hand-made scores: signals, recipes, examples, overlap, costs."""

from __future__ import annotations

import io
import json
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console

from dccot_jax.artifact import ArmRun, Artifact, StageResult, Store, finish, table_hash
from dccot_jax.config import default_config, override
from dccot_jax.context import Context
from dccot_jax.external import select_files
from dccot_jax.records import TRACE_SCHEMA, Dropped, content_hash, make_trace, traces_to_table
from dccot_jax.report.build import build_report
from dccot_jax.report.pools import read_pool
from dccot_jax.report.recipes import shorten
from dccot_jax.report.selection import selection
from dccot_jax.select.agreement import agreement
from dccot_jax.select.passes import declared_passes
from dccot_jax.select.signals import signal_names

TOP = {"name": "top", "signal": "nll", "rows": 4}
TEXT = "<script>alert('x')</script> & so on. " * 30


def made(store: Store, kind: str, name: str, tables: dict[str, Any], **manifest: Any) -> Artifact:
    writer = store.writer(kind, content_hash(kind, name, digits=64))
    for key, table in tables.items():
        writer.write_dropped(table) if key == "dropped" else writer.write_table(key, table)
    result = StageResult(
        manifest.pop("hash", content_hash(name)),
        manifest.pop("rows_in", 0),
        manifest.pop("rows_out", 0),
        manifest.pop("dropped", {}),
        manifest.pop("facts", {}),
    )
    fixed = {"version": 1, "config": {}, "inputs": {}, "wall_seconds": 2.0, "recorded": {}}
    return finish(writer, kind=kind, identity=content_hash(kind, name, digits=64), result=result, **{**fixed, **manifest})


class Run:
    """Twelve rows of two teachers and one style, nll = 0..11, and any number of selections of them."""

    def __init__(self, root: Path, *, vectors: bool = False, scored: bool = True):
        self.root, self.store = root, Store(root / "artifacts")
        rows = [
            make_trace(
                task="toy",
                split="train",
                question=f"<b>{i}</b> What? {TEXT}",
                target="t",
                reasoning=f"r{i} {TEXT}",
                teacher="ab$x_1$"[i % 3 : i % 3 + 1] if i % 3 < 2 else "a/<b>$x_1$",
                style="plain",
                n_steps=None if i == 3 else 2,
                answer=str(i),
                gold_answer=str(i),
            )
            for i in range(12)
        ]
        self.ids = [row.id for row in rows]
        lengths = {"prompt_tokens": [4 + i % 2 for i in range(12)], "completion_tokens": [12 - i for i in range(12)]}
        self.artifacts = {
            "verify": made(self.store, "verify", "v", {"traces": traces_to_table(rows)}),
            "tokenize": made(self.store, "tokenize", "t", {"tokens": pa.table({"id": self.ids, **lengths})}, rows_out=12),
        }
        if scored:
            scores: dict[str, Any] = {"id": self.ids[:11], "nll": np.arange(11.0, dtype=np.float32)}  # one row was not scored
            scores["ifd_loss"] = np.asarray([5.0] * 6 + [7.0] * 5, np.float32)
            if vectors:
                flat = np.repeat(np.arange(11, dtype=np.float32), 4)
                scores["embedding"] = pa.FixedSizeListArray.from_arrays(pa.array(flat), 4)
            facts = {"signals": ["ifd_loss", "nll"], "rows_per_second": 5.5, "tokens": 321, "rows_resumed": 0, "student": {"kind": "train"}}
            self.artifacts["score"] = made(
                self.store, "score", "s", {"scores": pa.table(scores)}, facts=facts, rows_in=12, rows_out=11, wall_seconds=2.5
            )
            self.artifacts["train:warmup"] = made(self.store, "train", "w", {}, wall_seconds=7.5)

    def select(self, name: str, keep: list[int], steps: tuple[dict[str, Any], ...] = (), **more: Any) -> Artifact:
        kept = pa.table({"id": sorted(self.ids[i] for i in keep)})
        reason = "no_score_nll" if steps else "not_sampled"
        gone = [Dropped(self.ids[i], reason if i == 11 else f"not_in_{name}", f"step 0: row {i}") for i in range(12) if i not in keep]
        dropped = {reason: sum(row.reason == reason for row in gone) for reason in sorted({row.reason for row in gone})}
        return made(
            self.store,
            "select",
            name,
            {"kept": kept, "dropped": gone},
            hash=table_hash(kept),
            rows_in=12,
            rows_out=len(keep),
            dropped=dropped,
            config={"select.steps": list(steps), "seed": 0, **more.pop("config", {})},
            **more,
        )

    def arm(self, name: str, select: Artifact | None = None, seed: int = 0, tables: Sequence[str] = ()) -> ArmRun:
        return ArmRun(name, seed, {"select": {"tables": list(tables)}}, self.artifacts | ({"select": select} if select is not None else {}))


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path, vectors=True)


def test_signals_are_counted_per_teacher_and_style(run: Run):
    found = selection([run.arm("one"), run.arm("two")], run.root)
    (pool,) = found["pools"]
    assert pool["arms"] == ["one", "two"] and pool["rows"] == 12 and found["recipes"] == [] and found["overlap"]["sets"] == []
    assert pool["groups"] == {"teacher": {"a": 4, "a/<b>$x_1$": 4, "b": 4}, "style": {"plain": 12}} and not pool["same_groups"]
    assert list(pool["signals"]) == ["nll", "ifd_loss", "completion_tokens", "prompt_tokens", "n_steps"]
    nll = pool["signals"]["nll"]
    assert nll["n"] == 11 and nll["missing"] == 1 and nll["all"]["quantiles"][2] == 5 and nll["all"]["counts"] == [1] * 11
    assert nll["by"]["teacher"]["a"]["mean"] == np.mean([0, 3, 6, 9]) and nll["by"]["teacher"]["a/<b>$x_1$"]["n"] == 3
    assert pool["vectors"]["embedding"]["dimension"] == 4
    assert pool["vectors"]["embedding"]["norm"]["all"]["mean"] == pytest.approx(10)  # |(k, k, k, k)| = 2 k, k = 0..10
    at = pool["spearman"]["signals"].index
    assert pool["spearman"]["rho"][at("nll")][at("completion_tokens")] == pytest.approx(-1)
    assert pool["spearman"]["n"][at("nll")][at("n_steps")] == 10 and pool["spearman"]["rho"][at("nll")][at("n_steps")] is None
    json.dumps(found, allow_nan=False)


def test_recipe_shows_real_traces_at_both_ends(run: Run):
    chosen = run.select("top", [7, 8, 9, 10], ({"name": "none"}, TOP))
    (one,) = selection([run.arm("a", chosen)], run.root)["recipes"]
    assert one["signal"] == "nll" and one["reads"] == ["nll"] and one["dropped"] == {"no_score_nll": 1, "not_in_top": 7}
    shown = [(row["kept"], row["end"], row["score"], row["reason"]) for row in one["examples"]]
    assert shown == [
        (True, "lowest", 7.0, ""),
        (True, "lowest", 8.0, ""),
        (True, "highest", 9.0, ""),
        (True, "highest", 10.0, ""),
        (False, "lowest", 0.0, "not_in_top"),
        (False, "highest", 6.0, "not_in_top"),
        (False, "", None, "no_score_nll"),
    ]
    first, last = one["examples"][0], one["examples"][-1]
    assert first["id"] == run.ids[7] and first["question"].startswith("<b>7</b>") and first["rationale"].startswith("r7 ")
    assert len(first["question"]) <= 320 and first["question"].endswith("…") and first["rationale_characters"] == len(f"r7 {TEXT}")
    assert last["id"] == run.ids[11] and last["detail"] == "step 0: row 11"
    histogram = one["histograms"]["nll"]
    assert histogram["kept"] == [0] * 7 + [1] * 4 and histogram["dropped"] == [1] * 7 + [0] * 4 and histogram["outside"] == 0


def test_ties_at_the_end_go_by_id(run: Run):
    chosen = run.select("top", list(range(6)), ({"name": "bottom", "signal": "ifd_loss", "rows": 6},))
    (one,) = selection([run.arm("a", chosen)], run.root)["recipes"]
    assert [row["id"] for row in one["examples"][:2]] == sorted(run.ids[:6])[:2] and one["examples"][0]["score"] == 5.0


def test_costs_are_declared_and_measured(run: Run):
    chosen = run.select("top", [7], ({"name": "threshold", "signal": "ifd_loss", "max": 9.0}, TOP))
    (one,) = selection([run.arm("a", chosen)], run.root)["recipes"]
    cost = one["cost"]
    assert cost["declared"]["forward"] == 2 and cost["declared"]["views"] == ["conditional", "unconditional"]
    assert cost["declared"]["backward"] == cost["declared"]["generations"] == 0 and cost["select_seconds"] == 2.0
    scored = cost["scored"]
    assert (scored["wall_seconds"], scored["rows_per_second"], scored["tokens"], scored["warmup_seconds"]) == (2.5, 5.5, 321, 7.5)
    assert declared_passes(["nll", "entropy"])["forward"] == 1 and declared_passes([])["forward"] == 0
    assert declared_passes(["student_error"])["generations"] == 1
    assert declared_passes(["mine", "nll"])["undeclared"] == ["mine"]
    both = declared_passes(["grand", "less", "less_svamp"], snapshots=4)
    assert (both["forward"], both["backward"], both["undeclared"]) == (5, 5, [])


@pytest.mark.parametrize("name", signal_names())
def test_every_signal_declares_its_passes(name: str):
    assert declared_passes([name])["undeclared"] == []


def test_overlap_covers_seeds_and_other_selections_of_the_workdir(run: Run):
    a, b = run.select("a", [0, 1, 2, 3], (TOP,)), run.select("b", [2, 3, 4, 5, 6, 7])
    again, stray = run.select("a2", [0, 1, 2, 3]), run.select("stray", [11], ({"name": "random", "rows": 1},))
    (run.root / "artifacts" / "select-broken").mkdir()
    (run.root / "artifacts" / "select-broken" / "manifest.json").write_text("{")
    (run.root / "artifacts" / "select-unfinished").mkdir()
    arms = [run.arm("x", a), run.arm("x", b, seed=1), run.arm("y", again)]
    found = selection(arms, run.root)["overlap"]
    assert [one["label"] for one in found["sets"]] == ["x (seed 0), y", "x (seed 1)", "random(rows=1) (seed 0, not of this run)"]
    assert [(one["kept"], one["pool"], one["of_this_run"]) for one in found["sets"]] == [(4, 12, True), (6, 12, True), (1, 12, False)]
    assert found["jaccard"][0][1] == 2 / 8 and found["shared"][0] == [4, 2, 0]
    assert found["expected"][0][1] == pytest.approx(4 * 6 / 12) and found["jaccard_expected"][0][1] == pytest.approx(2 / 8)
    assert found["expected"][0][2] == pytest.approx(4 / 12) and found["unreadable"] == ["select-broken"] and found["left_out"] == []
    assert stray.path.exists()


def test_user_columns_join_and_a_changed_table_is_named_not_shown(run: Run):
    path = run.root / "mine.parquet"
    pq.write_table(pa.table({"id": run.ids[::-1], "mine": np.arange(12.0), "curve": [[3.0, 4.0]] * 12}), path)
    read = select_files(override(default_config(), {"select.tables": (str(path),)}))
    inputs = {role: {"hash": digest, "artifact": ""} for role, digest in read.items()}
    step = {"name": "top", "signal": "mine", "rows": 1}
    chosen = run.arm("a", run.select("m", [0], (step,), inputs=inputs), tables=[str(path)])
    pool = read_pool(chosen)
    assert pool.signals["mine"].tolist() == list(range(11, -1, -1)) and pool.norms["curve"][1].tolist() == [5.0] * 12
    (one,) = selection([chosen], run.root)["recipes"]
    assert one["cost"]["declared"]["undeclared"] == ["mine"] and one["examples"][0]["score"] == 11.0
    pq.write_table(pa.table({"id": run.ids, "mine": np.arange(12.0)}), path)
    pool = read_pool(chosen)
    assert "mine" not in pool.signals and "changed since" in pool.notes[0]
    path.unlink()
    (entry,) = selection([chosen], run.root)["pools"]
    assert "no longer there" in entry["notes"][0]


def page_of(run: Run, arms: list[ArmRun]) -> str:
    build_report(arms, run.root / "report", default_config(), Context(workdir=run.root, console=Console(file=io.StringIO())))  # pyright: ignore[reportArgumentType]
    return (run.root / "report" / "report.html").read_text()


def test_page_escapes_texts_and_names_and_describes_figures(run: Run):
    arms = [run.arm("a", run.select("top", [7, 8], (TOP,))), run.arm("b", run.select("b", [1, 8]))]
    text = page_of(run, arms)
    assert (
        "<script>" not in text and "&lt;script&gt;alert(&#39;x&#39;)" in text and "<b>7</b>" not in text and "&lt;b&gt;7&lt;/b&gt;" in text
    )
    assert "a/&lt;b&gt;$x_1$ (4)" in text  # no mathematics in a teacher's name
    assert 'aria-label="Figure 1: Histograms per teacher (a 4 rows, a/&lt;b>$x_1$ 4 rows, b 4 rows) of nll' in text
    assert "Overlap of the kept sets" in text and "Rank correlations" in text and "2 forward" in text and "not_in_top" in text
    assert (run.root / "report" / "plots" / "signals_0_teacher.svg").exists() and (run.root / "report" / "plots" / "scores_0.svg").exists()
    assert json.loads((run.root / "report" / "results.json").read_text())["selection"]["recipes"][0]["arms"] == ["a"]


def test_page_shows_what_judges_said_and_how_far_they_agree(run: Run):
    strict = {str(i): {"coherence": 1 + i % 3, "clarity": 5} for i in range(6)}
    mild = {str(i): {"coherence": 1 + i % 3 + (i == 5), "clarity": 5} for i in range(6)}
    pair = {"judges": ["strict", "mild"], **agreement(strict, mild, criteria=("coherence", "clarity"), thresholds=(3,))}
    about = {"rows": 7, "verdicts": 6, "no_verdict_replies": {"judge_malformed": 4}, "rows_without_verdict": {"judge_malformed": 1}}
    silent = {"rows": 7, "verdicts": 0, "no_verdict_replies": {}, "rows_without_verdict": {"judge_error": 7}, "mean": {}}
    judged = {"strict": about | {"mean": {"coherence": 2.0, "clarity": 5.0}}, "mild": about | {"mean": {"coherence": 2.25, "clarity": 5.0}}}
    facts = {"judged": {"judge": {"judges": {"mute": silent} | judged, "agreement": [pair]}}}
    table = pa.table({"id": run.ids[:6], "judge": np.arange(6, dtype=np.float32)})
    run.artifacts["score"] = made(run.store, "score", "j", {"scores": table}, facts={"signals": ["judge"]} | facts, rows_in=7, rows_out=6)
    text = page_of(run, [run.arm("a", run.select("top", [1, 2], (TOP | {"signal": "judge"},)))])
    assert "What judges said" in text and "over the 6 rows that both graded" in text and "7 judge_error" in text
    assert f"<td>{pair['criteria']['coherence']['kappa']:#.4g}</td>" in text and "<td>83.3</td>" in text and "<td>2.25</td>" in text
    assert "keep a row at a mean grade of 3: " in text


def test_page_without_scores_or_selection(tmp_path: Path):
    run = Run(tmp_path, scored=False)
    assert "Nothing is selected in these runs yet" in page_of(run, [run.arm("a")])
    text = page_of(run, [run.arm("a", run.select("all", list(range(12))))])
    assert "no model pass" in text and "Lengths" in text and "Overlap of the kept sets" not in text


def test_large_pools_are_read_without_texts_and_without_pairs_of_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    n, store = 20_000, Store(tmp_path / "artifacts")
    ids = [f"{i:024x}" for i in range(n)]
    empty = {field.name: pa.nulls(n, field.type) for field in TRACE_SCHEMA if field.nullable}
    empty |= {f.name: pa.array([[]] * n, f.type) for f in TRACE_SCHEMA if f.name in ("choices", "parent_ids")}
    empty |= {f.name: pa.array([0] * n, f.type) for f in TRACE_SCHEMA if f.name == "sample_index"}
    rest = {f.name: pa.array([f.name] * n, f.type) for f in TRACE_SCHEMA if f.name not in empty}
    traces = pa.table({**empty, **rest, "id": ids, "question": ["q" * 2000] * n}, schema=TRACE_SCHEMA)
    rng = np.random.default_rng(0)
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=n * 64).astype(np.float32)), 64)
    scores = pa.table({"id": ids, "nll": rng.normal(size=n), "entropy": rng.normal(size=n), "embedding": vectors})
    half = n // 2
    runs = []
    artifacts = {
        "verify": made(store, "verify", "v", {"traces": traces}),
        "tokenize": made(store, "tokenize", "t", {"tokens": pa.table({"id": ids, "prompt_tokens": [3] * n, "completion_tokens": [5] * n})}),
        "score": made(store, "score", "s", {"scores": scores}),
    }
    for name, kept in (("low", ids[:half]), ("high", ids[half:])):
        gone = [Dropped(i, "not_in_top_nll", "step 0") for i in sorted(set(ids) - set(kept))]
        tables = {"kept": pa.table({"id": kept}), "dropped": gone}
        select = made(store, "select", name, tables, rows_in=n, rows_out=half, dropped={"not_in_top_nll": half})
        runs.append(ArmRun(name, 0, {}, {**artifacts, "select": select}))
    del traces, scores, vectors, rest, empty, tables, gone
    read = Artifact.table
    monkeypatch.setattr(Artifact, "table", lambda self, name: read(self, name) if name in ("kept", "dropped") else pytest.fail(name))
    tracemalloc.start()
    found = selection(runs, tmp_path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found["overlap"]["shared"] == [[half, 0], [0, half]] and found["pools"][0]["vectors"]["embedding"]["norm"]["n"] == n
    assert len(found["recipes"][0]["examples"]) == 6 and len(found["recipes"][0]["examples"][0]["question"]) == 320
    assert peak < 16 * 2**20, peak  # one bit per pair of rows would be 48 MiB


def test_shorten_cuts_after_a_word():
    assert shorten("one two", 7) == "one two"
    assert shorten("one two three", 10) == "one two …" and len(shorten("x" * 99, 10)) <= 10
