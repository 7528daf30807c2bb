"""Checkpoints of a training while it runs: written behind its back, checked before they are used, kept by two rules.

One holds parameters, optimizer state, step and a small JSON record (whose plan and student it belongs to, the open window of the
log, one checksum per array). Arrays are read straight into the shardings of whatever mesh is there. All processes decide
together: what one of them cannot read, none uses. With `checkpoint` the only module that knows Orbax.
"""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dccot_jax.artifact import walk, write_atomic
from dccot_jax.processes import is_lost_peer
from dccot_jax.records import InputError
from dccot_jax.stopping import Stopped
from dccot_jax.train.abandoned import forget_abandoned_futures
from dccot_jax.train.checkpoint import STATE, CheckpointError, cause, first_line
from dccot_jax.train.digest import checksums

_SIZES = "sizes.json"
_DAMAGE = (ValueError, OSError, KeyError, TypeError, AttributeError)  # what Orbax and tensorstore raise on files that do not read
_TEXT_BYTES = 256  # of a message that processes exchange
_MOST_STEPS = 1024  # checkpoints in a directory
_POLL_SECONDS = 0.01
_ENDING_SECONDS = 10.0  # for a part of a failed write to end


def kept_steps(losses: Mapping[int, float | None], *, last: int, best: int) -> set[int]:
    """Which checkpoints stay: the `last` newest (at least one; negative: all) and the `best` of lowest loss; ties: the newer.

    Args:
      losses: step -> smoothed training loss when it was saved, None where it is not known.
    """
    steps = sorted(losses)
    if last < 0:
        return set(steps)
    return set(steps[-max(last, 1) :]) | best_steps(losses, best)


def best_steps(losses: Mapping[int, float | None], count: int) -> set[int]:
    """The `count` steps of lowest loss; ties: the newer."""
    known = [(loss, -step) for step, loss in losses.items() if loss is not None and math.isfinite(loss)]
    return {-step for _, step in sorted(known)[:count]}


class TrainCheckpoints:
    """Asynchronous checkpoints of one training; a step number is the number of finished steps.

    Args:
      path: their directory. owner: hashes by name (``plan``, ``student``, …) that a checkpoint must carry to be resumed from.
      keep, keep_best: how many of the newest, and of those of lowest loss, stay; see `kept_steps`. One goes only when a newer
        one is whole on disk. log: where damage is reported.
    """

    def __init__(self, path: epath.PathLike, owner: Mapping[str, str], *, keep: int, keep_best: int = 0, log: Callable[[str], None]):
        self._path = epath.Path(path)
        self._owner = dict(owner)
        self._log = log
        self._writing: int | None = None
        logging.getLogger("absl").addFilter(_reported_here)
        forget_abandoned_futures()
        if jax.process_index() == 0:
            self._path.mkdir(parents=True, exist_ok=True)
        _barrier("checkpoint directory")
        self._losses = saved_losses(self._path)
        self._failure: Exception | None = None  # of the write in flight
        self._begun: list[_Watched] = []  # its parts
        self._manager = ocp.CheckpointManager(
            self._path,
            handler_registry=_handlers(self._begun, self._note_failure),
            options=ocp.CheckpointManagerOptions(
                preservation_policy=_Kept(self._losses, keep, keep_best), cleanup_tmp_directories=True, create=False
            ),
        )
        self._checksums = jax.jit(checksums)

    # --- writing -------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, record: Mapping[str, Any], *, loss: float | None = None) -> None:
        """Start writing a checkpoint; returns once all is copied, so `state` may be donated and `record` changed next.

        Raises CheckpointError if this one, or the one before it, cannot be written; those that are there stay.
        """
        self.settle()
        sums = np.asarray(jax.device_get(self._checksums(state))).tolist()
        meta = {"step": step, "owner": self._owner, "checksums": sums, "loss": loss, "record": copy.deepcopy(dict(record))}
        self._losses[step] = loss
        self._writing = step
        self._begun.clear()
        with self._writes():
            self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))

    def settle(self) -> None:
        """Wait for the write in flight, then record the sizes of its files: how a torn file is told before it is read."""
        while self._failure is None and self._manager.is_saving_in_progress():
            time.sleep(_POLL_SECONDS)
        self.check()
        told = () if self._writing is not None else (OSError, ValueError)  # Orbax raises later what `check` has raised
        with self._writes(), contextlib.suppress(*told):
            self._manager.wait_until_finished()
            if self._writing is not None and jax.process_index() == 0:
                folder = self._path / str(self._writing)
                sizes = {str(file.relative_to(folder)): file.stat().length for file in sorted(walk(folder))}
                write_atomic(folder / _SIZES, json.dumps(sizes).encode())
        self._writing = None

    def check(self) -> None:
        """Raises CheckpointError if the write in flight has failed on this process; waits for nothing.

        Orbax raises it when all processes have ended their write, for which the others wait too, and wait for this one.
        """
        error, self._failure = self._failure, None
        if error is not None and self._writing is not None:  # a write fails once, whichever of its files fail
            with self._writes():
                raise error

    def _note_failure(self, error: Exception) -> None:
        self._failure = error

    def close(self) -> None:
        """Finish every write in flight. May be called again."""
        try:
            self.settle()
            self._manager.close()
        finally:
            if jax.process_count() == 1:  # else, they may wait for another process
                for part in self._begun:  # Orbax waits for none behind one that failed
                    with contextlib.suppress(Exception):
                        part.result(_ENDING_SECONDS)
            logging.getLogger("absl").removeFilter(_reported_here)

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        if kind is None or issubclass(kind, Stopped):
            self.close()
        elif jax.process_count() == 1:  # else, the others may never come to the barriers of a write
            with contextlib.suppress(CheckpointError):  # of a write, where there is an error already
                self.close()

    @contextlib.contextmanager
    def _writes(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if is_lost_peer(error) or isinstance(error, InputError):
                raise
            step, self._writing = self._writing, None
            self._losses.pop(-1 if step is None else step, None)
            if jax.process_index() == 0:  # make room; what writes in flight put there again goes when the training is next opened
                for left in self._path.glob(f"{step}.orbax-checkpoint-tmp*"):
                    with contextlib.suppress(OSError):
                        left.rmtree()
            whole = max((s for s in self._losses if (self._path / str(s)).exists()), default=None)
            stays = f"checkpoint {whole} is whole" if whole is not None else "there is no earlier one"
            raise CheckpointError(
                f"{self._path}: checkpoint {step} could not be written ({cause(error)}); {stays}. Make room and run the same command again"
            ) from error

    # --- reading -------------------------------------------------------------------------------------------------------

    def restore(self, target: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest whole checkpoint of this training as (step, state, record), or None if there is none.

        A damaged one is reported and set aside, and the one before it is used.

        Args:
          target: tree of ShapeDtypeStructs with shardings, as `state`.

        Raises:
          CheckpointError: a checkpoint belongs to another plan, student or config (the message names both hashes), or some
            process does not see it.
        """
        self.settle()
        for step in self._steps():
            folder = self._path / str(step)
            if _problem_of_any("" if folder.exists() else "missing"):
                raise CheckpointError(f"{folder}: some processes see this checkpoint and others do not; all hosts must see the workdir")
            meta, problem = _attempt(lambda folder=folder: _read_meta(folder))
            if not problem:
                self._check_owner(step, meta["owner"])
                state, problem = _attempt(lambda folder=folder: _read_state(folder, target))
            if not problem and np.asarray(jax.device_get(self._checksums(state))).tolist() != meta["checksums"]:
                problem = "array contents differ from their checksums"
            if not problem:
                return step, state, meta["record"]
            self._set_aside(step, problem)
        return None

    def _steps(self) -> list[int]:
        """Steps of the checkpoints there are, newest first, as process 0 sees them."""
        found = sorted(self._manager.all_steps(), reverse=True)
        if jax.process_count() > 1:
            padded = np.full(_MOST_STEPS, -1, np.int32)
            padded[: len(found[:_MOST_STEPS])] = found[:_MOST_STEPS]
            found = [int(step) for step in np.asarray(multihost_utils.broadcast_one_to_all(padded)) if step >= 0]
        return found

    def _set_aside(self, step: int, problem: str) -> None:
        """Rename a checkpoint that does not read: its step may be written again, and a person may still look at it."""
        aside = self._path / f"damaged-{step}"
        self._log(f"  checkpoint {step} is damaged ({problem}); set aside as {aside.name}, trying the one before")
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            (self._path / str(step)).rename(aside)
        _barrier("checkpoint set aside")
        self._losses.pop(step, None)
        self._manager.reload()

    def _check_owner(self, step: int, owner: Mapping[str, str]) -> None:
        for name, mine in self._owner.items():
            theirs = owner.get(name, "")
            if theirs != mine:
                raise CheckpointError(
                    f"{self._path / str(step)}: checkpoint of another {name} ({theirs[:16]}); this training's {name} is {mine[:16]}. "
                    "Remove the directory or train in another workdir"
                )


def _handlers(begun: list[_Watched], on_failure: Callable[[Exception], None]) -> Any:
    """Orbax's handlers of the two items of a checkpoint; a write that fails in the background is told at once.

    begun: gets the parts of each write.
    """
    registry = ocp.handlers.DefaultCheckpointHandlerRegistry()
    for item, save, restore, handler in (
        ("state", ocp.args.StandardSave, ocp.args.StandardRestore, ocp.StandardCheckpointHandler()),
        ("meta", ocp.args.JsonSave, ocp.args.JsonRestore, ocp.JsonCheckpointHandler()),
    ):
        handler.async_save = _watched(handler.async_save, begun, on_failure)
        registry.add(item, save, handler)
        registry.add(item, restore, handler)
    return registry


def _watched(save: Callable[..., Any], begun: list[_Watched], on_failure: Callable[[Exception], None]) -> Callable[..., Any]:
    async def watched(*args: Any, **kwargs: Any) -> list[_Watched]:
        parts = [_Watched(future, on_failure) for future in await save(*args, **kwargs) or ()]
        begun.extend(parts)
        return parts

    return watched


class _Watched:
    """A future of Orbax that tells when it ends in an error."""

    def __init__(self, future: Any, on_failure: Callable[[Exception], None]):
        self._future, self._on_failure = future, on_failure

    def result(self, timeout: float | None = None) -> Any:
        try:
            return self._future.result(timeout)
        except Exception as error:
            self._on_failure(error)
            raise

    def cancel(self) -> Any:
        return self._future.cancel()


class _Kept:
    """`kept_steps` as a preservation policy of Orbax, which asks it after a write and deletes once the write is whole."""

    def __init__(self, losses: Mapping[int, float | None], last: int, best: int):
        self._losses, self._last, self._best = losses, last, best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        steps = [info.step for info in checkpoints]
        kept = kept_steps({step: self._losses.get(step) for step in steps}, last=self._last, best=self._best)
        return [step in kept for step in steps]


def saved_losses(path: epath.PathLike) -> dict[int, float | None]:
    """Step -> smoothed training loss of the checkpoints in a directory; None where it does not read."""
    path = epath.Path(path)
    found = {}
    for folder in path.iterdir() if path.exists() else ():
        if folder.name.isdigit():
            try:
                found[int(folder.name)] = _read_meta(folder)["loss"]
            except _DAMAGE:
                found[int(folder.name)] = None
    return found


def remove_all_but_best(path: epath.PathLike, best: int) -> None:
    """Remove a finished training's checkpoints, those of lowest loss excepted. For one process."""
    path = epath.Path(path)
    stay = best_steps(saved_losses(path), best) if best else set()
    if not stay and path.exists():
        path.rmtree()
    elif stay:
        for folder in path.iterdir():
            if not (folder.name.isdigit() and int(folder.name) in stay):
                folder.rmtree()


# --- pieces -----------------------------------------------------------------------------------------------------------


def _read_meta(folder: epath.Path) -> dict[str, Any]:
    meta = json.loads((folder / "meta" / "metadata").read_text())
    return {"loss": meta.get("loss"), **{name: meta[name] for name in ("owner", "checksums", "record")}}


def _read_state(folder: epath.Path, target: Any) -> Any:
    """This process's shards of the state. The handler itself, not Orbax's checkpointer, which ends in a barrier: others may have failed."""
    if (folder / _SIZES).exists():  # else killed between the write and its record; the checksums still speak
        for name, size in json.loads((folder / _SIZES).read_text()).items():
            file = folder / name
            length = file.stat().length if file.exists() else -1
            if length != size:
                raise ValueError(f"{name} is missing" if length < 0 else f"{name} has {length} bytes instead of {size}")
    return ocp.StandardCheckpointHandler().restore(folder / STATE, args=ocp.args.StandardRestore(target))


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
    """(what was read, "") where every process could read its part, else (None, the first problem)."""
    found, problem = None, ""
    try:
        found = read()
    except _DAMAGE as error:
        problem = first_line(error)
    problem = _problem_of_any(problem)
    return (None if problem else found), problem


def _problem_of_any(mine: str) -> str:
    """The first problem that any process has, on all of them; "" if none has one."""
    if jax.process_count() == 1:
        return mine
    text = np.zeros(_TEXT_BYTES, np.uint8)
    data = np.frombuffer(mine.encode()[:_TEXT_BYTES], np.uint8)
    text[: len(data)] = data
    rows = np.asarray(multihost_utils.process_allgather(text)).reshape(-1, _TEXT_BYTES)
    texts = [bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows]
    return next((f"process {index}: {text}" for index, text in enumerate(texts) if text), "")


def _reported_here(record: logging.LogRecord) -> bool:
    """Drops the tracebacks that Orbax logs, four for one failed write, of errors that it raises as well."""
    return record.levelno < logging.ERROR or "orbax" not in record.pathname


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
