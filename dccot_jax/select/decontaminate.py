"""Decontamination: which training rows hold questions of evaluation sets, whole or in parts.

Every text of a row is looked at: its question, its own prompt if it has one, and what the student learns to write; augmented
rows like all others. Two findings:

  exact    the text equals a test question up to case, spacing, punctuation of prose and LaTeX layout (signs of mathematics
           count, see `questions`), or contains one of at least `MIN_WORDS` words. Such a row is dropped, with its group and
           with what was made from it.
  n-grams  runs of n words that also stand in a test question. They are reported with the spans: short word problems share
           n-grams innocently, so dropping by them is a threshold that the user sets.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from dccot_jax.questions import question_words
from dccot_jax.records import Dropped, Trace, normalise_question
from dccot_jax.tasks.registry import all_tasks, data_at_hand, load_items

MIN_WORDS = 8
MAX_SPANS = 5
_LAYOUT = re.compile(r"\\(?:left|right|displaystyle|textstyle|text|mathrm|mathbf|quad|qquad)(?![a-zA-Z])|\\[,;:! ]")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no word's hash is lost in the products

OVERLAP_SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("part", pa.string(), nullable=False),  # question | prompt (its own, where it has one) | trace
        pa.field("task", pa.string(), nullable=False),  # evaluation task
        pa.field("n", pa.int32(), nullable=False),
        pa.field("item", pa.string(), nullable=False),  # the test item that shares most
        pa.field("share", pa.float32(), nullable=False),  # of that item's n-grams
        pa.field("ngrams", pa.int32(), nullable=False),  # of the text that stand in any question of the task
        pa.field("spans", pa.list_(pa.string()), nullable=False),  # the longest shared runs of words
    ],
    metadata={b"dccot_schema": b"overlap/1"},
)


@dataclasses.dataclass(frozen=True)
class Question:
    """One test question: its task, its item's id, its words alone (n-grams), its words with the signs between them (exact overlap)."""

    task: str
    item: str
    words: tuple[str, ...]
    signed: tuple[str, ...] = ()

    @classmethod
    def of(cls, task: str, item: str, text: str) -> Question:
        return cls(task, item, words(text), signed_words(text))


@dataclasses.dataclass(frozen=True)
class Match:
    """What one text shares with one task: the item that shares most, the share of its n-grams, matched n-grams, spans of words."""

    task: str
    item: str
    share: float
    ngrams: int
    spans: tuple[str, ...]
    items: frozenset[str]


def guarded_tasks(evaluated: Sequence[str], data_dir: Path | None, *, registered: bool) -> list[str]:
    """Evaluation sets to keep training data out of: the run's own first, then with `registered` every other whose rows are at hand."""
    others = [task.name for task in all_tasks() if "test" in task.splits and data_at_hand(task, data_dir)] if registered else []
    return list(dict.fromkeys([*evaluated, *others]))


def evaluation_questions(tasks: Iterable[str], data_dir: Path | None) -> list[Question]:
    """The questions of the whole test split of every task, whatever share is evaluated."""
    return [Question.of(name, item.id, item.question) for name in tasks for item in load_items(name, "test", data_dir)]


def words(text: str) -> tuple[str, ...]:
    """Normalised words of a text, LaTeX layout commands left out and fractions written one way."""
    return tuple(normalise_question(_without_layout(text)).split())


def signed_words(text: str) -> tuple[str, ...]:
    """The same with operators, brackets and decimal points (`questions.question_words`)."""
    return question_words(_without_layout(text))


def _without_layout(text: str) -> str:
    return _FRACTION.sub(r"\\frac", _LAYOUT.sub(" ", text)) if "\\" in text else text


# --- exact overlap ---------------------------------------------------------------------------------------------------------


class ExactIndex:
    """Finds whole test questions in texts."""

    def __init__(self, tests: Iterable[Question]):
        self._whole: dict[tuple[str, ...], Question] = {}
        self._starts: dict[tuple[str, ...], list[Question]] = defaultdict(list)
        for test in tests:
            if test.signed and test.signed not in self._whole:
                self._whole[test.signed] = test
                if len(test.words) >= MIN_WORDS:
                    self._starts[test.signed[:MIN_WORDS]].append(test)
        self._lengths = sorted({len(start) for start in self._starts})  # shorter ones where decimals join words

    def find(self, text: Sequence[str]) -> Question | None:
        """The test question that the words (`signed_words`) are, or contain; of several the first in the text."""
        found = self._whole.get(tuple(text))
        if found is not None:
            return found
        for start in range(len(text)):
            for length in self._lengths:
                for test in self._starts.get(tuple(text[start : start + length]), ()):
                    if tuple(text[start : start + len(test.signed)]) == test.signed:
                        return test
        return None


def drop_leaked(traces: Sequence[Trace], index: ExactIndex) -> tuple[list[Trace], list[Dropped]]:
    """Traces without exact overlap, and the others with reason ``leak:<task>``: groups whole, and all that was made from one."""
    reasons: dict[str, tuple[str, str]] = {}  # group -> (reason, what caused it)
    leaked: dict[str, str] = {}  # trace id -> evaluation task
    find = functools.lru_cache(maxsize=1 << 16)(lambda text: index.find(signed_words(text)))  # many traces ask one question
    for trace in traces:
        test = next((test for text in (trace.question, trace.prompt, trace.target) if text and (test := find(text))), None)
        if test is not None:
            reasons.setdefault(trace.group_id, (f"leak:{test.task}", trace.question[:120]))
            leaked[trace.id] = test.task
            if trace.method == "reverse":  # its parent asked the same and left the table when the group was made
                leaked |= dict.fromkeys(trace.parent_ids, test.task)
    # Rows made from a leaked one ask the test question in other words. Chains of parents are short; repeat until nothing is added.
    grown = True
    while grown:
        grown = False
        for trace in traces:
            source = next((parent for parent in trace.parent_ids if parent in leaked), None)
            if source is not None and trace.id not in leaked:
                leaked[trace.id], grown = leaked[source], True
                reasons.setdefault(trace.group_id, (f"leak:{leaked[source]}", f"derived from {source}"))
    return _without(traces, reasons)


# --- n-gram overlap --------------------------------------------------------------------------------------------------------


class NgramIndex:
    """Finds runs of `n` words that stand in test questions. Memory: 16 bytes per n-gram of the tests."""

    def __init__(self, tests: Sequence[Question], n: int):
        self.n, self.tests = n, [test for test in tests if len(test.words) >= n]
        found = [np.unique(ngram_hashes(test.words, n)) for test in self.tests]
        self.sizes = np.array([len(hashes) for hashes in found], np.int64)
        flat = np.concatenate(found) if found else np.zeros(0, np.uint64)
        order = np.argsort(flat, kind="stable")
        self.hashes = flat[order]
        self.owners = np.repeat(np.arange(len(found)), self.sizes)[order]

    def match(self, text: Sequence[str]) -> list[Match]:
        """One Match per task that shares an n-gram with the words, in the order of the tests."""
        hashes = ngram_hashes(text, self.n)
        first, last = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        hits = np.flatnonzero(last > first)
        if not len(hits):
            return []
        counts = (last - first)[hits]
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        owners = self.owners[np.repeat(first[hits], counts) + offsets]
        places = np.repeat(hits, counts)
        by_task: dict[str, list[int]] = defaultdict(list)
        for entry, owner in enumerate(owners.tolist()):
            by_task[self.tests[owner].task].append(entry)
        return [self._of_task(text, task, owners[entries], places[entries], hashes) for task, entries in by_task.items()]

    def _of_task(self, text: Sequence[str], task: str, owners: np.ndarray, places: np.ndarray, hashes: np.ndarray) -> Match:
        pairs = np.unique(np.stack([owners.astype(np.uint64), hashes[places]]), axis=1)  # an n-gram counts once per item
        own, shared = np.unique(pairs[0].astype(np.int64), return_counts=True)
        shares = shared / self.sizes[own]
        best = int(own[np.argmax(shares)])  # ties: the first test
        positions = np.unique(places)
        items = frozenset(self.tests[i].item for i in own.tolist())
        return Match(task, self.tests[best].item, float(shares.max()), len(positions), spans(text, positions, self.n), items)


def ngram_hashes(text: Sequence[str], n: int) -> np.ndarray:
    """64-bit hashes of every run of n words, [max(0, W - n + 1)]: a polynomial of the words' own hashes."""
    values = np.array([_word_hash(word) for word in text], np.uint64)
    found = np.zeros(max(0, len(values) - n + 1), np.uint64)
    for k in range(n if len(found) else 0):
        found = found * _BASE + values[k : k + len(found)]
    return found


def spans(text: Sequence[str], positions: np.ndarray, n: int) -> tuple[str, ...]:
    """The runs of words that n-grams at `positions` cover, neighbours merged; the `MAX_SPANS` longest, longest first."""
    found: list[list[int]] = []
    for start in positions.tolist():
        if found and start <= found[-1][1]:
            found[-1][1] = start + n
        else:
            found.append([start, start + n])
    longest = sorted(found, key=lambda span: (span[0] - span[1], span[0]))[:MAX_SPANS]
    return tuple(" ".join(text[start:end]) for start, end in longest)


def overlaps(traces: Sequence[Trace], tests: Sequence[Question], sizes: Sequence[int]) -> tuple[pa.Table, dict[str, Any]]:
    """n-gram overlap of every row with every task.

    Returns:
      the table (`OVERLAP_SCHEMA`: one row per trace, part, task and n that share anything, sorted) and figures per task:
      {task: {"items": test items, n: {"short": items of fewer than n words, "rows": traces that share an n-gram,
      "items": test items that are shared with, "rows_half": traces that hold at least half of an item's n-grams}}}.
    """
    columns: dict[str, list[Any]] = {name: [] for name in OVERLAP_SCHEMA.names}
    figures: dict[str, dict[str, Any]] = {}
    for test in tests:
        figures.setdefault(test.task, {"items": 0})["items"] += 1
    for n in sizes:
        index = NgramIndex(tests, n)
        match = functools.lru_cache(maxsize=1 << 14)(lambda text, index=index: index.match(words(text)))
        rows: dict[str, set[str]] = defaultdict(set)
        half: dict[str, set[str]] = defaultdict(set)
        items: dict[str, set[str]] = defaultdict(set)
        for trace in traces:
            for part, text in (("question", trace.question), ("prompt", trace.prompt), ("trace", trace.target)):
                for found in match(text) if text else ():
                    values = (trace.id, part, found.task, n, found.item, found.share, found.ngrams, list(found.spans))
                    for name, value in zip(columns, values):
                        columns[name].append(value)
                    rows[found.task].add(trace.id)
                    items[found.task] |= found.items
                    if found.share >= 0.5:
                        half[found.task].add(trace.id)
        for task, entry in figures.items():
            short = sum(test.task == task and len(test.words) < n for test in tests)
            entry[str(n)] = {"short": short, "rows": len(rows[task]), "items": len(items[task]), "rows_half": len(half[task])}
    table = pa.table(columns, schema=OVERLAP_SCHEMA)
    return table.sort_by([(name, "ascending") for name in ("id", "part", "task", "n")]), figures


def drop_overlapping(traces: Sequence[Trace], table: pa.Table, n: int, share: float) -> tuple[list[Trace], list[Dropped]]:
    """Groups of which no row holds at least `share` of a test item's `n`-grams, and the others: ``overlap_<n>:<task>``."""
    worst: dict[str, Mapping[str, Any]] = {}
    for row in table.to_pylist():
        if row["n"] == n and row["share"] >= share and row["share"] > worst.get(row["id"], {"share": -1.0})["share"]:
            worst[row["id"]] = row
    reasons: dict[str, tuple[str, str]] = {}
    for trace in traces:
        if trace.id in worst:
            row = worst[trace.id]
            detail = f"{row['share']:.0%} of the {n}-grams of test item {row['item']} in its {row['part']}: {row['spans'][0][:120]}"
            reasons.setdefault(trace.group_id, (f"overlap_{n}:{row['task']}", detail))
    return _without(traces, reasons)


def _without(traces: Sequence[Trace], reasons: Mapping[str, tuple[str, str]]) -> tuple[list[Trace], list[Dropped]]:
    kept = [trace for trace in traces if trace.group_id not in reasons]
    return kept, [Dropped(trace.id, *reasons[trace.group_id]) for trace in traces if trace.group_id in reasons]


@functools.lru_cache(maxsize=1 << 18)
def _word_hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
