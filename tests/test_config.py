"""Configs: unknown keys, ill-typed values and impossible combinations fail before any work and say what is accepted."""

from __future__ import annotations

from pathlib import Path

import pytest

from dccot_jax import config as config_lib
from dccot_jax.cli import main
from dccot_jax.config import ConfigError
from dccot_jax.config_identity import config_slice

QUICKSTART = str(Path(__file__).parent.parent / "configs" / "quickstart.py")


def test_defaults_are_valid_and_untouched_by_the_check():
    config = config_lib.default_config()
    before = config_lib.resolved_text(config)
    config_lib.validate(config)
    assert config_lib.resolved_text(config) == before
    assert list(config_lib.arms(config)) == ["run"] and config_lib.seeds(config) == (0,)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"train.stepz": 3}, ["train.stepz", "train.steps"]),
        ({"trian.steps": 3}, ["trian.steps", "train.steps"]),
        ({"train.steps": "many"}, ["train.steps", "many", "int"]),
    ],
)
def test_override_names_field_and_nearest(changes, words):
    with pytest.raises(ConfigError) as caught:
        config_lib.override(config_lib.default_config(), changes)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mix.kind": "lenght"}, ["mix.kind", "lenght", "length"]),
        ({"train.microbatches": 5}, ["microbatches", "rows_per_step"]),
        ({"tokens.max_length": 4096}, ["tokens.max_length", "row_tokens"]),
        ({"augment.methods": ("rephase",)}, ["rephase", "rephrase"]),
        ({"traces.teachers": ()}, ["traces.teachers", "empty"]),
        ({"mix.alpha": 1.5}, ["mix.alpha", "1.5"]),
        ({"train.rows_per_step": 0}, ["rows_per_step", "at least 1"]),
        ({"train.moment_dtype": "bf16"}, ["train.moment_dtype", "bf16", "did you mean 'bfloat16'"]),
        ({"train.moment_dtype": "bfloat16", "train.optimizer": "adafactor"}, ["train.moment_dtype", "adafactor", "no first moment"]),
    ],
)
def test_validate_names_field_value_and_what_is_accepted(changes, words):
    with pytest.raises(ConfigError) as caught:
        config_lib.validate(config_lib.override(config_lib.default_config(), changes))
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "accepted"),
    [
        ("train.learning_rate", -1.0, "must be at least 0"),
        ("train.warmup_steps", -5, "must be at least 0 (0: none)"),
        ("train.steps", -3, "must be at least 0 (0: train.epochs says how many)"),
        ("train.epochs", -1.0, "must be at least 0"),
        ("train.clip_norm", -0.5, "must be at least 0 (0: no clipping)"),
        ("train.weight_decay", -0.1, "must be at least 0"),
        ("train.b1", 1.0, "must lie in [0, 1)"),
        ("train.b2", -0.1, "must lie in [0, 1)"),
        ("train.momentum", 1.0, "must lie in [0, 1)"),
        ("train.eps", 0.0, "must be above 0"),
        ("train.decay_share", 1.1, "must lie in [0, 1]"),
        ("train.final_lr_share", -0.1, "must lie in [0, 1]"),
        ("student.model.rope_theta", 0.0, "must be above 0"),
        ("verify.time_limit_seconds", 0.0, "must be above 0"),
        ("verify.ngram_drop_size", 0, "must be at least 1"),
        ("score.batch_tiles", 0, "must be at least 1"),
        ("score.sampling.temperature", 0.0, "must be above 0; all answers would be one"),
        ("score.over_time.learned", 0.0, "must lie in (0, 1]"),
        ("report.bootstrap", -1, "must be at least 1"),
        ("report.samples", -1, "must be at least 0"),
        ("curriculum.stages", -1, "must be at least 2"),
        ("curriculum.c0", 0.0, "must lie in (0, 1]"),
        ("curriculum.full_at", 1.5, "must lie in (0, 1]"),
        ("mix.temperature", 0.0, "must be above 0"),
        ("traces.max_tokens", 0, "must be at least 1"),
        ("traces.temperature", -1.0, "must be at least 0"),
        ("augment.agreement", 1.5, "must lie in [0, 1]"),
        ("augment.votes", 0, "must be at least 1"),
        ("train.learning_rate", float("nan"), "must be a finite number"),
        ("train.step_deadline_seconds", float("inf"), "must be a finite number"),
    ],
)
def test_numbers_that_cannot_work_are_refused(key, value, accepted):
    with pytest.raises(ConfigError) as caught:
        config_lib.validate(config_lib.override(config_lib.default_config(), {key: value}))
    assert str(caught.value) == f"config.{key}: {value} {accepted}"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seeds", "zzz"),
        ("seeds", True),
        ("curriculum.stage_shares", "zzz"),
        ("curriculum.stage_shares", 0.0),
        ("verify.ngram_sizes", 0),
        ("traces.teachers", "scripted"),
        ("score.judge.judges", 3),
        ("arms", "a"),
        ("score.gradients.validation", 3),
        ("report.compare", 3),
        ("report.compare", ("one",)),
        ("report.compare", ("one", 2)),
        *((key, value) for key in ("evaluate.iid", "evaluate.ood", "evaluate.cross", "score.signals") for value in (3, {"zz": 1})),
        *((key, 3) for key in ("select.tables", "augment.methods", "train.lora.targets", "mix.strong", "mix.long")),
        *((key, "") for key in ("score.gradients.norm_subset", "score.gradients.subset")),
    ],
)
def test_elements_of_another_kind_are_refused(key, value):
    with pytest.raises(ConfigError) as caught:
        config_lib.validate(config_lib.override(config_lib.default_config(), {key: (value,)}))
    shown = list(value) if isinstance(value, tuple) else value
    assert str(caught.value).startswith(f"config.{key}[0]: {shown!r} must be ")


def test_a_number_deep_in_a_tuple_must_be_finite_too():
    steps = ({"name": "threshold", "signal": "nll", "max": float("inf")},)
    with pytest.raises(ConfigError, match=r"config\.select\.steps: inf must be a finite number"):
        config_lib.validate(config_lib.override(config_lib.default_config(), {"select.steps": steps}))
    with pytest.raises(ConfigError, match=r"config\.mix\.weights: 'svamp': -1 must be a number of at least 0"):
        config_lib.validate(config_lib.override(config_lib.default_config(), {"mix.weights": {"svamp": -1}}))


def test_arms_are_checked_too():
    for arm, words in [({"name": "a", "mix.kind": "nope"}, "mix.kind"), ({"name": "a", "mix.knd": "x"}, "mix.kind"), ({}, "name")]:
        config = config_lib.override(config_lib.default_config(), {"arms": (arm,)})
        with pytest.raises(ConfigError, match=words):
            config_lib.validate(config)


def test_slice_leaves_out_what_changes_no_result():
    config = config_lib.default_config()
    first = config_slice(config, ("train", "score"))
    second = config_slice(config_lib.override(config, {"score.batch_tiles": 9, "train.log_every": 1}), ("train", "score"))
    assert first == second
    assert first != config_slice(config_lib.override(config, {"train.learning_rate": 1.0}), ("train", "score"))


def test_the_first_moments_dtype_counts_where_it_is_not_what_older_runs_had():
    config = config_lib.default_config()
    assert "train.moment_dtype" not in config_slice(config, ("train",))
    rounded = config_lib.override(config, {"train.moment_dtype": "bfloat16"})
    assert config_slice(rounded, ("train",)) == config_slice(config, ("train",)) | {"train.moment_dtype": "bfloat16"}


def test_override_leaves_the_original_alone():
    config = config_lib.default_config()
    config_lib.override(config, {"train.steps": 7, "mix.weights": {"a": 1.0}})
    assert config.train.steps == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config.train.stepz=3"], ["train.stepz", "train.steps"]),
        (["--config.train.steps=abc"], ["--config.train.steps=abc: must be a whole number"]),
        (["--config.train.learning_rate=fast"], ["--config.train.learning_rate=fast: must be a number"]),
        (["--config.evaluate.base=maybe"], ["must be true or false"]),
        (["--config.mix.kind=lenght"], ["mix.kind", "did you mean 'length'"]),
        (["--confg=x"], ["confg"]),
    ],
)
def test_command_line_complains_in_one_line(arguments, words, capsys):
    assert main(["validate", f"--config={QUICKSTART}", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    for word in words:
        assert word in lines[0]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["run", f"--config={QUICKSTART}", "--data_dir=/nope"],
            "goes with tasks, score, select, stability, not with run; write --config.data_dir",
        ),
        (["validate", f"--config={QUICKSTART}", "--topology", "foo"], "--topology goes with estimate, not with validate"),
        (["validate", f"--config={QUICKSTART}", "--noaot"], "--noaot goes with estimate, not with validate"),
        (["tasks", "--config.train.steps=3"], "--config.KEY goes with run, eval, validate"),
        (["report", "--workdir=w", "--config=no.py"], "--config goes with run, eval, validate, doctor, estimate, not with report"),
        (["select", "t.jsonl", "--dtype=float32"], "--dtype goes with score, stability, not with select"),
        (["tasks", "--wordir=x"], "wordir"),
    ],
)
def test_a_flag_of_other_commands_is_refused(words, said, capsys):
    assert main(words) == 2
    error = capsys.readouterr().err.strip()
    assert said in error and len(error.splitlines()) == 1


def test_config_file_errors_name_file_and_line(tmp_path, capsys):
    missing = tmp_path / "no.py"
    assert main(["validate", f"--config={missing}"]) == 2
    assert "no such file" in capsys.readouterr().err
    wrong = tmp_path / "wrong.py"
    wrong.write_text(
        "from dccot_jax.config import default_config\ndef get_config():\n    c = default_config()\n    c.train.stps = 1\n    return c\n"
    )
    assert main(["validate", f"--config={wrong}"]) == 2
    error = capsys.readouterr().err
    assert "wrong.py:4: " in error and "'steps'" in error


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def get_config():\n    c = default_config()\n    c.train.steps = 'many'\n    return c", "wrong.py:4: TypeError: "),
        ("import foo_bar", "wrong.py:2: ModuleNotFoundError: No module named 'foo_bar'"),
        ("def get_config():\n    1 / 0", "wrong.py:3: ZeroDivisionError: division by zero"),
        ("def get_config():\n    open('/nowhere/x')", "wrong.py:3: FileNotFoundError: "),
        ("def get_config(:", "wrong.py:2: SyntaxError: invalid syntax"),
        ("def get_config():\n    default_config()", "wrong.py: get_config() returns nothing; it must end with `return`"),
        ("c = default_config()", "wrong.py: has no function get_config()"),
        ("def get_config():\n    return {}", "wrong.py: get_config() returns a dict, not a ConfigDict"),
    ],
)
def test_what_is_wrong_in_a_config_file_is_one_line(tmp_path, capsys, body, said):
    path = tmp_path / "wrong.py"
    path.write_text(f"from dccot_jax.config import default_config\n{body}\n")
    assert main(["validate", "--config", str(path)]) == 2
    error = capsys.readouterr().err.strip()
    assert f"{tmp_path}/{said}" in error and len(error.splitlines()) == 1


def test_a_config_file_takes_an_argument_and_overrides_in_any_order(tmp_path, capsys):
    path = tmp_path / "some.py"
    path.write_text(
        "from dccot_jax.config import default_config\n"
        "def get_config(task):\n    c = default_config()\n    c.traces.task = task\n    return c\n"
    )
    assert main(["validate", "--config.traces.seed=4", f"--config={path}:nothing_such"]) == 2
    assert "nothing_such" in capsys.readouterr().err
    assert main(["validate", "--config.traces.seed=4"]) == 2
    assert "--config=FILE.py is needed" in capsys.readouterr().err


def test_unknown_command_lists_commands(capsys):
    assert main(["rum"]) == 2
    assert "run" in capsys.readouterr().err
