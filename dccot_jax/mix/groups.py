"""Groups: the units that mixing, curricula and packing move. A group is all token rows made together from one question."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa

from dccot_jax.questions import question_key
from dccot_jax.records import Dropped, InputError

TOKEN_COLUMNS = ("id", "group_id", "prompt_tokens", "completion_tokens")
TRACE_COLUMNS = ("id", "part", "task", "question", "teacher", "style", "level", "n_steps")


class PlanError(InputError):
    """A plan that cannot be made; the message names the config field or the column at fault."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One token row: its trace id, row number in the token table, role in the group and sizes in tokens."""

    id: str
    token_row: int
    part: str
    prompt_tokens: int
    completion_tokens: int

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclasses.dataclass(frozen=True)
class Group:
    """Rows that stay together, and what is known about the trace that leads them.

    Attributes:
      id: group id. rows: its rows, sorted by id. lead: the forward row, else the first.
      task, teacher, style, level: of the leading trace. question: key of (task, question), see `questions`.
      n_steps: reasoning steps of the leading trace, or None.
    """

    id: str
    rows: tuple[Row, ...]
    lead: Row
    task: str
    question: str
    teacher: str = ""
    style: str = ""
    level: str = ""
    n_steps: int | None = None

    @property
    def completion_tokens(self) -> int:
        """Of all rows: what the group costs."""
        return sum(row.completion_tokens for row in self.rows)


def build_groups(
    kept: Iterable[str], traces: Iterable[pa.RecordBatch], tokens: Iterable[pa.RecordBatch]
) -> tuple[list[Group], list[Dropped]]:
    """Groups of the kept ids, sorted by id, and the kept ids that cannot be used.

    Args:
      kept: ids from `select`. traces: the verified traces, at least `TRACE_COLUMNS` of them. tokens: the token rows, at least
        `TOKEN_COLUMNS`, whose order gives ``token_row``.
    A kept id without a token row is dropped (``no_tokens``), and so is one whose group was kept only in part.
    """
    wanted = set(kept)
    placed: dict[str, tuple[int, str, int, int]] = {}  # id -> token row, group, prompt and completion tokens
    partial: set[str] = set()
    for number, (identity, group, prompt, completion) in enumerate(_rows(tokens, TOKEN_COLUMNS)):
        if identity in wanted:
            placed[identity] = (number, group, prompt, completion)
        else:
            partial.add(group)
    records: dict[str, dict[str, Any]] = {
        record[0]: dict(zip(TRACE_COLUMNS, record)) for record in _rows(traces, TRACE_COLUMNS) if record[0] in wanted
    }
    members: dict[str, list[Row]] = {}
    dropped: list[Dropped] = []
    for identity in sorted(wanted):
        if identity not in placed or identity not in records:
            dropped.append(Dropped(identity, "no_tokens", "kept by selection, but it has no token row"))
            continue
        number, group, prompt, completion = placed[identity]
        if group in partial:
            dropped.append(Dropped(identity, "group_incomplete", f"other rows of group {group} were not kept"))
        else:
            members.setdefault(group, []).append(Row(identity, number, records[identity]["part"], prompt, completion))
    return [_group(identity, rows, records) for identity, rows in sorted(members.items())], dropped


def drop_groups(groups: Iterable[Group], reason: str, detail: str = "") -> list[Dropped]:
    """One Dropped per row of `groups`."""
    return [Dropped(row.id, reason, detail) for group in groups for row in group.rows]


def seeded_order(groups: Sequence[Group], seed: int, *names: Any) -> list[Group]:
    """`groups` in a random order that hangs on the seed, the names and each group's id alone.

    Sorting by a hash, not shuffling by a generator: adding or removing a group leaves the order of the others.
    """
    prefix = f"{seed}/" + "/".join(str(name) for name in names) + "/"
    return sorted(groups, key=lambda group: (hashlib.blake2b((prefix + group.id).encode(), digest_size=16).digest(), group.id))


def _rows(batches: Iterable[pa.RecordBatch], columns: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    for batch in batches:
        yield from zip(*(batch.column(name).to_pylist() for name in columns))


def _group(identity: str, rows: list[Row], records: Mapping[str, Mapping[str, Any]]) -> Group:
    lead = next((row for row in rows if row.part == "forward"), rows[0])
    record = records[lead.id]
    return Group(
        id=identity,
        rows=tuple(rows),
        lead=lead,
        task=record["task"],
        question=f"{record['task']}:{question_key(record['question'])}",
        teacher=record["teacher"],
        style=record["style"],
        level=record["level"],
        n_steps=record["n_steps"],
    )
