"""Every flag of the command line: what it takes, which commands take it, which config key it stands for."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import NamedTuple

from absl import flags

from dccot_jax.formats import FORMATS
from dccot_jax.records import ANSWER_TYPES, InputError

STANDALONE = ("score", "select", "stability")  # of a file of traces, without a config file
_CONFIGURED = ("run", "eval", "validate", "doctor", "estimate")
_JOINING = ("run", "eval", "export", "doctor", *STANDALONE)
PATHS = ("workdir", "out", "checkpoint", "student", "data_dir")  # flags whose value is one path
_HELP_WIDTH = 128


class UsageError(InputError):
    """A command line that cannot work."""


class Flag(NamedTuple):
    """A flag as some commands take it. `value`: what stands for its value in the help, "" for a switch; `key`: config key it stands for."""

    name: str
    value: str
    verbs: tuple[str, ...]
    text: str
    key: str = ""
    default: str | bool | int | None = None


FLAGS = (
    Flag("config", "FILE.py[:ARG]", _CONFIGURED, "Python file with get_config(); ARG is handed to it."),
    Flag("config.KEY", "VALUE", _CONFIGURED, "Changes a value of the config, e.g. --config.train.steps=1000."),
    Flag("config.KEY", "VALUE", STANDALONE, "Changes any other key that the stages read."),
    Flag("workdir", "DIR", ("run",), "Where artifacts and the report go."),
    Flag("workdir", "DIR", ("eval",), "Where artifacts and the report go; default: runs/eval-NAME, by the checkpoint's name."),
    Flag("workdir", "DIR", ("report", "export-traces"), "Where the run is."),
    Flag("workdir", "DIR", ("doctor",), "Look at the storage there too."),
    Flag("until", "STAGE", ("run",), "Stop each arm after this stage.", default=""),
    Flag("only", "STAGE", ("run",), "Run this stage alone; what it reads must be there.", default=""),
    Flag("checkpoint", "DIR", ("eval",), "A train artifact, a Hugging Face directory or a .gguf file."),
    Flag("checkpoint", "DIR", ("export",), "A train or student artifact."),
    Flag("out", "DIR", ("export",), "A new directory, for a Hugging Face checkpoint."),
    Flag("out", "FILE", ("export-traces",), "A new .jsonl, .json or .parquet file."),
    Flag("out", "FILE", ("score",), "Scores to write: a .parquet file."),
    Flag("out", "FILE", ("select",), "Kept rows to write: .jsonl, .json or .parquet."),
    Flag("out", "FILE", ("stability",), "Figures to write: a .json file."),
    Flag("format", "FORMAT", ("export-traces",), f"{', '.join(FORMATS)}."),
    Flag("format", "FORMAT", STANDALONE, f"auto, {', '.join(FORMATS)}."),
    Flag(
        "stage",
        "STAGE",
        ("export-traces",),
        "Whose traces: traces, augment, verify or select (default: select, the kept ones).",
        default="select",
    ),
    Flag("arm", "NAME[/SEED]", ("export-traces",), "Whose traces, where arms differ in them.", default=""),
    Flag("student", "DIR", STANDALONE, "Hugging Face directory of the student.", key="student.path"),
    Flag("signals", "NAMES", ("score", "stability"), "Signals to score, with commas.", key="score.signals"),
    Flag("scores", "FILES", ("select", "stability"), "Parquet files of scores, with commas.", key="select.tables"),
    Flag("recipe", "RECIPE", STANDALONE, "Selectors: JSON, a .json file or a config file.", key="select.steps"),
    Flag("dtype", "DTYPE", ("score", "stability"), "float32 or bfloat16.", key="compute_dtype"),
    Flag("batch_size", "N", ("score", "stability"), "Tiles in flight; changes speed and memory, no score.", key="score.batch_tiles"),
    Flag("max_length", "N", STANDALONE, "Longest row in tokens; default: the student's positions.", key="tokens.max_length"),
    Flag("gold_field", "COLUMN", STANDALONE, "Column of the right answers."),
    Flag("answer_type", "TYPE", STANDALONE, f"Type of the right answers: {', '.join(ANSWER_TYPES)}."),
    Flag("seed", "N", STANDALONE, "Root seed.", key="seed"),
    Flag("data_dir", "DIR", ("tasks",), "Local files of public tasks.", default=""),
    Flag("data_dir", "DIR", STANDALONE, "Local files of public tasks, for selectors that resemble one.", key="data_dir", default=""),
    Flag("topology", "NAME", ("estimate",), "Machine to estimate for, by the cloud's name: v5e-16, v5p-128, v6e-256, h100x8, cpu."),
    Flag("json", "", ("estimate",), "Print JSON.", default=False),
    Flag("aot", "", ("estimate",), "Ask the TPU compiler too, or with --noaot do not; by default where libtpu is installed."),
    Flag("distributed", "", _JOINING, "Join other processes; Slurm, TPU pods, Kubernetes and MPI are detected.", default=False),
    Flag("coordinator", "HOST:PORT", _JOINING, "Of process 0, where the cluster is not detected.", default=""),
    Flag("num_processes", "N", _JOINING, "Number of processes, with --coordinator.", default=0),
    Flag("process_id", "N", _JOINING, "Index of this process, with --coordinator.", default=-1),
)


def flags_of(verb: str) -> list[Flag]:
    return [flag for flag in FLAGS if verb in flag.verbs]


def verbs_of(name: str) -> tuple[str, ...]:
    """The commands that take a flag."""
    return tuple(verb for flag in FLAGS if flag.name == name for verb in flag.verbs)


def define(verb: str, values: flags.FlagValues) -> None:
    """Define the flags of a command, but for --config and what changes it."""
    for flag in flags_of(verb):
        if flag.name.startswith("config"):
            continue
        if not flag.value:
            flags.DEFINE_bool(flag.name, flag.default, flag.text, flag_values=values)
        elif isinstance(flag.default, int):
            flags.DEFINE_integer(flag.name, flag.default, flag.text, flag_values=values)
        else:
            flags.DEFINE_string(flag.name, flag.default, flag.text, flag_values=values)


def check_verb(verb: str, arguments: Sequence[str]) -> None:
    """Raises UsageError on a flag of other commands: not to be taken for a choice of what this one does."""
    own = {flag.name for flag in flags_of(verb)}
    for word in arguments:
        if word == "--":
            return
        name = word.lstrip("-").split("=")[0]
        name = "config.KEY" if name.startswith("config.") else name
        known = [flag for flag in FLAGS if name == flag.name or (not flag.value and name == f"no{flag.name}")]
        if not word.startswith("-") or not known or known[0].name in own:
            continue
        verbs = ", ".join(verbs_of(known[0].name))
        key = next((flag.key for flag in known if flag.key), "")
        hint = f"; write --config.{key}" if key and verb in _CONFIGURED else ""
        raise UsageError(f"--{name} goes with {verbs}, not with {verb}{hint}")


def flag_lines(verb: str) -> str:
    """The flags of a command for its help, one or more lines each."""
    rows = [(f"--{flag.name}={flag.value}" if flag.value else f"--{flag.name}", flag.text) for flag in flags_of(verb)]
    width = max(len(name) for name, _ in rows) + 2
    return "\n".join(
        textwrap.fill(text, _HELP_WIDTH, initial_indent=f"  {name:<{width}}", subsequent_indent=" " * (width + 2)) for name, text in rows
    )
