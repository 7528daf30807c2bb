"""What the compiled train step sends between devices, by kind and count, on four meshes of eight; and between slices."""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fake_devices import tpu_slices
from jax.experimental import topologies
from training_cases import TINY, mesh, run_config

from dccot_jax.model.sharding import AXES, make_mesh
from dccot_jax.train.checkpoint import abstract_params
from dccot_jax.train.feed import abstract_batch
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
# forward, two again where the backward pass recomputes, and the rest are sums of cotangents. Along fsdp every gradient of a matrix
# is scattered, along data its share is summed. The head (here the table) is gathered once for all its chunks, and its gradient
# scattered once; to look tokens up the table is not gathered at all: tokens are, and [B, T, D] is exchanged.
EXPECTED = {
    (8, 1, 1): {"layer gathers": 0, "layer scatters": 0, "layer sums": MATRICES, "activation sums": 0, "head gathers": 0},
    (1, 8, 1): {"layer gathers": 2 * MATRICES, "layer scatters": MATRICES, "layer sums": 0, "activation sums": 0, "head gathers": 1},
    (2, 2, 2): {"layer gathers": 2 * MATRICES, "layer scatters": MATRICES, "layer sums": MATRICES, "activation sums": 9, "head gathers": 1},
    (1, 2, 4): {"layer gathers": 2 * MATRICES, "layer scatters": MATRICES, "layer sums": 0, "activation sums": 9, "head gathers": 1},
}


def _compiled(on):
    train = run_config(remat="nothing_saveable").train
    state = abstract_state(abstract_params(MC, on), make_optimizer(train), on)
    batch = abstract_batch(on, ROWS, TOKENS)
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
    compiled, state = _compiled(mesh(*sizes))
    data, fsdp, tensor = sizes
    sent = _sent(compiled.as_text())
    expected = EXPECTED[sizes]
    table = {MC.vocab_size // tensor, MC.vocab_size}
    group, rows = (ROWS // data, TOKENS), ROWS // (data * fsdp)  # tokens that a group of fsdp looks up together

    def count(kind, wanted):
        return sum(n for (name, shape), n in sent.items() if name == kind and wanted(shape))

    def of_layer(shape):
        return len(shape) == 2 and not table & set(shape) and TOKENS not in shape

    def of_table(shape):
        return len(shape) == 2 and bool(table & set(shape))

    assert {kind for kind, _ in sent} <= {"all-gather", "all-reduce", "reduce-scatter", "all-to-all"}
    # Nothing gathers a stack of layers, an activation or a moment: a gather gives one layer's matrix, whole but for its tensor axis.
    assert count("all-gather", of_layer) == expected["layer gathers"]
    assert count("all-gather", of_table) == expected["head gathers"]
    assert count("all-gather", lambda shape: not of_layer(shape) and not of_table(shape) and shape != group) == 0
    assert count("reduce-scatter", of_layer) == expected["layer scatters"]
    assert count("all-reduce", of_layer) == expected["layer sums"]
    assert count("reduce-scatter", of_table) == (fsdp > 1)
    # Of the table's gradients, by look-up and by head, every device sums its own columns with the replicas.
    own = (MC.vocab_size // tensor, MC.hidden_size // fsdp)
    assert count("all-reduce", of_table) == count("all-reduce", lambda shape: shape == own) == (2 if data > 1 else 0)
    activation, looked_up = (rows, TOKENS, MC.hidden_size), (ROWS // data, TOKENS, MC.hidden_size // fsdp)
    assert count("all-reduce", lambda shape: shape == activation) == expected["activation sums"]
    assert count("all-reduce", lambda shape: shape == looked_up) == (tensor > 1)
    assert all(shape in (activation, looked_up) for (kind, shape) in sent if kind in ("all-reduce", "reduce-scatter") and len(shape) == 3)
    # The look-up's rows change places within a group, forward and backward.
    moved = sum(n * math.prod(shape) for (kind, shape), n in sent.items() if kind == "all-to-all")
    assert moved == (2 * math.prod(activation) if fsdp > 1 else 0)

    # Parameters and moments come out as they went in: gradients kept the parameters' sharding.
    shardings = jax.tree.leaves(compiled.output_shardings[0])
    for leaf, sharding in zip(jax.tree.leaves(state), shardings, strict=True):
        assert sharding.is_equivalent_to(leaf.sharding, leaf.ndim)


@pytest.mark.parametrize("sizes", [(2, 2, 2), (4, 2, 1)])
def test_only_gradients_and_totals_cross_between_slices(sizes):
    """Real devices in the order that `make_mesh` gives two slices: which of them each collective joins."""
    fakes = make_mesh(dict(zip(AXES, sizes)), tpu_slices(2, (2, 2), stand_ins=jax.devices())).devices
    slice_of = [fake.slice_index for fake in fakes.flat]
    real = np.vectorize(lambda fake: fake.stands_for, otypes=[object])(fakes)
    compiled, state = _compiled(jax.sharding.Mesh(real, AXES, axis_types=(jax.sharding.AxisType.Explicit,) * 3))

    crossing: list[tuple[str, tuple[int, ...]]] = []
    inside = 0
    for line in compiled.as_text().splitlines():
        found = _sent(line)
        if found and any(len({slice_of[place] for place in group}) > 1 for group in _groups(line)):
            crossing += found.elements()
        else:
            inside += sum(found.values())
    assert inside > MATRICES * 2  # gathers of weights, scatters of gradients
    assert {kind for kind, _ in crossing} == {"all-reduce"}
    # Every one is a device's own share of one layer's gradient, of the table's, or of a norm's, or a number.
    params = state["params"]
    shares = Counter(leaf.sharding.shard_shape(leaf.shape)[1:] for leaf in params["layers"].values() if leaf.ndim == 3)
    shares[params["embed"].sharding.shard_shape(params["embed"].shape)] = 2  # by look-up and by head
    matrices = Counter(shape for _, shape in crossing if len(shape) == 2)
    assert matrices == shares
    assert {shape for _, shape in crossing if len(shape) != 2} <= {(), (MC.hidden_size,)}


@pytest.mark.slow
def test_the_tpu_compiler_sends_nothing_but_sums_between_two_slices(monkeypatch):
    """Compiled for two v5e-16; what crosses the data-centre network is a `send` of the MEGASCALE runtime."""
    pytest.importorskip("libtpu")
    for name, value in {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}.items():
        monkeypatch.setenv(name, value)
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:4x4", num_slices=2).devices
    on = make_mesh({"data": 2, "fsdp": 4, "tensor": 4}, devices)
    assert [{device.slice_index for device in row.flat} for row in on.devices] == [{0}, {1}]
    text = _compiled(on)[0].as_text()
    kinds = Counter(re.findall(r'send\(.*_xla_megascale_transfer_type="(\w+)"', text))
    assert set(kinds) == {"ALL_REDUCE"} and kinds["ALL_REDUCE"] >= 3
    # Every other collective is of one slice's sixteen, which both run alike.
    groups = re.findall(r"replica_groups=\{(\{[\d,{}]*\})\}", text)
    assert groups and max(int(place) for group in groups for place in re.findall(r"\d+", group)) == 15


def _groups(line: str) -> list[list[int]]:
    """Places in the mesh, in its order, of the devices that a collective joins: the spellings of HLO."""
    if lists := re.search(r"replica_groups=\{(\{[\d,{}]*\})\}", line):
        return [[int(place) for place in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", lists[1])]
    if iota := re.search(r"replica_groups=\[([\d,]+)\]<=(\[\S+)", line):
        return _places(iota[2]).reshape(_numbers(iota[1])).tolist()
    axes = re.search(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", line)
    assert axes, line
    names, joined = re.findall(r"'(\w+)'=", axes[1]), re.findall(r"'(\w+)'", axes[3])
    sizes, last = [int(size) for size in re.findall(r"=(\d+)", axes[1])], [names.index(name) for name in joined]
    places = _places(axes[2] or f"[{math.prod(sizes)}]").reshape(sizes)
    return np.moveaxis(places, last, range(-len(last), 0)).reshape(-1, math.prod(sizes[axis] for axis in last)).tolist()


def _places(text: str) -> np.ndarray:
    """[4,2]T(1,0): the numbers from 0 on in that shape, its axes then in that order, as one row."""
    sizes, _, turned = text.partition("T")
    places = np.arange(math.prod(_numbers(sizes))).reshape(_numbers(sizes))
    return (places.transpose(_numbers(turned)) if turned else places).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
