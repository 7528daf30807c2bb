"""What a command says when it ends by an exception: one line where the reason lies with what the user gave, else the error itself."""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Mapping
from pathlib import Path

from rich.console import Console

from dccot_jax import processes
from dccot_jax.records import InputError
from dccot_jax.stopping import LOST_PEER, STOPPED, Stopped

_NOT_ALLOWED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)  # true of all that is in a directory


def explain_end(error: Exception, verb: str, paths: Mapping[str, str], console: Console) -> int:
    """Exit code of a command that raised, after saying why. `paths`: what the user gave, by how it was given ("--out").

    Raises the error itself where it is none of the user's.
    """
    from dccot_jax.artifact import DISK_FULL

    if isinstance(error, Stopped):
        console.print(f"dccot {verb}: stopped ({error}); run the same command again to go on", markup=False, soft_wrap=True)
        return STOPPED
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        error = InputError(f"{error.filename or 'a write'}: {error.strerror}; make room and run the same command again to go on")
    elif isinstance(error, OSError) and (reason := path_problem(error, paths)):
        error = InputError(reason)
    elif isinstance(error, InputError):
        pass
    elif processes.is_lost_peer(error):
        text = (
            f"another process of the run is gone ({one_line(error)[:200]}); the same command on every process goes on where the run stopped"
        )
        console.print(f"dccot {verb}: {text}", style="bold red", markup=False, soft_wrap=True)
        return LOST_PEER
    elif processes.joined():  # the traceback here: `leave` will not return
        traceback.print_exception(error)
        return 1
    else:
        raise error
    console.print(f"dccot {verb}: {error}", style="bold red", markup=False, soft_wrap=True)
    return 2


def path_problem(error: OSError, paths: Mapping[str, str]) -> str:
    """One line if the error is about a path that the user gave, else "".

    It is where it names that path, a directory above it or a file made beside it (``out.parquet.parts``); of what lies below it
    only where nothing there may be touched at all: a file missing inside a run is not the user's doing.
    """
    if not isinstance(error.filename, str | os.PathLike):
        return ""
    at = Path(os.path.abspath(error.filename))
    for source, text in paths.items():
        given = Path(os.path.abspath(os.path.expanduser(text)))
        beside = at.parent == given.parent and at.name.lstrip(".").startswith(f"{given.stem}.")
        if beside or given.is_relative_to(at) or (at.is_relative_to(given) and error.errno in _NOT_ALLOWED):
            reason = "exists and is not a directory" if isinstance(error, FileExistsError) else error.strerror
            return f"{source}{text}: {reason}" + ("" if at == given else f" ({at})")
    return ""


def one_line(error: BaseException) -> str:
    text = str(error.args[0]) if error.args else str(error)
    return " ".join(text.split())
