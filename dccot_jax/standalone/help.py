"""What `dccot score --help`, `dccot select --help` and `dccot stability --help` print; names come from the registries."""

from __future__ import annotations

from dccot_jax import config as config_lib
from dccot_jax.command_flags import flag_lines
from dccot_jax.select import selectors
from dccot_jax.select.signals import signal_names
from dccot_jax.standalone.request import in_flags

_USAGE = {
    "score": """dccot score TRACES --student=DIR --signals=nll,ifd_loss --out=scores.parquet

Score every row of a file of traces with a Hugging Face student. Writes scores.parquet (id, source, prompt_tokens,
completion_tokens, one column per signal), scores.dropped.parquet (every other row with its reason) and, for signals that sample,
scores.samples.jsonl. Killed, the same command goes on from the chunks in scores.parquet.parts; finished, it has nothing to do.""",
    "select": """dccot select TRACES --scores=scores.parquet --out=kept.jsonl \\
    --recipe='["teacher_correct", {"name": "top", "signal": "ifd_loss", "share": 0.5}]'

Keep rows of a file of traces by a recipe: a list of selectors, each over what the one before kept. Writes the kept rows as they
stood (.jsonl, .json or .parquet, by the suffix of --out) and kept.dropped.parquet, every other row with its reason. Budgets in
tokens count the student's tokens, from --scores or by --student.""",
    "stability": """dccot stability TRACES --student=DIR --recipe=RECIPE --out=stability.json \\
    [--seed=0,1,2 --dtype=float32,bfloat16 --batch_size=1,64]

Score and select again with another seed, dtype and batch size, one at a time, and report the rank correlation of every signal that
the recipe reads and the overlap of the kept sets. The first value of each is the baseline. Another batch size must change nothing.""",
}


def help_text(verb: str) -> str:
    """Usage, flags and, from the registries, the signals or the selectors there are."""
    parts = [_USAGE[verb], f"Flags:\n{flag_lines(verb)}"]
    if verb != "select":
        defaults = config_lib.resolved_text(config_lib.ConfigDict({"config": {"score": config_lib.default_config().score}}))
        parts += [f"Signals: {', '.join(signal_names())}.", "Options of scoring, with their defaults:\n" + _indented(defaults)]
    if verb != "score":
        parts.append(in_flags(selectors.__doc__ or "", verb))
    return "\n\n".join(parts)


def _indented(text: str) -> str:
    return "\n".join(f"  --{line}" for line in text.splitlines())
