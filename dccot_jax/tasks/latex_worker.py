"""A small pool of child processes for symbolic comparison, with a hard wall-clock limit that works in any thread.

The limit covers work only: a child's start-up and the wait for a free child are not counted. A child that is late is killed and a fresh one
takes its place.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

MAX_CHILDREN = 4
START_LIMIT_SECONDS = 120.0
_CHILD = Path(__file__).with_name("latex_child.py")


class WorkerError(RuntimeError):
    """The child process could not be started."""


class _Child:
    """One child and a thread that reads its lines."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(  # -P: the tasks folder must not shadow standard modules
            [sys.executable, "-P", str(_CHILD)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C is for the parent: a child that ends in the middle of its work counts as a verdict
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()
        if self._receive(START_LIMIT_SECONDS) is None:
            self.kill()
            raise WorkerError(f"{_CHILD.name} did not start (exit status {self.process.poll()}); is math-verify[antlr4_13_2] installed?")

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def _receive(self, limit: float) -> dict[str, Any] | None:
        try:
            line = self.lines.get(timeout=max(limit, 0.0))
        except queue.Empty:
            return None
        return json.loads(line) if line else None

    def ask(self, request: dict[str, Any], limit: float) -> bool | None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps({**request, "limit": limit}) + "\n")
            self.process.stdin.flush()
        except (BrokenPipeError, OSError):
            return None
        reply = self._receive(limit)
        return None if reply is None else bool(reply["equal"])

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


class _Pool:
    def __init__(self) -> None:
        self.owner = os.getpid()
        self.slots = threading.Semaphore(MAX_CHILDREN)
        self.idle: list[_Child] = []
        self.lock = threading.Lock()

    def take(self) -> _Child:
        self.slots.acquire()
        try:
            with self.lock:
                while self.idle:
                    child = self.idle.pop()
                    if child.process.poll() is None:
                        return child
                    child.kill()
            return _Child()
        except BaseException:
            self.slots.release()
            raise

    def give(self, child: _Child, *, healthy: bool) -> None:
        if healthy:
            with self.lock:
                self.idle.append(child)
        else:
            child.kill()
        self.slots.release()

    def close(self) -> None:
        with self.lock:
            children, self.idle = self.idle, []
        for child in children:
            child.kill()


_pool = _Pool()
_pool_lock = threading.Lock()


def ask(request: dict[str, Any], limit: float) -> tuple[bool | None, float]:
    """Verdict of a child on {"left", "right", "proportional"} and the seconds it worked; None on timeout, or if the child died.

    Raises:
      WorkerError: no child can be started.
    """
    pool = _current_pool()
    child = pool.take()
    started = time.monotonic()
    answer = None
    try:
        answer = child.ask(request, limit)
    finally:
        pool.give(child, healthy=answer is not None)
    return answer, time.monotonic() - started


def close() -> None:
    """End all idle children (done at exit as well)."""
    if _pool.owner == os.getpid():
        _pool.close()


def _current_pool() -> _Pool:
    """The pool of this process: after a fork the parent's children are not ours."""
    global _pool
    with _pool_lock:
        if _pool.owner != os.getpid():
            _pool = _Pool()
        return _pool


atexit.register(close)
