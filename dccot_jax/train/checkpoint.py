"""Checkpoints: the training state while it runs, final parameters, and opening any student from disk.

The only module that knows Orbax. A training checkpoint holds parameters, optimizer state, step and a small JSON record
(whose plan and student it belongs to, the open window of the log, one checksum per array). Arrays are read straight into the
shardings of whatever mesh is there.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from dccot_jax.artifact import MANIFEST, Artifact, ArtifactError, open_artifact, walk, write_atomic
from dccot_jax.data.template import stop_ids
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.model import decoder, hf
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.sharding import make_mesh, param_shardings, weight_shapes
from dccot_jax.records import InputError
from dccot_jax.train.digest import checksums

FINAL = "final"  # directory of the trained parameters in a train artifact
_SIZES = "sizes.json"
_DAMAGE = (ValueError, OSError, KeyError, TypeError, AttributeError)  # what Orbax and tensorstore raise on files that do not read


class CheckpointError(InputError):
    """A checkpoint that does not belong to this training, or a path that holds no student."""


@dataclasses.dataclass(frozen=True)
class Student:
    """A model ready for the train step, the scorer or the sampler.

    Attributes:
      mc: model config. params: parameter tree on the mesh it was loaded for. tokenizer_dir: Hugging Face tokenizer files.
      eos_id: end-of-turn token. stop_ids: that one and whatever else ends a reply. pad_id: fills rows; masked by segment, never by id.
      source: where the student was opened from, for people.
    """

    mc: ModelConfig
    params: Any
    tokenizer_dir: epath.Path
    eos_id: int
    stop_ids: tuple[int, ...]
    pad_id: int
    source: str


# --- opening a student ------------------------------------------------------------------------------------------------


def load_student(source: Artifact | epath.PathLike, mesh: jax.sharding.Mesh, *, param_dtype: Any = jnp.float32) -> Student:
    """Open a student artifact, a train artifact or a Hugging Face directory, onto any mesh.

    Args:
      source: a finished artifact of kind ``student``, ``train`` or ``train:<name>``, or a path to one or to a Hugging Face
        directory. mesh: from `model.sharding.make_mesh`. param_dtype: dtype of the parameters in memory.

    Raises:
      CheckpointError: the source is none of these. ArtifactError: it is one, and damaged.
    """
    found = source if isinstance(source, Artifact) else resolve_checkpoint(source)
    if not isinstance(found, Artifact):
        mc, params = hf.load_hf(found, mesh, dtype=param_dtype)
        tokenizer = load_tokenizer(found)
        stops = stop_ids(tokenizer, mc.eos_token_ids)
        pad: Any = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return Student(mc, params, found, stops[0], tuple(stops), int(pad), str(found))
    record = found.json("student")
    mc, weights, about = ModelConfig.from_dict(record["model"]), record["weights"], record["tokenizer"]
    if found.kind.split(":")[0] == "train":
        params = restore_params(found.file(FINAL), mc, mesh, param_dtype)
    elif weights["kind"] == "random":
        params = _cast(random_params(mc, mesh, int(weights["seed"])), mesh, param_dtype)
    else:
        _, params = hf.load_hf(weights["path"], mesh, dtype=param_dtype)
    return Student(mc, params, found.file("tokenizer"), about["eos_id"], tuple(about["stop_ids"]), about["pad_id"], str(found.path))


def resolve_checkpoint(path: epath.PathLike) -> Artifact | epath.Path:
    """What a path given by a user holds: a finished student or train artifact, or a Hugging Face directory (its path).

    Raises CheckpointError naming what was found instead.
    """
    folder = epath.Path(path)
    if (folder / MANIFEST).exists():
        artifact = open_artifact(folder)
        if artifact.kind.split(":")[0] not in ("student", "train"):
            raise CheckpointError(f"{folder}: an artifact of stage {artifact.kind}, not of student or train")
        return artifact
    if (folder / "config.json").exists():
        return folder
    raise CheckpointError(f"{folder}: neither an artifact ({MANIFEST}) nor a Hugging Face directory (config.json)")


def export_hf(source: Artifact | epath.PathLike, out_dir: str | os.PathLike[str]) -> None:
    """Write a student in the Hugging Face layout (configs, safetensors, tokenizer); loads in ``transformers``, stops as it does here."""
    mesh = make_mesh({"data": 1, "fsdp": -1, "tensor": 1})
    student = load_student(source, mesh)
    hf.save_hf(student.params, student.mc, student.tokenizer_dir, out_dir, stop_ids=student.stop_ids)


def random_params(mc: ModelConfig, mesh: jax.sharding.Mesh, seed: int) -> Any:
    """Fresh float32 parameters, a function of the seed alone, made in their shardings."""
    with jax.set_mesh(mesh):
        return _initialiser(mc, mesh)(jax.random.key(seed))


@functools.lru_cache(maxsize=16)
def _initialiser(mc: ModelConfig, _mesh: jax.sharding.Mesh) -> Callable[[jax.Array], Any]:
    """Compiled once per model and mesh: a sweep opens the same fresh student many times."""
    return jax.jit(functools.partial(decoder.init_params, mc))


def _cast(params: Any, mesh: jax.sharding.Mesh, dtype: Any) -> Any:
    if all(leaf.dtype == jnp.dtype(dtype) for leaf in jax.tree.leaves(params)):
        return params
    with jax.set_mesh(mesh):
        return jax.jit(lambda tree: jax.tree.map(lambda x: x.astype(dtype), tree), donate_argnums=0)(params)


# --- parameters on disk -----------------------------------------------------------------------------------------------


def abstract_params(mc: ModelConfig, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32) -> Any:
    """Shapes and shardings of the parameters, without memory."""
    shapes, shardings = weight_shapes(mc), param_shardings(mc, mesh)
    return jax.tree.map(lambda sharding, shape: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding), shardings, shapes)


def save_params(path: epath.PathLike, params: Any) -> None:
    """Write parameters and wait until they are on disk. A directory left by a killed run is replaced. Every process calls this."""
    with ocp.StandardCheckpointer() as saver:
        saver.save(epath.Path(path), params, force=True)
        saver.wait_until_finished()


def restore_params(path: epath.PathLike, mc: ModelConfig, mesh: jax.sharding.Mesh, dtype: Any = jnp.float32) -> Any:
    """Read parameters into the target shardings of `mesh`; each process reads only its shards.

    Raises ArtifactError if they do not read, or do not have the model's shapes.
    """
    target = abstract_params(mc, mesh, dtype)
    try:
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(epath.Path(path), target)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: parameters do not read ({_first_line(error)})") from error


# --- training checkpoints ---------------------------------------------------------------------------------------------


class TrainCheckpoints:
    """Asynchronous checkpoints of one training; a step number is the number of finished steps.

    Args:
      path: their directory. owner: hashes by name (``plan``, ``student``, …) that a checkpoint must carry to be resumed from.
      keep: how many of the newest to keep; negative keeps all. log: where damage is reported.
    """

    def __init__(self, path: epath.PathLike, owner: Mapping[str, str], *, keep: int, log: Callable[[str], None]):
        self._path = epath.Path(path)
        self._owner = dict(owner)
        self._log = log
        self._unsized: int | None = None
        if jax.process_index() == 0:
            self._path.mkdir(parents=True, exist_ok=True)
        _barrier("checkpoint directory")
        self._manager = ocp.CheckpointManager(
            self._path,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=ocp.checkpoint_managers.LatestN(None if keep < 0 else max(keep, 1)),
                cleanup_tmp_directories=True,
                create=False,
            ),
        )
        self._checksums = jax.jit(checksums)

    def save(self, step: int, state: Any, record: Mapping[str, Any]) -> None:
        """Start writing a checkpoint; returns once the arrays are copied to the host, so `state` may be donated next."""
        self.settle()
        sums = np.asarray(jax.device_get(self._checksums(state))).tolist()
        meta = {"step": step, "owner": self._owner, "checksums": sums, "record": dict(record)}
        self._manager.save(step, args=ocp.args.Composite(state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)))
        self._unsized = step

    def settle(self) -> None:
        """Wait for the write in flight, then record the sizes of its files: how a torn file is told before it is read."""
        self._manager.wait_until_finished()
        if self._unsized is not None and jax.process_index() == 0:
            folder = self._path / str(self._unsized)
            sizes = {str(file.relative_to(folder)): file.stat().length for file in sorted(walk(folder))}
            write_atomic(folder / _SIZES, json.dumps(sizes).encode())
        self._unsized = None

    def restore(self, target: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """The newest whole checkpoint of this training as (step, state, record), or None if there is none.

        A damaged one is reported and set aside, and the one before it is used.

        Args:
          target: tree of ShapeDtypeStructs with shardings, as `state`.

        Raises:
          CheckpointError: a checkpoint belongs to another plan, student or config; the message names both hashes.
        """
        for step in sorted(self._manager.all_steps(), reverse=True):
            try:
                meta = self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]
                owner, record = meta["owner"], meta["record"]
            except _DAMAGE as error:
                self._set_aside(step, error)
                continue
            self._check_owner(step, owner)
            try:
                self._check_sizes(step)
                state = self._manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore(target)))["state"]
                if np.asarray(jax.device_get(self._checksums(state))).tolist() != meta["checksums"]:
                    raise ValueError("array contents differ from their checksums")
            except _DAMAGE as error:
                self._set_aside(step, error)
                continue
            return step, state, record
        return None

    def close(self) -> None:
        """Finish every write in flight. May be called again."""
        self.settle()
        self._manager.close()

    def __enter__(self) -> TrainCheckpoints:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    def _set_aside(self, step: int, error: Exception) -> None:
        """Rename a checkpoint that does not read: its step may be written again, and a person may still look at it."""
        aside = self._path / f"damaged-{step}"
        self._log(f"  checkpoint {step} is damaged ({_first_line(error)}); set aside as {aside.name}, trying the one before")
        if jax.process_index() == 0:
            if aside.exists():
                aside.rmtree()
            (self._path / str(step)).rename(aside)
        _barrier("checkpoint set aside")
        self._manager.reload()

    def _check_owner(self, step: int, owner: Mapping[str, str]) -> None:
        for name, mine in self._owner.items():
            theirs = owner.get(name, "")
            if theirs != mine:
                raise CheckpointError(
                    f"{self._path / str(step)}: checkpoint of another {name} ({theirs[:16]}); this training's {name} is {mine[:16]}. "
                    "Remove the directory or train in another workdir"
                )

    def _check_sizes(self, step: int) -> None:
        folder = self._path / str(step)
        if not (folder / _SIZES).exists():  # killed between the write and its record; the checksums still speak
            return
        for name, size in json.loads((folder / _SIZES).read_text()).items():
            file = folder / name
            length = file.stat().length if file.exists() else -1
            if length != size:
                raise ValueError(f"{name} has {length} bytes instead of {size}")


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
