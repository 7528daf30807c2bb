"""A workdir that every host can write, read and delete in, and that is the same one for all."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import uuid
from collections.abc import Callable
from typing import Any

from etils import epath

from dccot_jax.context import forget_listings
from dccot_jax.doctor.lines import one_line

_TRIES = 3  # network disks may show a new file late
_PAUSE_SECONDS = 1.0

Gather = Callable[[Any], list[Any]]  # what this host gives -> what every host gave, in the order of their indices


@dataclasses.dataclass(frozen=True)
class Storage:
    """What one host saw in the workdir.

    Attributes:
      write, delete: the error, one line, or empty. unseen: the hosts that wrote a file which this one did not see.
    """

    write: str = ""
    unseen: tuple[int, ...] = ()
    delete: str = ""

    @property
    def well(self) -> bool:
        return self == Storage()


def probe(workdir: epath.Path, index: int, gather: Gather) -> Storage:
    """Write a file, read those of all hosts, delete it.

    Args:
      workdir: as a run would use it; made if it is not there. Holds nothing new afterwards.
      index: of this host. gather: collective, so it is a barrier too.
    """
    if "://" in str(workdir):
        forget_listings()
    token = gather(uuid.uuid4().hex)[0]
    folder = workdir / f".doctor-{token}"
    own = folder / f"{index}.txt"
    write = delete = ""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        own.write_text(f"{token} {index}")
    except Exception as error:  # storage backends raise errors of their own
        write = one_line(error)
    wrote = [host for host, error in enumerate(gather(write)) if not error]
    unseen = tuple(host for host in wrote if not _holds(folder / f"{host}.txt", f"{token} {host}"))
    gather(None)  # every host has read
    if not write:
        try:
            own.unlink()
            delete = f"{own} is still there after its deletion" if own.exists() else ""
        except Exception as error:
            delete = one_line(error)
    gather(None)  # every host has deleted
    with contextlib.suppress(Exception):  # another host was first, or a bucket has no folders
        folder.rmdir()
    return Storage(write, unseen, delete)


def _holds(path: epath.Path, text: str) -> bool:
    for attempt in range(_TRIES):
        if attempt:
            time.sleep(_PAUSE_SECONDS)
        with contextlib.suppress(Exception):
            if path.read_text() == text:
                return True
    return False
