"""What the compiled train step sends between devices, by kind and count, on four meshes of eight."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest
from training_cases import TINY, mesh, run_config

from dccot_jax.train.checkpoint import abstract_params
from dccot_jax.train.feed import batch_sharding
from dccot_jax.train.losses import BATCH_FIELDS
from dccot_jax.train.optimizer import make_optimizer
from dccot_jax.train.step import abstract_state, make_train_step

# V, N·H and K·H, D, F differ from one another and from rows and tokens, so that a shape says what it is.
MC = dataclasses.replace(TINY, vocab_size=208, num_kv_heads=4, num_layers=3, hidden_size=16, intermediate_size=40)
ROWS, TOKENS = 8, 32
MATRICES = 7  # of a layer
KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_COLLECTIVE = re.compile(rf"= (\([^)]*\)|\S+) ({'|'.join(KINDS)})(?:-start)?\(")
_SHAPE = re.compile(r"\w+\[([\d,]*)\]")

# The layers are scanned, so what a layer sends stands in the program once for the forward and once for the backward pass:
# its matrices are gathered once in each, their gradients are summed once, and with a tensor axis two sums of activations go
# forward, two again where the backward pass recomputes, and the rest are sums of cotangents. The backend may gather the table
# again instead of keeping it: from one to three times.
EXPECTED = {
    (8, 1, 1): {"layer gathers": 0, "layer sums": MATRICES, "activation sums": 0, "table gathers": {0}},
    (1, 8, 1): {"layer gathers": 2 * MATRICES, "layer sums": MATRICES, "activation sums": 0, "table gathers": {1, 3}},
    (2, 2, 2): {"layer gathers": 2 * MATRICES, "layer sums": 2 * MATRICES, "activation sums": 10, "table gathers": {1, 3}},
    (1, 2, 4): {"layer gathers": 2 * MATRICES, "layer sums": MATRICES, "activation sums": 10, "table gathers": {1, 3}},
}


def _compiled(sizes):
    on = mesh(*sizes)
    train = run_config(remat="nothing_saveable").train
    state = abstract_state(abstract_params(MC, on), make_optimizer(train), on)
    dtypes = {name: jnp.float32 if name == "weights" else jnp.int32 for name in BATCH_FIELDS}
    batch = {name: jax.ShapeDtypeStruct((ROWS, TOKENS), dtype, sharding=batch_sharding(on)) for name, dtype in dtypes.items()}
    with jax.set_mesh(on):
        return make_train_step(MC, on, train, jnp.float32, steps=4).lower(state, batch).compile(), state


def _sent(text: str) -> Counter[tuple[str, tuple[int, ...]]]:
    """(kind, shape) of every array that a collective of the program gives; several in one operation are counted apart."""
    found: Counter[tuple[str, tuple[int, ...]]] = Counter()
    for result, kind in _COLLECTIVE.findall(text):
        for sizes in _SHAPE.findall(result):
            found[kind, tuple(int(size) for size in sizes.split(",") if size)] += 1
    return found


@pytest.mark.parametrize("sizes", EXPECTED)
def test_collectives_by_kind_and_count(sizes):
    compiled, state = _compiled(sizes)
    data, fsdp, tensor = sizes
    sent = _sent(compiled.as_text())
    expected = EXPECTED[sizes]
    table = {MC.vocab_size // tensor, MC.vocab_size}

    def count(kind, wanted):
        return sum(n for (name, shape), n in sent.items() if name == kind and wanted(shape))

    assert {kind for kind, _ in sent} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert count("all-gather", lambda shape: len(shape) == 2 and not table & set(shape)) == expected["layer gathers"]
    assert count("all-gather", lambda shape: bool(table & set(shape)) and len(shape) == 2) in expected["table gathers"]
    # Nothing gathers a stack of layers, an activation or a moment: a gather gives one layer's matrix, whole but for its tensor axis.
    assert count("all-gather", lambda shape: len(shape) != 2) == 0
    sums = [shape for (kind, shape), n in sent.items() if kind != "all-gather" for _ in range(n)]
    assert sum(len(shape) == 2 and not table & set(shape) and TOKENS not in shape for shape in sums) == expected["layer sums"]
    activation = (ROWS // (data * fsdp), TOKENS, MC.hidden_size)
    assert sum(shape == activation for shape in sums) == expected["activation sums"]
    assert all(shape == activation for shape in sums if len(shape) == 3)

    # Parameters and moments come out as they went in: gradients kept the parameters' sharding.
    shardings = jax.tree.leaves(compiled.output_shardings[0])
    for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)
