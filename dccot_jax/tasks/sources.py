"""Reading task rows: local JSON files of several layouts, hub data sets, and options written inside a question's text."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dccot_jax.tasks.base import TaskDataError

_OPTIONS = re.compile(r"\s*(?:answer\s+choices|options|choices)\s*:\s*", re.I)
_QUESTION_MARK = re.compile(r"^\s*Q(?:uestion)?\s*:\s*", re.I)
_ITEM_MARK = r"(?:\((?P<a>{0})\)|(?P<b>{0})\s*[:.)])\s*"


def read_rows(data_dir: Path, name: str, *, task: str) -> list[dict[str, Any]]:
    """Rows of one file: a JSON list, JSON lines, or an object with ``examples``; gzip if the name ends in .gz.

    Raises:
      TaskDataError: the file is missing, or a line is not a JSON object (names file and line).
    """
    path = Path(data_dir) / name
    try:
        text = (gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()).decode("utf-8")
    except FileNotFoundError:
        raise TaskDataError(f"task {task}: file {name} is missing under {data_dir}") from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TaskDataError(f"task {task}: {path}: cannot be read ({error})") from None
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        return _json_lines(text, path, task)
    rows = value.get("examples", [value]) if isinstance(value, dict) else value
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise TaskDataError(f"task {task}: {path}: expected a list of objects")
    return rows


def hub_rows(hub: str, split: str, *, task: str) -> list[dict[str, Any]]:
    """Rows of one split of a hub data set ``owner/name`` or ``owner/name:config``, through `datasets`.

    Repositories that still hold a loading script are read from their converted parquet branch.

    Raises:
      TaskDataError: the data set cannot be had (no network, no such id); names the hub id.
    """
    import datasets

    path, _, config = hub.partition(":")
    arguments = (path, config) if config else (path,)
    try:
        try:
            data = datasets.load_dataset(*arguments, split=split)
        except RuntimeError as error:
            if "script" not in str(error):
                raise
            data = datasets.load_dataset(*arguments, split=split, revision="refs/convert/parquet")
    except Exception as error:  # datasets raises many types for "cannot be had"; all are the same to us and the cause is kept
        reason = str(error).strip().splitlines()
        raise TaskDataError(
            f"task {task}: hub data set {hub} (split {split}) cannot be loaded: {reason[0] if reason else type(error).__name__}"
        ) from error
    return [dict(row) for row in data]  # type: ignore[arg-type]


def split_options(text: str) -> tuple[str, tuple[str, ...]]:
    """Question and options of a text that holds both; options are () if there are none.

    Understands "Answer choices: A: x, B: y", "Answer Choices:\\nA. x\\nB. y", "Options:\\n(A) x\\n(B) y" and "... (A) x (B) y".
    A leading "Q:" is dropped, so that the same question from differently laid out files gets the same text.
    """
    stripped = _QUESTION_MARK.sub("", text).strip()
    heads = list(_OPTIONS.finditer(stripped))
    if heads:
        options = _lettered(stripped[heads[-1].end() :])
        if options:
            return stripped[: heads[-1].start()].strip(), options
    inline = re.search(r"\(A\)\s", stripped)
    if inline and inline.start() > 0:
        options = _lettered(stripped[inline.start() :])
        if len(options) >= 2:
            return stripped[: inline.start()].strip(), options
    return stripped, ()


def letter_of(answer: str, choices: Sequence[str], *, task: str, where: str) -> str:
    """Letter of the option whose text is `answer`. Raises TaskDataError if there is none or more than one."""
    hits = [index for index, choice in enumerate(choices) if choice.strip() == answer.strip()]
    hits = hits or [index for index, choice in enumerate(choices) if choice.strip().casefold() == answer.strip().casefold()]
    if len(hits) != 1:
        raise TaskDataError(f"task {task}: {where}: answer {answer!r} is {len(hits)} of the options {list(choices)}")
    return chr(ord("A") + hits[0])


def number_text(value: float | int | str) -> str:
    """A number as text without a needless ".0"."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value).strip()


def _json_lines(text: str, path: Path, task: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise TaskDataError(f"task {task}: {path}:{number}: not JSON ({error.msg})") from None
        if not isinstance(row, dict):
            raise TaskDataError(f"task {task}: {path}:{number}: expected an object")
        rows.append(row)
    return rows


def _lettered(text: str) -> tuple[str, ...]:
    """Options after "(A) ", "A: " or "A. ", letters in order; () if the text does not start with option A."""
    options: list[str] = []
    mark = re.match(_ITEM_MARK.format("A"), text)
    if mark is None:
        return ()
    marks = [r"\({}\)\s*"] if mark["a"] else [r"(?<=\n){}\s*[:.)]\s*", r"(?<=,\s){}\s*[:.)]\s*", r"(?<=\s){}\s*[:.)]\s*"]
    style = next((pattern for pattern in marks if re.search(pattern.format("B"), text)), marks[0])
    position = mark.end()
    for code in range(ord("B"), ord("K") + 1):
        following = re.search(style.format(chr(code)), text[position:])
        if following is None:
            break
        options.append(_trim(text[position : position + following.start()]))
        position += following.end()
    options.append(_trim(text[position:], last=True))
    return tuple(options)


def _trim(option: str, *, last: bool = False) -> str:
    option = option.strip()
    return option if last else option.rstrip(",").strip()
