"""Runs a request, and tells what cannot work in the words of its flags."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence

from dccot_jax.context import Context
from dccot_jax.records import InputError
from dccot_jax.standalone import score, select, stability
from dccot_jax.standalone.request import Request, in_flags, make_request

_RUN = {"score": score.run, "select": select.run, "stability": stability.run}
_LONG = ("score", "train_warmup")  # artifacts worth to go on from


def parse(verb: str, given: Mapping[str, str | None], files: Sequence[str], overrides: Mapping[str, str]) -> Request:
    """As `request.make_request`."""
    with _in_flags(verb):
        return make_request(verb, given, files, overrides)


def run(request: Request, ctx: Context) -> None:
    """Do what is asked. Raises InputError with one line. Leaves nothing beside the output but scores (and a warm-up) to go on from."""
    try:
        with _in_flags(request.verb):
            _RUN[request.verb](request, ctx)
    finally:
        started = [p for depth in ("", "*/") for kind in _LONG for p in request.workdir.glob(f"{depth}artifacts/{kind}-*/*")]
        if ctx.is_main and not started:
            request.clear_parts()


@contextlib.contextmanager
def _in_flags(verb: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(in_flags(str(error), verb)) from None
