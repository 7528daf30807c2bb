"""From a teacher's spec in the config to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dccot_jax.config import nearest
from dccot_jax.records import InputError, Teacher


class TeacherError(InputError):
    """A teacher spec that cannot work; the message names the field and what would be accepted."""


def make_teacher(spec: Mapping[str, Any]) -> Teacher:
    """The teacher of a spec such as ``{"kind": "scripted", "style": "verbose"}``.

    Raises TeacherError on an unknown kind or field, and for ``replay``, which holds finished traces and answers no requests.
    """
    kind = str(spec.get("kind", ""))
    if kind == "replay":
        raise TeacherError("teacher kind 'replay' holds finished traces and cannot answer requests; use it in traces.teachers only")
    if kind not in _FACTORIES:
        kinds = sorted([*_FACTORIES, "replay"])
        raise TeacherError(f"teacher kind {kind!r} is not one of {', '.join(kinds)}{nearest(kind, kinds)}")
    try:
        return _FACTORIES[kind](**{key: value for key, value in spec.items() if key != "kind"})
    except TypeError as error:
        raise TeacherError(f"teacher {dict(spec)}: {error}") from None


def register_kind(kind: str, factory: Callable[..., Teacher]) -> None:
    """Add a kind of teacher; `factory` takes the spec's other fields as keywords. Raises ValueError if the kind exists."""
    if kind in _FACTORIES or kind == "replay":
        raise ValueError(f"teacher kind {kind!r} is already registered")
    _FACTORIES[kind] = factory


def _scripted(style: str) -> Teacher:
    from dccot_jax.tasks.synthetic.teachers import ScriptedTeacher  # pulls in every synthetic family

    return ScriptedTeacher(style=style)


_FACTORIES: dict[str, Callable[..., Teacher]] = {"scripted": _scripted}
