"""Stage `tokenize`: every verified trace as one row of token ids.

Files: ``tokens.parquet`` (`TOKENS_SCHEMA`, sorted by id) and ``dropped.parquet``. A group whose row does not fit leaves
as a whole, so no method ever trains on half of its sequences.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from ml_collections import ConfigDict

from dccot_jax.artifact import Artifact, ArtifactWriter, StageResult, json_hash, table_hash
from dccot_jax.context import Context, Meter
from dccot_jax.data.template import Rendered, TemplateError, check_template, render_many
from dccot_jax.data.tokenizer import load_tokenizer, tokenizer_hash
from dccot_jax.records import Dropped, Trace, table_to_traces
from dccot_jax.tasks.registry import build_prompt, build_target, get_task

TOKENS_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("group_id", pa.string(), nullable=False),
        pa.field("input_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),  # length of the prefix that carries no loss
        pa.field("completion_tokens", pa.int32(), nullable=False),  # target and end-of-turn token
    ],
    metadata={b"dccot_schema": b"tokens/1"},
)
_BATCH_ROWS = 512


@dataclasses.dataclass(frozen=True)
class TokenRow:
    """One trace as token ids."""

    id: str
    group_id: str
    input_ids: Sequence[int]
    prompt_tokens: int

    @property
    def completion_tokens(self) -> int:
        return len(self.input_ids) - self.prompt_tokens


def run(cfg: ConfigDict, inputs: Mapping[str, Artifact], out: ArtifactWriter, ctx: Context) -> StageResult:
    """Tokenise `verify`'s traces with `student`'s tokenizer. Raises TemplateError if the template cannot be trained with."""
    if not ctx.is_main:
        return StageResult("")
    tokenizer_dir = inputs["student"].file("tokenizer")
    tokenizer = load_tokenizer(tokenizer_dir)
    check_template(tokenizer)
    traces = sorted(table_to_traces(inputs["verify"].table("traces")), key=lambda trace: trace.id)
    with ctx.progress("tokenize", len(traces)) as meter:
        rows, dropped = tokenize_traces(
            traces,
            tokenizer,
            max_length=cfg.tokens.max_length,
            no_cot=cfg.tokens.format == "no_cot",
            suffix=cfg.tokens.train_suffix,
            meter=meter,
        )
    table = tokens_table(rows)
    out.write_table("tokens", table)
    counts = out.write_dropped(dropped)
    used = tokenizer_hash(tokenizer_dir)
    facts = {
        "tokenizer_hash": used,
        "prompt_tokens": int(np.sum(table["prompt_tokens"].to_numpy(), dtype=np.int64)),
        "completion_tokens": int(np.sum(table["completion_tokens"].to_numpy(), dtype=np.int64)),
    }
    meaning = json_hash({"rows": table_hash(table), "tokenizer": used})
    return StageResult(meaning, rows_in=len(traces), rows_out=len(rows), dropped=counts, facts=facts)


def tokenize_traces(
    traces: Sequence[Trace], tokenizer: Any, *, max_length: int, no_cot: bool = False, suffix: bool = True, meter: Meter | None = None
) -> tuple[list[TokenRow], list[Dropped]]:
    """Token rows in the order of `traces`, and a reason for every trace that has none.

    Args:
      max_length: longest row in tokens, prompt and completion; a row of exactly that length stays.
      no_cot: the target is the gold answer alone; only forward rows have one.
      suffix: prompts built from the question carry the task's prompt suffix.
    Raises:
      TemplateError: the template drops part of a target or its end of turn; every row would be trained wrongly.
    """
    rows: list[TokenRow] = []
    dropped: list[Dropped] = []
    lost_groups: dict[str, str] = {}
    for start in range(0, len(traces), _BATCH_ROWS):
        batch = traces[start : start + _BATCH_ROWS]
        texts: list[tuple[Trace, str, str]] = []
        for trace in batch:
            target = _target(trace, no_cot)
            if isinstance(target, Dropped):
                dropped.append(target)
            else:
                texts.append((trace, training_prompt(trace, suffix=suffix), target))
        for (trace, _, _), row in zip(texts, render_many(tokenizer, [(prompt, target) for _, prompt, target in texts])):
            fault = _fault(trace, row, max_length)
            if fault is not None:
                dropped.append(fault)
                lost_groups.setdefault(trace.group_id, trace.id)
            elif isinstance(row, Rendered):
                rows.append(TokenRow(trace.id, trace.group_id, row.input_ids, row.prompt_tokens))
        if meter is not None:
            meter.advance(len(batch))
    kept = [row for row in rows if row.group_id not in lost_groups]
    dropped += [
        Dropped(row.id, "group_incomplete", f"{lost_groups[row.group_id]} of its group was dropped")
        for row in rows
        if row.group_id in lost_groups
    ]
    return kept, sorted(dropped, key=lambda row: row.id)


def training_prompt(trace: Trace, *, suffix: bool = True) -> str:
    """The user message a trace is trained with: its own prompt, else built from its question by its task."""
    if trace.prompt is not None:
        return trace.prompt
    task = get_task(trace.task)
    return build_prompt(task if suffix else dataclasses.replace(task, prompt_suffix=""), trace.question, trace.choices)


def tokens_table(rows: Iterable[TokenRow]) -> pa.Table:
    """Token rows as a table in `TOKENS_SCHEMA`, in the given order."""
    rows = list(rows)
    lengths = np.fromiter((len(row.input_ids) for row in rows), np.int64, len(rows))
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    if offsets[-1] > np.iinfo(np.int32).max:
        raise ValueError(f"{offsets[-1]:,} tokens in one table; at most {np.iinfo(np.int32).max:,} fit, split the traces over several runs")
    flat = np.fromiter((token for row in rows for token in row.input_ids), np.int32, int(offsets[-1]))
    ids = pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), pa.array(flat))
    return pa.table(
        {
            "id": pa.array([row.id for row in rows], pa.string()),
            "group_id": pa.array([row.group_id for row in rows], pa.string()),
            "input_ids": ids,
            "prompt_tokens": pa.array([row.prompt_tokens for row in rows], pa.int32()),
            "completion_tokens": pa.array([row.completion_tokens for row in rows], pa.int32()),
        },
        schema=TOKENS_SCHEMA,
    )


def _target(trace: Trace, no_cot: bool) -> str | Dropped:
    if not no_cot:
        return trace.target
    if trace.part != "forward":  # writes a question, or reasons about one that has no gold answer
        return Dropped(trace.id, "no_cot_part", f"part {trace.part!r} has no gold answer of its own")
    if not trace.gold_answer:
        return Dropped(trace.id, "missing_gold", "no gold answer to train on without a rationale")
    return build_target(get_task(trace.task), "", trace.gold_answer)


def _fault(trace: Trace, row: Rendered | TemplateError, max_length: int) -> Dropped | None:
    if isinstance(row, TemplateError):
        if row.fatal:
            raise TemplateError(row.reason, f"trace {trace.id}: {row}")
        return Dropped(trace.id, row.reason, str(row))
    if len(row.input_ids) > max_length:
        return Dropped(trace.id, "too_long", f"{len(row.input_ids)} tokens, at most {max_length}")
    return None
