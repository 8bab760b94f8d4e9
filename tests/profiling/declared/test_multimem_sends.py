"""What Mosaic GPU kernels send to the switch of their node: read from their loops."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from txcore.profiling.declared.collectives import list_declared

BLOCKS = 4


def declared_by(body, *shapes, **axes):
    device = AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    kinds = (AxisType.Auto,) * len(axes)
    mesh = AbstractMesh(tuple(axes.values()), tuple(axes), kinds, abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        f = jax.shard_map(body, in_specs=P(), out_specs=P(), check_vma=False)
        return list_declared(jax.make_jaxpr(f)(*shapes))


def kernel_of(body):
    """Return a kernel of 4 blocks that gets its operand, its result and the block's number."""
    from jax.experimental.pallas import mosaic_gpu as plgpu

    def local(x):
        def kernel(x, out):
            body(x, out, lax.axis_index("block"))

        out_type = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return plgpu.kernel(kernel, out_type=out_type, grid=(BLOCKS,), grid_names=("block",))(x)

    return local


def store(x, out, _=None):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    plgpu.multimem_store(x[:128], out.at[:128], ("data",))


def load(x, out, _=None):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    out[:128] = plgpu.multimem_load_reduce(
        x.at[:128], collective_axes=("data",), reduction_op="add"
    )


def repeat(copy, start, end):
    def body(x, out, block):
        lax.fori_loop(start(block), end(block), lambda i, _: copy(x, out), None)

    return body


SENT = {
    "each block once": (store, BLOCKS * 128),
    "a load, of which every device sends": (load, BLOCKS * 128 * 8),
    "a loop": (repeat(store, lambda b: 0, lambda b: 3), BLOCKS * 3 * 128),
    "a loop of each block's own": (
        *(repeat(store, lambda b: b, lambda b: jnp.maximum(2 * b, 3)),),
        (3 + 2 + 2 + 3) * 128,
    ),
    "a loop of some of a number's bits": (
        *(repeat(store, lambda b: 0, lambda b: (b + 4) & 6),),
        (4 + 4 + 6 + 6) * 128,
    ),
    "a loop of a number's inverse": (
        *(repeat(store, lambda b: 0, lambda b: -(~b)),),
        (1 + 2 + 3 + 4) * 128,
    ),
    "a loop of a choice of three": (
        *(repeat(store, lambda b: 0, lambda b: lax.select_n(b % 3, b, 2 * b, 5 * b)),),
        (0 + 2 + 10 + 3) * 128,
    ),
}


@pytest.mark.parametrize("case", SENT)
def test_copies_are_added_up_over_blocks_and_loops(case):
    body, elements = SENT[case]
    [found] = declared_by(kernel_of(body), jax.ShapeDtypeStruct((512,), jnp.float32), data=8)
    wanted = ("remote-dma", ("data",), 8, "float32", elements, True)
    assert (
        *(found.kind, found.axes, found.group_size),
        *(found.dtype, found.elements, found.size_known),
    ) == wanted


def by_device(x, out, _):
    lax.cond(lax.axis_index("data") == 0, lambda: store(x, out), lambda: None)


def and_of_a_neighbour(x, out, _):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store(x, out)
    out[256:384] = plgpu.remote_ref(x, (lax.axis_index("data") + 1) % 8)[256:384]


def in_a_function_of_its_own_derivative(x, out, block):
    called = jax.custom_jvp(lambda one: store(x, out) or one)
    called.defjvp(lambda primals, tangents: (primals[0], tangents[0]))
    store(x, out)
    called(block)


def and_by_instructions_of_its_own(x, out, _):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    store(x, out)
    plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))(lambda context, ref: None)(out)


UNKNOWN = {
    "instructions of its own": and_by_instructions_of_its_own,
    "a loop of fractions": repeat(
        store, lambda b: 0, lambda b: ((b + 3).astype(jnp.float32) / 2 * 2).astype(jnp.int32)
    ),
    "a neighbour's memory": and_of_a_neighbour,
    "a branch": by_device,
    "a loop of each device's own": repeat(store, lambda b: 0, lambda b: lax.axis_index("data")),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_what_a_device_decides_is_not_known(case):
    [found] = declared_by(
        kernel_of(UNKNOWN[case]), jax.ShapeDtypeStruct((512,), jnp.float32), data=8
    )
    assert not found.size_known


def test_a_call_that_is_not_known_here():
    shape = jax.ShapeDtypeStruct((512,), jnp.float32)
    [found] = declared_by(kernel_of(in_a_function_of_its_own_derivative), shape, data=8)
    assert not found.size_known or found.elements == 2 * BLOCKS * 128


def test_a_local_kernel_declares_nothing():
    def double(x, out, _):
        out[...] = x[...] * 2

    assert declared_by(kernel_of(double), jax.ShapeDtypeStruct((512,), jnp.float32), data=8) == ()
