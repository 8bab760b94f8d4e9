"""MeshSpec and Plan: positions and groups against hand-written arithmetic, and refusals."""

import re

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.plan.batch_specs import top_key

AXES = ("data", "pipe", "model")
SHAPE = (2, 2, 2)


@pytest.fixture
def cube():
    """A mesh whose devices are not in the order of their ids."""
    return tx.MeshSpec(devices=jax.devices()[::-1], axes=AXES, shape=SHAPE)


def says(error, text):
    return pytest.raises(error, match=f"^{re.escape(text)}$")


def test_shape_and_size(cube):
    assert cube.shape == {"data": 2, "pipe": 2, "model": 2}
    assert cube.size == 8
    assert cube.devices == jax.devices()[::-1]
    assert repr(cube) == "MeshSpec(axes=('data', 'pipe', 'model'), shape=(2, 2, 2), 8 x cpu)"


def test_default_is_one_data_axis_over_all_devices():
    mesh = tx.MeshSpec()
    assert mesh.shape == {"data": 8}
    assert set(mesh.devices) == set(jax.devices())


def test_shape_with_all_devices():
    assert tx.MeshSpec(axes=("data", "model"), shape=(4, 2)).shape == {"data": 4, "model": 2}


def test_one_axis_may_be_a_plain_string():
    assert tx.MeshSpec(jax.devices()[:3], axes="data").shape == {"data": 3}


@pytest.mark.parametrize("number", range(8))
def test_position_and_coordinates(cube, number):
    device = jax.devices()[::-1][number]
    assert cube.position(device) == number
    assert cube.coordinates(device) == {
        "data": number // 4,
        "pipe": number // 2 % 2,
        "model": number % 2,
    }


def test_position_of_this_process_is_its_first_device_here(cube):
    assert cube.position() == 0
    assert cube.coordinates() == {"data": 0, "pipe": 0, "model": 0}


REPLICA_GROUPS = {
    "data": ((0, 4), (1, 5), (2, 6), (3, 7)),
    "pipe": ((0, 2), (1, 3), (4, 6), (5, 7)),
    "model": ((0, 1), (2, 3), (4, 5), (6, 7)),
}


@pytest.mark.parametrize("axis", AXES)
def test_replica_groups(cube, axis):
    assert cube.replica_groups(axis) == REPLICA_GROUPS[axis]


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("number", range(8))
def test_group(cube, axis, number):
    stride = {"data": 4, "pipe": 2, "model": 1}[axis]
    index = number // stride % 2
    first = number - index * stride
    other = first + (1 - index) * stride
    group = cube.group(axis, cube.devices[number])
    assert group == tx.DeviceGroup(axis, 2, index, (first, first + stride), other, other)


def test_neighbours_close_the_ring():
    mesh = tx.MeshSpec(jax.devices(), axes=("data", "model"), shape=(2, 4))
    for index, (left, right) in enumerate([(3, 1), (0, 2), (1, 3), (2, 0)]):
        group = mesh.group("model", mesh.devices[4 + index])
        assert (group.previous, group.next) == (4 + left, 4 + right)
        assert group.index == index


def test_alone_each_device_is_its_own_neighbour():
    group = tx.MeshSpec(jax.devices()[:1]).group("data")
    assert group == tx.DeviceGroup("data", 1, 0, (0,), 0, 0)


def test_sharding_places_rows_by_index(cube):
    x = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    placed = jax.device_put(x, cube.sharding(("data", "pipe"), "model"))
    for shard in placed.addressable_shards:
        at = cube.coordinates(shard.device)
        row, column = 2 * at["data"] + at["pipe"], 3 * at["model"]
        np.testing.assert_array_equal(shard.data, x[row : row + 1, column : column + 3])


def test_sharding_without_spec_replicates(cube):
    placed = jax.device_put(np.arange(3.0), cube.sharding())
    assert placed.is_fully_replicated
    assert len(placed.addressable_shards) == 8


def test_a_mismatched_spec_is_an_error_and_no_reshard(cube):
    x = jax.device_put(np.ones(4, np.float32), cube.sharding("data"))
    y = jax.device_put(np.ones(4, np.float32), cube.sharding("model"))
    with pytest.raises(Exception, match="sharding"):
        jax.jit(lambda x, y: x + y)(x, y)


@pytest.mark.parametrize(
    "given, text",
    [
        ({"axes": ()}, "MeshSpec needs axes= at least one axis name, got ()"),
        ({"axes": ("data", "")}, "MeshSpec needs axes= at least one axis name, got ('data', '')"),
        ({"axes": (1,)}, "MeshSpec needs axes= at least one axis name, got (1,)"),
        (
            {"axes": ("data", "data"), "shape": (2, 4)},
            "MeshSpec needs each axis name once, got axes=('data', 'data')",
        ),
        ({"devices": []}, "MeshSpec needs at least one device, got devices=[]"),
        (
            {"axes": ("data", "model")},
            "MeshSpec needs shape= one size for each of the axes ('data', 'model'), whose "
            "product is the number of devices, 8",
        ),
        (
            {"axes": ("data", "model"), "shape": (8,)},
            "MeshSpec needs shape= one positive size for each of the axes ('data', 'model'), "
            "got (8,)",
        ),
        (
            {"axes": ("data", "model"), "shape": (-2, -4)},
            "MeshSpec needs shape= one positive size for each of the axes ('data', 'model'), "
            "got (-2, -4)",
        ),
        (
            {"axes": ("data", "model"), "shape": (3, 2)},
            "MeshSpec needs shape= sizes whose product is the number of devices, 8, got "
            "(3, 2) = 6: change shape=, or pass devices= a list that long",
        ),
    ],
)
def test_bad_meshes(given, text):
    with says(ValueError, text):
        tx.MeshSpec(**given)


@pytest.mark.parametrize("ask", ["group", "replica_groups", "check_axis"])
def test_unknown_axis(cube, ask):
    text = (
        "need mesh axis 'batch', but the mesh's axes are 'data', 'pipe', 'model': use one of "
        "them, or name the axis in MeshSpec(axes=...)"
    )
    with says(ValueError, text):
        getattr(cube, ask)("batch")


def test_device_outside_the_mesh():
    inside, outside = jax.devices()[:2]
    mesh = tx.MeshSpec([inside])
    for ask in (mesh.position, mesh.coordinates, lambda device: mesh.group("data", device)):
        with says(ValueError, f"{outside} is not in MeshSpec(axes=('data',), shape=(1,), 1 x cpu)"):
            ask(outside)


def test_process_without_a_device_in_the_mesh(monkeypatch):
    mesh = tx.MeshSpec(jax.devices()[:2])
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    text = "MeshSpec(axes=('data',), shape=(2,), 2 x cpu)"
    with says(ValueError, f"process 1 has no device in {text}: name a device"):
        mesh.position()


# Plans


@pytest.mark.parametrize("axis", [(), 3, ("data", 1), ("data", "data")])
def test_bad_dp(axis):
    text = f"DP needs axis= a mesh axis name or a tuple of different names, got {axis!r}"
    with says(ValueError, text):
        tx.DP(axis=axis)


def test_data_axes():
    assert tx.Plan().data_axes == ()
    assert tx.Plan(data_parallel=tx.DP("data")).data_axes == ("data",)
    assert tx.Plan(data_parallel=tx.DP(("pod", "data"))).data_axes == ("pod", "data")


def test_axes_of_size_one_are_not_active():
    mesh = tx.MeshSpec(jax.devices()[:4], axes=("pod", "data"), shape=(1, 4))
    assert tx.Plan(data_parallel=tx.DP(("pod", "data"))).active_data_axes(mesh) == ("data",)


def test_plan_wants_a_dp():
    text = (
        "Plan needs data_parallel= a tx.DP or None, got 'data': write "
        "tx.Plan(data_parallel=tx.DP(axis=...))"
    )
    with says(TypeError, text):
        tx.Plan(data_parallel="data")


def test_plan_wants_partition_specs():
    text = (
        "Plan needs batch= PartitionSpecs by key, got ('data',) for 'x': write "
        "jax.sharding.PartitionSpec(('data',))"
    )
    with says(TypeError, text):
        tx.Plan(data_parallel=tx.DP("data"), batch={"x": ("data",)})  # type: ignore[dict-item]


@pytest.mark.parametrize(
    "plan, needs, axis",
    [
        (
            tx.Plan(data_parallel=tx.DP("batch")),
            "Plan(data_parallel=DP(axis='batch')) needs",
            "batch",
        ),
        (
            tx.Plan(data_parallel=tx.DP(("data", "pod"))),
            "Plan(data_parallel=DP(axis=('data', 'pod'))) needs",
            "pod",
        ),
        (
            tx.Plan(data_parallel=tx.DP("data"), batch={"x": P("data", ("seq",))}),
            "Plan(batch={'x': ...}) needs",
            "seq",
        ),
    ],
)
def test_validate_names_the_axis(plan, needs, axis):
    text = (
        f"{needs} mesh axis {axis!r}, but the mesh's axes are 'data': use one of them, or name "
        "the axis in MeshSpec(axes=...)"
    )
    with says(ValueError, text):
        plan.validate(tx.MeshSpec())


def test_validate_accepts_what_the_mesh_has(cube):
    tx.Plan(
        data_parallel=tx.DP(("data", "pipe")), batch={"x": P(("data", "pipe"), None, "model")}
    ).validate(cube)


def test_batch_specs(cube):
    plan = tx.Plan(data_parallel=tx.DP(("data", "pipe")), batch={"x": P(("data", "pipe"), "model")})
    specs = plan.batch_specs({"x": np.ones((4, 2)), "y": {"z": np.ones(4)}}, cube)
    assert specs == {
        "x": P(("data", "pipe"), "model"),
        "y": {"z": P(("data", "pipe"))},
    }


def test_batch_specs_leave_out_axes_of_size_one():
    mesh = tx.MeshSpec(jax.devices()[:2], axes=("pod", "data", "model"), shape=(1, 2, 1))
    plan = tx.Plan(data_parallel=tx.DP(("pod", "data")), batch={"x": P(("pod", "data"), "model")})
    specs = plan.batch_specs({"x": np.ones((4, 2)), "y": np.ones(4)}, mesh)
    assert specs == {"x": P("data", None), "y": P("data")}


def test_without_data_parallelism_batches_are_whole():
    assert tx.Plan().batch_specs(np.ones(3), tx.MeshSpec()) == P()


def test_batch_key_that_is_not_there():
    plan = tx.Plan(data_parallel=tx.DP("data"), batch={"img": P("data"), "x": P("data")})
    text = "Plan(batch=...) declares 'img', but the batch has 'mask', 'x' at its top: name those"
    with says(ValueError, text):
        plan.batch_specs({"x": np.ones(8), "mask": np.ones(8)}, tx.MeshSpec())


def test_top_key():
    attribute, key = jax.tree_util.GetAttrKey("x"), jax.tree_util.DictKey("x")
    position = jax.tree_util.SequenceKey(0)
    assert top_key((attribute, position)) == "x"
    assert top_key((key,)) == "x"
    assert top_key((position, key)) == ""
    assert top_key(()) == ""


def test_old_names_warn_and_say_the_new_ones():
    mesh = tx.MeshSpec(jax.devices()[:2])
    with pytest.warns(DeprecationWarning, match=r"^ProcessGroup is now DeviceGroup, since a"):
        assert tx.ProcessGroup is tx.DeviceGroup
    with pytest.warns(DeprecationWarning, match=r"^MeshSpec.rank is now MeshSpec.position, since"):
        assert mesh.rank(mesh.devices[1]) == 1
    with pytest.warns(DeprecationWarning, match=r"^DeviceGroup.rank is now DeviceGroup.index, si"):
        assert mesh.group("data", mesh.devices[1]).rank == 1


def test_a_name_that_never_was_is_none():
    with pytest.raises(AttributeError, match="module 'txcore' has no attribute 'Nothing'"):
        _ = tx.Nothing
