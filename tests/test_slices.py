"""Meshes of several TPU slices, and of GPUs on several hosts: what runs over the network and what stays inside."""

from __future__ import annotations

import jax
import numpy as np
import pytest
from fake_devices import gpu_hosts, tpu_slices

from dccot_jax import preflight
from dccot_jax.config import ConfigError, default_config
from dccot_jax.doctor import report
from dccot_jax.model.sharding import MeshError, make_mesh, mesh_shape, slice_count
from dccot_jax.train import checkpoint


def _slices_of(mesh: jax.sharding.Mesh) -> np.ndarray:
    """Slice (or host) of every device, shaped as the mesh."""
    return np.vectorize(lambda device: device.slice_index)(mesh.devices)


@pytest.mark.parametrize("kind", ["TPU v4", "TPU v5 lite", "TPU v6 lite"])
@pytest.mark.parametrize(
    ("slices", "sizes", "shape"),
    [
        (2, {"data": 2, "fsdp": -1, "tensor": 1}, (2, 16, 1)),
        (2, {"data": 2, "fsdp": 2, "tensor": 8}, (2, 2, 8)),
        (2, {"data": -1, "fsdp": 4, "tensor": 2}, (4, 4, 2)),
        (4, {"data": 8, "tensor": -1}, (8, 1, 8)),
    ],
)
def test_data_runs_over_the_slices_and_the_other_axes_stay_inside(kind, slices, sizes, shape):
    devices = tpu_slices(slices, (4, 4), kind)
    mesh = make_mesh(sizes, devices)
    assert mesh.axis_names == ("data", "fsdp", "tensor") and mesh.devices.shape == shape
    assert all(axis == jax.sharding.AxisType.Explicit for axis in mesh.axis_types)
    assert set(mesh.devices.flat) == set(devices)
    of = _slices_of(mesh)
    assert [np.unique(row).tolist() for row in of] == [[i // (shape[0] // slices)] for i in range(shape[0])]
    # Every slice is laid out alike: what is summed over data are the same chips' shares.
    chips = np.vectorize(lambda device: device.coords[:2], otypes=[object])(mesh.devices).reshape(slices, -1)
    assert all(list(row) == list(chips[0]) for row in chips)


def test_one_slice_splits_its_torus_where_the_axes_need_it(monkeypatch):
    devices = tpu_slices(1, (4, 4), "TPU v4")
    monkeypatch.setattr(jax, "devices", lambda: devices)
    mesh = make_mesh({"fsdp": 8, "tensor": 2})
    assert mesh.devices.shape == (1, 8, 2) and set(mesh.devices.flat) == set(devices)
    assert all(sum(abs(a - b) for a, b in zip(*(device.coords for device in pair))) == 1 for pair in mesh.devices[0])  # neighbours


@pytest.mark.parametrize(
    ("sizes", "said"),
    [
        ({"data": 1, "fsdp": -1, "tensor": 1}, "data = 1 must be a multiple of 2, so that fsdp × tensor = 32 × 1 stays inside a slice"),
        ({"data": -1, "fsdp": 4, "tensor": 8}, "data = 1 must be a multiple of 2, so that fsdp × tensor = 4 × 8 stays inside a slice"),
    ],
)
def test_sizes_that_would_reach_over_the_network_are_named(sizes, said):
    with pytest.raises(MeshError) as raised:
        make_mesh(sizes, tpu_slices(2, (4, 4)))
    assert str(raised.value) == f"mesh: {sizes} on 2 slices of 16 devices: {said}, such as mesh.data=2 mesh.fsdp=-1"


def test_slices_that_are_not_equal_are_refused():
    devices = tpu_slices(2, (4, 4))[:-1]
    with pytest.raises(MeshError, match="the slices have 16, 15 devices; they must be equal"):
        make_mesh({"fsdp": -1}, devices)


def test_gpus_of_one_host_lie_together_and_any_axis_may_span_hosts(monkeypatch):
    devices = gpu_hosts(2, 8)
    monkeypatch.setattr(jax, "devices", lambda: devices)
    assert slice_count() == 1
    inside = _slices_of(make_mesh({"data": 2, "fsdp": 4, "tensor": 2}))
    assert np.unique(inside[0]).tolist() == [0] and np.unique(inside[1]).tolist() == [1]
    over = make_mesh({"data": 1, "fsdp": -1, "tensor": 8})  # jax.make_mesh refuses devices of several hosts
    assert over.devices.shape == (1, 2, 8) and _slices_of(over)[0].tolist() == [[0] * 8, [1] * 8]


def test_without_several_slices_nothing_changes():
    assert slice_count() == 1 and slice_count(tpu_slices(1, (2, 2))) == 1
    assert mesh_shape({"fsdp": -1}, 8) == (1, 8, 1)
    assert make_mesh({"fsdp": -1}).devices.ravel().tolist() == jax.devices()
    backwards = jax.devices()[::-1]
    assert make_mesh({"data": 2, "fsdp": 4}, backwards).devices.ravel().tolist() == backwards


def test_a_config_is_refused_before_any_work(monkeypatch):
    monkeypatch.setattr(preflight, "slice_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"^config\.mesh: .* on 2 slices of 4 devices: data = 1 must be a multiple of 2"):
        preflight.check(default_config())
    config = default_config()
    config.mesh.data = 2
    preflight.check(config)
    monkeypatch.setattr(report, "slice_count", lambda: 2)
    assert report._mesh_lines(config, 8) == ["mesh: data 2 × fsdp 4 × tensor 1 = 8 device(s) of 2 slices"]
    assert report._mesh_lines(default_config(), 8) == []


def test_export_spreads_the_student_inside_each_slice(monkeypatch, tmp_path):
    """The mesh of an export has no config to take `data` from."""
    meshes = []

    def stop(_source, mesh):
        meshes.append(mesh)
        raise InterruptedError

    monkeypatch.setattr(checkpoint, "slice_count", lambda: 2)
    monkeypatch.setattr(checkpoint, "load_student", stop)
    with pytest.raises(InterruptedError):
        checkpoint.export_hf(tmp_path, tmp_path / "out")
    assert meshes[0].devices.shape == (2, 4, 1)
