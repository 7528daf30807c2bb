"""The command line: one verb per thing a user wants done.

A run, from traces to a report:
  dccot run      --config=FILE.py --workdir=DIR [--config.a.b=value ...] [--until=STAGE] [--only=STAGE]
  dccot report   --workdir=DIR
  dccot eval     --config=FILE.py --checkpoint=DIR [--workdir=DIR]
  dccot export   --checkpoint=DIR --out=DIR
  dccot export-traces --workdir=DIR --format=FORMAT --out=FILE [--stage=STAGE] [--arm=NAME[/SEED]]

Any file of traces and any Hugging Face student, without a config:
  dccot score     TRACES --student=DIR --signals=nll,ifd_loss --out=scores.parquet
  dccot select    TRACES --scores=scores.parquet --recipe=RECIPE --out=kept.jsonl
  dccot stability TRACES --student=DIR --recipe=RECIPE --out=stability.json

What there is, and whether it works here:
  dccot tasks    [--data_dir=DIR]
  dccot validate --config=FILE.py
  dccot doctor   [--workdir=DIR] [--config=FILE.py]
  dccot estimate --config=FILE.py --topology=v5e-16|v5p-128|v6e-256|h100x8|cpu [--json] [--noaot]

dccot VERB --help: all flags of a command, and what it does.

FORMAT is messages, prompt_completion, question_answer, sharegpt, alpaca, eit, dccot or trace; STAGE traces, augment, verify or select
(default: the kept traces); FILE and TRACES are .jsonl, .json or .parquet; RECIPE is JSON, a .json file or a config file like those in
configs/select.

Exit codes: 0 done; 1 failed; 2 a command, config or input that cannot work; 75 stopped cleanly after SIGTERM or Ctrl-C;
76 another process of the run is gone; 130 interrupted at once by a second signal. After 75, 76, 130 or a kill the same
command goes on where the run stopped.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import config_flags
from rich.console import Console
from rich.table import Table

from dccot_jax import __version__, compile_cache, cpu_memory, processes
from dccot_jax import config as config_lib
from dccot_jax.command_errors import explain_end, one_line
from dccot_jax.command_flags import PATHS, STANDALONE, UsageError, check_verb, define, flags_of
from dccot_jax.command_help import help_text
from dccot_jax.config_file import explain_override, load_config, split_config
from dccot_jax.context import Context
from dccot_jax.stopping import StopRequest

_FLAGS = flags.FlagValues()
_WORDS: list[str] = []  # of this command: what is neither a flag nor a flag's value
_OVERRIDES: dict[str, str] = {}  # of a command without a config file: {dotted key: text}


def main(argv: Sequence[str]) -> int:
    """Run one command. Returns the exit code; prints one line on bad input."""
    console = Console(stderr=True, highlight=False)
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(__doc__)
        return 0
    if argv[0] in ("--version", "version"):
        print(f"dccot_jax {__version__}")
        return 0
    verb, rest = argv[0], list(argv[1:])
    try:
        if verb not in VERBS:
            raise UsageError(f"unknown command {verb!r}; commands are {', '.join(VERBS)}")
        if any(word in ("-h", "--help") for word in rest):
            print(help_text(verb))
            return 0
        _parse(verb, rest)
        code = VERBS[verb](console)
    except Exception as error:
        code = explain_end(error, verb, _given_paths(), console)
    except KeyboardInterrupt:
        console.print("interrupted; run the same command again to go on")
        code = 130
    processes.leave(code)
    return code


def console() -> None:
    """Entry point of the console script."""
    sys.exit(main(sys.argv[1:]))


def _given_paths() -> dict[str, str]:
    """{how it was given: path} of what the command line names."""
    return {f"--{name}=": str(_FLAGS[name].value) for name in PATHS if name in _FLAGS and _FLAGS[name].value}


def _parse(verb: str, arguments: Sequence[str]) -> None:
    """Parse flags; turns every complaint into a UsageError of one line."""
    _WORDS.clear()
    _OVERRIDES.clear()
    check_verb(verb, arguments)
    if verb in STANDALONE:
        from dccot_jax.standalone import request

        arguments, overrides = request.split_overrides(arguments)
        _OVERRIDES.update(overrides)
    path, arguments = split_config(arguments)
    config = None if path is None else load_config(path)
    if config is None and verb not in STANDALONE and any(word.startswith("--config.") for word in arguments):
        raise UsageError("--config=FILE.py is needed")
    for name in list(_FLAGS):  # parsing overrides adds flags of its own, which must not outlive one command
        delattr(_FLAGS, name)
    define(verb, _FLAGS)
    before, sys.argv = sys.argv, ["dccot", *arguments]  # config_flags looks for overrides there
    try:
        if config is None:
            flags.DEFINE_string("config", None, "", flag_values=_FLAGS)
        else:
            config_flags.DEFINE_config_dict("config", config, flag_values=_FLAGS, lock_config=True)
        left = _FLAGS(["dccot", *arguments])
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(explain_override(error, arguments, config)) from None
    finally:
        sys.argv = before
    if verb in STANDALONE:
        _WORDS.extend(left[1:])
    elif len(left) > 1:
        raise UsageError(f"unexpected argument {left[1]!r}")
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # grain and orbax read absl flags


def _config() -> config_lib.ConfigDict:
    config = _FLAGS.config
    if config is None:
        raise UsageError("--config=FILE.py is needed")
    config_lib.validate(config)
    return config


def _workdir() -> epath.Path:
    if not _FLAGS.workdir:
        raise UsageError("--workdir=DIR is needed")
    return _path(_FLAGS.workdir)


def _path(text: str) -> epath.Path:
    """A path of the user: on an object store (gs://…), else absolute."""
    return epath.Path(text if "://" in text else os.path.abspath(os.path.expanduser(text)))


def _join_processes() -> None:
    """Join the other processes of the run, when asked to. Before anything else touches JAX's devices."""
    if _FLAGS.coordinator and (_FLAGS.num_processes < 1 or _FLAGS.process_id < 0):
        raise UsageError("--coordinator needs --num_processes and --process_id")
    if not (_FLAGS.coordinator or _FLAGS.distributed):
        return
    try:
        processes.join(_FLAGS.coordinator, _FLAGS.num_processes, _FLAGS.process_id)
    except ValueError as error:  # JAX's way to say that it recognises no cluster here
        if _FLAGS.coordinator:
            raise
        raise UsageError(f"--distributed: no cluster detected ({one_line(error)}); give --coordinator=HOST:PORT") from None


@contextlib.contextmanager
def _started(workdir: epath.Path, data_dir: str) -> Iterator[Context]:
    """Start JAX (and its processes, when asked) and describe where the run takes place; signals ask it to stop."""
    with StopRequest().on_signals() as stop, contextlib.ExitStack() as stack:
        _join_processes()
        import jax

        compile_cache.enable()
        cpu_memory.keep()
        index, count = jax.process_index(), jax.process_count()
        if count > 1:
            text = f"dccot: process {index} of 0..{count - 1} was killed, or ended by JAX because another process is gone"
            stack.enter_context(processes.last_words(f"{text}; the same command on every process goes on where the run stopped"))
        path = Path(data_dir).expanduser() if data_dir else None
        if path is not None and not path.is_dir():
            raise UsageError(f"config.data_dir: {data_dir!r} is not a directory")
        yield Context(workdir=workdir, data_dir=path, process_index=index, process_count=count, stop=stop)


@contextlib.contextmanager
def _locked(workdir: epath.Path, ctx: Context) -> Iterator[None]:
    """One run at a time in a workdir (local disks)."""
    workdir.mkdir(parents=True, exist_ok=True)
    if not ctx.is_main or "://" in str(workdir):
        yield
        return
    with (workdir / ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UsageError(f"--workdir={workdir}: another run is at work there") from None
        yield


def _run(console: Console) -> int:
    from dccot_jax import pipeline

    config, workdir = _config(), _workdir()
    with _started(workdir, config.data_dir) as ctx, _locked(workdir, ctx):
        pipeline.run(config, ctx, until=_FLAGS.until, only=_FLAGS.only)
    return 0


def _report(console: Console) -> int:
    from dccot_jax import pipeline
    from dccot_jax.run_record import load_runs

    workdir = _workdir()
    config, runs = load_runs(workdir)
    pipeline.report(config, runs, Context(workdir=workdir), force=True)
    return 0


def _eval(console: Console) -> int:
    from dccot_jax import pipeline

    config = _config()
    if not _FLAGS.checkpoint:
        raise UsageError("--checkpoint=DIR is needed: a train artifact, a Hugging Face directory or a .gguf file")
    checkpoint = _path(_FLAGS.checkpoint)
    workdir = _workdir() if _FLAGS.workdir else epath.Path("runs").absolute() / f"eval-{checkpoint.name}"
    with _started(workdir, config.data_dir) as ctx, _locked(workdir, ctx):
        pipeline.evaluate_checkpoint(config, checkpoint, ctx)
    return 0


def _export(console: Console) -> int:
    if not _FLAGS.checkpoint or not _FLAGS.out:
        raise UsageError("--checkpoint=DIR and --out=DIR are needed")
    out = Path(_FLAGS.out).expanduser()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"--out={out}: {'not empty' if out.is_dir() else 'exists and is not a directory'}; name another directory")
    _join_processes()  # a barrier: no process writes before all have looked
    import jax

    from dccot_jax.train.checkpoint import export_hf

    export_hf(_path(_FLAGS.checkpoint), out)
    if jax.process_index() == 0:
        console.print(f"wrote {out}", soft_wrap=True)
    return 0


def _export_traces(console: Console) -> int:
    from dccot_jax.formats import FORMATS
    from dccot_jax.formats_files import written_as
    from dccot_jax.trace_export import STAGES, export_run

    workdir = _workdir()
    for name, accepted in (("format", FORMATS), ("stage", STAGES)):
        if _FLAGS[name].value not in accepted:
            raise UsageError(f"--{name}={_FLAGS[name].value or ''}: must be one of {', '.join(accepted)}")
    if not _FLAGS.out:
        raise UsageError("--out=FILE is needed")
    out = Path(_FLAGS.out).expanduser()
    if out.exists():
        raise UsageError(f"--out={out}: exists; name another file")
    written_as(out)
    rows = export_run(workdir, out, _FLAGS.format, stage=_FLAGS.stage, arm=_FLAGS.arm)
    console.print(f"wrote {out}: {rows:,} rows", soft_wrap=True)
    return 0


def _tasks(console: Console) -> int:
    from dccot_jax.tasks.registry import all_tasks, data_at_hand

    root = Path(_FLAGS.data_dir).expanduser() if _FLAGS.data_dir else None
    table = Table(title="Tasks")
    for column in ("task", "answer", "domain", "IID", "OOD", "cross-domain", "data at hand", "hub"):
        table.add_column(column, overflow="fold")
    for task in all_tasks():
        at_hand = "yes" if data_at_hand(task, root) else "hub" if task.hub else "no"
        table.add_row(
            task.name,
            task.answer_type,
            task.domain,
            " ".join(task.iid),
            " ".join(task.ood),
            " ".join(task.cross),
            at_hand,
            task.hub or "built in",
        )
    Console(width=None if sys.stdout.isatty() else 200).print(table)
    return 0


def _validate(console: Console) -> int:
    from dccot_jax import pipeline
    from dccot_jax.preflight import check

    config = _config()
    check(config, devices=False)  # the run may be meant for another machine
    for arm, arm_config in config_lib.arms(config).items():
        nodes = pipeline.graph(arm_config, base=False)
        print(f"{arm}: {' → '.join(nodes)}")
    print(f"valid; {len(config_lib.arms(config))} arm(s) × {len(config_lib.seeds(config))} seed(s)")
    return 0


def _doctor(console: Console) -> int:
    from dccot_jax.doctor import report

    config = None if _FLAGS.config is None else _config()
    workdir = _workdir() if _FLAGS.workdir else None
    _join_processes()
    return report.run(config, workdir)


def _estimate(console: Console) -> int:
    import jax

    from dccot_jax.estimate.assess import assess
    from dccot_jax.estimate.report import render

    config = _config()
    if not _FLAGS.topology:
        raise UsageError("--topology=NAME is needed, e.g. v5e-16, v5p-128, v6e-256, h100x8 or cpu")
    jax.config.update("jax_platforms", "cpu")  # no accelerator is touched
    result = assess(config, _FLAGS.topology, compile_for=_FLAGS.aot, log=console.print)
    if _FLAGS.json:
        print(json.dumps(result, indent=1))
    else:
        render(result, Console(width=None if sys.stdout.isatty() else 160, highlight=False))
    return 0


def _standalone(verb: str) -> Callable[[Console], int]:
    """The handler of a command that works on a file of traces."""

    def handle(console: Console) -> int:
        from dccot_jax.standalone import command

        given = {flag.name: _FLAGS[flag.name].value for flag in flags_of(verb) if flag.name in _FLAGS}
        asked = command.parse(verb, given, _WORDS, _OVERRIDES)
        with _started(asked.workdir, _FLAGS.data_dir) as ctx, _locked(asked.workdir, ctx):
            command.run(asked, ctx)
        return 0

    return handle


VERBS: dict[str, Callable[[Console], int]] = {
    "run": _run,
    "report": _report,
    "eval": _eval,
    "export": _export,
    "export-traces": _export_traces,
    "tasks": _tasks,
    "validate": _validate,
    "score": _standalone("score"),
    "select": _standalone("select"),
    "stability": _standalone("stability"),
    "doctor": _doctor,
    "estimate": _estimate,
}

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
