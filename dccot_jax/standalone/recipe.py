"""A recipe as people give it on a command line: JSON, a JSON file, or a config file with `get_config()`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.config import ConfigError, default_config, flatten, to_plain
from dccot_jax.select.candidates import Step
from dccot_jax.select.selectors import check_steps

VALIDATION = "score.gradients.validation"
_EXAMPLE = """'[{"name": "top", "signal": "ifd_loss", "share": 0.5}]'"""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a recipe says.

    Attributes:
      steps: as `config.select.steps`.
      changes: {dotted key: plain value}, how its rows are to be scored where that differs from the default config: `score`, and
        `train` where the scoring student is warmed up by it. Empty for JSON.
    """

    steps: list[Step]
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def read_recipe(text: str) -> Recipe:
    """Read a recipe.

    Args:
      text: JSON (a step, or a list of steps; a step without options may be its bare name), or a path that ends in .json (holding
        that) or .py (a config file like those in configs/select).

    Raises ConfigError: no such file, JSON or Python that does not read (line named), or a step that `check_steps` refuses.
    """
    if text.endswith(".py"):
        recipe = _from_config(Path(text).expanduser())
    elif text.endswith(".json"):
        path = Path(text).expanduser()
        if not path.is_file():
            raise ConfigError(f"config.select.steps: {text}: no such file")
        recipe = Recipe(_from_json(path.read_text(), str(path)))
    else:
        recipe = Recipe(_from_json(text, "config.select.steps"))
    check_steps(recipe.steps)
    return recipe


def _from_json(text: str, where: str) -> list[Step]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        place = f":{error.lineno}" if where.endswith(".json") else ""
        raise ConfigError(f"{where}{place}: not JSON ({error.msg}, column {error.colno}); write e.g. {_EXAMPLE}") from None
    steps = value if isinstance(value, list) else [value]
    return [{"name": step} if isinstance(step, str) else step for step in steps]


def _from_config(path: Path) -> Recipe:
    if not path.is_file():
        raise ConfigError(f"config.select.steps: {path}: no such file")
    spec = importlib.util.spec_from_file_location("dccot_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        config: Any = module.get_config()
    except SyntaxError as error:
        raise ConfigError(f"{path}:{error.lineno}: {error.msg}") from None
    except (AttributeError, KeyError, TypeError, ValueError, OSError, ImportError) as error:
        raise ConfigError(f"{path}: get_config() cannot be called ({type(error).__name__}: {' '.join(str(error).split())})") from None
    if not isinstance(config, (ConfigDict, Mapping)) or "select" not in config:
        raise ConfigError(f"{path}: get_config() must return a config with select.steps")
    return Recipe(list(to_plain(config["select"]["steps"])), _changes(ConfigDict(config)))


def _changes(config: ConfigDict) -> dict[str, Any]:
    """`Recipe.changes` of a config. Sub-tasks of `less` that no one chose, the training task of no run, are left out."""
    defaults = default_config()
    score = config.get("score", ConfigDict())
    sections = ("score", "train") if score.get("student") == "warmup" else ("score",)
    known = dict(flatten("", defaults))
    found = {key: value for name in sections if name in config for key, value in flatten(name, config[name])}
    changes = {key: value for key, value in found.items() if key not in known or known[key] != value}
    validation = changes.get(VALIDATION, ())
    if any(isinstance(entry, Mapping) and entry.get("task") == defaults.traces.task for entry in validation):
        del changes[VALIDATION]
    return changes
