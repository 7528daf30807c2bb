"""Which parameters a gradient is taken of: names of weights, or shell patterns over them."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from dccot_jax.config import ConfigError
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import weight_shapes

TABLES = ("embed", "head")


def weight_names(mc: ModelConfig) -> tuple[str, ...]:
    """Names of all weights, those of the layers first; a tied head is ``embed``."""
    shapes = weight_shapes(mc)
    return (*shapes["layers"], *(name for name in shapes if name != "layers"))


def choose(mc: ModelConfig, patterns: Sequence[str], *, key: str, tables: bool = True) -> tuple[str, ...]:
    """Names that match any of `patterns` (``*`` and ``?`` as in a shell), in the order of `weight_names`.

    A name stands for that weight in every layer.

    Args:
      key: dotted config key, for messages. tables: embedding and head may be among them.

    Raises ConfigError on a pattern that matches nothing, on no pattern at all, and on a table where none may be.
    """
    names = weight_names(mc)
    if not patterns:
        raise ConfigError(f"config.{key}: empty; name weights, e.g. ('wq', 'wv'); there are {', '.join(names)}")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            close = difflib.get_close_matches(pattern, names, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            raise ConfigError(f"config.{key}: {pattern!r} matches no weight; there are {', '.join(names)}{hint}")
    chosen = tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))
    for name in TABLES:
        if name in chosen and not tables:
            raise ConfigError(
                f"config.{key}: {name!r} has a row per token of the vocabulary; features take weights of the layers and norms"
            )
    return chosen
