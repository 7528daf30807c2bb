"""What the commands score, select and stability are asked to do: their flags as one checked request and a config.

A flag stands for a config key, and every other key that the stages read can be changed as in `dccot run`, with
``--config.KEY=VALUE``. Errors that name a config key are told in the words of the flag (`in_flags`).
"""

from __future__ import annotations

import ast
import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.command_flags import FLAGS, verbs_of
from dccot_jax.config import DTYPES
from dccot_jax.formats import FORMATS
from dccot_jax.formats_files import written_as
from dccot_jax.records import ANSWER_TYPES, InputError
from dccot_jax.select.candidates import Step
from dccot_jax.select.columns import check_table
from dccot_jax.select.selectors import required_signals
from dccot_jax.select.signals import split_signals
from dccot_jax.standalone.recipe import Recipe, read_recipe

KEYS = {flag.name: flag.key for flag in FLAGS if flag.key}  # flag -> the config key it stands for
_ADD = re.compile(r"add (it|one) to config\.score\.signals")
_ENDING = re.compile(r"\.(jsonl|json|parquet)(\.gz)?$")
_DEFAULTS = {"dtype": "float32", "batch_size": "4", "seed": "0"}
_SPREAD = {"dtype": "float32,bfloat16", "batch_size": "1,64", "seed": "0,1,2"}  # what stability compares by default


@dataclasses.dataclass(frozen=True)
class Request:
    """One command.

    Attributes:
      file: the traces. out: what to write. format, gold_field, answer_type: as in `rows.read_traces`.
      config: defaults with the flags and overrides in it. max_length: 0 means the student's positions.
      spread: {flag: values to compare, the first is the baseline}, for stability.
    """

    verb: str
    file: Path
    out: Path
    format: str
    gold_field: str
    answer_type: str
    config: ConfigDict
    max_length: int
    spread: Mapping[str, tuple[Any, ...]]

    @property
    def workdir(self) -> epath.Path:
        """Where unfinished work stands, beside the output."""
        return epath.Path(self.out.parent / f"{self.out.name}.parts")

    @property
    def steps(self) -> list[Step]:
        return list(config_lib.to_plain(self.config.select.steps))

    def clear_parts(self) -> None:
        """Remove `workdir`, but for the replies of judges, which may have cost money, where there are any."""
        if not self.workdir.exists():
            return
        paid = self.workdir / "cache"
        for path in self.workdir.iterdir() if paid.exists() else (self.workdir,):
            if path == paid:
                continue
            path.rmtree() if path.is_dir() else path.unlink()

    def beside(self, name: str) -> Path:
        """A further output: ``scores.parquet`` -> ``scores.<name>``."""
        return self.out.with_name(f"{_ENDING.sub('', self.out.name)}.{name}")


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """(arguments without them, {dotted key: text}) of ``--config.KEY=VALUE`` arguments."""
    found = dict(a[len("--config.") :].split("=", 1) for a in arguments if a.startswith("--config.") and "=" in a)
    return [a for a in arguments if not (a.startswith("--config.") and "=" in a)], found


def make_request(verb: str, given: Mapping[str, str | None], files: Sequence[str], overrides: Mapping[str, str]) -> Request:
    """Check what needs no device and no data. `given`: flags by name. Raises InputError naming the flag, the value and what is accepted."""
    if len(files) != 1:
        raise InputError(f"one file of traces is needed, got {len(files)}: dccot {verb} traces.jsonl --out=FILE …")
    file = Path(files[0]).expanduser()
    if not file.is_file():
        raise InputError(f"{file}: no such file")
    for name, accepted in (("format", ("auto", *FORMATS)), ("answer_type", ANSWER_TYPES)):
        if given.get(name) and given[name] not in accepted:
            raise InputError(
                f"--{name}={given[name]}: must be one of {', '.join(accepted)}{config_lib.nearest(str(given[name]), accepted)}"
            )
    if not given.get("out"):
        raise InputError(f"--out={'FILE.parquet' if verb == 'score' else 'FILE.json' if verb == 'stability' else 'FILE'} is needed")
    out = Path(str(given["out"])).expanduser().absolute()
    if out == file.absolute():
        raise InputError(f"--out={given['out']}: is the file of traces itself")
    if verb == "select":
        written_as(str(given["out"]))
    elif out.suffix != (suffix := ".parquet" if verb == "score" else ".json"):
        raise InputError(f"--out={given['out']}: must end in {suffix}")
    spread: dict[str, tuple[Any, ...]] = {
        "seed": _whole_numbers("seed", given, verb),
        "dtype": _parts("dtype", given, verb),
        "batch_size": _whole_numbers("batch_size", given, verb, least=1),
    }
    for dtype in spread["dtype"]:
        if dtype not in DTYPES:
            raise InputError(f"--dtype={dtype}: must be one of {', '.join(DTYPES)}{config_lib.nearest(dtype, DTYPES)}")
    return Request(
        verb=verb,
        file=file,
        out=out,
        format=given.get("format") or "auto",
        gold_field=given.get("gold_field") or "",
        answer_type=given.get("answer_type") or "",
        config=_config(verb, given, spread, overrides),
        max_length=_max_length(given),
        spread=spread,
    )


def in_flags(text: str, verb: str) -> str:
    """A message about config keys in the words of the flags of `verb` that stand for them."""
    if verb not in verbs_of("signals"):
        text = _ADD.sub(r"score \1 with `dccot score --signals=…` and pass --scores=FILE", text)
    for flag, key in KEYS.items():
        if verb in verbs_of(flag):
            text = text.replace(f"config.{key}", f"--{flag}")
    return text


def _config(verb: str, given: Mapping[str, str | None], spread: Mapping[str, tuple[Any, ...]], overrides: Mapping[str, str]) -> ConfigDict:
    recipe = read_recipe(str(given["recipe"])) if given.get("recipe") else Recipe([])
    changes = recipe.changes if verb != "select" else {}
    if verb != "score" and not given.get("recipe"):
        raise InputError("--recipe is needed: JSON, a .json file, or a config file like those in configs/select")
    if verb != "select" and not given.get("student"):
        raise InputError("--student=DIR is needed: a Hugging Face directory")
    signals = tuple(name.strip() for name in str(given.get("signals") or "").split(",") if name.strip())
    tables = tuple(name.strip() for name in str(given.get("scores") or "").split(",") if name.strip())
    config = config_lib.override(
        config_lib.default_config(),
        {
            **changes,
            "student.path": given.get("student") or "",
            "data_dir": given.get("data_dir") or "",
            "select.steps": tuple(recipe.steps),
            "select.tables": tables,
            **{KEYS[name]: values[0] for name, values in spread.items() if given.get(name) or KEYS[name] not in changes},
        },
    )
    for key, text in overrides.items():
        if key in KEYS.values():
            flag = next(flag for flag, own in KEYS.items() if own == key)
            if verb not in verbs_of(flag):
                raise InputError(f"--config.{key}={text}: does not go with {verb}; --{flag} goes with {', '.join(verbs_of(flag))}")
            raise InputError(f"{key!r} has a flag of its own: write --{flag}={text}")
        config = config_lib.override(config, {key: _literal(text)})
    if verb != "select":
        there = {name for path in tables for names in check_table(path) for name in names}
        wanted = {*changes.get("score.signals", ()), *required_signals(recipe.steps)}
        signals = signals or tuple(sorted(wanted - there))
        if verb == "score" and not signals:
            raise InputError("--signals is needed, or a --recipe that reads some; `dccot score --help` lists them")
        split_signals(signals)
        config = config_lib.override(config, {"score.signals": signals})
    return config


def _max_length(given: Mapping[str, str | None]) -> int:
    text = given.get("max_length") or "0"
    if not text.isdigit():
        raise InputError(f"--max_length={text}: must be a whole number (0: the student's positions)")
    return int(text)


def _parts(name: str, given: Mapping[str, str | None], verb: str) -> tuple[str, ...]:
    text = given.get(name) or (_SPREAD if verb == "stability" else _DEFAULTS)[name]
    parts = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if len(parts) != 1 and verb != "stability":
        raise InputError(f"--{name}={text}: one value is needed; several are for `dccot stability`")
    return parts


def _whole_numbers(name: str, given: Mapping[str, str | None], verb: str, *, least: int = 0) -> tuple[int, ...]:
    parts = _parts(name, given, verb)
    for part in parts:
        if not part.isdigit() or int(part) < least:
            raise InputError(f"--{name}={part}: must be a whole number of at least {least}")
    return tuple(int(part) for part in parts)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (SyntaxError, ValueError):
        return {"true": True, "false": False}.get(text.lower(), text)
