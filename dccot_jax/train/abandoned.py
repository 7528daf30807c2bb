"""Keeps quiet what tensorstore says to an event loop that Orbax has closed.

Where one array of a checkpoint does not write or read, Orbax raises its error and closes its loop while the other arrays are still
under way. Each of these, once done, wakes the closed loop; nothing can raise there, so Python would print a traceback for each,
before the one line that says what happened. So it does for each write that fails beside the first, and, in a warning, for each that
was not begun.
"""

from __future__ import annotations

import asyncio
import logging
import re
import sys
import warnings
from typing import Any

_WRITE = r"async_serialize_from_host\.<locals>\.\w+"  # of one array, in Orbax
_NOT_BEGUN = rf"coroutine '{_WRITE}' was never awaited"
_FAILED_TOO = re.compile(rf"Task exception was never retrieved\nfuture: <Task finished .*coro=<{_WRITE}\(\)")


class _Hook:
    """An unraisable hook that passes everything else on."""

    def __init__(self, others: Any):
        self._others = others

    def __call__(self, unraisable: Any) -> None:
        if not _wakes_a_closed_loop(unraisable):
            self._others(unraisable)


def forget_abandoned_futures() -> None:
    """For the rest of the process: a future may end long after its loop. May be called again."""
    if not isinstance(sys.unraisablehook, _Hook):
        sys.unraisablehook = _Hook(sys.unraisablehook)
    warnings.filterwarnings("ignore", message=_NOT_BEGUN, category=RuntimeWarning)
    logging.getLogger("asyncio").addFilter(_is_news)


def _is_news(record: logging.LogRecord) -> bool:
    return not _FAILED_TOO.match(record.getMessage())


def _wakes_a_closed_loop(unraisable: Any) -> bool:
    """Whether it is asyncio's own error, raised in a wake-up that no Python code asked for."""
    error, trace = unraisable.exc_value, unraisable.exc_traceback
    if type(error) is not RuntimeError or str(error) != "Event loop is closed" or trace is None:
        return False
    return trace.tb_frame.f_code is asyncio.BaseEventLoop.call_soon_threadsafe.__code__
