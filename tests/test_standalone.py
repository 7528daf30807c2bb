"""dccot score, select and stability on a tiny Hugging Face student: the pipeline's own numbers, resume, what is refused."""

from __future__ import annotations

import json
import re
import runpy
import shlex
from pathlib import Path

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from standalone_cases import PAIRS, POSITIONS, make_student, rows_of, write_lines
from tiny import tiny_config

from dccot_jax import pipeline
from dccot_jax.artifact import ArtifactWriter
from dccot_jax.cli import main
from dccot_jax.config import override
from dccot_jax.context import Context
from dccot_jax.formats import export_traces
from dccot_jax.model.sharding import make_mesh
from dccot_jax.records import table_to_traces
from dccot_jax.select import engine, packed
from dccot_jax.select.columns import ScoreColumns
from dccot_jax.select.cuts import Run
from dccot_jax.select.signals import signal_names
from dccot_jax.standalone import show
from dccot_jax.standalone.stability import Outcome, compare
from dccot_jax.train import loop

ROOT = Path(__file__).resolve().parent.parent
TOP = {"name": "top", "signal": "nll", "share": 0.5}


@pytest.fixture(scope="module", autouse=True)
def one_device():
    """Compiling for one device is quicker; other tests of the engine use several."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (engine, loop):
            patch.setattr(module, "make_mesh", lambda sizes, devices=None: make_mesh({"fsdp": 1}, jax.devices()[:1]))
        yield


@pytest.fixture(scope="module")
def student(tmp_path_factory):
    return make_student(tmp_path_factory.mktemp("student"))


@pytest.fixture(scope="module")
def scored(student, tmp_path_factory):
    """A folder with traces.jsonl (12 rows with gold answers, then a repeated and a far too long one) and their scores."""
    folder = tmp_path_factory.mktemp("scored")
    rows = rows_of("messages", key=lambda n: 5 if n == 3 else n + n * 7 % 10)
    long = {"messages": [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "one " * 700}]}
    write_lines(folder / "traces.jsonl", [*rows, rows[0], long])
    arguments = ["--signals=nll,ifd_loss", f"--student={student}", f"--out={folder / 'scores.parquet'}"]
    assert main(["score", str(folder / "traces.jsonl"), *arguments]) == 0
    return folder


@pytest.fixture
def call(capsys):
    """Runs a command; returns (exit code, standard output, standard error)."""

    def run(*words):
        code = main([str(word) for word in words])
        said = capsys.readouterr()
        return code, said.out, said.err

    return run


def columns(path: Path) -> dict[str, list]:
    return pq.read_table(path).to_pydict()


# --- score --------------------------------------------------------------------------------------------------------------


def test_every_row_is_scored_or_dropped_with_a_reason(scored):
    table, dropped = columns(scored / "scores.parquet"), columns(scored / "scores.dropped.parquet")
    assert list(table) == ["id", "source", "prompt_tokens", "completion_tokens", "ifd_loss", "nll"]
    assert table["source"] == [f"traces.jsonl:{n}" for n in range(1, 13)]  # the file's order
    assert dropped["source"] == ["traces.jsonl:13", "traces.jsonl:14"] and dropped["reason"] == ["duplicate", "too_long"]
    assert dropped["detail"][1].endswith(f"at most {POSITIONS}")
    assert np.isfinite(table["nll"]).all() and min(table["completion_tokens"]) > 5
    assert sorted(path.name for path in scored.iterdir()) == ["scores.dropped.parquet", "scores.parquet", "traces.jsonl"]


def test_scores_and_choice_are_those_of_a_run(student, tmp_path, call):
    config = tiny_config(
        student__path=str(student),
        traces__questions=30,
        tokens__max_length=POSITIONS,
        train__row_tokens=POSITIONS,
        score__student="base",
        score__signals=("nll", "ifd_ppl"),
        select__steps=({"name": "teacher_correct"}, {"name": "top", "signal": "ifd_ppl", "share": 0.4}, {"name": "random", "tokens": 400}),
        evaluate__base=False,
    )
    [run] = pipeline.run(config, Context(workdir=tmp_path / "run"), until="select")
    traces = table_to_traces(run.artifacts["verify"].table("traces"))
    export_traces(traces[::-1], tmp_path / "t.jsonl", "trace")
    out = tmp_path / "s.parquet"
    assert call("score", tmp_path / "t.jsonl", f"--student={student}", "--signals=ifd_ppl,nll", f"--out={out}", "--batch_size=2")[0] == 0
    mine, theirs = pq.read_table(out).sort_by("id"), run.artifacts["score"].table("scores")
    assert len(mine) > 20 and mine.drop_columns(["source", "prompt_tokens"]).replace_schema_metadata().equals(theirs)

    (tmp_path / "r.json").write_text(json.dumps(list(config.select.steps)))
    code, said, _ = call(
        "select", tmp_path / "t.jsonl", f"--scores={out}", f"--recipe={tmp_path / 'r.json'}", f"--out={tmp_path / 'k.jsonl'}"
    )
    kept = [json.loads(line)["id"] for line in (tmp_path / "k.jsonl").read_text().splitlines()]
    chosen = run.artifacts["select"]
    assert code == 0 and 0 < len(kept) < 20 and sorted(kept) == chosen.table("kept")["id"].to_pylist()
    assert "random(tokens=400)" in said and "mean kept" in said
    reasons = {row["id"]: (row["reason"], row["detail"]) for row in pq.read_table(tmp_path / "k.dropped.parquet").to_pylist()}
    lost = [row for stage in ("tokenize", "select") for row in run.artifacts[stage].table("dropped").to_pylist()]
    assert reasons == {row["id"]: (row["reason"], row["detail"]) for row in lost}


def test_killed_scoring_goes_on_and_a_finished_one_has_nothing_to_do(scored, student, tmp_path, call, monkeypatch):
    path, out = scored / "traces.jsonl", tmp_path / "s.parquet"
    words = ["score", path, f"--student={student}", "--signals=nll,ifd_loss", f"--out={out}", "--config.score.chunk_rows=1"]
    commit, committed = ArtifactWriter.commit_chunk, []

    def dying(self, series, index, table):
        if len(committed) == stop:
            raise KeyboardInterrupt
        committed.append(index)
        commit(self, series, index, table)

    monkeypatch.setattr("dccot_jax.select.views.TILE_TOKENS", {"cpu": 32})
    monkeypatch.setattr("dccot_jax.select.engine.TILE_TOKENS", {"cpu": 32})
    monkeypatch.setattr(ArtifactWriter, "commit_chunk", dying)
    stop = 1
    assert call(*words)[0] == 130 and not out.exists() and (tmp_path / "s.parquet.parts").exists()
    first, stop = list(committed), -1
    assert call(*words)[0] == 0
    assert len(first) == 1 < len(committed) and len(set(committed)) == len(committed)  # no chunk twice
    assert not (tmp_path / "s.parquet.parts").exists()
    mine, whole = columns(out), columns(scored / "scores.parquet")
    assert mine["id"] == whole["id"] and np.allclose(mine["nll"], whole["nll"], rtol=1e-5)
    done, before = list(committed), out.read_bytes()
    code, _, said = call(*words)
    assert code == 0 and "up to date" in said and committed == done and out.read_bytes() == before
    code, _, said = call(*[w for w in words if "signals" not in str(w)], "--signals=ppl")
    assert code == 2 and "exists and was made from something else" in said and out.read_bytes() == before
    assert not (tmp_path / "s.parquet.parts").exists()


def test_a_sampled_signal_asks_the_rows_own_question(scored, student, tmp_path, call):
    path, out = scored / "traces.jsonl", tmp_path / "s.parquet"
    words = ["score", path, f"--student={student}", "--signals=student_error", f"--out={out}", "--config.evaluate.max_new_tokens=6"]
    code, _, said = call(*words)
    assert code == 2 and "student_error needs right answers, and no row has one; name their column by --gold_field: messages, key" in said
    assert "say of which type they are, e.g. --answer_type=number" in call(*words, "--gold_field=key")[2]
    assert "no row has the field 'kye'; fields of the first row: messages, key" in call(*words, "--gold_field=kye")[2]
    assert call(*words, "--gold_field=key", "--answer_type=number")[0] == 0
    assert columns(out)["student_error"] == [1.0] * 12  # a random student
    samples = [json.loads(line) for line in (tmp_path / "s.samples.jsonl").read_text().splitlines()]
    assert {s["question"] for s in samples} == {question for question, _ in PAIRS} and samples[0]["task"] == "rows:number"
    reasons = dict(zip(columns(tmp_path / "s.dropped.parquet")["source"], columns(tmp_path / "s.dropped.parquet")["reason"]))
    assert reasons == {"traces.jsonl:13": "duplicate", "traces.jsonl:14": "too_long"}


def test_a_signal_that_loses_every_row_is_one_line_with_the_reasons(student, tmp_path, call):
    rows = [{"prompt": f"What is 1 + {n}?", "completion": f"The answer is {n + 1}.", "gold": str(n + 1)} for n in range(4)]
    path, out = write_lines(tmp_path / "t.jsonl", rows), tmp_path / "s.parquet"
    words = ["score", path, f"--student={student}", "--gold_field=gold", "--answer_type=number", f"--out={out}"]
    for _ in range(2):  # the same command again does not find itself done
        code, _, said = call(*words, "--signals=answer_gain")
        assert code == 2 and re.search(r"t\.jsonl: no row could be scored \(\w+ 4; e\.g\. t\.jsonl:\d: ", said.splitlines()[-1])
        assert sorted(path.name for path in tmp_path.iterdir()) == ["s.dropped.parquet", "t.jsonl"]
    dropped = columns(tmp_path / "s.dropped.parquet")
    assert dropped["source"] == [f"t.jsonl:{n}" for n in range(1, 5)] and len(set(dropped["reason"])) == 1
    # A table without these rows, but with their reasons beside it.
    pq.write_table(
        pa.table(
            {
                "id": pa.array([], pa.string()),
                "prompt_tokens": pa.array([], pa.int32()),
                "completion_tokens": pa.array([], pa.int32()),
                "answer_gain": pa.array([], pa.float32()),
            }
        ),
        out,
    )
    code, _, said = call(
        "select", path, f"--scores={out}", f"--recipe={json.dumps(TOP | {'signal': 'answer_gain'})}", f"--out={tmp_path / 'k.jsonl'}"
    )
    assert code == 2 and f"no row of {path} got scores ({dropped['reason'][0]} 4; e.g. t.jsonl:4: " in said
    out.unlink()
    assert call(*words, "--signals=nll")[0] == 0 and columns(tmp_path / "s.dropped.parquet")["id"] == []


def test_a_table_of_scores_without_a_row_can_be_shown(capsys):
    show.scores(pa.table({"id": pa.array([], pa.string()), "source": pa.array([], pa.string()), "nll": pa.array([], pa.float32())}), [])
    assert re.search(r"nll +│ +0 │", capsys.readouterr().out)


# --- recipes of config files ---------------------------------------------------------------------------------------------

SHORT = ("--config.score.warmup.steps=3", "--config.train.rows_per_step=2", f"--config.train.row_tokens={POSITIONS}")


def test_a_recipe_of_a_config_file_scores_as_its_run_does(student, tmp_path, call):
    """Cherry LLM's: the student is warmed up on a tenth of the rows."""
    recipe = ROOT / "configs" / "select" / "cherry_ifd.py"
    sizes = {"student.path": str(student), "traces.questions": 40, "tokens.max_length": POSITIONS, "train.row_tokens": POSITIONS}
    config = override(runpy.run_path(str(recipe))["get_config"](), {**sizes, "score.warmup.steps": 3, "train.rows_per_step": 2})
    [run] = pipeline.run(config, Context(workdir=tmp_path / "run"), until="score")
    path, out = tmp_path / "t.jsonl", tmp_path / "s.parquet"
    export_traces(table_to_traces(run.artifacts["verify"].table("traces")), path, "trace")
    assert call("score", path, f"--student={student}", f"--recipe={recipe}", *SHORT, f"--out={out}")[0] == 0
    mine, theirs = pq.read_table(out).sort_by("id"), run.artifacts["score"].table("scores")
    assert len(mine) > 30 and mine.drop_columns(["source", "prompt_tokens"]).replace_schema_metadata().equals(theirs)
    text = "import runpy\ndef get_config():\n  c = runpy.run_path(%r)['get_config']()\n  c.select.steps = (%r,)\n  return c\n"
    (tmp_path / "half.py").write_text(text % (str(recipe), TOP | {"signal": "ifd_loss"}))
    words = [f"--recipe={tmp_path / 'half.py'}", f"--out={tmp_path / 'st.json'}", "--seed=0,1", "--dtype=float32", "--batch_size=1,2"]
    assert call("stability", path, f"--student={student}", *words, *SHORT)[0] == 0
    found = {change["factor"]: change for change in json.loads((tmp_path / "st.json").read_text())["changes"]}
    assert found["batch_size"]["equal"] and found["seed"]["signals"]["ifd_loss"]["max_difference"] > 0  # of another warm-up


@pytest.mark.slow
def test_what_shipped_recipes_ask_of_scoring_is_done(scored, student, tmp_path, monkeypatch, call):
    def score(name, *words):
        out = tmp_path / f"{name}.parquet"
        recipe = ROOT / "configs" / "select" / f"{name}.py"
        code, _, said = call("score", scored / "traces.jsonl", f"--student={student}", f"--recipe={recipe}", f"--out={out}", *SHORT, *words)
        return pq.read_table(out) if code == 0 else said.splitlines()[-1]

    share = "--config.score.warmup.share=0.5"
    deita = score("deita", share)
    assert deita.schema.names[-2:] == ["ifd_loss", "embedding_rationale"]
    assert json.loads(deita.schema.metadata[b"dccot_scores"])["facts"]["student"]["kind"] == "train"
    assert "config.score.models.holdout" in score("rho", share)
    monkeypatch.setenv("DCCOT_HOLDOUT", str(student))
    rho = np.array(score("rho", share)["rho"].to_pylist())
    assert np.isfinite(rho).all() and (rho != 0).all() and np.abs(rho).max() < 1  # a few steps from the holdout model
    s2l = score("s2l", "--config.score.over_time.snapshots=3")
    assert s2l.schema.field("s2l").type == pa.list_(pa.float32(), 3)
    assert "less compares rows with others" in score("less")  # the shipped one names the training task of a run
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]


# --- select -------------------------------------------------------------------------------------------------------------


def test_steps_compose_and_rows_come_out_as_they_stood(scored, tmp_path, call):
    out, recipe = tmp_path / "kept.jsonl", json.dumps(["teacher_correct", TOP])
    words = ["select", scored / "traces.jsonl", f"--scores={scored / 'scores.parquet'}", f"--recipe={recipe}", f"--out={out}"]
    code, _, said = call(*words)
    assert code == 2 and "not_verified 12" in said and "--gold_field and --answer_type" in said and not list(tmp_path.iterdir())
    code, said, _ = call(*words, "--gold_field=key", "--answer_type=number")
    assert code == 0 and "wrote" in said and "teacher_wrong" in said
    lines = (scored / "traces.jsonl").read_text().splitlines()
    scores = columns(scored / "scores.parquet")
    right = [n for n in range(12) if n != 3]
    best = sorted(sorted(right, key=lambda n: -scores["nll"][n])[:5])  # half of 11, rounded down
    assert [json.loads(line) for line in out.read_text().splitlines()] == [json.loads(lines[n]) for n in best]
    dropped = columns(tmp_path / "kept.dropped.parquet")
    assert len(dropped["id"]) == 14 - 5 and dropped["reason"][dropped["source"].index("traces.jsonl:4")] == "teacher_wrong"
    assert dropped["reason"][-2:] == ["duplicate", "too_long"]  # why it has no scores, from the table beside them
    code, _, said = call(*words)
    assert code == 2 and "kept.jsonl exists" in said


def test_lengths_come_from_the_scores_or_from_the_student(scored, student, tmp_path, call):
    recipe = '--recipe={"name": "random", "tokens": 80}'
    code, _, said = call("select", scored / "traces.jsonl", recipe, f"--out={tmp_path / 'a.jsonl'}")
    assert code == 2 and "--student=DIR to count with its tokenizer" in said
    assert call("select", scored / "traces.jsonl", recipe, f"--student={student}", f"--out={tmp_path / 'a.jsonl'}")[0] == 0
    assert call("select", scored / "traces.jsonl", recipe, f"--scores={scored / 'scores.parquet'}", f"--out={tmp_path / 'b.jsonl'}")[0] == 0
    assert (tmp_path / "a.jsonl").read_text() == (tmp_path / "b.jsonl").read_text() != ""
    other = [f"--out={tmp_path / 'c.jsonl'}", recipe, f"--scores={scored / 'scores.parquet'}"]
    code, _, said = call("select", write_lines(tmp_path / "t.jsonl", [{"prompt": "a", "completion": "b"}]), *other)
    assert code == 2 and "scores of other traces?" in said


def test_vectors_and_own_columns_join_by_id(scored, tmp_path, call):
    ids = columns(scored / "scores.parquet")["id"]
    angles = np.linspace(0, np.pi, 12)
    vectors = np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32)
    table = {"id": ids, "mine": pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 2), "length": list(range(12))}
    pq.write_table(pa.table(table), tmp_path / "mine.parquet")
    steps = [{"name": "bottom", "signal": "length", "rows": 11}, {"name": "kcenter", "vector": "mine", "rows": 2}]
    words = [
        "select",
        scored / "traces.jsonl",
        f"--scores={scored / 'scores.parquet'},{tmp_path / 'mine.parquet'}",
        f"--out={tmp_path / 'k.parquet'}",
    ]
    assert call(*words, f"--recipe={json.dumps(steps)}")[0] == 0
    kept = [row["messages"][0]["content"] for row in pq.read_table(tmp_path / "k.parquet").to_pylist()]
    places = [[question for question, _ in PAIRS].index(question) for question in kept]
    assert len(places) == 2 and 11 not in places and abs(places[0] - places[1]) > 3  # far apart on the half circle
    (tmp_path / "k.parquet").unlink()
    (tmp_path / "k.dropped.parquet").unlink()
    code, _, said = call(*words, '--recipe={"name": "kcenter", "vector": "nll", "rows": 2}')
    assert code == 2 and "'nll' is a number, not a vector; vectors: mine" in said


def test_own_tables_of_views_with_values_that_are_not_finite(scored, tmp_path, call):
    table = pq.read_table(scored / "scores.parquet").select(["id", "prompt_tokens", "completion_tokens"])
    table = table.set_column(0, "id", table["id"].cast(pa.string_view()))
    pq.write_table(table.append_column("mine", pa.array([float(n) for n in range(10)] + [np.nan, np.inf])), tmp_path / "m.parquet")
    words = [scored / "traces.jsonl", f"--scores={tmp_path / 'm.parquet'}", '--recipe={"name": "top", "signal": "mine", "rows": 4}']
    code, said, _ = call("select", *words, f"--out={tmp_path / 'k.jsonl'}")
    assert code == 0 and re.search(r"mine +│ +7\.5 │ +2\.5 │ +2 │", said) and "no_score_mine" in said
    pq.write_table(pa.concat_tables([pq.read_table(tmp_path / "m.parquet")] * 2), tmp_path / "m.parquet")
    code, _, said = call("select", *words, f"--out={tmp_path / 'again.jsonl'}")
    assert code == 2 and f"--scores: '{tmp_path / 'm.parquet'}': id '{table['id'][0]}' is there more than once" in said


def test_vectors_of_the_student_are_columns_too(scored, student, tmp_path, call):
    words = [scored / "traces.jsonl", f"--student={student}", "--signals=embedding_rationale,nll"]
    assert call("score", *words, f"--out={tmp_path / 's.parquet'}")[0] == 0
    table = pq.read_table(tmp_path / "s.parquet")
    assert table.schema.field("embedding_rationale").type == pa.list_(pa.float32(), 16)
    assert table["nll"].to_pylist() == columns(scored / "scores.parquet")["nll"]
    recipe = '--recipe={"name": "kcenter", "vector": "embedding_rationale", "rows": 4}'
    assert call("select", words[0], f"--scores={tmp_path / 's.parquet'}", recipe, f"--out={tmp_path / 'k.jsonl'}")[0] == 0
    out = tmp_path / "stability.json"
    assert call("stability", words[0], words[1], recipe, f"--out={out}", "--seed=0", "--dtype=float32", "--batch_size=1,2")[0] == 0
    [change] = json.loads(out.read_text())["changes"]
    assert change["equal"] and change["signals"] == {
        "embedding_rationale": {"kind": "vector", "rows": 12, "lost": 0, "max_difference": 0.0}
    }


def test_a_group_that_is_not_whole_is_dropped(scored, student, tmp_path, call):
    rows = [{"question": f"Q{n}?", "forward_reasoning": "F", "backward_question": f"S{n}?", "backward_reasoning": "G"} for n in range(3)]
    path, scores = write_lines(tmp_path / "t.jsonl", rows), tmp_path / "s.parquet"
    assert call("score", path, f"--student={student}", "--signals=nll", f"--out={scores}")[0] == 0
    pq.write_table(pq.read_table(scores).slice(1), scores)
    (tmp_path / "s.dropped.parquet").unlink()
    assert call("select", path, f"--scores={scores}", '--recipe="none"', f"--out={tmp_path / 'k.jsonl'}")[0] == 0
    assert [json.loads(line)["question"] for line in (tmp_path / "k.jsonl").read_text().splitlines()] == ["Q1?", "Q2?"]
    assert sorted(columns(tmp_path / "k.dropped.parquet")["reason"]) == ["group_incomplete", "group_incomplete", "not_scored"]


# --- stability ----------------------------------------------------------------------------------------------------------


def test_stability_by_seed_dtype_and_batch_size(scored, student, tmp_path, call):
    out, recipe = tmp_path / "stability.json", json.dumps([TOP, {"name": "random", "rows": 3}])
    code, said, _ = call("stability", scored / "traces.jsonl", f"--student={student}", f"--recipe={recipe}", f"--out={out}", "--seed=0,1")
    assert code == 0 and "Jaccard" in said and "batch_size 64" in said
    report = json.loads(out.read_text())
    assert report["baseline"] == {"seed": 0, "dtype": "float32", "batch_size": 1} and report["kept_rows"] == 3
    found = {change["factor"]: change for change in report["changes"]}
    batch = found["batch_size"]
    assert batch["equal"] and batch["jaccard"] == 1.0 and (batch["moved"], batch["moved_in_band"]) == (0, 0)
    assert batch["signals"]["nll"] == {"kind": "number", "rows": 12, "lost": 0, "max_difference": 0.0, "spearman": 1.0, "kendall": 1.0}
    assert found["seed"]["moved"] > 0 and found["seed"]["moved_in_band"] == 0 and "at the cut" in said
    assert found["seed"]["jaccard"] < 1 and found["seed"]["signals"]["nll"]["spearman"] == 1.0  # only the draw differs
    dtype = found["dtype"]["signals"]["nll"]
    assert 0 < dtype["max_difference"] < 0.1 and 0.5 < dtype["kendall"] <= 1 and not found["dtype"]["equal"]
    assert [path.name for path in tmp_path.iterdir()] == ["stability.json"]


def test_every_batch_size_is_scored_anew(scored, student, tmp_path, call, monkeypatch):
    """A score that hangs on the batch size is found: the second one must not come out of the store."""
    sizes = []

    def leaking(*arguments, in_flight, **rest):
        sizes.append(in_flight)
        for found, values in score_bins(*arguments, in_flight=in_flight, **rest):
            yield found, values + np.float32(1e-3) * (in_flight > 1)

    score_bins = packed.score_bins
    monkeypatch.setattr(packed, "score_bins", leaking)
    words = ["stability", scored / "traces.jsonl", f"--student={student}", f"--recipe={json.dumps(TOP)}", f"--out={tmp_path / 's.json'}"]
    code, _, said = call(*words, "--seed=0", "--dtype=float32", "--batch_size=1,3")
    assert code == 2 and "batch size 3 changes scores or the kept set" in said and sizes == [1, 3]


def test_comparison_counts_lost_rows_and_vectors():
    ids, vectors = "abc", {i: np.eye(3, dtype=np.float32)[n] for n, i in enumerate("abc")}
    first = Outcome(ScoreColumns({"x": {i: float(n) for n, i in enumerate(ids)}}, {"v": vectors}), frozenset("ab"), Run({}, {}))
    other = Outcome(ScoreColumns({"x": {"a": 1.0, "b": 0.0}}, {"v": {**vectors, "c": vectors["c"] * 3}}), frozenset("bc"), Run({}, {}))
    found = compare(first, other, ids)
    assert found["signals"]["x"] == {"kind": "number", "rows": 2, "lost": 1, "max_difference": 1.0, "spearman": None, "kendall": -1.0}
    assert found["signals"]["v"] == {"kind": "vector", "rows": 3, "lost": 0, "max_difference": 2.0}
    assert (
        found["jaccard"] == pytest.approx(1 / 3)
        and found["jaccard_expected"] == pytest.approx(4 / 3 / (4 - 4 / 3))
        and not found["equal"]
        and compare(first, first, ids)["equal"]
    )


# --- what is refused, and help ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["score"], "one file of traces is needed, got 0"),
        (["score", "no.jsonl"], "no.jsonl: no such file"),
        (["score", "T"], "--out=FILE.parquet is needed"),
        (["score", "T", "--out=s.csv"], "--out=s.csv: must end in .parquet"),
        (["score", "T", "--out=s.parquet"], "--student=DIR is needed"),
        (["score", "T", "--out=s.parquet", "--student=S"], "--signals is needed"),
        (["score", "T", "--out=s.parquet", "--student=S", "--signals=nll,ifd_los"], "--signals: 'ifd_los' is not one of"),
        (["score", "T", "--out=s.parquet", "--student=S", "--signals=nil"], "(did you mean 'nll'?)"),
        (["score", "T", "--out=s.parquet", "--student=/nowhere", "--signals=nll"], "--student: no config.json in /nowhere"),
        (["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--dtype=float16"], "--dtype=float16: must be one of float32"),
        (["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--dtype=float32,bfloat16"], "one value is needed"),
        (
            ["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--batch_size=0"],
            "--batch_size=0: must be a whole number of at",
        ),
        (["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--max_length=999"], f"the student has {POSITIONS} positions"),
        (
            ["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--max_length=3"],
            "no row could be scored (duplicate 1, too_long",
        ),
        (
            ["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--config.score.chunk=1"],
            "did you mean config.score.chunk_rows?",
        ),
        (
            ["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--config.seed=1"],
            "'seed' has a flag of its own: write --seed=1",
        ),
        (["score", "T", "--out=s.parquet", "--format=mesages"], "--format=mesages: must be one of auto, trace"),
        (["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", "--format=eit"], "missing_field instruction"),
        (["score", "T", "--out=s.parquet", "--scores=x"], "--scores goes with select, stability"),
        (["score", "T", "--out=s.parquet", "--workdir=x"], "--workdir goes with run, eval, report, export-traces, doctor, not with score"),
        (["select", "T", "--out=k.jsonl"], "--recipe is needed"),
        (["select", "T", "--out=k.jsonl", '--recipe=["tpo"]'], "--recipe[0].name: 'tpo' is not one of"),
        (["select", "T", "--out=k.jsonl", '--recipe=["none"]', "--scores=no.parquet"], "--scores: 'no.parquet': no such file"),
        (
            ["select", "T", "--out=k.jsonl", "--scores=P", '--recipe={"name": "top", "signal": "ifd", "rows": 1}'],
            "signal 'ifd' has no scores; scored: ifd_loss, nll; score it with `dccot score --signals=…` and pass --scores=FILE",
        ),
        (
            ["select", "T", "--out=k.jsonl", "--scores=P", '--recipe={"name": "kcenter", "vector": "v", "rows": 1}'],
            "vectors: none; score one with `dccot score --signals=…` and pass --scores=FILE",
        ),
        (
            ["select", "T", "--out=k.jsonl", "--scores=P", '--recipe=["none"]', "--config.score.signals=nll"],
            "does not go with select; --signals goes with score, stability",
        ),
        (
            ["score", "T", "--out=s.parquet", "--student=S", "--signals=nll", '--recipe={"name": "top", "signal": "ppl", "rows": 1}'],
            "signal 'ppl' has no scores; scored: nll; add it to --signals",
        ),
        (["select", "T", "--out=k.csv", "--scores=P", '--recipe=["none"]'], "cannot tell what to write; use .jsonl"),
        (["select", "T", "--out=k.txt"], "k.txt: cannot tell what to write"),
        (["select", "T", "--out=T", '--recipe=["none"]'], "is the file of traces itself"),
        (["run", "T"], "unexpected argument"),
        (
            ["score", "T", "--out=/proc/s.parquet", "--student=S", "--signals=nll"],
            "--out=/proc/s.parquet: No such file or directory (/proc/s",
        ),
        (["score", "T", "--out=T/s.parquet", "--student=S", "--signals=nll"], "s.parquet: Not a directory"),
        (["select", "T", "--out=/proc/x/k.jsonl", "--student=S", '--recipe=["none"]'], "--out=/proc/x/k.jsonl: No such file or directory"),
        (["stability", "T", "--out=/proc/x/k.json", "--student=S", '--recipe=["none"]'], "--out=/proc/x/k.json: No such file or directory"),
        (["export", "--checkpoint=x", f"--out={__file__}"], "exists and is not a directory"),
        (["report", "--format=eit"], "--format goes with export-traces, score, select, stability"),
    ],
)
def test_what_cannot_work_is_one_line(scored, student, tmp_path, monkeypatch, call, words, message):
    monkeypatch.chdir(tmp_path)
    place = {"T": scored / "traces.jsonl", "--student=S": f"--student={student}", "--scores=P": f"--scores={scored / 'scores.parquet'}"}
    place["--out=T/s.parquet"] = f"--out={scored / 'traces.jsonl' / 's.parquet'}"
    place["--out=T"] = f"--out={scored / 'traces.jsonl'}"
    code, _, said = call(*(place.get(word, word) for word in words))
    assert code == 2 and message in said.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_documented_commands_work(student, tmp_path, monkeypatch, call):
    monkeypatch.chdir(tmp_path)
    write_lines(tmp_path / "traces.jsonl", rows_of("messages", final=lambda n: str(n + n * 7 % 10)))
    text = (ROOT / "docs" / "selection.md").read_text()
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", text, re.S)).replace("\\\n", " ").replace("DIR", str(student))
    commands = [
        shlex.split(line)[1:] for line in blocks.splitlines() if line.startswith(("dccot score", "dccot select", "dccot stability"))
    ]
    assert len(commands) == 5
    for words in commands:
        assert call(*words)[0] == 0, words
    assert sum(1 for _ in (tmp_path / "hard.jsonl").open()) == 12 and (tmp_path / "stability.json").exists()


def test_help_is_grouped_and_knows_every_signal_and_flag(call):
    _, said, _ = call("--help")
    assert (
        said.index("A run")
        < said.index("dccot run")
        < said.index("Any file of traces")
        < said.index("dccot score")
        < said.index("dccot doctor")
    )
    _, said, _ = call("score", "--help")
    names = (*signal_names(), "--gold_field", "--config.score.chunk_rows: 256", "--out=FILE", "--distributed")
    assert all(name in said for name in names) and "--scores" not in said
    _, said, _ = call("select", "--help")
    assert "kcenter" in said and "--scores" in said and "config.select" not in said
