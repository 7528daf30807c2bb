"""One reader per row format: a raw row becomes fields of one or several traces, or says why it cannot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from dccot_jax.records import canonical_json

GOLD_FIELDS = ("gold_answer", "ground_truth", "gold", "label", "answer")  # where foreign files keep the right answer
MARKUP = (  # reasoning tags and what they become; the student learns one kind
    ("<think>", "</think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<reasoning>", "</reasoning>"),
)
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
}
_SURROGATE = re.compile("[\ud800-\udfff]")
_OPTIONS = re.compile(r"\s*answer choices:\s*(?=A:)", re.IGNORECASE)

Fields = dict[str, Any]


class RowError(ValueError):
    """A row that cannot become a trace: a short countable reason and a detail."""

    def __init__(self, reason: str, detail: str = ""):
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


# --- reasoning markup -------------------------------------------------------------------------------------------------


def split_reasoning(text: str) -> tuple[str, str]:
    """(reasoning, rest) of a completion with reasoning tags; ("", text) without.

    The opening tag may be absent, since some chat templates put it into the prompt. A reasoning that is never closed is all
    reasoning and leaves an empty rest.
    """
    for opening, closing in MARKUP:
        before, found, after = text.partition(closing)
        if found:
            return before.removeprefix(opening).replace(opening, "", 1).strip(), after.strip()
        if text.lstrip().startswith(opening):
            return text.lstrip()[len(opening) :].strip(), ""
    return "", text


def join_reasoning(reasoning: str, rest: str) -> str:
    """The target text of a reasoning and what follows it; `split_reasoning` takes it apart again."""
    return f"<think>\n{reasoning}\n</think>\n\n{rest}" if reasoning else rest


# --- readers ----------------------------------------------------------------------------------------------------------


def read_eit(row: Mapping[str, Any]) -> list[Fields]:
    """``{instruction, output}``; ``Q: ... Answer choices: A: x, B: y`` is taken apart into question and options."""
    question, choices = split_options(_text(row, "instruction").strip())
    return [_fields(row, question, *split_reasoning(_text(row, "output").strip()), choices=choices, used=("instruction", "output"))]


def read_alpaca(row: Mapping[str, Any]) -> list[Fields]:
    """``{instruction, input, output}``, optionally ``system`` and an empty ``history``."""
    if row.get("history"):
        raise RowError("several_turns", "history is not empty")
    extra = str(row.get("input") or "").strip()
    question = _text(row, "instruction").strip()
    question = f"{question}\n{extra}" if extra else question
    used = ("instruction", "input", "output", "system", "history")
    return [_fields(row, question, *split_reasoning(_text(row, "output").strip()), system=str(row.get("system") or ""), used=used)]


def read_prompt_completion(row: Mapping[str, Any]) -> list[Fields]:
    """``{prompt, completion}``, each a string or a list of messages."""
    prompt, completion = _present(row, "prompt"), _present(row, "completion")
    if isinstance(prompt, str) and isinstance(completion, str):
        used = ("prompt", "completion")
        return [_fields(row, prompt.strip(), *split_reasoning(completion.strip()), used=used)]
    turns = _as_turns(prompt, "prompt", "user") + _as_turns(completion, "completion", "assistant")
    return [_conversation(row, turns, ("prompt", "completion"))]


def read_messages(row: Mapping[str, Any]) -> list[Fields]:
    """``{messages: [{role, content}]}``; thinking in ``reasoning_content`` (or ``thinking``) or inside the text."""
    return [_conversation(row, _as_turns(_present(row, "messages"), "messages", ""), ("messages",))]


def read_sharegpt(row: Mapping[str, Any]) -> list[Fields]:
    """``{conversations: [{from: human|gpt, value}]}``, optionally ``system``."""
    turns = _as_turns(_present(row, "conversations"), "conversations", "")
    if row.get("system"):
        turns = [{"role": "system", "content": str(row["system"])}, *turns]
    return [_conversation(row, turns, ("conversations", "system"))]


def read_question_answer(row: Mapping[str, Any]) -> list[Fields]:
    """``{question, answer}``: the answer is the whole reply; a bare final answer stands in one of the other gold fields."""
    question, choices = split_options(_text(row, "question").strip())
    used = ("question", "answer")
    fields = _fields(row, question, *split_reasoning(_text(row, "answer").strip()), choices=choices, used=used)
    fields.pop("prompt", None)  # the column `question` is the prompt
    return [fields | {"question": question}]


def read_dccot(row: Mapping[str, Any]) -> list[Fields]:
    """DC-CoT and RevThink records: one row per question with all that was generated from it.

    Gives the forward trace (``vanilla``, or ``reverse`` with its two backward parts in one group), one ``answer`` trace per
    entry of ``answer_aug`` / ``answer_augmentations`` and a ``rephrase`` trace where the rephrased question was answered
    (``rephrased_reasoning``, an addition of ours). Every field dict carries ``join_question``, the question of the record.
    """
    question, choices = split_options(_text(row, "question").strip())
    gold = gold_text(row.get("gold_answer"))
    common: Fields = {
        "join_question": question,
        "join_choices": choices,
        "choices": choices,
        "gold_answer": gold,
        "meta": canonical_json(_index(row)),
    }

    def part(text: Any, **fields: Any) -> Fields:
        reasoning, rest = split_reasoning(str(text).strip())
        return {"question": question, "reasoning": reasoning, "target": join_reasoning(reasoning, rest), **common, **fields}

    found: list[Fields] = []
    backward = bool(row.get("backward_question")) and bool(row.get("backward_reasoning"))
    if row.get("forward_reasoning"):
        forward = {"answer": gold_text(row.get("forward_pred")), "method": "reverse" if backward else "vanilla"}
        found.append(part(row["forward_reasoning"], **forward, **({"group": "reverse"} if backward else {})))
        if backward:
            consistent = row.get("is_consistent")
            shared: Fields = {"method": "reverse", "group": "reverse"}
            if consistent is not None:
                shared["consistent"] = str(consistent).strip().lower() == "true"
                found[-1]["consistent"] = shared["consistent"]
            asked = str(row["backward_question"]).strip()
            found.append(part(asked, part="backward_question", **shared))
            found.append(
                part(row["backward_reasoning"], part="backward_reasoning", **shared)
                | {
                    "question": asked,
                    "choices": (),
                    "gold_answer": gold_text(row.get("backward_pred")),
                    "answer": gold_text(row.get("backward_pred")),
                }
            )
    for index, entry in enumerate(row.get("answer_aug") or row.get("answer_augmentations") or ()):
        if entry.get("reasoning"):
            predicted = gold_text(entry.get("pred", entry.get("extracted_prediction")))
            found.append(part(entry["reasoning"], answer=predicted, method="answer", sample_index=index + 1))
    if row.get("rephrased_question") and row.get("rephrased_reasoning"):
        rephrased = str(row["rephrased_question"]).strip()
        found.append(
            part(row["rephrased_reasoning"], answer=gold_text(row.get("rephrased_pred")), method="rephrase") | {"question": rephrased}
        )
    if not found:
        raise RowError("missing_field", "no forward_reasoning, answer_aug or answered rephrased_question")
    return found


def read_trace(row: Mapping[str, Any]) -> list[Fields]:
    """Rows written from `records.Trace`, every field as it is."""
    for name in ("question", "target"):
        _text(row, name)
    fields = {key: value for key, value in row.items() if value is not None}
    if "gold_answer" in fields:
        fields["gold_answer"] = gold_text(fields["gold_answer"])
    return [fields | {"choices": tuple(row.get("choices") or ()), "parent_ids": tuple(row.get("parent_ids") or ())}]


READERS: dict[str, Callable[[Mapping[str, Any]], list[Fields]]] = {
    "trace": read_trace,
    "dccot": read_dccot,
    "prompt_completion": read_prompt_completion,
    "messages": read_messages,
    "sharegpt": read_sharegpt,
    "alpaca": read_alpaca,
    "eit": read_eit,
    "question_answer": read_question_answer,
}

# Beside one of these a column `answer` is no reply, and which one is the reply is not for us to guess.
_OTHER_REPLIES = ("response", "output", "completion", "solution", "rationale", "reasoning", "explanation", "cot", "generation")
_DCCOT_MARKS = ("forward_reasoning", "backward_question", "answer_aug", "answer_augmentations", "rephrased_question")


def detect(row: Mapping[str, Any]) -> str | None:
    """Name of the format a row is in, from its field names; None when it is none of them."""
    if all(name in row for name in ("question", "target", "teacher", "method")):
        return "trace"
    if "question" in row and any(name in row for name in _DCCOT_MARKS):
        return "dccot"
    if "prompt" in row and "completion" in row:
        return "prompt_completion"
    if "messages" in row:
        return "messages"
    if "conversations" in row:
        return "sharegpt"
    if "instruction" in row and "output" in row:
        return "alpaca" if "input" in row or "history" in row or "system" in row else "eit"
    if "question" in row and isinstance(row.get("answer"), str) and not any(name in row for name in _OTHER_REPLIES):
        return "question_answer"
    return None


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """(stem, options) of ``Q: stem Answer choices: A: x, B: y`` or ``stem (A) x (B) y``; (text, ()) when there is no such list."""
    parts = _OPTIONS.split(text, maxsplit=1)
    if len(parts) == 2:
        options = _lettered(parts[1], "{}:", ", {}:")
        if options:
            return re.sub(r"^Q:\s*", "", parts[0]).strip(), options
    stem, found, rest = text.partition("(A) ")
    if found and stem.strip():
        options = _lettered("(A) " + rest, "({}) ", "({}) ")
        if options:
            return stem.strip(), options
    return text, ()


def _lettered(text: str, first: str, further: str) -> tuple[str, ...]:
    """Options marked A, B, C, ... in order; () for fewer than two."""
    options, rest = [], text.strip().removeprefix(first.format("A"))
    for letter in "BCDEFGHIJ":
        option, found, after = rest.partition(further.format(letter))
        if not found:
            break
        options.append(option.strip())
        rest = after
    options.append(rest.strip())
    return tuple(options) if len(options) > 1 else ()


def check_unicode(value: Any, name: str = "") -> None:
    r"""Raises RowError ``not_unicode`` where a text, at any depth, holds half of a surrogate pair.

    JSON can write one (``\ud800``), UTF-8 cannot: no hash, table or file could take the row.
    """
    if isinstance(value, str):
        if not value.isascii() and (found := _SURROGATE.search(value)):
            raise RowError("not_unicode", f"{name}: lone surrogate \\u{ord(found[0]):04x} at character {found.start() + 1}")
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            check_unicode(key, "a field's name")
            check_unicode(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, (list, tuple)):
        for inner in value:
            check_unicode(inner, name)


# --- pieces -----------------------------------------------------------------------------------------------------------


def _present(row: Mapping[str, Any], name: str) -> Any:
    value = row.get(name)
    if value is None or value in ("", []):
        raise RowError("missing_field", name)
    return value


def _text(row: Mapping[str, Any], name: str) -> str:
    value = _present(row, name)
    if not isinstance(value, str):
        raise RowError("not_text", f"{name} is a {type(value).__name__}")
    if not value.strip():
        raise RowError("missing_field", f"{name} is blank")
    return value


def _as_turns(value: Any, name: str, role: str) -> list[dict[str, Any]]:
    """Chat turns as ``{role, content, reasoning}``; a bare string is one turn of `role`."""
    if isinstance(value, str) and role:
        return [{"role": role, "content": value}]
    if not isinstance(value, (list, tuple)) or not all(isinstance(turn, Mapping) for turn in value):
        raise RowError("not_messages", f"{name} is no list of messages")
    turns = []
    for turn in value:
        said = str(turn.get("role", turn.get("from", "")))
        if said not in _ROLES:
            raise RowError("unknown_role", f"{name}: {said!r}")
        content = turn.get("content", turn.get("value"))
        thought = turn.get("reasoning_content") or turn.get("thinking") or turn.get("reasoning") or ""
        turns.append({"role": _ROLES[said], "content": _content(content, name), "reasoning": str(thought)})
    return turns


def _content(content: Any, name: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, (list, tuple)) and all(isinstance(piece, Mapping) and piece.get("type") == "text" for piece in content):
        return "".join(str(piece.get("text", "")) for piece in content)
    raise RowError("not_text", f"{name}: content is not text")


def _conversation(row: Mapping[str, Any], turns: list[dict[str, Any]], used: tuple[str, ...]) -> Fields:
    system = "\n".join(turn["content"].strip() for turn in turns if turn["role"] == "system")
    talk = [turn for turn in turns if turn["role"] != "system"]
    roles = [turn["role"] for turn in talk]
    if roles != ["user", "assistant"]:
        if "user" not in roles or "assistant" not in roles:
            raise RowError("missing_field", "needs a user turn and an assistant turn")
        raise RowError("several_turns", f"{len(roles)} turns; one question and one reply are supported")
    inside, rest = split_reasoning(talk[1]["content"].strip())
    return _fields(row, talk[0]["content"].strip(), talk[1].get("reasoning", "").strip() or inside, rest, system=system, used=used)


def _fields(
    row: Mapping[str, Any],
    prompt: str,
    reasoning: str,
    rest: str,
    *,
    choices: tuple[str, ...] = (),
    system: str = "",
    used: tuple[str, ...],
) -> Fields:
    """Trace fields of one question and reply. A ``question`` column wins over the prompt, which then is kept as it is."""
    if not prompt:
        raise RowError("missing_field", "the question is blank")
    target = join_reasoning(reasoning, rest)
    if not target:
        raise RowError("missing_field", "the reply is blank")
    question = str(row.get("question") or "").strip() or prompt
    fields: Fields = {"question": question, "choices": _options_column(row) or choices, "reasoning": reasoning, "target": target}
    shown = f"{system.strip()}\n\n{prompt}" if system.strip() else prompt
    if shown != question:
        fields["prompt"] = shown
    for name in GOLD_FIELDS:
        if row.get(name) is not None and name not in used:
            fields["gold_answer"] = gold_text(row[name])
            used = (*used, name)
            break
    for name in ("task", "teacher", "style", "level", "finish_reason"):
        if isinstance(row.get(name), str):
            fields[name] = row[name]
    rest_of_row = {key: value for key, value in row.items() if key not in used and key not in fields and value is not None}
    fields["meta"] = canonical_json({"row": _as_json(rest_of_row)}) if rest_of_row else "{}"
    return fields


def _as_json(columns: Mapping[str, Any]) -> Any:
    """Columns as JSON holds them: dates, bytes and decimals (parquet has them) as text, NaN and infinities as null."""
    return json.loads(json.dumps(dict(columns), default=str), parse_constant=lambda text: None)


def gold_text(value: Any) -> str | None:
    """An answer as text; whole floats lose their ``.0``, booleans become yes / no."""
    if value is None:
        return None
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip() or None


def _options_column(row: Mapping[str, Any]) -> tuple[str, ...]:
    choices = row.get("choices")
    return tuple(str(choice) for choice in choices) if isinstance(choices, (list, tuple)) else ()


def _index(row: Mapping[str, Any]) -> dict[str, Any]:
    return {"row": {"_original_index": row["_original_index"]}} if row.get("_original_index") is not None else {}
