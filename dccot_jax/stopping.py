"""Ending a run on request: SIGTERM (preemption) and Ctrl-C are noted, and the stage at work ends at its next safe point.

How a run ends, beside 0, 1 and 2: `STOPPED` after a request, `LOST_PEER` when another process of the run is gone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

STOPPED = 75  # EX_TEMPFAIL: nothing is wrong, the same command goes on
LOST_PEER = 76  # EX_PROTOCOL
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(Exception):
    """Ends a run at a safe point after a request to stop.

    Attributes:
      agreed: every process raised it at the same point; False: process 0 did so alone and has still to tell the others.
    """

    def __init__(self, where: str, *, agreed: bool):
        super().__init__(where)
        self.agreed = agreed


class StopRequest:
    """Whether this process was asked to stop. `asked` names the signal, "" if none came."""

    def __init__(self) -> None:
        self.asked = ""

    def ask(self, why: str) -> None:
        self.asked = self.asked or why

    @contextlib.contextmanager
    def on_signals(self) -> Iterator[StopRequest]:
        """SIGTERM and SIGINT ask to stop; a second one raises KeyboardInterrupt. Outside the main thread signals stay as they are."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler if handler is not None else signal.SIG_DFL)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.ask(signal.Signals(number).name)
        # Not through a stream: the signal may have come in the middle of a write to it.
        os.write(2, f"{self.asked}: stopping at the next safe point; a second one stops at once\n".encode())
