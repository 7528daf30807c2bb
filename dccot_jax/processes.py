"""Several processes as one run: joining them, and an end for all soon after one of them is gone.

A process that dies is noticed in one of three ways. Its connections close, and a collective of the others raises; it is silent for
`HEARTBEAT_SECONDS`, and JAX's coordination service ends the others; or it lives and does not come, and the step deadline of the
others (`Watchdog`) runs out. JAX ends a process by abort; a companion process then still says why (`last_words`).
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

from dccot_jax.stopping import LOST_PEER, STOPPED

HEARTBEAT_SECONDS = 60  # silence after which a process counts as dead; JAX's own default is 100
SHUTDOWN_SECONDS = 60  # how long a process that is done waits for the others
_LINGER_SECONDS = 2.0  # process 0 holds the coordination service, whose end aborts the others; they may be failing by themselves
_SIGNS = ("gloo", "nccl", "coordination service", "heartbeat")
_OWN_SIGNS = ("connection closed", "connection reset", "unavailable", "deadline_exceeded")  # storage and teachers use these words too
_COMPANION = "import sys\nif not sys.stdin.buffer.read(): print(sys.argv[1], file=sys.stderr)"


def join(coordinator: str = "", processes: int = 0, index: int = -1) -> None:
    """Join the other processes of the run; without arguments JAX asks the cluster. Call before JAX is used."""
    import jax

    jax.config.update("jax_enable_preemption_service", False)  # its SIGTERM handler would take the signal from `stopping`
    known = {"coordinator_address": coordinator, "num_processes": processes, "process_id": index} if coordinator else {}
    jax.distributed.initialize(**known, heartbeat_timeout_seconds=HEARTBEAT_SECONDS, shutdown_timeout_seconds=SHUTDOWN_SECONDS)


def joined() -> bool:
    """Whether this process is one of several."""
    if "jax" not in sys.modules:
        return False
    import jax

    return jax.distributed.is_initialized() and jax.process_count() > 1


def leave(code: int) -> None:
    """Leave the run with exit code `code`; returns where all processes leave together.

    After a failure nothing waits for the others: they would wait at a barrier for one that never comes.
    """
    if not joined():
        return
    import jax

    if code in (0, STOPPED):
        jax.distributed.shutdown()
        return
    if jax.process_index() == 0:
        time.sleep(_LINGER_SECONDS)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error of a collective says that another process is gone, as far as its text tells."""
    if not joined() or isinstance(error, OSError):
        return False
    import jax

    signs = (*_SIGNS, *_OWN_SIGNS) if isinstance(error, jax.errors.JaxRuntimeError) else _SIGNS
    return any(sign in str(error).lower() for sign in signs)


@contextlib.contextmanager
def last_words(text: str) -> Iterator[None]:
    """Print `text` on stderr if this process ends in the middle of the block without passing its end (abort, SIGKILL)."""
    # A session of its own: Ctrl-C is not for the companion. It ends when the pipe does, whatever happens to this process.
    companion = subprocess.Popen([sys.executable, "-I", "-S", "-c", _COMPANION, text], stdin=subprocess.PIPE, start_new_session=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            companion.communicate(b".")


class Watchdog:
    """Ends this process with `LOST_PEER` if `beat` is not called for `limit` seconds; 0: never. Use as a context manager.

    It prints what the last beat said and the stack of every thread: a collective that waits for a process which does not come
    raises nothing.
    """

    def __init__(self, limit: float, name: str):
        self._limit, self._name = limit, name
        self._last, self._what = time.monotonic(), "nothing yet"
        self._done = threading.Event()

    def beat(self, what: str) -> None:
        self._what, self._last = what, time.monotonic()

    def __enter__(self) -> Watchdog:
        if self._limit > 0:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()
        return self

    def __exit__(self, *_exception: object) -> None:
        self._done.set()

    def _watch(self) -> None:
        self.beat(self._what)
        while not self._done.wait(min(1.0, self._limit / 4)):
            if time.monotonic() - self._last > self._limit:
                faulthandler.dump_traceback(all_threads=True)
                text = f"dccot: {self._name} has not moved for {self._limit:g} s (last: {self._what}); another process may be stuck or gone"
                print(f"{text}. The same command on every process goes on", file=sys.stderr, flush=True)
                os._exit(LOST_PEER)
