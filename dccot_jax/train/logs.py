"""The training log: one JSON line per window of steps, TensorBoard scalars made from the same lines.

A resumed run continues the log as if it had never stopped: lines after the resumed step are cut off, and the open window is
carried in the checkpoint. So the two logs are equal except for times.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from dccot_jax.artifact import write_atomic

LOG_FILE = "train_log.jsonl"
TENSORBOARD_DIR = "tensorboard"
_REWRITE_SECONDS = 30.0
_TOTALS = ("tokens", "trained_tokens", "skipped", "empty")  # reported as totals; the others as means
_ORDER = ("loss", "learning_rate", "grad_norm", "tokens", "trained_tokens", "skipped", "empty")


class Window:
    """(sum, weight) of every metric over the steps since the last log line."""

    def __init__(self, state: Mapping[str, Any] | None = None):
        state = state or {}
        self.steps = int(state.get("steps", 0))
        self.sums: dict[str, list[float]] = {name: list(pair) for name, pair in state.get("sums", {}).items()}
        self.last: dict[str, float] = dict(state.get("last", {}))

    def add(self, metrics: Mapping[str, tuple[Any, Any]]) -> None:
        self.steps += 1
        for name, (total, weight) in metrics.items():
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += float(total)
            pair[1] += float(weight)
            self.last[name] = float(total)

    def state(self) -> dict[str, Any]:
        """JSON-able, exact; the constructor takes it back."""
        return {"steps": self.steps, "sums": self.sums, "last": self.last}

    def values(self) -> dict[str, Any]:
        """Means Σ sum / Σ weight (None where nothing was counted), totals for counts, the newest learning rate."""
        found: dict[str, Any] = {}
        for name in sorted(self.sums, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)):
            total, weight = self.sums[name]
            if name in _TOTALS:
                found[name] = int(total)
            elif name == "learning_rate":
                found[name] = self.last[name]
            else:
                found[name] = total / weight if weight > 0 else None
        return found


class SmoothedLoss:
    """Σ w·nll / Σ w with older steps fading by `DECAY` a step (about the last 50 count): by it checkpoints are called better or worse."""

    DECAY = 0.98

    def __init__(self, state: Sequence[float] = (0.0, 0.0)):
        self.total, self.weight = state

    def add(self, total: float, weight: float) -> None:
        self.total = self.DECAY * self.total + total
        self.weight = self.DECAY * self.weight + weight

    def state(self) -> list[float]:
        return [self.total, self.weight]

    def value(self) -> float | None:
        return self.total / self.weight if self.weight > 0 else None


class _Lines:
    """A text file that grows. An object store knows no append: there it is written whole, now and then and at `flush`."""

    def __init__(self, path: epath.Path, text: str):
        self._path, self._text = path, text
        write_atomic(path, text.encode())
        self._file = None if "://" in str(path) else path.open("a")
        self._last = time.monotonic()

    def append(self, text: str) -> None:
        if self._file is not None:
            self._file.write(text)
            self._file.flush()
            return
        self._text += text
        if time.monotonic() - self._last >= _REWRITE_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._file is None:
            self._path.write_text(self._text)
            self._last = time.monotonic()

    def close(self) -> None:
        self.flush()
        if self._file is not None:
            self._file.close()


class _Events:
    """How tensorboardX writes on an object store: a file in memory, stored whole at each of its flushes. Its own needs a client library."""

    def open(self, path: str) -> _EventFile:
        return _EventFile(path)

    def directory_check(self, path: str) -> None:
        """Object stores have no directories to make."""


class _EventFile:
    def __init__(self, path: str):
        self._path, self._data = epath.Path(path), bytearray()

    def write(self, data: bytes) -> None:
        self._data += data

    def flush(self) -> None:
        self._path.write_bytes(bytes(self._data))

    close = flush


class TrainLog:
    """Writes `train_log.jsonl` and TensorBoard events (process 0).

    Args:
      folder: the artifact's directory. first_step: finished steps of the run that is resumed; later lines are cut off.
    """

    def __init__(self, folder: epath.PathLike, first_step: int):
        from tensorboardX import SummaryWriter, record_writer

        events = epath.Path(folder) / TENSORBOARD_DIR
        if events.exists():
            events.rmtree()
        lines = [line for line in read_log(folder) if line["step"] <= first_step]
        self._lines = _Lines(epath.Path(folder) / LOG_FILE, "".join(_text(line) for line in lines))
        if "://" in str(events):
            record_writer.register_writer_factory(str(events).split("://")[0], _Events())
        self._board = SummaryWriter(str(events))
        for line in lines:
            self._scalars(line)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; fields whose value is None stay in the file and out of TensorBoard."""
        line = {**line, "time": round(time.time(), 3)}
        self._lines.append(_text(line))
        self._scalars(line)

    def flush(self) -> None:
        """Everything written so far is stored; before a checkpoint, which counts on it."""
        self._lines.flush()

    def close(self) -> None:
        self._lines.close()
        self._board.close()

    def __enter__(self) -> TrainLog:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _scalars(self, line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, (int, float)):
                self._board.add_scalar(f"train/{name}", value, global_step=line["step"], walltime=line["time"])


def read_log(folder: epath.PathLike) -> list[dict[str, Any]]:
    """Lines of a training log; a last line that a kill tore is left out."""
    path = epath.Path(folder) / LOG_FILE
    found: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def to_host(metrics: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[float, float]]:
    """Fetch a step's metrics; waits for the step."""
    import jax

    return {name: (float(np.asarray(a)), float(np.asarray(b))) for name, (a, b) in jax.device_get(dict(metrics)).items()}


def _text(line: Mapping[str, Any]) -> str:
    return json.dumps(line, sort_keys=False, allow_nan=False) + "\n"
