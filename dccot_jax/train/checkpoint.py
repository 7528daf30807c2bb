"""Parameters on disk, and opening any student from there; the states of a running training are in `states`.

Arrays are read straight into the shardings of whatever mesh is there.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from dccot_jax.artifact import MANIFEST, Artifact, ArtifactError, copy_tree, open_artifact
from dccot_jax.data.template import stop_ids
from dccot_jax.data.tokenizer import load_tokenizer
from dccot_jax.model import decoder, hf, lora
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.gguf_io import is_gguf
from dccot_jax.model.sharding import make_mesh, param_shardings, slice_count, weight_shapes
from dccot_jax.processes import is_lost_peer
from dccot_jax.records import InputError
from dccot_jax.train.abandoned import forget_abandoned_futures

FINAL = "final"  # directory of the trained parameters in a train artifact
ADAPTER = "adapter"  # PEFT directory in the artifact of a training of adapters
STATE = "state"  # directory of the training state in a checkpoint


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
    """Open a student artifact, a train artifact, one of its kept checkpoints or a Hugging Face directory, onto any mesh.

    Args:
      source: a finished artifact of kind ``student``, ``train`` or ``train:<name>``, or a path to one, to a Hugging Face
        directory or to ``checkpoints/<step>`` in a train artifact.
      mesh: from `model.sharding.make_mesh`. param_dtype: dtype of the parameters in memory.

    Raises:
      CheckpointError: the source is none of these. ArtifactError: it is one, and damaged.
    """
    where = str(source.path if isinstance(source, Artifact) else source)
    kept = epath.Path(where) / STATE
    inside = kept.exists()  # of a checkpoint that a training left
    if inside:
        source = open_artifact(kept.parent.parent.parent)
    found = source if isinstance(source, Artifact) else resolve_checkpoint(source)
    if not isinstance(found, Artifact):
        mc, params = hf.load_hf(found, mesh, dtype=param_dtype)
        tokenizer = load_tokenizer(found)
        stops = stop_ids(tokenizer, mc.eos_token_ids)
        pad: Any = stops[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        return Student(mc, params, found, stops[0], tuple(stops), int(pad), where)
    record = found.json("student")
    mc, about = ModelConfig.from_dict(record["model"]), record["tokenizer"]
    if inside:
        params = checkpointed_params(kept, found, mc, mesh, param_dtype)
    elif found.kind.split(":")[0] == "train":
        params = restore_params(found.file(FINAL), abstract_params(mc, mesh, param_dtype))
    else:
        params = untrained_params(found, mesh, param_dtype)
    return Student(mc, params, found.file("tokenizer"), about["eos_id"], tuple(about["stop_ids"]), about["pad_id"], where)


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
    if is_gguf(folder):
        raise CheckpointError(f"{folder}: a GGUF file is read as student.path alone; give the student artifact made from it")
    raise CheckpointError(f"{folder}: neither an artifact ({MANIFEST}) nor a Hugging Face directory (config.json)")


def untrained_params(source: Artifact, mesh: jax.sharding.Mesh, dtype: Any) -> Any:
    """The parameters of a student artifact, or those that a training began with: what its student record names."""
    record = source.json("student")
    mc, weights = ModelConfig.from_dict(record["model"]), record["weights"]
    if weights["kind"] == "random":
        return _cast(random_params(mc, mesh, int(weights["seed"])), mesh, dtype)
    return hf.load_hf(weights["path"], mesh, dtype=dtype)[1]


def checkpointed_params(path: epath.Path, training: Artifact, mc: ModelConfig, mesh: jax.sharding.Mesh, dtype: Any) -> Any:
    """Parameters of a state that a finished training left on disk; adapters merged into the weights they were trained beside.

    These are the student's own in the training's frozen dtype, as in ``final/``. Raises ArtifactError if they do not read.
    """
    settings = training.json("final").get("lora")
    if settings is None:
        return restore_params(path, abstract_params(mc, mesh, dtype), inside="params")
    adapted = dataclasses.replace(mc, lora=settings)
    adapters = restore_params(path, lora.split(adapted, abstract_params(adapted, mesh))[0], inside="params")
    base = untrained_params(training, mesh, frozen_dtype(training))
    with jax.set_mesh(mesh):
        merged = jax.jit(lambda params, frozen: lora.merge(lora.join(params, frozen), adapted)[0])(adapters, base)
    return _cast(merged, mesh, dtype)


def frozen_dtype(training: Artifact) -> str:
    """Dtype of the weights that a training of adapters left alone (``train.lora.frozen_dtype``)."""
    return training.manifest["config"].get("train.lora.frozen_dtype", "float32")  # a default is not in the manifest


def export_hf(source: Artifact | epath.PathLike, out_dir: str | os.PathLike[str]) -> None:
    """Write a student in the Hugging Face layout (configs, safetensors, tokenizer); loads in ``transformers``, stops as it does here.

    A training of adapters is written merged, and its adapters beside it in ``adapter/``, a PEFT directory; one of its checkpoints
    is written merged alone.
    """
    mesh = make_mesh({"data": slice_count(), "fsdp": -1, "tensor": 1})
    student = load_student(source, mesh)
    hf.save_hf(student.params, student.mc, student.tokenizer_dir, out_dir, stop_ids=student.stop_ids)
    adapter = epath.Path(source.path if isinstance(source, Artifact) else source) / ADAPTER
    if adapter.exists() and jax.process_index() == 0:
        copy_tree(adapter, epath.Path(out_dir) / ADAPTER)


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
    """Write parameters and wait until they are on disk. A directory left by a killed run is replaced. Every process calls this.

    Raises CheckpointError if they cannot be written.
    """
    forget_abandoned_futures()
    try:
        with ocp.StandardCheckpointer() as saver:
            saver.save(epath.Path(path), params, force=True)
            saver.wait_until_finished()
    except (OSError, ValueError) as error:
        if is_lost_peer(error):
            raise
        raise CheckpointError(
            f"{path}: parameters could not be written ({cause(error)}); make room and run the same command again"
        ) from error


def restore_params(path: epath.PathLike, target: Any, *, inside: str = "") -> Any:
    """Read parameters into the shapes and shardings of `target` (`abstract_params`); each process reads only its shards.

    Args:
      inside: their key in a larger tree, of which nothing else is read.

    Raises ArtifactError if they do not read, or do not have the model's shapes.
    """
    forget_abandoned_futures()
    try:
        if inside:
            whole = {inside: target}
            form = ocp.args.PyTreeRestore(whole, restore_args=ocp.checkpoint_utils.construct_restore_args(whole), partial_restore=True)
            return ocp.PyTreeCheckpointHandler().restore(epath.Path(path), args=form)[inside]
        with ocp.StandardCheckpointer() as reader:
            return reader.restore(epath.Path(path), target)
    except (ValueError, OSError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path}: parameters do not read ({first_line(error)})") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's text, cut to what fits a log line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]


def cause(error: BaseException) -> str:
    """The operating system's words at the end of a tensorstore message, else the first line."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    message, *notes = re.split(r" \[\w+=", line, maxsplit=1)  # of tensorstore, in an order that differs between its versions
    return message.rsplit(": ", 1)[-1] if notes else line[:200]
