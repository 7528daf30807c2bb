"""Stage `train`: the student learns the plan. Read from top to bottom.

Where the state comes from, first match wins:
  1. ``final.json`` of this very training: it is finished, nothing is done;
  2. the newest whole checkpoint of the same plan, student and config;
  3. the student's own weights (pretrained, or random by its seed).

Files: ``final/`` (parameters; adapters are merged into them), ``adapter/`` (PEFT, where adapters were trained), ``final.json``,
``student.json`` and ``tokenizer/`` (copied, so that the artifact stands alone), ``train_log.jsonl``, ``tensorboard/``;
``checkpoints/`` while it runs; ``snapshots/`` where the config asks for them.

At most two steps are in flight: the metrics of step n-1 are read after step n was dispatched. That hides the host's work,
bounds the memory of queued batches, and is what keeps many fake CPU devices from dead-locking. In float32 on one mesh the
result is bitwise the same however often the training was killed and resumed.

Asked to stop (SIGTERM, Ctrl-C, on any process), all processes save after the same step and raise Stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, copy_tree, json_hash
from dccot_jax.config import ConfigError, to_plain
from dccot_jax.config_identity import config_slice
from dccot_jax.context import Context
from dccot_jax.data.loader import PlanSource, batches
from dccot_jax.model.backends.choice import choose
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh
from dccot_jax.processes import Watchdog
from dccot_jax.records import canonical_json, content_hash
from dccot_jax.stopping import Stopped
from dccot_jax.train import adapters
from dccot_jax.train.checkpoint import FINAL, CheckpointError, save_params
from dccot_jax.train.digest import params_hash
from dccot_jax.train.feed import abstract_batch, local_rows, to_global
from dccot_jax.train.logs import SmoothedLoss, TrainLog, Window, to_host
from dccot_jax.train.losses import Distillation
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.skips import Skips, Unit, only, skipped_line
from dccot_jax.train.snapshots import SNAPSHOTS, describe_snapshots, save_snapshot
from dccot_jax.train.states import TrainCheckpoints, remove_all_but_best
from dccot_jax.train.step import abstract_state, init_state, make_train_step, with_constants
from dccot_jax.train.teacher import abstract_teacher, load_teacher, teacher_settings
from dccot_jax.train.votes import VOTE, cast_vote, counting, vote_shape

CHECKPOINTS = "checkpoints"


def run(
    cfg: ConfigDict,
    inputs: Mapping[str, Artifact],
    out: ArtifactWriter,
    ctx: Context,
    *,
    devices: Sequence[Any] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> StageResult:
    """Train the student of ``inputs["student"]`` on ``inputs["plan"]`` over the token rows of ``inputs["tokenize"]``.

    A teacher's likeliest tokens are those of ``inputs["distill"]``, where it is there.

    Args:
      devices: those to train on; None: all.
      on_step: called with the number of dispatched steps after each (tests interrupt a training there).

    Raises:
      ConfigError: rows longer than the model's positions, or rows of a step that do not split over the devices.
      AttentionError: the attention backend asked for cannot be used here.
      Stopped: a process was asked to stop; the checkpoint of the last step is on disk.
      CheckpointError: the directory holds a training of another plan, student or config, or a checkpoint cannot be written.
      NonFiniteError: more than ``train.max_skipped`` steps in a row were not finite, or empty; the message names the traces.
    """
    # --- what is trained -----------------------------------------------------------------------------------------------
    plan, student = inputs["plan"], inputs["student"]
    about = plan.json("plan")
    steps, rows_per_step, row_tokens = about["steps"], about["rows_per_step"], about["row_tokens"]
    base = ModelConfig.from_dict(student.json("student")["model"])
    mc = adapters.trained_model(base, cfg.train)
    stored = inputs.get("distill")
    distill = teacher_settings(student, mc, cfg.train.distill, stored)
    owner = {
        "plan": about["hash"],
        "student": student.logical_hash,
        "config": json_hash(config_slice(cfg, ("train", "compute_dtype"))),
    } | ({} if stored is None else {"teacher": stored.logical_hash})
    _check(about, student, mc)
    finished = _finished(out, owner)
    if finished is not None:
        ctx.log("  train: already finished")
        _remove_checkpoints(cfg, out, ctx)
        return _result(finished)

    # --- mesh, optimizer, state ----------------------------------------------------------------------------------------
    mesh = make_mesh(to_plain(cfg.mesh), devices)
    attention, remark = choose(cfg.attention, mc, row_tokens, cfg.compute_dtype, packed=True)
    if distill is not None and distill.teacher is not None:
        theirs, other = choose(cfg.attention, distill.teacher, row_tokens, cfg.compute_dtype, packed=True)
        distill, remark = distill._replace(attention=theirs), remark or other
    if remark:
        ctx.log(f"  {remark}")
    optimizer = make_optimizer(cfg.train)
    keep, keep_best = cfg.train.keep_checkpoints, cfg.train.keep_best
    checkpoints = TrainCheckpoints(out.file(CHECKPOINTS), owner, keep=keep, keep_best=keep_best, log=ctx.log)
    with jax.set_mesh(mesh), checkpoints as saver:
        trained, _ = adapters.abstract_trained(mc, mesh, cfg.train)
        found = saver.restore(abstract_state(trained, optimizer, mesh))
        constants = adapters.load_frozen(student, mc, mesh, cfg.train) | load_teacher(distill, cfg.train.distill, mesh)
        if found is None:
            first, record = 0, {}
            state = init_state(adapters.fresh(student, mc, mesh, cfg.seed), optimizer, mesh, constants)
        else:
            first, state, record = found
            state = with_constants(state, constants)
            ctx.log(f"  resuming after step {first} of {steps}")

        # --- data: every process builds its own rows -------------------------------------------------------------------
        rows = local_rows(mesh, rows_per_step)
        source = PlanSource.from_artifacts(plan, inputs["tokenize"], stored, rows=rows)
        epochs = _epochs(plan, about)
        snapshots = describe_snapshots(cfg.train, steps)
        voting = ctx.process_count > 1

        def feed(local: Mapping[str, np.ndarray]) -> dict[str, jax.Array]:
            """The global batch, with this process's vote to stop where there are several."""
            batch = to_global(local, mesh, rows, rows_per_step)
            return {**batch, VOTE: cast_vote(mesh, bool(ctx.stop.asked))} if voting else batch

        # --- compile ---------------------------------------------------------------------------------------------------
        started = time.monotonic()
        sizes, drop_seed = (steps, rows_per_step, row_tokens), adapters.dropout_seed(cfg.seed)
        train_step = _compile(
            mc, mesh, canonical_json(to_plain(cfg.train)), cfg.compute_dtype, attention, sizes, drop_seed, distill, voting
        )
        ctx.log(
            f"  {mc.num_params():,} parameters on {mesh.devices.size} device(s), {steps:,} steps of {rows_per_step} × {row_tokens} tokens; "
            f"attention {attention}; compiled in {time.monotonic() - started:.1f} s{_memory(train_step)}"
        )

        # --- loop ------------------------------------------------------------------------------------------------------
        log = TrainLog(out.path, first) if ctx.is_main else None
        window = Window(record.get("window"))
        smoothed = SmoothedLoss(record.get("smoothed_loss", (0.0, 0.0)))
        skips = Skips(cfg.train.max_skipped, record.get("skipped_in_a_row", ()), record.get("empty_in_a_row", ()))
        totals: dict[str, float] = {"tokens": 0, "trained_tokens": 0, "skipped": 0, "empty": 0, "seconds": 0.0} | record.get("totals", {})
        last_loss: float | None = record.get("last_loss")
        pending: Any = None
        asked = False  # to stop, by any process
        clock = time.monotonic()
        watchdog = Watchdog(cfg.train.step_deadline_seconds if voting else 0.0, f"training on process {ctx.process_index}")

        with log or contextlib.nullcontext(), ctx.progress("train", steps, unit="steps") as meter, watchdog:
            meter.skip(first)

            def fails(step: int, units: frozenset[Unit]) -> bool:
                """Whether a step is not finite with only these of its sequences; the state moves where it is."""
                nonlocal state
                part = feed(only(source[step - 1], rows, units))
                state, metrics = train_step(state, part)
                watchdog.beat(f"looking for what is not finite in step {step}")
                found = to_host(metrics)
                return found["skipped"][0] > found["empty"][0]

            def finish_step(step: int, metrics: Any) -> None:
                """Wait for a step, count it, and write a log line at the end of a window. Raises NonFiniteError."""
                nonlocal window, last_loss, clock, asked
                found = to_host(metrics)
                asked = found.pop(VOTE, (0.0, 1.0))[0] > 0 if voting else bool(ctx.stop.asked)
                watchdog.beat(f"step {step}")
                saver.check()
                window.add(found)
                smoothed.add(*found["loss"])
                if skips.add(step, found["skipped"][0] > 0, found["empty"][0] > 0):
                    raise skips.error(plan.table("plan"), fails)
                if step % cfg.train.log_every == 0 or step == steps:
                    now = time.monotonic()
                    seconds, clock = now - clock, now
                    line = {"step": step, "epoch": round(float(epochs[step - 1]), 6), **window.values()}
                    line |= {"seconds": round(seconds, 4), "tokens_per_second": round(line["tokens"] / max(seconds, 1e-9), 1)}
                    for name in totals:
                        totals[name] += line[name]
                    last_loss = line["loss"]
                    if log is not None:
                        log.write(line)
                    window = Window()
                meter.advance(1, note="" if last_loss is None else f"loss {last_loss:.4f}")

            for step, local in enumerate(batches(source, first), first + 1):
                state, metrics = train_step(state, feed(local))
                if pending is not None:
                    finish_step(*pending)  # waits for the step before this one only
                pending = (step, metrics)
                if on_step is not None:
                    on_step(step)
                stopping = asked and step < steps
                due = step % cfg.train.checkpoint_every == 0 and step < steps
                if step == steps or due or stopping:
                    finish_step(*pending)
                    pending = None
                if any(step == snapshot["step"] for snapshot in snapshots):  # before a checkpoint says that this step is past
                    save_snapshot(out.file(SNAPSHOTS), step, state)
                if due or stopping:
                    record = {"window": window.state(), "totals": dict(totals), "last_loss": last_loss}
                    record |= {"smoothed_loss": smoothed.state(), "skipped_in_a_row": skips.steps, "empty_in_a_row": skips.empty}
                    if log is not None:
                        log.flush()
                    saver.save(step, with_constants(state, {}), record, loss=smoothed.value())
                if stopping:
                    raise Stopped(f"training saved after step {step} of {steps}", agreed=True)

        # --- finish: parameters, then final.json, then the checkpoints go ----------------------------------------------
        saver.close()
        whole = adapters.whole(state, mc)
        save_params(out.file(FINAL), whole)
        final = {
            "owner": owner,
            "logical_hash": _logical_hash(params_hash(whole, mesh), student, about),
            "steps": steps,
            "parameters": base.num_params(),
            "trained_parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state["params"])),
            "lora": None if mc.lora is None else dataclasses.asdict(mc.lora),
            "loss": last_loss,
            "tokens": int(totals["tokens"]),
            "trained_tokens": int(totals["trained_tokens"]),
            "skipped_steps": int(totals["skipped"]),
            "epochs": round(float(epochs[-1]), 6),
            "seconds": round(totals["seconds"], 3),
            "sequences": about["sequences"]["seen"],
            "snapshots": snapshots,
        }
    if mc.lora is not None:
        adapters.save_adapter(out, state["params"], mc, student.json("student")["weights"].get("path"))
    if ctx.is_main:
        copy_tree(student.file("tokenizer"), out.file("tokenizer"))
        out.write_bytes("student.json", student.file("student.json").read_bytes())
        out.write_json("final", final)
    ctx.barrier("train final")
    _remove_checkpoints(cfg, out, ctx)
    if final["skipped_steps"]:
        ctx.log(f"  {skipped_line(final['skipped_steps'], int(totals['empty']), steps)}")
    return _result(final)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _check(about: Mapping[str, Any], student: Artifact, mc: ModelConfig) -> None:
    if about["row_tokens"] > mc.max_positions:
        raise ConfigError(f"config.train.row_tokens: {about['row_tokens']} exceeds the student's {mc.max_positions} positions")
    mine = student.facts["tokenizer_hash"]
    if about["tokenizer_hash"] != mine:
        raise CheckpointError(f"the plan was made with tokenizer {about['tokenizer_hash'][:16]}, the student has {mine[:16]}")


def _finished(out: ArtifactWriter, owner: Mapping[str, str]) -> dict[str, Any] | None:
    """The record of a training that ended and was killed before its manifest was written."""
    path = out.file("final.json")
    if not path.exists():
        return None
    final = json.loads(path.read_text())
    for name, mine in owner.items():
        if final["owner"].get(name) != mine:
            raise CheckpointError(
                f"{path}: result of another {name} ({str(final['owner'].get(name))[:16]}); this training's {name} is {mine[:16]}. "
                "Remove the directory or train in another workdir"
            )
    return final


def _result(final: Mapping[str, Any]) -> StageResult:
    facts = {name: value for name, value in final.items() if name not in ("owner", "logical_hash", "seconds")}
    return StageResult(
        final["logical_hash"], rows_in=final["sequences"], rows_out=final["sequences"], facts=facts, device_seconds=final["seconds"]
    )


def _remove_checkpoints(cfg: ConfigDict, out: ArtifactWriter, ctx: Context) -> None:
    """Final parameters are on disk: training states have had their use. `keep_best` of them stay, or all if `keep_checkpoints` < 0."""
    if ctx.is_main and cfg.train.keep_checkpoints >= 0:
        remove_all_but_best(out.file(CHECKPOINTS), cfg.train.keep_best)


def _logical_hash(params_sha: str, student: Artifact, about: Mapping[str, Any]) -> str:
    """What a trained student means: its weights, the model they belong to, its tokenizer, and the plan it learned."""
    return content_hash("train/1", params_sha, student.json("student")["model"], about["tokenizer_hash"], about["hash"], digits=64)


def _epochs(plan: Artifact, about: Mapping[str, Any]) -> np.ndarray:
    """Passes over the plan's sequences after each step: sequences used so far / different sequences, float64 [steps]."""
    per_step = np.bincount(plan.table("plan")["step"].to_numpy(), minlength=about["steps"])
    return np.cumsum(per_step) / max(about["sequences"]["unique"], 1)


@functools.lru_cache(maxsize=4)
def _compile(
    mc: ModelConfig,
    mesh: jax.sharding.Mesh,
    train: str,
    compute_dtype: str,
    attention: str,
    sizes: tuple[int, int, int],
    seed: int,
    distill: Distillation | None,
    voting: bool,
) -> Any:
    """The compiled step; arms that differ only in their data share it.

    Args:
      train: the config's ``train`` group as JSON. attention: the backend.
      sizes: steps, rows per step, tokens per row. seed: of the adapters' dropout.
      voting: the batch carries the processes' votes to stop (`train.votes`).
    """
    group, (steps, rows, tokens) = ConfigDict(json.loads(train)), sizes
    trained, constants = adapters.abstract_trained(mc, mesh, group)
    state = abstract_state(trained, make_optimizer(group), mesh, constants | abstract_teacher(distill, group.distill, mesh))
    batch: dict[str, Any] = abstract_batch(mesh, rows, tokens, group.distill.top_k)
    step = make_train_step(mc, mesh, group, jnp.dtype(compute_dtype), steps=steps, seed=seed, attention=attention, distill=distill)
    if voting:
        step, batch = counting(step), {**batch, VOTE: vote_shape(mesh)}
    with jax.set_mesh(mesh):
        return step.lower(state, batch).compile()


def _memory(compiled: Any) -> str:
    """Bytes per device that the compiled step needs, where the backend says so."""
    stats = compiled.memory_analysis()
    if stats is None:
        return ""
    state, temporary = stats.argument_size_in_bytes / 2**20, stats.temp_size_in_bytes / 2**20
    return f"; per device {state:,.0f} MiB state and batch, {temporary:,.0f} MiB temporary"
