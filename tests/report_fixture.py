"""Finished artifacts with made-up numbers: what a run of several arms and seeds leaves behind, without running it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dccot_jax.artifact import Artifact, StageResult, Store, finish, table_hash
from dccot_jax.config import default_config, override, to_plain
from dccot_jax.evaluate.metrics import task_metrics
from dccot_jax.pipeline import ArmRun
from dccot_jax.records import Dropped, content_hash, derive_seed, make_trace, traces_to_table

TASKS = {
    "synth_arithmetic": "iid",
    "synth_arithmetic_long": "ood",
    "synth_arithmetic_large": "ood",
    "synth_objects": "cross",
    "synth_calendar": "cross",
}
STEPS = {"synth_arithmetic": (2, 3, 4, 5, 6), "synth_arithmetic_long": (7, 8, 9), "synth_arithmetic_large": (2, 3, 4)}
SKILL = {
    "no_cot": 0.08,
    "vanilla_clean": 0.95,
    "vanilla_noisy": 0.66,
    "correct_noisy": 0.9,
    "random_noisy": 0.62,
    "length_mix": 0.93,
    "staged": 0.94,
}
EASE = {
    "synth_arithmetic": 1.0,
    "synth_arithmetic_long": 0.45,
    "synth_arithmetic_large": 0.6,
    "synth_objects": 0.12,
    "synth_calendar": 0.05,
}
# What the verify stage found: n-grams shared with one task, and nothing with another.
OVERLAP = {
    "synth_objects": {"items": 240, "8": {"short": 3, "rows": 1, "items": 2, "rows_half": 1}},
    "synth_calendar": {"items": 60, "8": {"short": 0, "rows": 0, "items": 0, "rows_half": 0}},
}


def make_runs(root: Path, arms: Sequence[str] = tuple(SKILL), seeds: Sequence[int] = (0, 1), items: int = 240) -> tuple[Any, list[ArmRun]]:
    """A config and its runs (base first), with artifacts under `root`/artifacts."""
    config = override(
        default_config(),
        {
            "name": "tiny_arms",
            "seeds": tuple(seeds),
            "report.bootstrap": 300,
            "score.signals": ("ifd_loss", "nll"),
            "student.model.num_layers": 3,
        },
    )
    config = config.copy_and_resolve_references().unlock()
    config.report.compare = (("correct_noisy", "vanilla_noisy"), ("correct_noisy", "random_noisy")) if "correct_noisy" in arms else ()
    config = config.lock()
    store = Store(root / "artifacts")
    runs = []
    for arm in arms:
        for seed in seeds:
            plain = {**to_plain(override(config, {"seed": seed})), "arm_note": arm}
            plain.pop("arms")
            runs.append(ArmRun(arm, seed, plain, _artifacts(store, arm, seed, items)))
    student = runs[0].artifacts["student"]
    runs.insert(0, ArmRun("base", seeds[0], runs[0].config, {"student": student, "evaluate": _evaluation(store, "base", seeds[0], items)}))
    return config, runs


def _finish(store: Store, kind: str, name: str, files: dict[str, Any], result: StageResult, seconds: float) -> Artifact:
    identity = content_hash("fake", kind, name, digits=64)
    found = store.find(kind, identity)
    if found is not None:
        return found
    writer = store.writer(kind, identity)
    for file, value in files.items():
        if isinstance(value, pa.Table):
            writer.write_table(file, value)
        elif isinstance(value, str):
            writer.write_text(file, value)
        elif isinstance(value, list):
            writer.write_dropped(value)
        else:
            writer.write_json(file, value)
    return finish(writer, kind=kind, identity=identity, version=1, config={}, inputs={}, result=result, wall_seconds=seconds, recorded={})


def _artifacts(store: Store, arm: str, seed: int, items: int) -> dict[str, Artifact]:
    rng = np.random.default_rng(derive_seed(7, arm))
    noisy = "noisy" in arm
    traces = [
        make_trace(task="synth_arithmetic", split="train", question=f"q{i}", target=f"t{i} {noisy}", verdict=not (noisy and i % 3 == 0))
        for i in range(600)
    ]
    ids = [trace.id for trace in traces]
    data = "noisy" if noisy else "clean"
    leaked, long_rows = traces[:7], traces[7:10]
    kept = traces[10:]
    scores = pa.table({"id": [t.id for t in kept], "ifd_loss": rng.normal(0.7, 0.12, len(kept)), "nll": rng.gamma(4, 0.4, len(kept))})
    lengths = pa.table(
        {"id": [t.id for t in kept], "prompt_tokens": [20] * len(kept), "completion_tokens": [30 + i % 9 for i in range(590)]}
    )
    chosen = [t for t in kept if t.verdict or not arm.startswith(("correct", "random"))]
    out = [Dropped(t.id, "teacher_wrong") for t in kept if t not in chosen]
    steps = 120
    plan = pa.table(
        {"id": [chosen[i % len(chosen)].id for i in range(steps * 8)], "step": pa.array(np.repeat(np.arange(steps), 8), pa.int32())}
    )
    losses = 2.5 * np.exp(-np.arange(0, steps, 10) / 40) + 0.2 + rng.normal(0, 0.02, steps // 10) + 0.02 * seed
    log = "".join(json.dumps({"step": 10 * i + 10, "loss": float(x), "tokens_per_second": 9000.0}) + "\n" for i, x in enumerate(losses))
    return {
        "student": _finish(
            store,
            "student",
            str(seed),
            {"student": {"weights": {"kind": "random", "seed": seed}}},
            StageResult("s", facts={"parameters": 812_000}),
            1,
        ),
        "traces": _finish(
            store, "traces", data, {"traces": traces_to_table(traces)}, StageResult("a", 640, 600, {"teacher_error": 40}), 3.1
        ),
        "verify": _finish(
            store,
            "verify",
            data,
            {
                "traces": traces_to_table(traces[7:]),
                "dropped": [Dropped(t.id, "leak:synth_objects") for t in leaked],
                "overlap": pa.table({name: [value] for name, value in _overlap(kept[0].id).items()}),
            },
            StageResult("b", 600, 593, {"leak:synth_objects": 7}, {"overlap": OVERLAP}),
            2.0,
        ),
        "tokenize": _finish(
            store,
            "tokenize",
            data,
            {"dropped": [Dropped(t.id, "too_long") for t in long_rows], "tokens": lengths},
            StageResult("c", 593, 590, {"too_long": 3}, {"completion_tokens": 41234}),
            1.2,
        ),
        "score": _finish(store, "score", data, {"scores": scores}, StageResult(f"d{data}", 590, 590), 20.0),
        "select": _finish(
            store,
            "select",
            arm,
            {"kept": pa.table({"id": [t.id for t in chosen]}), "dropped": out},
            StageResult(f"e{data}{len(out)}", 590, len(chosen), {"teacher_wrong": len(out)} if out else {}),
            0.2,
        ),
        "plan": _finish(
            store,
            "plan",
            f"{arm}{seed}",
            {"plan": plan},
            StageResult(
                table_hash(plan, by=("step", "id")),
                len(chosen),
                len(set(plan.column("id").to_pylist()) & set(ids)),
                facts={"completion_tokens": {"unique": 31_000, "seen": 65_000}, "steps": steps, "fill_rate": 0.93},
            ),
            0.4,
        ),
        "train": _finish(
            store, "train", f"{arm}{seed}", {"train_log.jsonl": log}, StageResult(f"w{arm}{seed}", 100, 100, facts={"steps": steps}), 55.0
        ),
        "evaluate": _evaluation(store, arm, seed, items),
    }


def _overlap(trace_id: str) -> dict[str, Any]:
    spans = ["start with nine and add <ten>"]
    return {
        "id": trace_id,
        "part": "question",
        "task": "synth_objects",
        "n": 8,
        "item": "i",
        "share": 0.75,
        "ngrams": 6,
        "spans": spans,
    }


def _evaluation(store: Store, arm: str, seed: int, items: int) -> Artifact:
    samples, tasks = [], {}
    for task, group in TASKS.items():
        n = 60 if task == "synth_calendar" else items
        rows = [_sample(arm, seed, task, group, i) for i in range(n)]
        tasks[task] = task_metrics(rows, group=group, available=n, limit=0) | {"answer_type": "number", "task_hash": content_hash(task)}
        samples += rows
    metrics = {
        "tasks": tasks,
        "groups": {group: [task for task, owner in TASKS.items() if owner == group] for group in ("iid", "ood", "cross")},
        "protocol": {
            "name": "sound",
            "max_new_tokens": 160,
            "decoding": "greedy",
            "prompt_suffixes": {"synth_objects": "\nAnswer with a letter."},
            "items": {"synth_objects": "240 of 240"},
            "chat_template_sha256": "ab" * 32,
        },
        "student": {"parameters": 812_000},
    }
    text = "".join(json.dumps(row) + "\n" for row in samples)
    return _finish(
        store,
        "evaluate",
        f"{arm}{seed}",
        {"samples.jsonl": text, "metrics": metrics},
        StageResult(f"e{arm}{seed}", len(samples), len(samples)),
        14.0,
    )


def _sample(arm: str, seed: int, task: str, group: str, i: int) -> dict[str, Any]:
    rng = np.random.default_rng(derive_seed(1, arm, seed, task, i))
    hard = np.random.default_rng(derive_seed(2, task, i)).random()
    steps = STEPS.get(task, (0,))
    n_steps = steps[i % len(steps)] if task in STEPS else None
    skill = SKILL.get(arm, 0.0) * EASE[task] * (1 - 0.04 * (n_steps or 0) * (group == "ood"))
    right = bool(0.7 * hard + 0.3 * rng.random() < skill)
    unread = bool(rng.random() < (0.4 if group == "cross" and arm != "no_cot" else 0.01)) and not right
    answer = str(10 + i) if right else None if unread else str(9 + i)
    text = f"Start with {i}. Add 10. <b>{i} + 10 = {answer}</b>." + (f"\nThe answer is {answer}." if answer else "")
    length = int(6 if arm == "no_cot" else 30 + 8 * (n_steps or 3) + rng.integers(0, 9))
    reason = "correct" if right else "no_answer" if unread else "wrong"
    return {
        "doc_id": i,
        "item_id": content_hash(task, i),
        "task": task,
        "group": group,
        "n_steps": n_steps,
        "doc": {"question": f"Ann has {i} beads and buys 10. How many? <script>alert(1)</script>", "choices": []},
        "prompt": f"<|user|>\nAnn has {i} beads and buys 10. How many?<|end|>\n<|assistant|>\n",
        "prompt_tokens": 21,
        "target": str(10 + i),
        "text": text,
        "tokens": [1] * length,
        "completion_tokens": length,
        "finish_reason": "length" if unread else "stop",
        "answer_strict": answer,
        "answer_flexible": answer,
        "correct_strict": right,
        "correct_flexible": right,
        "reason": reason,
        "gold_nll_nats": None if task == "synth_calendar" else float(20 * (1.2 - SKILL.get(arm, -1.0)) + rng.random()),
        "gold_nll_tokens": None if task == "synth_calendar" else 20 + i % 5,
        "doc_hash": content_hash(task, i),
        "prompt_hash": content_hash("p", task, i),
        "target_hash": content_hash(str(10 + i)),
        "resps": [[text]],
        "filtered_resps": [answer],
    }
