"""DEITA's complexity and quality (Liu et al., arXiv 2312.15685) from the logits of a local model.

The model reads a prompt that asks for a grade from 1 to 6; with z_1..z_6 the logits of the tokens "1".."6" where its answer begins, the
score is sum_k k softmax(z)_k, in [1, 6]. The published scorers are models trained for this; set `score.deita.complexity_model` and
`quality_model` to them, the prompts to those of their model cards, and `chat` to False. Any other model is a proxy for them, the student
itself too, which grades where no model is named. The published code returns 3 where a digit is missing; here that cannot be.

Forward parts are graded; the other parts of a group take the value of its forward part.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from dccot_jax.config import ConfigError
from dccot_jax.data.template import prompt_text
from dccot_jax.model import decoder, head
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import activation_spec, reshard
from dccot_jax.records import Dropped, Trace
from dccot_jax.select.signals import DEITA
from dccot_jax.select.views import Row
from dccot_jax.teachers.prompts import with_options

Program = Callable[[Any, Mapping[str, Mapping[str, jax.Array]]], jax.Array]
GRADES = (1, 2, 3, 4, 5, 6)
_FIELDS = {"deita_complexity": ("{question}",), "deita_quality": ("{question}", "{response}")}


def grader_models(cfg: ConfigDict) -> dict[str, str]:
    """{requested signal: path of the model that grades, "" for the student itself}."""
    return {name: str(cfg.score.deita[f"{name.removeprefix('deita_')}_model"]) for name in sorted(set(cfg.score.signals) & set(DEITA))}


def check_prompts(cfg: ConfigDict) -> None:
    """Raises ConfigError unless the prompts of the requested signals hold what they are to grade."""
    for name in grader_models(cfg):
        key = f"{name.removeprefix('deita_')}_prompt"
        for field in _FIELDS[name]:
            if field not in cfg.score.deita[key]:
                raise ConfigError(f"config.score.deita.{key}: {cfg.score.deita[key]!r} has no {field}")


def grader_rows(
    name: str, cfg: ConfigDict, traces: Sequence[Trace], tokenizer: Any, max_positions: int
) -> tuple[list[Row], dict[str, str], list[Dropped], tuple[int, ...]]:
    """What the grader reads for signal `name`.

    Returns:
      rows, each a prompt and one token in the place of its answer, with the id of a trace; {trace id: id of the row graded for it};
      traces without one; the token ids of "1".."6".

    Raises ConfigError if the grader's tokenizer does not write a digit as one token of its own after the prompt.
    """
    settings, what = cfg.score.deita, name.removeprefix("deita_")
    template = settings[f"{what}_prompt"]
    digits = digit_tokens(tokenizer, template, chat=settings.chat)
    ordered = sorted(traces, key=lambda t: t.id)
    forward: dict[str, str] = {}
    made: dict[str, Row] = {}
    long: dict[str, Dropped] = {}
    for trace in ordered:
        if trace.part != "forward":
            continue
        forward.setdefault(trace.group_id, trace.id)
        ids = _encode(tokenizer, fill(template, with_options(trace.question, trace.choices), trace.target), chat=settings.chat)
        if len(ids) + 1 > max_positions:
            detail = f"{name}: a prompt of {len(ids)} tokens, the grader has {max_positions} positions"
            long[trace.id] = Dropped(trace.id, "exceeds_positions", detail)
        else:
            made[trace.id] = Row(trace.id, np.asarray([*ids, digits[0]], np.int32), len(ids))
    uses, dropped = {}, []
    for trace in ordered:
        source = trace.id if trace.part == "forward" else forward.get(trace.group_id, "")
        if source in made:
            uses[trace.id] = source
        else:
            detail = long[source].detail if source else f"{name}: its group has no forward part in the pool"
            dropped.append(Dropped(trace.id, "exceeds_positions" if source else "no_forward_part", detail))
    return list(made.values()), uses, dropped, digits


def fill(template: str, question: str, response: str) -> str:
    """The template with its fields replaced; braces in a question or a response stay what they are."""
    fields = {"{question}": question, "{response}": response}
    return re.sub(r"\{question\}|\{response\}", lambda match: fields[match[0]], template)


def digit_tokens(tokenizer: Any, template: str, *, chat: bool) -> tuple[int, ...]:
    """Token ids of "1".."6" where an answer to the prompt begins.

    Raises ConfigError if a digit is not one token there, or changes how the prompt is split.
    """
    probe = fill(template, "What is 2 + 3?", "2 + 3 = 5. The answer is 5.")
    before = _encode(tokenizer, probe, chat=chat)
    found = []
    for grade in GRADES:
        ids = _encode(tokenizer, probe, chat=chat, answer=str(grade))
        if ids[: len(before)] != before or len(ids) != len(before) + 1:
            raise ConfigError(
                f"config.score.deita: the grader's tokenizer does not write {str(grade)!r} as one token after the prompt"
                f" {probe[-40:]!r} (chat = {chat}); end the prompt in another way or take another model"
            )
        found.append(ids[-1])
    return tuple(found)


def _encode(tokenizer: Any, text: str, *, chat: bool, answer: str = "") -> list[int]:
    """Ids of a prompt and the beginning of its answer: as a chat, or as plain text after what the tokenizer adds (BOS)."""
    if chat:
        return list(tokenizer(prompt_text(tokenizer, text) + answer, add_special_tokens=False)["input_ids"])
    eos = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    ids = list(tokenizer(text + answer)["input_ids"])
    return ids[:-1] if ids[-1:] == eos else ids  # some tokenizers close a plain text


@functools.lru_cache(maxsize=8)
def make_grader(mc: ModelConfig, digits: tuple[int, ...], compute_dtype: str) -> Program:
    """The jitted function (params, {"conditional": arrays of `view_arrays`}) -> [B, 1] float32: sum_k k softmax(z_digits)_k
    at the last token of the prompt; call it under a mesh."""

    @jax.jit
    def grade(params: Any, arrays: Mapping[str, Mapping[str, jax.Array]]) -> jax.Array:
        x = arrays["conditional"]
        hidden = decoder.forward(params, mc, x["tokens"], x["segment_ids"], x["positions"], compute_dtype=compute_dtype, remat="none")
        z = head.logits(params, mc, head.gather_positions(hidden, x["index"][:, :1]))
        vocabulary = jax.lax.broadcasted_iota(jnp.int32, z.shape, 2)  # by masked sums, which a sharded vocabulary allows
        chosen = jnp.stack([jnp.sum(jnp.where(vocabulary == token, z, 0.0), axis=-1) for token in digits], axis=-1)
        chosen = reshard(chosen[:, 0], activation_spec(len(hidden), None))
        return jnp.sum(jax.nn.softmax(chosen, axis=-1) * jnp.asarray(GRADES, jnp.float32), axis=-1, keepdims=True)

    return grade
