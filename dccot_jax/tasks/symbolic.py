"""Coin flips and last letters, generated here: the same items on every machine, train and test disjoint by a hash of the question."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dccot_jax.records import content_hash, derive_seed, normalise_question
from dccot_jax.tasks.base import Item, Task, TaskDataError, make_item
from dccot_jax.tasks.loading import STRING_SUFFIX, YES_NO_SUFFIX

SIZES = {"train": 2000, "test": 500}
_FIRST = """
Ana Ben Carla David Elena Farid Grace Hugo Ines Jamal Kira Liam Mona Nadia Oscar Petra Quinn Rosa Samir Tara
Umar Vera Walter Xenia Yusuf Zoe Amir Beth Colin Dora Emil Fay Gus Hana Ivan Judy Karl Lena Milo Nora
"""
_LAST = """
Abbott Baker Castro Dunn Ellis Fuchs Gomez Hale Ito Jensen Kovacs Lopez Meyer Novak Owens Park Quist Rossi Singh Tran
Urban Vogel Weiss Xu York Zhang Archer Blum Cruz Diaz Ekman Frost Grant Huang Irwin Jain Klein Lund Moss Nagy
"""
FIRST, LAST = _FIRST.split(), _LAST.split()


def coin_flip(rng: random.Random) -> dict[str, Any]:
    """Two to five people flip a coin or do not; is it still heads up?"""
    people = rng.sample(FIRST, rng.randint(2, 5))
    heads = True
    story, steps = [], []
    for person in people:
        flips = rng.random() < 0.5
        heads ^= flips
        story.append(f"{person} {'flips' if flips else 'does not flip'} the coin.")
        steps.append(f"{person} {'flips' if flips else 'does not flip'} it, so it is {'heads' if heads else 'tails'} up.")
    question = f"A coin is heads up. {' '.join(story)} Is the coin still heads up?"
    return {
        "question": question,
        "gold": "yes" if heads else "no",
        "rationale": f"The coin starts heads up. {' '.join(steps)}",
        "n_steps": len(people),
    }


def last_letters(rng: random.Random) -> dict[str, Any]:
    """The last letters of two to four names, joined."""
    count = rng.randint(2, 4)
    words = [rng.choice(FIRST if index % 2 == 0 else LAST) for index in range(count)]
    steps = [f'The last letter of "{word}" is "{word[-1]}".' for word in words]
    gold = "".join(word[-1] for word in words)
    question = f'Take the last letters of the words in "{" ".join(words)}" and concatenate them.'
    return {"question": question, "gold": gold, "rationale": f'{" ".join(steps)} Joined they are "{gold}".', "n_steps": count}


def _generated(name: str, make: Callable[[random.Random], dict[str, Any]]) -> Callable[[str, Path | None], list[Item]]:
    def load(split: str, data_dir: Path | None) -> list[Item]:
        if split not in SIZES:
            raise TaskDataError(f"task {name} has no split {split!r}; it has {', '.join(SIZES)}")
        items: dict[str, Item] = {}
        index = 0
        while len(items) < SIZES[split]:
            fields = make(random.Random(derive_seed(0, name, index)))
            index += 1
            key = normalise_question(fields["question"])
            in_test = int(content_hash("split", name, key, digits=8), 16) % 5 == 0
            if in_test == (split == "test"):
                item = make_item(name, split, **fields)
                items.setdefault(item.id, item)
        return list(items.values())

    return load


TASKS: tuple[Task, ...] = (
    Task(
        name="coin_flip",
        answer_type="yes_no",
        domain="symbolic",
        description="State of a coin after flips (generated)",
        load=_generated("coin_flip", coin_flip),
        prompt_suffix=YES_NO_SUFFIX,
        iid=("coin_flip",),
        ood=("last_letters", "bbh_boolean_expressions"),
        cross=("svamp", "strategyqa"),
    ),
    Task(
        name="last_letters",
        answer_type="string",
        domain="symbolic",
        description="Concatenated last letters of names (generated)",
        load=_generated("last_letters", last_letters),
        prompt_suffix=STRING_SUFFIX,
        iid=("last_letters",),
        ood=("coin_flip",),
        cross=("svamp", "strategyqa"),
    ),
)
