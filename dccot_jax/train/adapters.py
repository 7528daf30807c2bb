"""What a training moves and what stays: all weights, or adapters beside frozen ones (``train.lora``)."""

from __future__ import annotations

import functools
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from dccot_jax.artifact import Artifact, ArtifactWriter, copy_tree
from dccot_jax.model import lora
from dccot_jax.model.config import ModelConfig
from dccot_jax.model.peft import save_peft
from dccot_jax.records import derive_seed
from dccot_jax.train.checkpoint import ADAPTER, abstract_params, load_student
from dccot_jax.train.settings import lora_settings


def trained_model(mc: ModelConfig, train: Any) -> ModelConfig:
    """`mc` with the adapters that the config's ``train`` group asks for. Raises ModelError."""
    settings = lora_settings(train)
    return mc if settings is None else lora.with_adapters(mc, **settings)


def abstract_trained(mc: ModelConfig, mesh: jax.sharding.Mesh, train: Any) -> tuple[Any, dict[str, Any]]:
    """Shapes and shardings of what is trained, and {"frozen": those of what is not} where there is such."""
    if mc.lora is None:
        return abstract_params(mc, mesh), {}
    adapters, frozen = lora.split(mc, abstract_params(mc, mesh))
    dtype = jnp.dtype(train.lora.frozen_dtype)
    return adapters, {"frozen": jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding), frozen)}


def load_frozen(student: Artifact, mc: ModelConfig, mesh: jax.sharding.Mesh, train: Any) -> dict[str, Any]:
    """{"frozen": the student's own weights} where only adapters are trained."""
    return {} if mc.lora is None else {"frozen": load_student(student, mesh, param_dtype=jnp.dtype(train.lora.frozen_dtype)).params}


def fresh(student: Artifact, mc: ModelConfig, mesh: jax.sharding.Mesh, seed: int) -> Any:
    """What is trained, before step 0: adapters by the run's seed, or the student's own weights. Needs `mesh` in use."""
    if mc.lora is None:
        return load_student(student, mesh).params
    return jax.jit(functools.partial(lora.init_adapters, mc))(jax.random.key(_seed(seed, "adapters")))


def dropout_seed(seed: int) -> int:
    return _seed(seed, "dropout")


def _seed(root: int, name: str) -> int:
    return derive_seed(root, name) % (1 << 31)


def whole(state: Any, mc: ModelConfig) -> Any:
    """The trained model's float32 parameters without adapters, merged on the mesh where they lie."""
    if mc.lora is None:
        return state["params"]
    return jax.jit(lambda params, frozen: lora.merge(lora.join(params, frozen), mc)[0])(state["params"], state["frozen"])


def save_adapter(out: ArtifactWriter, params: Any, mc: ModelConfig, base: str | None) -> None:
    """Write the adapters as a PEFT directory into a train artifact, `base` as in `save_peft`. All processes call it."""
    with tempfile.TemporaryDirectory() as folder:
        save_peft(params, mc, base, folder)
        if jax.process_index() == 0:
            copy_tree(epath.Path(folder), out.file(ADAPTER))
