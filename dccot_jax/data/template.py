"""Prompt and target to token ids through the tokenizer's own chat template, with the boundary between them checked.

Layout of a row: ``[prompt ... generation prompt][target ... end of turn]``; the loss covers the second part. What the
template writes after the end-of-turn token (SmolLM2: a newline) is cut, since generation stops before it. Training,
scoring and evaluation all render through here, so the student is asked exactly as it was trained.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from dccot_jax.records import InputError

# Faults of the template itself: every row would be wrong, so training is refused. The others concern one row.
FATAL = frozenset({"no_template", "broken_template", "target_changed", "no_end_of_turn"})


class TemplateError(InputError):
    """A row, or a tokenizer, that cannot be rendered faithfully.

    Attributes:
      reason: ``no_template``, ``broken_template`` (it does not render), ``target_changed`` (the template drops or rewrites part of
        the target, e.g. its reasoning), ``no_end_of_turn``, ``prompt_not_prefix``, ``end_of_turn_in_text``, ``not_representable``
        or ``empty_target``.
    """

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason

    @property
    def fatal(self) -> bool:
        """True if the template is at fault and not the row."""
        return self.reason in FATAL


@dataclasses.dataclass(frozen=True)
class Rendered:
    """One row: ``input_ids[:prompt_tokens]`` carries no loss, the rest (ending in the end-of-turn token) does."""

    input_ids: tuple[int, ...]
    prompt_tokens: int
    text: str

    @property
    def completion_tokens(self) -> int:
        return len(self.input_ids) - self.prompt_tokens


@dataclasses.dataclass(frozen=True)
class TurnEnd:
    """How a template closes turns.

    Attributes:
      id: the token that closes an assistant turn. stop_ids: every token that generation stops at, that one first.
      in_prompt: how many of them the template itself writes into a prompt (after the user's turn, a system prompt, ...).
    """

    id: int
    stop_ids: tuple[int, ...]
    in_prompt: int


def prompt_text(tokenizer: Any, prompt: str) -> str:
    """The conversation up to where the student starts writing. Raises TemplateError if there is no chat template, or a broken one."""
    return _applied(tokenizer, [{"role": "user", "content": prompt}], add_generation_prompt=True)


def render_prompt(tokenizer: Any, prompt: str) -> list[int]:
    """Token ids of a prompt, ready for generation; equal to the prompt part of a training row."""
    return _encode(tokenizer, [prompt_text(tokenizer, prompt)])[0]


def stop_ids(tokenizer: Any, model_eos: Sequence[int] = ()) -> list[int]:
    """Ids that end generation: the template's end-of-turn token first, then the tokenizer's eos and the model's, where they are others."""
    return list(dict.fromkeys((*turn_end(tokenizer).stop_ids, *model_eos)))


def reply_text(tokenizer: Any, tokens: Sequence[int], stop_ids: Sequence[int]) -> str:
    """A reply's text, without the token that ended it (a model's eos need not be a special token of its tokenizer)."""
    body = tokens[:-1] if tokens and tokens[-1] in stop_ids else tokens
    return tokenizer.decode(list(body), skip_special_tokens=True)


def turn_end(tokenizer: Any) -> TurnEnd:
    """How this tokenizer's template closes an assistant turn. Raises TemplateError if it does not."""
    _need_template(tokenizer)
    return _turn_end(tokenizer, str(tokenizer.chat_template))


def render(tokenizer: Any, prompt: str, target: str) -> Rendered:
    """Render one training row. Raises TemplateError; see `render_many`."""
    [row] = render_many(tokenizer, [(prompt, target)])
    if isinstance(row, TemplateError):
        raise row
    return row


def check_template(tokenizer: Any) -> None:
    """Render a plain example, so that a tokenizer without a usable template is refused before any row is read.

    Raises TemplateError. Whether reasoning survives depends on how rows mark it, so `render_many` checks that row by row.
    """
    render(tokenizer, "What is 2 + 3?", "2 + 3 = 5\nThe answer is 5.")


def render_many(tokenizer: Any, rows: Sequence[tuple[str, str]]) -> list[Rendered | TemplateError]:
    """Render (prompt, target) rows; an unusable row comes back as its TemplateError.

    White space around a target is dropped first (it would merge with the template's own). Checks, per row: the target's
    text is whole in the template's output and in the decoded completion (up to white space, which some templates
    normalise); the prompt's ids are a prefix of the row's ids; the end-of-turn token closes the completion and does
    not occur before.
    """
    end = turn_end(tokenizer)
    prompts: dict[str, str] = {}
    for prompt, _ in rows:
        if prompt not in prompts:
            prompts[prompt] = prompt_text(tokenizer, prompt)
    targets = [target.strip() for _, target in rows]
    texts = [_conversation(tokenizer, prompt, target) for (prompt, _), target in zip(rows, targets)]
    prompt_ids = dict(zip(prompts, _encode(tokenizer, list(prompts.values()))))
    found: list[Rendered | TemplateError] = []
    for (prompt, _), target, text, ids in zip(rows, targets, texts, _encode(tokenizer, texts)):
        try:
            found.append(_checked(tokenizer, end, prompts[prompt], prompt_ids[prompt], target, text, ids))
        except TemplateError as error:
            found.append(error)
    return found


def _checked(tokenizer: Any, end: TurnEnd, before: str, prompt_ids: list[int], target: str, text: str, ids: list[int]) -> Rendered:
    if not target:
        raise TemplateError("empty_target", "the target is empty")
    if not text.startswith(before):
        raise TemplateError("prompt_not_prefix", "the generation prompt is not a prefix of the full conversation's text")
    if _squash(target) not in _squash(text[len(before) :]):
        raise TemplateError(
            "target_changed",
            f"the chat template drops or rewrites part of the target (does it remove reasoning?): {_short(target)!r} became "
            f"{_short(text[len(before) :])!r}; give the student a template that keeps the whole assistant turn",
        )
    start = len(prompt_ids)
    if ids[:start] != prompt_ids:
        raise TemplateError(
            "prompt_not_prefix", "the prompt's tokens are not a prefix of the row's tokens: prompt and target merge at the border"
        )
    body = ids[start:]
    stops = [place for place, token in enumerate(body) if token in end.stop_ids]
    if not stops:
        raise TemplateError(
            "no_end_of_turn", "the chat template writes no end-of-turn token after the target; the student could not learn to stop"
        )
    completion = body[: stops[0] + 1]
    decoded = tokenizer.decode(completion[:-1], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    if _squash(target) not in _squash(decoded):
        if _squash(target) in _squash(tokenizer.decode(body, skip_special_tokens=False, clean_up_tokenization_spaces=False)):
            raise TemplateError("end_of_turn_in_text", "the target's text contains an end-of-turn token")
        raise TemplateError("not_representable", "decoding the target's tokens does not give its text back")
    if sum(token in end.stop_ids for token in prompt_ids) != end.in_prompt:
        raise TemplateError("end_of_turn_in_text", "the prompt's text contains an end-of-turn token")
    return Rendered(tuple(ids[: start + len(completion)]), start, text)


@functools.lru_cache(maxsize=8)
def _turn_end(tokenizer: Any, template: str) -> TurnEnd:
    del template  # part of the cache key: a tokenizer's template can be replaced
    probe = "zq"
    text = _conversation(tokenizer, "hi", probe)
    tail = text[text.rfind(probe) + len(probe) :] if probe in text else ""
    eos = tokenizer.eos_token_id
    special = set(tokenizer.all_special_ids) | {token for token, entry in tokenizer.added_tokens_decoder.items() if entry.special}
    closing = [token for token in _encode(tokenizer, [tail])[0] if token in special] if tail else []
    if not closing:
        raise TemplateError(
            "no_end_of_turn",
            f"the chat template writes no end-of-turn token after an assistant turn (but {tail!r}); the student could not learn to stop",
        )
    stops = tuple(dict.fromkeys([closing[0]] + ([eos] if eos is not None else [])))
    return TurnEnd(closing[0], stops, sum(token in stops for token in render_prompt(tokenizer, "hi")))


def _conversation(tokenizer: Any, prompt: str, target: str) -> str:
    return _applied(tokenizer, [{"role": "user", "content": prompt}, {"role": "assistant", "content": target}], add_generation_prompt=False)


def _applied(tokenizer: Any, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
    _need_template(tokenizer)
    from jinja2 import TemplateError as JinjaError

    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except (JinjaError, TypeError) as error:
        line = f" (line {vars(error)['lineno']})" if vars(error).get("lineno") else ""
        said = " ".join(str(error).split())
        raise TemplateError("broken_template", f"the chat template of {_name(tokenizer)} does not render{line}: {said}") from error


def _name(tokenizer: Any) -> str:
    return f"the tokenizer at {getattr(tokenizer, 'name_or_path', '') or '(unnamed)'}"


def _encode(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    # The template writes every special token itself, so the tokenizer must add none.
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"] if texts else []


def _need_template(tokenizer: Any) -> None:
    if not getattr(tokenizer, "chat_template", None):
        raise TemplateError(
            "no_template",
            f"{_name(tokenizer)} has no chat template; "
            "add 'chat_template' to its tokenizer_config.json or use an instruction-tuned student",
        )


def _squash(text: str) -> str:
    return "".join(text.split())


def _short(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 :]}"
