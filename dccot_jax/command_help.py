"""What `dccot VERB --help` prints: how the command is called, what it does, its flags."""

from __future__ import annotations

from dccot_jax.command_flags import STANDALONE, flag_lines

_USAGE = {
    "run": """dccot run --config=FILE.py --workdir=DIR [--config.a.b=VALUE ...] [--until=STAGE] [--only=STAGE]

Make all that a config asks for, from traces to a report, arm by arm and seed by seed. What is made already is used again, so the same
command goes on where it was stopped, and does nothing once all is made. Stages: student, traces, augment, verify, tokenize, distill,
score, select, plan, train, evaluate, report.""",
    "report": """dccot report --workdir=DIR

Make the report of a run again, in DIR/report, from what the run made.""",
    "eval": """dccot eval --config=FILE.py --checkpoint=DIR [--workdir=DIR]

Evaluate a student under a config's protocol, without a run.""",
    "export": """dccot export --checkpoint=DIR --out=DIR

Write a trained student as a Hugging Face directory. On several processes each writes its part; --out must be a directory that all see.""",
    "export-traces": """dccot export-traces --workdir=DIR --format=FORMAT --out=FILE [--stage=STAGE] [--arm=NAME[/SEED]]

Write the traces of a run as a file in a format that other trainers read.""",
    "tasks": """dccot tasks [--data_dir=DIR]

List the tasks there are, what each is evaluated on, and whether its data are at hand.""",
    "validate": """dccot validate --config=FILE.py [--config.a.b=VALUE ...]

Check a config and everything it names, before any work, and list its arms and their stages.""",
    "doctor": """dccot doctor [--config=FILE.py] [--workdir=DIR]

Look at the devices, versions, memory, collectives and storage of every process, and at the mesh of a config.
Exit code 1: something is wrong.""",
    "estimate": """dccot estimate --config=FILE.py --topology=NAME [--json] [--aot|--noaot]

From the config alone: does it fit on that machine, how fast can it be, what would make it fit.""",
}


def help_text(verb: str) -> str:
    """Usage, what the command does, and its flags; of a command without a config also its signals and selectors."""
    if verb in STANDALONE:
        from dccot_jax.standalone import help

        return help.help_text(verb)
    return f"{_USAGE[verb]}\n\nFlags:\n{flag_lines(verb)}\n"
