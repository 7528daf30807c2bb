"""The stages of a run as a graph of named artifacts: what is done, what is left, in which order.

`run` walks the graph of every (arm, seed). An artifact whose identity is already in the store is reused, so arms share
what they have in common and a second run of a finished workdir does nothing.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.artifact import (
    ArmRun,
    Artifact,
    ArtifactError,
    StageResult,
    Store,
    artifact_identity,
    finish,
    open_artifact,
    remove_leftovers,
    write_atomic,
)
from dccot_jax.config import ConfigError
from dccot_jax.config_identity import config_slice
from dccot_jax.context import Context
from dccot_jax.external import EXTERNAL
from dccot_jax.model.gguf_io import is_gguf
from dccot_jax.preflight import check
from dccot_jax.records import content_hash
from dccot_jax.run_record import INDEX, read_index, shows_evaluations, write_config_text, write_record
from dccot_jax.select.settings import sections_read, snapshots_needed


@dataclasses.dataclass(frozen=True)
class Stage:
    """A kind of stage: where its code is, what it depends on.

    Attributes:
      kind: name of the stage. run: ``module:function``, imported when needed.
      version: raise it when the same config and inputs would give another result.
      config_keys: dotted keys whose values are part of the identity.
      external: names a function of `external.py` that hashes files outside the store, or "".
    """

    kind: str
    run: str
    version: int
    config_keys: tuple[str, ...]
    external: str = ""

    def load(self) -> Callable[..., StageResult]:
        module, name = self.run.split(":")
        return getattr(importlib.import_module(module), name)


STAGES = {
    stage.kind: stage
    for stage in (
        Stage("student", "dccot_jax.data.student:run", 1, ("student", "seed"), "student_files"),
        Stage("traces", "dccot_jax.teachers.stage:run", 3, ("traces",), "trace_files"),
        Stage("augment", "dccot_jax.augment.stage:run", 3, ("augment", "traces.task", "traces.seed"), "trace_files"),
        Stage(
            "verify",
            "dccot_jax.select.verify:run",
            4,
            ("verify", "traces.task", "evaluate.iid", "evaluate.ood", "evaluate.cross"),
            "guarded_files",
        ),
        Stage("tokenize", "dccot_jax.data.tokenize:run", 1, ("tokens",)),
        Stage(
            "distill",
            "dccot_jax.select.distill:run",
            1,
            (
                "train.distill.top_k",
                "train.distill.top_k_dtype",
                "train.distill.temperature",
                "train.distill.teacher_dtype",
                "train.loss_mask",
                "compute_dtype",
            ),
            "train_files",
        ),
        Stage(
            "score",
            "dccot_jax.select.engine:run",
            2,
            ("score.signals", "compute_dtype", "evaluate.max_new_tokens", "verify.time_limit_seconds"),
            "score_files",
        ),
        Stage("select", "dccot_jax.select.stage:run", 2, ("select", "seed"), "select_files"),
        Stage(
            "plan",
            "dccot_jax.mix.plan:run",
            2,
            (
                "mix",
                "curriculum",
                "train.steps",
                "train.epochs",
                "train.rows_per_step",
                "train.row_tokens",
                "train.loss_mask",
                "train.loss_weight",
                "seed",
            ),
        ),
        Stage("train", "dccot_jax.train.loop:run", 1, ("train", "compute_dtype"), "train_files"),
        Stage(
            "evaluate",
            "dccot_jax.evaluate.stage:run",
            2,
            (
                "traces.task",
                "compute_dtype",
                "verify.time_limit_seconds",
                "evaluate.iid",
                "evaluate.ood",
                "evaluate.cross",
                "evaluate.limit",
                "evaluate.limits",
                "evaluate.max_new_tokens",
                "evaluate.gold_nll",
            ),
            "task_files",
        ),
    )
}

DATA_STAGES = ("traces", "augment")  # their randomness hangs on traces.seed, so that seeds share their data
ORDER = tuple(STAGES)
REPORT = "report"
REPORT_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Node:
    """One artifact to be made: a stage, the config it sees and the nodes it reads.

    `inputs` maps a role to a node name; `facets` names, per role, the manifest fact that stands for the input in the
    identity instead of its whole logical hash (tokenising depends on the student's tokenizer, not on its weights).
    """

    name: str
    stage: Stage
    config: ConfigDict
    inputs: Mapping[str, str]
    facets: Mapping[str, str] = dataclasses.field(default_factory=dict)


def graph(config: ConfigDict, *, base: bool) -> dict[str, Node]:
    """Nodes of one (arm, seed) in the order they are made. `base` adds the evaluation of the untrained student."""
    nodes: dict[str, Node] = {}

    def add(name: str, inputs: Mapping[str, str], cfg: ConfigDict = config, facets: Mapping[str, str] | None = None) -> None:
        stage = STAGES[name.split(":")[0]]
        if stage.kind == "score":
            stage = dataclasses.replace(stage, config_keys=(*stage.config_keys, *sections_read(cfg)))
        if stage.kind in DATA_STAGES:
            cfg = config_lib.override(cfg, {"seed": cfg.traces.seed})
        nodes[name] = Node(name, stage, cfg, dict(inputs), facets or {})

    add("student", {})
    add("traces", {})
    traces = "traces"
    if config.augment.methods:
        add("augment", {"traces": traces})
        traces = "augment"
    add("verify", {"traces": traces})
    add("tokenize", {"verify": "verify", "student": "student"}, facets={"student": "tokenizer_hash"})
    rows = {"verify": "verify", "tokenize": "tokenize"}
    learned = {"tokenize": "tokenize", "student": "student"}
    stored: dict[str, str] = {}
    if config.train.distill.top_k:
        add("distill", learned, facets={"student": "tokenizer_hash"})
        stored = {"distill": "distill"}
    scored: dict[str, str] = {}
    if config.score.signals:
        if config.score.student == "warmup":
            short = config_lib.override(
                config,
                {
                    "select.steps": ({"name": "random", "share": config.score.warmup.share, "stream": "warmup"},),
                    "mix.kind": "none",
                    "mix.total_examples": 0,
                    "mix.total_tokens": 0,
                    "curriculum.kind": "none",
                    "train.steps": config.score.warmup.steps,
                    "train.snapshots": snapshots_needed(config),
                },
            )
            add("select:warmup", rows, short)
            add("plan:warmup", {**rows, **stored, "select": "select:warmup"}, short)
            add("train:warmup", {"plan": "plan:warmup", **learned, **stored}, short)
            add("score", {**rows, "train": "train:warmup"})
        elif config.score.student == "base":
            add("score", {**rows, "student": "student"})
        else:
            add("score", {**rows, "train": f"path:{config.score.student}"})
        scored = {"score": "score"}
    add("select", {**rows, **scored})
    add("plan", {**rows, **stored, **scored, "select": "select"})
    add("train", {"plan": "plan", **learned, **stored})
    if base:
        add("evaluate:base", {"student": "student"})
    add("evaluate", {"train": "train"})
    return nodes


def run(config: ConfigDict, ctx: Context, *, until: str = "", only: str = "") -> list[ArmRun]:
    """Run every (arm, seed) of a config, then the report.

    Args:
      until: stop each arm after this node, e.g. ``select`` or ``train:warmup``.
      only: run this stage (a kind or a node name) alone; its inputs must be there.
    Raises:
      ConfigError: a config that cannot work, or an unknown stage name.
    """
    check(config)
    for name, value in (("--until", until), ("--only", only)):
        if value and value not in (*ORDER, REPORT) and value.split(":")[0] not in ORDER:
            raise ConfigError(f"{name}={value}: no such stage; stages are {', '.join((*ORDER, REPORT))}")
    if ctx.is_main:
        write_config_text(ctx.workdir, config)
    store = Store(ctx.workdir / "artifacts")
    runs: list[ArmRun] = []
    made: set[str] = set()
    reused: set[str] = set()
    there: dict[str, None] = {}  # what --only may name, in order
    for arm, seed, arm_config, base in _arm_seeds(config):
        nodes = graph(arm_config, base=base)
        done: dict[str, Artifact] = {}
        label = f"{arm}/{seed}"
        last = _last_node(nodes, until)
        there |= dict.fromkeys([*nodes, *(node.stage.kind for node in nodes.values())])
        for node in nodes.values():
            if only and only not in (node.name, node.stage.kind):
                found = _peek(store, node, done)
                if found is not None:
                    done[node.name] = found
                continue
            artifact, fresh = _make(store, node, done, label, ctx)
            done[node.name] = artifact
            (made if fresh else reused).add(artifact.path.name)
            if node.name == last:
                break
        runs += _as_runs(arm, seed, arm_config, done)
    if only not in ("", REPORT, *there):
        raise ConfigError(f"--only={only}: no arm of this config has this stage; they have {', '.join(there)}")
    if ctx.is_main and not write_record(ctx.workdir, config, runs):
        ctx.log(f"Not finished: {ctx.workdir / INDEX}, and so dccot report and export-traces, stay with the finished run before.")
    if made or only:
        ctx.log(f"{len(made)} artifacts made, {len(reused - made)} reused.")
    else:
        ctx.log(f"Nothing to do: all {len(reused)} artifacts of this run are up to date.")
    if (not until or until == REPORT) and only in ("", REPORT):
        report(config, runs, ctx)
    return runs


def needed(config: ConfigDict, target: str, given: Collection[str] = ()) -> list[Node]:
    """The node `target` of a config's graph and those it is made from, in that order; not those `given`, nor what only these need."""
    nodes = graph(config, base=False)
    wanted = {target}
    for node in reversed(nodes.values()):  # a node reads only from nodes before it
        if node.name in wanted:
            wanted.update(name for name in node.inputs.values() if name not in given)
    return [node for node in nodes.values() if node.name in wanted]


def make(config: ConfigDict, target: str, ctx: Context, given: Mapping[str, Artifact]) -> dict[str, Artifact]:
    """The artifacts `given` and those of `needed`, made in `ctx.workdir` where they are not there; resumes like a run."""
    store, done = Store(ctx.workdir / "artifacts"), dict(given)
    for node in needed(config, target, given):
        done[node.name], _ = _make(store, node, done, target, ctx)
    return done


def report(config: ConfigDict, runs: Sequence[ArmRun], ctx: Context, *, force: bool = False) -> None:
    """Write `workdir/report` from finished artifacts (process 0), unless it was written from the same ones; `force` writes it again.

    Raises ConfigError if that would put a report without evaluations in the place of one that has some.
    """
    if ctx.is_main:
        folder = epath.Path(ctx.workdir) / "report"
        if not any("evaluate" in run.artifacts for run in runs) and shows_evaluations(folder):
            raise ConfigError(f"nothing to report: no evaluation has been made; the report in {folder} stays as it is")
        artifacts = [[run.arm, run.seed, {name: item.identity for name, item in run.artifacts.items()}] for run in runs]
        made_from = content_hash(REPORT_VERSION, config_lib.to_plain(config), artifacts)
        stamp = folder / "made_from"
        if force or not stamp.exists() or stamp.read_text() != made_from:
            from dccot_jax.report.build import build_report

            build_report(list(runs), folder, config, ctx)
            write_atomic(stamp, made_from.encode())
        ctx.log(f"Report: {folder / 'report.html'}")
    ctx.barrier("report")


def _last_node(nodes: Mapping[str, Node], until: str) -> str:
    """The node after which `until` stops: itself, or the last one before it in `ORDER` if this arm has no such stage."""
    if not until or until == REPORT or until in nodes:
        return until
    rank = ORDER.index(until.split(":")[0])
    return [name for name in nodes if name in ORDER and ORDER.index(name) <= rank][-1]


def evaluate_checkpoint(config: ConfigDict, checkpoint: epath.Path | Path, ctx: Context) -> list[ArmRun]:
    """Evaluate a train artifact, a Hugging Face directory or a GGUF file under a config's protocol; the workdir gets a report of it.

    Raises ConfigError if the path is neither, or the workdir holds a run already.
    """
    check(config, traces=False)
    if (ctx.workdir / INDEX).exists() and any(set(run["artifacts"]) - {"student", "train", "evaluate"} for run in read_index(ctx.workdir)):
        raise ConfigError(f"--workdir={ctx.workdir}: holds a run; name another directory for this evaluation")
    store = Store(ctx.workdir / "artifacts")
    if (checkpoint / "manifest.json").exists():
        source = open_artifact(checkpoint)
        if source.kind not in ("train", "student"):
            raise ConfigError(f"--checkpoint={checkpoint}: a {source.kind} artifact, not a train or student artifact")
        role = source.kind
    elif (checkpoint / "config.json").exists() or is_gguf(checkpoint):
        config = config_lib.override(config, {"student.path": str(checkpoint)})
        role = "student"
        source, _ = _make(store, Node("student", STAGES["student"], config, {}), {}, "eval", ctx)
    else:
        raise ConfigError(
            f"--checkpoint={checkpoint}: neither a train artifact (manifest.json), a Hugging Face directory (config.json) nor a .gguf file"
        )
    node = Node("evaluate", STAGES["evaluate"], config, {role: "source"})
    artifact, _ = _make(store, node, {"source": source}, "eval", ctx)
    config = config_lib.override(config, {"arms": (), "report.compare": ()})
    runs = [ArmRun(checkpoint.name, config.seed, config_lib.to_plain(config), {role: source, "evaluate": artifact})]
    if ctx.is_main:
        write_config_text(ctx.workdir, config)
        write_record(ctx.workdir, config, runs)
    report(config, runs, ctx)
    return runs


def _arm_seeds(config: ConfigDict) -> Iterator[tuple[str, int, ConfigDict, bool]]:
    first = True
    for arm, arm_config in config_lib.arms(config).items():
        for seed in config_lib.seeds(config):
            yield arm, seed, config_lib.override(arm_config, {"seed": seed, "seeds": ()}), bool(config.evaluate.base) and first
            first = False


def _as_runs(arm: str, seed: int, config: ConfigDict, done: dict[str, Artifact]) -> list[ArmRun]:
    plain = config_lib.to_plain(config)
    plain.pop("arms", None)
    runs = [ArmRun(arm, seed, plain, {name: artifact for name, artifact in done.items() if name != "evaluate:base"})]
    if "evaluate:base" in done:
        runs.insert(0, ArmRun("base", seed, plain, {"student": done["student"], "evaluate": done["evaluate:base"]}))
    return runs


def _inputs(node: Node, done: Mapping[str, Artifact]) -> dict[str, Artifact]:
    found = {}
    for role, name in node.inputs.items():
        if name.startswith("path:"):
            found[role] = open_artifact(epath.Path(name[len("path:") :]).expanduser())
        elif name in done:
            found[role] = done[name]
        else:
            raise ConfigError(f"stage {node.name}: its input {name!r} has not been made; run without --only first")
    return found


def _identity(node: Node, inputs: Mapping[str, Artifact]) -> tuple[str, dict[str, Any], dict[str, str]]:
    semantic = config_slice(node.config, node.stage.config_keys)
    hashes = {role: str(item.facts[node.facets[role]]) if role in node.facets else item.logical_hash for role, item in inputs.items()}
    if node.stage.external:
        hashes.update(EXTERNAL[node.stage.external](node.config))
    return artifact_identity(node.stage.kind, node.stage.version, semantic, hashes), semantic, hashes


def _peek(store: Store, node: Node, done: Mapping[str, Artifact]) -> Artifact | None:
    """The finished artifact of a node, or None; makes nothing."""
    try:
        identity, _, _ = _identity(node, _inputs(node, done))
        return store.find(node.name, identity)
    except (ConfigError, ArtifactError):  # said by the stage that is asked for, if it needs this one
        return None


def _make(store: Store, node: Node, done: Mapping[str, Artifact], label: str, ctx: Context) -> tuple[Artifact, bool]:
    """The artifact of a node, made if it is not there. Returns it and whether it was made now."""
    inputs = _inputs(node, done)
    identity, semantic, hashes = _identity(node, inputs)
    found = None
    if ctx.is_main:
        try:
            found = store.find(node.name, identity)
        except ArtifactError as error:
            ctx.log(f"[{label}] {node.name}: damaged, making it again ({error})")
            store.discard(node.name, identity)
    if _agree(found is not None, ctx):
        return found or open_artifact(store.path(node.name, identity)), False
    start = time.monotonic()
    ctx.log(f"[{label}] {node.name} …")
    writer = store.writer(node.name, identity)
    if ctx.is_main:
        remove_leftovers(writer.path)
    ctx.stop_point(f"before {node.name}")
    with ctx.stopping_together():
        result = node.stage.load()(node.config, inputs, writer, ctx)
    ctx.barrier(f"end {node.name} {identity}")
    seconds = time.monotonic() - start
    if ctx.is_main:
        finish(
            writer,
            kind=node.stage.kind,
            identity=identity,
            version=node.stage.version,
            config=semantic,
            inputs={
                role: {
                    "hash": value,
                    "artifact": inputs[role].path.name if role in inputs else "",
                }
                for role, value in hashes.items()
            },
            result=result,
            wall_seconds=seconds,
            recorded={
                "processes": ctx.process_count,
                "mesh": config_lib.to_plain(node.config.mesh),
                "attention": node.config.attention,
                "node": node.name,
            },
        )
    lost = ", ".join(f"{reason} {count:,}" for reason, count in result.dropped.items())
    ctx.log(
        f"[{label}] {node.name}: {result.rows_in:,} rows in, {result.rows_out:,} out"
        + (f"; dropped: {lost}" if lost else "")
        + f" ({seconds:.1f} s)"
    )
    ctx.stop_point(f"after {node.name}")  # the manifest is there
    return open_artifact(writer.path), True


def _agree(value: bool, ctx: Context) -> bool:
    """Process 0's answer, on every process."""
    if ctx.process_count == 1:
        return value
    import numpy as np
    from jax.experimental import multihost_utils

    return bool(multihost_utils.broadcast_one_to_all(np.asarray(value)))
