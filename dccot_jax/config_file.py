"""Reading a config file: Python with a `get_config()`. What is wrong in it is told in one line, with the file and the line."""

from __future__ import annotations

import contextlib
import re
import sys
import traceback
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from dccot_jax.command_errors import one_line
from dccot_jax.config import ConfigError, lookup
from dccot_jax.records import InputError

_MODULE = "config_file"
_ACCEPTED = {int: "a whole number", float: "a number", bool: "true or false"}


def split_config(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """(value of ``--config=FILE.py`` or ``--config FILE.py``, the last one if several, or None; the other arguments)."""
    found, rest, words = None, [], iter(arguments)
    for word in words:
        if word == "--":
            rest += [word, *words]
        elif word in ("--config", "-config"):
            found = next(words, "")
        elif word.startswith(("--config=", "-config=")):
            found = word.split("=", 1)[1]
        else:
            rest.append(word)
    return found, rest


def load_config(text: str) -> ConfigDict:
    """The locked config of ``FILE.py`` or ``FILE.py:ARG``, where ARG is handed to get_config().

    Raises ConfigError: no such file, an error in it (file, line, type, message), no get_config(), or one that returns no config.
    """
    path, *argument = text.split(":", 1)
    if not Path(path).is_file():
        raise ConfigError(f"--config={path}: no such file")
    module = types.ModuleType(_MODULE)
    module.__file__ = path
    sys.modules[_MODULE] = module  # classes defined in the file look for it there
    with _explained(path):
        exec(compile(Path(path).read_bytes(), path, "exec"), module.__dict__)
    if not callable(getattr(module, "get_config", None)):
        raise ConfigError(f"{path}: has no function get_config()")
    with _explained(path):
        config = module.get_config(*argument)
    if config is None:
        raise ConfigError(f"{path}: get_config() returns nothing; it must end with `return` and the config")
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise ConfigError(f"{path}: get_config() returns a {kind}, not a ConfigDict; start from dccot_jax.config.default_config()")
    return config.lock()


def explain_override(error: Exception, arguments: Sequence[str], config: ConfigDict | None) -> str:
    """One line for a command line that absl or ml_collections refused: the key, the value and what is accepted."""
    text = one_line(error)
    kind: Any = int if "int()" in text else None
    if config is not None:
        for argument in arguments:
            key = argument.removeprefix("--config.").split("=")[0]
            if argument.startswith("--config.") and not key.startswith("arms."):
                try:
                    value = lookup(config, key)
                except ConfigError as problem:
                    return str(problem)
                kind = type(value) if text.startswith(f"flag --config.{key}=") else kind
    found = re.match(r"flag (--[\w.]+=.*?): ", text)
    return f"{found[1]}: must be {_ACCEPTED[kind]}" if found and kind in _ACCEPTED else text


@contextlib.contextmanager
def _explained(path: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        raise ConfigError(_explain(path, error)) from None


def _explain(path: str, error: Exception) -> str:
    text = " ".join(str(error.args[0] if isinstance(error, KeyError) and error.args else error).split())
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}: {type(error).__name__}: {error.msg}"
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == path]
    where = f"{path}:{lines[-1]}" if lines else path
    missing = re.search(r'Key "(\w+)" does not exist', text)
    nearest = re.search(r'Did you mean "([\w.]+)"', text)
    if missing:
        return f"{where}: no such config key {missing[1]!r}" + (f"; did you mean {nearest[1]!r}?" if nearest else "")
    return f"{where}: {text}" if isinstance(error, InputError) else f"{where}: {type(error).__name__}: {text}"
