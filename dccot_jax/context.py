"""What a stage is given besides its inputs: where it runs, how it reports progress, how processes agree."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from dccot_jax.stopping import Stopped, StopRequest

_PLAIN_INTERVAL_SECONDS = 10.0


class Meter:
    """Counts work done; shows a bar on a terminal and a line every ten seconds elsewhere, with rate and ETA."""

    def __init__(self, console: Console, label: str, total: int, unit: str, bar: Progress | None):
        self._console, self._label, self._total, self._unit, self._bar = console, label, total, unit, bar
        self._start = self._last = time.monotonic()
        self.done = 0
        self._first = 0
        self._task = bar.add_task(label, total=total, rate="") if bar else None

    def skip(self, n: int) -> None:
        """Count work that was finished in an earlier run: it moves the bar and not the rate."""
        self.done += n
        self._first += n
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done)

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        now = time.monotonic()
        rate = (self.done - self._first) / max(now - self._start, 1e-9)
        text = f"{rate:,.1f} {self._unit}/s {note}".rstrip()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self.done, rate=text)
        elif now - self._last >= _PLAIN_INTERVAL_SECONDS:
            self._last = now
            left = max(self._total - self.done, 0) / max(rate, 1e-9)
            line = f"  {self._label}: {self.done:,}/{self._total:,} {text}, {left:,.0f} s left"
            self._console.print(line, highlight=False, markup=False, soft_wrap=True)


def forget_listings() -> None:
    """Object stores: fsspec keeps listings of directories, in which other processes, and tensorstore in this one, write unseen."""
    from fsspec.config import conf

    for scheme in ("gcs", "s3", "az"):
        conf.setdefault(scheme, {}).setdefault("use_listings_cache", False)


@dataclasses.dataclass
class Context:
    """Run-time surroundings of a stage. Nothing here may change a result.

    Attributes:
      workdir: the run's directory. data_dir: local files of public tasks, or None.
      process_index, process_count: this process among all (JAX processes).
      console: where people read; silent on processes other than 0.
      stop: whether this process was asked to stop.
    """

    workdir: epath.Path | Path
    data_dir: Path | None = None
    process_index: int = 0
    process_count: int = 1
    console: Console = dataclasses.field(default_factory=lambda: Console(file=sys.stderr, highlight=False))
    stop: StopRequest = dataclasses.field(default_factory=StopRequest)

    def __post_init__(self) -> None:
        if "://" in str(self.workdir):
            forget_listings()
        if self.process_index:
            self.console = Console(quiet=True)

    @property
    def is_main(self) -> bool:
        return self.process_index == 0

    def barrier(self, name: str) -> None:
        """Wait until every process is here; no-op for one process. Raises Stopped if one of them cannot come because it stops."""
        if self.process_count > 1:
            self._meet(name, leaving=False)

    def stop_point(self, where: str) -> None:
        """Raises Stopped, on every process, if any was asked to stop. Every process must call this; it is a barrier."""
        if self.process_count > 1:
            self._meet(where, leaving=bool(self.stop.asked))
        elif self.stop.asked:
            raise Stopped(where, agreed=True)

    def stop_alone(self, where: str) -> None:
        """Raises Stopped if this process was asked to stop: for work of one process while the others wait at a barrier."""
        if self.stop.asked:
            raise Stopped(where, agreed=self.process_count == 1)

    @contextlib.contextmanager
    def stopping_together(self) -> Iterator[None]:
        """Around a stage: if process 0 stops alone, the others leave the barrier at which they wait for it, with Stopped too."""
        try:
            yield
        except Stopped as stop:
            if not stop.agreed:
                with contextlib.suppress(Stopped):
                    self._meet(str(stop), leaving=True)
            raise

    def _meet(self, name: str, *, leaving: bool) -> None:
        import numpy as np
        from jax.experimental import multihost_utils

        mine = np.asarray([leaving, zlib.crc32(name.encode()) >> 1], np.int32)
        found = np.asarray(multihost_utils.process_allgather(mine)).reshape(-1, 2)
        if found[:, 0].any():
            raise Stopped(name, agreed=True)
        if (found[:, 1] != mine[1]).any():
            raise RuntimeError(f"process {self.process_index} is at {name!r}, another process elsewhere")

    def log(self, text: str) -> None:
        """One line for the reader of the terminal."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def progress(self, label: str, total: int, unit: str = "rows") -> Iterator[Meter]:
        """Progress over `total` units; `meter.advance(n)` after each batch."""
        if self.console.is_terminal and not self.console.quiet:
            bar = Progress(
                TextColumn("  {task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self.console,
            )
            with bar:
                yield Meter(self.console, label, total, unit, bar)
        else:
            yield Meter(self.console, label, total, unit, None)
