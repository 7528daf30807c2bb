"""Scripted teachers: they read a request's text, recognise a family's question in it, and write a real answer.

A teacher knows nothing but the request. It parses the question with the family's own parser, solves it, and writes a
rationale that ends in "The answer is X.". What it cannot read is an error response, which callers count.

Styles: ``verbose`` (says what happens, then the equation), ``concise`` (equations only), ``noisy`` (verbose, with the
systematic misreading of `noise.py`), ``answer_only`` (no rationale).

Requests. A user message with a line ``Task: ...`` is an augmenter's request; its blocks, each starting with a tag at the
beginning of a line, come after that line, with any instruction text between:

  Task: rephrase            Question:                          -> Rephrased question: ...
  Task: new question        Question:                          -> New question: ...
  Task: backward question   Question:, Answer:                 -> Backward question: ...
  Task: consistency         Question 1:, Answer 1:, Question 2:, Answer 2:   -> reasoning, last line True or False
  Task: judge               Question:, Response:               -> a JSON verdict (`judging.py`)
  Task: complexity and quality   the same                      -> the same

Options shown with a question, as ``(A) ball (B) cup``, are repeated after a new or a backward question.

Anything else is a question to solve, forward or backward. Augmenters' requests are answered correctly in every style;
only solving a forward question in style ``noisy`` goes wrong, and judging one by an answer that was found so.

Sampling. ``sample_index`` 0, or temperature 0, gives the teacher's own style. With temperature above 0 the samples 1, 2,
3, ... walk through the other answer paths (grouped, narrated, chained), starting where ``seed`` says.

Tokens are metered as words separated by white space.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import Any

from dccot_jax.records import Request, Response, content_hash, derive_seed
from dccot_jax.tasks.synthetic import judging
from dccot_jax.tasks.synthetic.arithmetic import ARITHMETIC
from dccot_jax.tasks.synthetic.calendar import CALENDAR
from dccot_jax.tasks.synthetic.family import PATHS, Family, options, skeleton_split
from dccot_jax.tasks.synthetic.noise import is_misread
from dccot_jax.tasks.synthetic.objects import OBJECTS

FAMILIES: tuple[Family[Any, Any], ...] = (ARITHMETIC, OBJECTS, CALENDAR)
STYLES = ("verbose", "concise", "noisy", "answer_only")
VERSION = 1  # raise when any reply changes: it is part of the cache key

TASK_LINE = "Task:"
REPHRASE, NEW_QUESTION, BACKWARD_QUESTION, CONSISTENCY = "rephrase", "new question", "backward question", "consistency"
QUESTION, ANSWER, RESPONSE = "Question:", "Answer:", "Response:"
QUESTION_1, ANSWER_1, QUESTION_2, ANSWER_2 = "Question 1:", "Answer 1:", "Question 2:", "Answer 2:"
REPHRASED_REPLY, NEW_REPLY, BACKWARD_REPLY = "Rephrased question:", "New question:", "Backward question:"

_TASK = re.compile(r"^Task:[ \t]*(.+?)[ \t]*$", re.MULTILINE)
_BLOCK = re.compile(r"^(Question(?: [12])?:|Answer(?: [12])?:)", re.MULTILINE)
_LETTERED = re.compile(r"\(?([A-J])\)?(?:\s+(.+?))?\.?")
_STATED = re.compile(r"[Tt]he answer is:?\s*(.+?)\.?\s*$", re.MULTILINE)


class UnreadableRequest(ValueError):
    """The request's text holds no question of a known family, or no known task."""


class ScriptedTeacher:
    """A teacher for the synthetic families in one of `STYLES`; safe to call concurrently.

    Raises ValueError for an unknown style.
    """

    def __init__(self, style: str):
        if style not in STYLES:
            raise ValueError(f"scripted teacher style {style!r} is not one of {', '.join(STYLES)}")
        self.style = style
        self.name = f"scripted-{style}"

    @property
    def cache_key(self) -> str:
        return content_hash("scripted", VERSION, self.style)

    async def complete(self, request: Request) -> Response:
        """Answer `request`; an unreadable one gives ``finish_reason="error"``, a reply over ``max_tokens`` is cut (``length``)."""
        prompt_tokens = sum(len(message.content.split()) for message in request.messages)
        user = [message.content for message in request.messages if message.role == "user"]
        try:
            if not user:
                raise UnreadableRequest("no user message")
            text = self.reply(user[-1], request)
        except UnreadableRequest as error:
            return Response("", finish_reason="error", prompt_tokens=prompt_tokens, model=self.name, error=str(error))
        words = [match.end() for match in re.finditer(r"\S+", text)]
        if len(words) > request.max_tokens:
            text, words = text[: words[request.max_tokens - 1]] if request.max_tokens > 0 else "", words[: request.max_tokens]
            return Response(text, finish_reason="length", prompt_tokens=prompt_tokens, completion_tokens=len(words), model=self.name)
        return Response(text, prompt_tokens=prompt_tokens, completion_tokens=len(words), model=self.name)

    def reply(self, text: str, request: Request) -> str:
        """The reply to one user message. Raises UnreadableRequest."""
        task = _TASK.search(text)
        if task is None:
            return self._solve(text, request)
        blocks = _blocks(text[task.end() :])
        kind = task[1].lower()
        if kind == CONSISTENCY:
            return _consistency(blocks)
        if kind in (judging.JUDGE, judging.PROXY):
            return self._judge(kind, text[task.end() :])
        family, problem = _read(_need(blocks, QUESTION))
        rng = random.Random(derive_seed(request.seed, "augment", kind, request.sample_index, _need(blocks, QUESTION)))
        if kind == REPHRASE:
            return f"{REPHRASED_REPLY} {family.rephrase(problem, rng)}"
        if kind == NEW_QUESTION:
            return f"{NEW_REPLY} {new_question(family, problem, rng)}{_same_options(blocks)}"
        if kind == BACKWARD_QUESTION:
            if not _states(_need(blocks, ANSWER), family.answer(problem), options(_need(blocks, QUESTION))):
                raise UnreadableRequest("the given answer does not answer the question")
            return f"{BACKWARD_REPLY} {family.backward(problem, rng)}{_same_options(blocks)}"
        raise UnreadableRequest(f"unknown task {task[1]!r}")

    def _solve(self, text: str, request: Request) -> str:
        repeated = request.temperature > 0 and request.sample_index > 0
        offset = derive_seed(request.seed, "answer path") if repeated else 0
        path = PATHS[1 + (request.sample_index - 1 + offset) % (len(PATHS) - 1)] if repeated else PATHS[0]
        for family in FAMILIES:
            problem = family.parse(text)
            if problem is not None:
                draw = (request.seed, request.sample_index) if repeated else None
                misread = self.style == "noisy" and is_misread(family, problem, draw)
                return self._written(family.rationale(problem, self.style, path, misread), family.answer(problem, misread), text)
            backward = family.parse_backward(text)
            if backward is not None:
                rationale, answer = family.solve_backward(backward, self.style, path)
                return self._written(rationale, answer, text)
        raise UnreadableRequest("unknown family")

    def _judge(self, rubric: str, text: str) -> str:
        _, _, after = text.partition(f"\n{QUESTION}")
        question, found, response = after.partition(f"\n{RESPONSE}")
        if not found:
            raise UnreadableRequest(f"the request has no {RESPONSE!r} block")
        family, problem = _read(question)
        answer = family.answer(problem, self.style == "noisy" and is_misread(family, problem))
        return judging.verdict(rubric, question, response, _states(response, answer, options(question)))

    def _written(self, rationale: str, answer: str, text: str) -> str:
        letter = options(text).get(answer)
        stated = f"The answer is ({letter})." if letter else f"The answer is {answer}."
        return stated if self.style == "answer_only" else f"{rationale}\n{stated}"


def _read(text: str) -> tuple[Family[Any, Any], Any]:
    for family in FAMILIES:
        problem = family.parse(text)
        if problem is not None:
            return family, problem
    raise UnreadableRequest("unknown family")


def new_question(family: Family[Any, Any], problem: Any, rng: random.Random) -> str:
    """A parallel question whose skeleton belongs to train and is not the original's."""
    while True:
        new = family.similar(problem, rng)
        skeleton = family.skeleton(new)
        if skeleton_split(family.name, skeleton) == "train" and skeleton != family.skeleton(problem):
            return family.render(new)


def _blocks(text: str) -> dict[str, str]:
    """Tag to its text: the rest of its line and the lines up to the next tag."""
    parts = _BLOCK.split(text)
    return {tag: body.strip() for tag, body in zip(parts[1::2], parts[2::2])}


def _need(blocks: Mapping[str, str], tag: str) -> str:
    if not blocks.get(tag):
        raise UnreadableRequest(f"the request has no {tag!r} block")
    return blocks[tag]


def _same_options(blocks: Mapping[str, str]) -> str:
    """The options shown with the question, for the end of the question that is made from it."""
    return "".join(f" ({letter}) {text}" for text, letter in options(_need(blocks, QUESTION)).items())


def _states(text: str, answer: str, letters: Mapping[str, str]) -> bool:
    """Whether `text` states `answer`, as words, as an option letter or as both ("(B) cup").

    `text` is a bare answer or a rationale with an answer line; `letters` maps option texts to letters.
    Raises UnreadableRequest for a letter where no options are shown.
    """
    found = _STATED.findall(text)
    lettered = _LETTERED.fullmatch((found[-1] if found else text).strip())
    if lettered is None:
        return (found[-1] if found else text).strip(" .").lower().removeprefix("the ") == answer.lower()
    letter, words = lettered[1], (lettered[2] or "").strip(" .")
    if words:
        return words == answer and letters.get(words, letter) == letter
    if not letters:
        raise UnreadableRequest(f"the answer is option {letter} but the request shows no options")
    return letters.get(answer) == letter


def _consistency(blocks: dict[str, str]) -> str:
    """True iff question 2 tells question 1 with one quantity masked, answer 1 is right, and answer 2 is the masked quantity."""
    first, second = _need(blocks, QUESTION_1), _need(blocks, QUESTION_2)
    given, recovered = _need(blocks, ANSWER_1), _need(blocks, ANSWER_2)
    family, problem = _read(first)
    backward = family.parse_backward(second)
    if backward is None:
        return "Question 2 does not ask for a part of question 1.\nFalse"
    letters, letters_2 = options(first) or options(second), options(second) or options(first)
    if not _states(given, family.answer(problem), letters):
        return f"Question 1 has the answer {family.answer(problem)}, not the given one.\nFalse"
    same, masked = family.same_story(problem, backward)
    if not same:
        return "Question 2 tells another story than question 1.\nFalse"
    if not _states(recovered, masked, letters_2):
        return f"The part that question 2 asks for is {masked} in question 1, not the given answer.\nFalse"
    return f"Question 1 says {masked}, and that is answer 2.\nTrue"
