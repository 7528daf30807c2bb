"""Signals over sequences made from pieces of a row: single steps in a window, and the answer with and without the rationale.

Every signal turns rows into items, which are rows themselves and are scored by `nll` in the engine's own program; equal items
are scored once. `expand` says which items a row needs, `reduce` makes its value of their scores.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dccot_jax.records import Dropped, Trace
from dccot_jax.select.views import Row
from dccot_jax.tasks.registry import build_target, get_task

WINDOW_STEPS = 4
STEM = "The answer is"
_BREAK = re.compile(r"\n\s*|[.!?][\"')\]]*(?= +\S)")
_SPACES = (("Ġ", " "), ("Ċ", "\n"), ("▁", " "), ("<0x0A>", "\n"))  # how byte-level and SentencePiece vocabularies write them


@dataclasses.dataclass(frozen=True)
class Items:
    """`rows`: the distinct items, sorted by id. `uses`: {row id: ids of its items}. `dropped`: rows that have no value, and why."""

    rows: list[Row]
    uses: dict[str, tuple[str, ...]]
    dropped: list[Dropped]


def expand(name: str, rows: Sequence[Row], traces: Mapping[str, Trace], tokenizer: Any, max_positions: int) -> Items:
    """The items of signal `name` ("local_naturalness" or "answer_gain") for every row.

    Args:
      traces: by row id, with the whole groups of the rows. max_positions: longest sequence the student reads.
    """
    make = {"local_naturalness": _step_items, "answer_gain": _answer_items}[name]
    uses, dropped = make(rows, traces, tokenizer, max_positions)
    items = {item.id: item for found in uses.values() for item in found}
    return Items([items[i] for i in sorted(items)], {row: tuple(item.id for item in found) for row, found in uses.items()}, dropped)


def reduce(name: str, items: Items, nll: Mapping[str, float]) -> dict[str, float]:
    """{row id: value} from the mean -log p of every item.

    local_naturalness: mean over steps of the mean log p of a step's tokens, nats per token. answer_gain: log p(answer |
    question, rationale) - log p(answer | question), nats, over all tokens of the answer.
    """
    if name == "local_naturalness":
        return {row: -math.fsum(nll[i] for i in uses) / len(uses) for row, uses in items.uses.items()}
    tokens = {item.id: item.completion_tokens for item in items.rows}
    return {row: tokens[alone] * (nll[alone] - nll[given]) for row, (given, alone) in items.uses.items()}


# --- local naturalness -----------------------------------------------------------------------------------------------------


def _step_items(
    rows: Sequence[Row], traces: Mapping[str, Trace], tokenizer: Any, max_positions: int
) -> tuple[dict[str, list[Row]], list[Dropped]]:
    """Local average log probability (arXiv 2510.03988): each step after the question and at most `WINDOW_STEPS` steps before it.

    With a single step this is the mean log p of the completion. Steps are lines and sentences; the end-of-turn token
    belongs to the last one. The width of the window is our choice.
    """
    pieces: dict[int, str] = {}
    uses = {}
    for row in rows:
        prompt, completion = row.input_ids[: row.prompt_tokens], row.input_ids[row.prompt_tokens :]
        for token in set(completion.tolist()) - pieces.keys():
            pieces[token] = _plain(tokenizer.convert_ids_to_tokens(token))
        ends = step_ends([pieces[token] for token in completion[:-1].tolist()])
        ends = [*ends[:-1], len(completion)] if ends else [len(completion)]
        starts = [0, *ends[:-1]]
        uses[row.id] = []
        for step, (start, end) in enumerate(zip(starts, ends)):
            before = completion[starts[max(0, step - WINDOW_STEPS)] : start]
            uses[row.id].append(_item(np.concatenate([prompt, before]), completion[start:end]))
    return uses, []


def step_ends(pieces: Sequence[str]) -> list[int]:
    """Where the steps of a text end, as numbers of tokens: after line breaks, and after sentences that a space follows.

    Args:
      pieces: the text of each token. A step never ends inside a token.
    """
    text = "".join(pieces)
    borders = [match.end() for match in _BREAK.finditer(text) if match.end() < len(text)]
    reached = np.cumsum([len(piece) for piece in pieces])  # characters up to and including each token
    inner = {int(np.searchsorted(reached, border)) + 1 for border in borders} - {len(pieces)}
    return [*sorted(inner), len(pieces)] if pieces else []


def _plain(piece: str | None) -> str:
    text = piece or ""
    for written, meant in _SPACES:
        text = text.replace(written, meant)
    return text


# --- answer gain -----------------------------------------------------------------------------------------------------------


def _answer_items(
    rows: Sequence[Row], traces: Mapping[str, Trace], tokenizer: Any, max_positions: int
) -> tuple[dict[str, list[Row]], list[Dropped]]:
    """How much the rationale helps with the gold answer (close to MoRSD, arXiv 2509.23574, whose exact form is not public).

    The answer's own tokens are scored in the task's answer line, after "The answer is", with the rationale in front and
    without it; the stem itself is given in both. Parts of a group other than the forward one take its value.
    """
    forward = {}
    for trace in sorted(traces.values(), key=lambda t: t.id):
        if trace.part == "forward":
            forward.setdefault(trace.group_id, trace.id)
    by_id = {row.id: row for row in rows}
    made: dict[str, list[Row] | Dropped] = {}
    for row in rows:
        if traces[row.id].part == "forward":
            made[row.id] = _answer_pair(row, traces[row.id], tokenizer, max_positions)
    uses, dropped = {}, []
    for row in rows:
        trace = traces[row.id]
        source = row.id if trace.part == "forward" else forward.get(trace.group_id, "")
        found = made.get(source) if source in by_id else None
        if isinstance(found, list):
            uses[row.id] = found
        else:
            reason = found if found is not None else Dropped(row.id, "no_forward_part", "answer_gain: its group has no question to answer")
            dropped.append(dataclasses.replace(reason, id=row.id))
    return uses, dropped


def _answer_pair(row: Row, trace: Trace, tokenizer: Any, max_positions: int) -> list[Row] | Dropped:
    if not trace.gold_answer:
        return Dropped(row.id, "missing_gold", "answer_gain: no gold answer")
    if not trace.reasoning.strip():
        return Dropped(row.id, "no_reasoning", "answer_gain: the trace has no rationale")
    line = build_target(get_task(trace.task), "", trace.gold_answer)
    encoded = tokenizer(line, add_special_tokens=False, return_offsets_mapping=True)
    stem = sum(end <= len(STEM) for _, end in encoded["offset_mapping"])
    tokens = np.asarray(encoded["input_ids"], np.int32)
    rationale = tokenizer(trace.reasoning.strip() + "\n", add_special_tokens=False)["input_ids"]
    prompt = row.input_ids[: row.prompt_tokens]
    given = _item(np.concatenate([prompt, np.asarray(rationale, np.int32), tokens[:stem]]), tokens[stem:])
    if len(given.input_ids) > max_positions:
        return Dropped(
            row.id, "exceeds_positions", f"answer_gain: {len(given.input_ids)} tokens, the student has {max_positions} positions"
        )
    return [given, _item(np.concatenate([prompt, tokens[:stem]]), tokens[stem:])]


def _item(context: np.ndarray, scored: np.ndarray) -> Row:
    """A row whose id is its content."""
    ids = np.concatenate([context, scored]).astype(np.int32)
    digest = hashlib.sha256(ids.tobytes() + len(context).to_bytes(8, "little")).hexdigest()
    return Row(digest[:24], ids, len(context))
