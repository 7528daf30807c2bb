"""Imports point downward: a room imports only from floors below it (docs/architecture.md)."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def _floors() -> dict[str, int]:
    """Room -> floor, read from the list in docs/architecture.md."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return {room: int(number) for number, rooms in re.findall(r"^(\d)\. (.*)$", text, re.M) for room in re.findall(r"`(\w+)`", rooms)}


def _room(module: str, floors: dict[str, int]) -> str | None:
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 and parts[0] == "dccot_jax" else ""
    return name if name in floors else "formats" if name.startswith("formats") else None


def test_no_room_imports_from_a_floor_above_it():
    floors = _floors()
    assert {"records", "tasks", "data", "train", "select", "pipeline", "standalone", "cli"} <= set(floors)
    wrong = []
    for path in sorted((ROOT / "dccot_jax").rglob("*.py")):
        here = _room(".".join(path.relative_to(ROOT).with_suffix("").parts), floors)
        if here is None:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else []
            )
            for module in modules:
                there = _room(module, floors)
                if there is not None and floors[there] > floors[here]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {module}")
    assert not wrong, wrong


def test_the_training_loop_stays_short_enough_to_read():
    assert len((ROOT / "dccot_jax" / "train" / "loop.py").read_text().splitlines()) < 400
