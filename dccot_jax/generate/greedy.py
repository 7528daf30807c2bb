"""Greedy replies of a student, asked alike by every stage: its own stop tokens, evaluation's batch and budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from jax.sharding import Mesh
from ml_collections import ConfigDict

from dccot_jax.generate.sampler import Generated, Sampler
from dccot_jax.model.config import ModelConfig


class Speaker(Protocol):
    """What generation needs of a student (`train.checkpoint.Student` is one). stop_ids: every token that ends a reply."""

    @property
    def mc(self) -> ModelConfig: ...
    @property
    def params(self) -> Any: ...
    @property
    def stop_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_id(self) -> int: ...


def make_sampler(cfg: ConfigDict, student: Speaker, mesh: Mesh) -> Sampler:
    """The sampler with evaluation's settings; any of the student's stop tokens ends a reply."""
    return Sampler(
        student.mc,
        student.params,
        mesh,
        compute_dtype=cfg.compute_dtype,
        batch_rows=cfg.evaluate.batch_rows,
        eos_id=student.stop_ids,
        pad_id=student.pad_id,
    )


def greedy(
    sampler: Sampler,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    row_ids: Sequence[int],
    entropy: bool = False,
    on_batch: Callable[[list[tuple[int, Generated]]], None] | None = None,
) -> list[Generated]:
    """One greedy reply per prompt, in input order.

    Args:
      row_ids: the number of each prompt in the whole stage, so that a row is the same row however prompts are chunked.
      entropy, on_batch: as in `Sampler.generate`.
    """
    return sampler.generate(prompts, max_new_tokens, row_ids=row_ids, entropy=entropy, on_batch=on_batch)
