"""What a workdir keeps of its run beside the artifacts: `runs.json` (arms, seeds and their artifacts) and the config.

`dccot report` and `dccot export-traces` read it; resuming needs none of it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from dccot_jax import config as config_lib
from dccot_jax.artifact import ArmRun, Artifact, open_artifact, write_atomic
from dccot_jax.config import ConfigError

INDEX = "runs.json"
_CONFIG = "config.json"


def write_config_text(workdir: epath.Path | Path, config: ConfigDict) -> None:
    """`config.txt`: the resolved config of the latest command, sorted lines for people."""
    write_atomic(workdir / "config.txt", config_lib.resolved_text(config).encode())


def write_record(workdir: epath.Path | Path, config: ConfigDict, runs: Sequence[ArmRun]) -> bool:
    """Write `config.json` and `runs.json`, for `load_runs`. Returns False, writing nothing, if that would put a run without
    evaluations in the place of one that has them all.
    """
    if not all("evaluate" in run.artifacts for run in runs) and _is_finished(workdir):
        return False
    entries = [
        {
            "arm": run.arm,
            "seed": run.seed,
            "config": run.config,
            "artifacts": {name: _place(artifact, workdir) for name, artifact in run.artifacts.items()},
        }
        for run in runs
    ]
    _write_json(workdir / _CONFIG, config_lib.to_plain(config))
    _write_json(workdir / INDEX, entries)
    return True


def load_runs(workdir: epath.Path) -> tuple[ConfigDict, list[ArmRun]]:
    """The config and runs a workdir holds. Raises ConfigError if it holds none, or a file of the record is damaged."""
    if not (workdir / INDEX).exists():
        raise ConfigError(f"--workdir={workdir}: no {INDEX} there; run `dccot run --workdir={workdir}` first")
    entries = read_index(workdir)
    config = config_lib.default_config()
    for key, value in _read_json(workdir / _CONFIG, dict).items():
        flat = {f"{key}.{name}": item for name, item in value.items()} if isinstance(value, dict) else {key: value}
        config = config_lib.override(config, {name: item for name, item in flat.items() if not isinstance(item, dict) or item})
    runs = [
        ArmRun(
            entry["arm"], entry["seed"], entry["config"], {name: open_artifact(workdir / path) for name, path in entry["artifacts"].items()}
        )
        for entry in entries
    ]
    return config, runs


def read_index(workdir: epath.Path | Path) -> list[dict[str, Any]]:
    """The entries of `runs.json`: arm, seed, config, artifacts (paths by node name). Raises ConfigError if it is damaged."""
    entries = _read_json(workdir / INDEX, list)
    for entry in entries:
        if not isinstance(entry, dict) or not {"arm", "seed", "config", "artifacts"} <= set(entry):
            raise _damaged(workdir / INDEX, "an entry is not a run")
    return entries


def shows_evaluations(folder: epath.Path) -> bool:
    """Whether the report in `folder`, if there is one, holds figures of a student."""
    try:
        return bool(json.loads((folder / "results.json").read_bytes()).get("results"))
    except (OSError, ValueError, AttributeError):
        return False


def _is_finished(workdir: epath.Path | Path) -> bool:
    if not (workdir / INDEX).exists():
        return False
    try:
        entries = read_index(workdir)
    except ConfigError:
        return False
    return bool(entries) and all("evaluate" in entry["artifacts"] for entry in entries)


def _read_json(path: epath.Path | Path, kind: type) -> Any:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _damaged(path, "no such file") from None
    except json.JSONDecodeError as error:
        raise _damaged(path, f"not JSON: {error.msg}, line {error.lineno}, column {error.colno}") from None
    except ValueError as error:
        raise _damaged(path, f"not JSON: {error}") from None
    if not isinstance(value, kind):
        raise _damaged(path, f"holds a {type(value).__name__}")
    return value


def _damaged(path: epath.Path | Path, problem: str) -> ConfigError:
    return ConfigError(f"{path}: damaged ({problem}); the same `dccot run` again writes it anew and makes no artifact twice")


def _write_json(path: epath.Path | Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def _place(artifact: Artifact, workdir: epath.Path | Path) -> str:
    """Path of an artifact as the index keeps it: relative inside the workdir, whole outside."""
    return str(artifact.path.relative_to(workdir) if artifact.path.is_relative_to(workdir) else artifact.path)
