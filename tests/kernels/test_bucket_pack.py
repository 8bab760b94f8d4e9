"""Packing into a flat buffer and back, against NumPy."""

import re

import jax
import jax.numpy as jnp
import machine
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

from txcore import kernels

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

AXIS = "data"
# The Pallas kernels are interpreted, which an accelerator refuses.
BOTH = pytest.mark.parametrize(
    "implementation",
    ["xla", "pallas", "mosaic_tpu"] if machine.ON_CPU else ["xla", "pallas", "triton_ir"],
)
SHAPES = {
    "tree": {"w": (3, 5), "b": [(7,), ()]},
    "scalar": (),
    "one": {"a": (1,)},
    "odd": [(1023,), (1025,), (2, 3, 1)],
}


def tree(shapes, dtypes=("float32",), seed=0):
    random, kinds = np.random.default_rng(seed), iter(100 * dtypes)
    return jax.tree.map(
        lambda shape: jnp.asarray(random.normal(size=shape), next(kinds)),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )


def truth(arrays, scale=1.0):
    rows = [np.asarray(leaf, np.float64).ravel() * scale for leaf in jax.tree.leaves(arrays)]
    return np.concatenate(rows)


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert (a.shape, a.dtype, a.weak_type) == (b.shape, b.dtype, False)
        np.testing.assert_array_equal(np.asarray(a, np.float64), np.asarray(b, np.float64))


@BOTH
@pytest.mark.parametrize("name", SHAPES)
def test_unpack_inverts_pack(name, implementation):
    arrays = tree(SHAPES[name])
    flat = kernels.pack(arrays, implementation=implementation)
    np.testing.assert_array_equal(flat, truth(arrays))
    assert_same(kernels.unpack(flat, arrays, implementation=implementation), arrays)
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arrays)
    assert_same(kernels.unpack(flat, types, implementation=implementation), arrays)


@BOTH
@pytest.mark.parametrize("to", ["float32", "bfloat16", "float16"])
def test_the_cast_product_is_rounded_once(to, implementation):
    arrays = tree(SHAPES["tree"], ("float32", "bfloat16", "float16"))
    flat = kernels.pack(arrays, dtype=to, scale=1 / 3, implementation=implementation)
    assert flat.dtype == to
    exact = truth(arrays, float(np.float32(1 / 3)))  # in float32 first, as is documented
    want = exact.astype(np.float32).astype(jnp.dtype(to))
    np.testing.assert_array_equal(np.asarray(flat), want)

    got = kernels.unpack(flat, arrays, scale=3, implementation=implementation)
    wide = want.astype(np.float32) * np.float32(3)
    for a, like in zip(jax.tree.leaves(got), jax.tree.leaves(arrays), strict=True):
        part, wide = wide[: like.size], wide[like.size :]
        np.testing.assert_array_equal(np.asarray(a).ravel(), part.astype(like.dtype))


@BOTH
def test_float64_is_packed_in_float64(implementation):
    with jax.enable_x64(True):
        arrays = tree(SHAPES["tree"], ("float64", "float32"))
        flat = kernels.pack(arrays, dtype="float64", scale=1 / 3, implementation=implementation)
        np.testing.assert_allclose(flat, truth(arrays) / 3, rtol=1e-15)


@BOTH
def test_a_scale_may_be_traced_and_none_of_the_gradient_flows_to_it(implementation):
    arrays = tree(SHAPES["tree"])

    def loss(arrays, scale):
        return (kernels.pack(arrays, scale=scale, implementation=implementation) ** 2).sum()

    to_arrays, to_scale = jax.jit(jax.grad(loss, (0, 1)))(arrays, jnp.float32(0.5))
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b / 2, rtol=1e-6), to_arrays, arrays
    )  # d/dx of (x / 2)^2
    assert to_scale == 0


@BOTH
def test_an_overflow_is_infinite_and_a_nan_stays_in_its_place(implementation):
    arrays = [jnp.array([1e6, 1.0]), jnp.array([jnp.nan, -jnp.inf, 2.0])]
    flat = kernels.pack(arrays, dtype="float16", scale=1.0, implementation=implementation)
    np.testing.assert_array_equal(flat, np.array([np.inf, 1, np.nan, -np.inf, 2], np.float16))


def test_an_empty_tree_and_arrays_without_elements():
    assert (kernels.pack({}).shape, kernels.pack({}).dtype) == ((0,), jnp.float32)
    assert kernels.pack([], dtype="float16").dtype == jnp.float16
    assert kernels.unpack(jnp.zeros(0), {"a": []}) == {"a": []}
    arrays = [jnp.ones((2, 0)), jnp.ones(3)]
    assert_same(kernels.unpack(kernels.pack(arrays), arrays), arrays)


def parameters():
    return tree({"w1": (5, 7), "b1": (7,), "w2": (7, 3), "b2": (3,)})


def loss(flat, x):
    p = kernels.unpack(flat, parameters())
    return (jnp.tanh(x @ p["w1"] + p["b1"]) @ p["w2"] + p["b2"]).sum()


def test_the_gradient_of_unpacked_parameters_is_one_concatenation():
    flat, x = kernels.pack(parameters()), jnp.ones((2, 5))
    gradient = jax.grad(loss)
    equations = jax.make_jaxpr(gradient)(flat, x).jaxpr.eqns
    whole = [e.primitive.name for e in equations if e.outvars[0].aval.shape == flat.shape]
    assert whole == ["name", "concatenate"]  # the parameters' name for an audit, the gradient
    if not machine.ON_CPU:  # fusions hold copies of an operation elsewhere
        return
    hlo = jax.jit(gradient).lower(flat, x).compile().as_text()
    assert len(re.findall(r" concatenate\(", hlo)) == 1
    assert not re.search(r" (pad|dynamic-update-slice|scatter)\(", hlo)


@BOTH
def test_gradients_both_ways(implementation):
    arrays = tree(SHAPES["tree"], ("float32", "bfloat16", "float32"))

    def there_and_back(arrays):
        flat = kernels.pack(arrays, dtype="float32", scale=2, implementation=implementation)
        return kernels.unpack(flat, arrays, scale=3, implementation=implementation)

    out, vjp = jax.vjp(there_and_back, arrays)
    want = jax.tree.map(lambda x: (6 * x.astype(jnp.float32)).astype(x.dtype), arrays)
    assert_same(out, want)
    assert_same(vjp(arrays)[0], want)


@BOTH
def test_vmap(implementation):
    rows = tree({"w": (4, 3, 2), "b": (4,)})
    packed = jax.vmap(lambda t: kernels.pack(t, scale=2, implementation=implementation))
    want = np.stack([truth(jax.tree.map(lambda x, i=i: x[i], rows), 2) for i in range(4)])
    np.testing.assert_array_equal(jax.jit(packed)(rows), want)
    like = jax.tree.map(lambda x: x[0], rows)
    back = jax.vmap(lambda f: kernels.unpack(f, like, scale=0.5, implementation=implementation))
    assert_same(jax.jit(back)(packed(rows)), rows)


@pytest.fixture(scope="module")
def mesh():
    return machine.mesh(data=2)


@BOTH
@pytest.mark.parametrize("checked", [True, False])
def test_in_shard_map_leaves_may_vary_along_different_axes(checked, implementation, mesh):
    arrays = {"sharded": jnp.arange(6.0), "whole": jnp.arange(3.0)}

    def on_device(arrays):
        flat = kernels.pack(arrays, scale=2, implementation=implementation)
        summed = lax.psum(flat, AXIS)
        gradient = jax.grad(
            lambda f: (kernels.unpack(f, arrays, implementation=implementation)["whole"]).sum()
        )(flat)
        return kernels.unpack(summed, arrays, scale=0.5, implementation=implementation), gradient

    mapped = jax.shard_map(
        on_device,
        mesh=mesh,
        in_specs=({"sharded": P(AXIS), "whole": P()},),
        out_specs=(P(), P(AXIS)),
        check_vma=checked,
    )
    got, gradient = jax.jit(mapped)(arrays)
    np.testing.assert_array_equal(got["sharded"], [3, 5, 7])
    np.testing.assert_array_equal(got["whole"], [0, 2, 4])
    np.testing.assert_array_equal(gradient, [0, 0, 0, 1, 1, 1] * 2)


def test_the_buffer_of_whole_leaves_is_whole(mesh):
    # out_specs=P() is refused by jax for a result that varies.
    mapped = jax.shard_map(kernels.pack, mesh=mesh, in_specs=P(), out_specs=P())
    np.testing.assert_array_equal(mapped([jnp.ones(2), jnp.zeros(())]), [1, 1, 0])


ONE = jnp.ones(3)
BAD = {
    "integers": (
        lambda: kernels.pack({"a": ONE, "n": jnp.arange(3)}),
        TypeError,
        "pack: arrays['n'] needs a floating-point dtype, got int32: cast it, for example "
        "arrays['n'].astype(jnp.float32)",
    ),
    "mixed": (
        lambda: kernels.pack({"a": ONE, "b": ONE, "c": ONE.astype(jnp.bfloat16)}),
        TypeError,
        "pack: without dtype= all arrays need one dtype, got arrays['b'] float32, arrays['c'] "
        "bfloat16: pass the buffer's dtype, for example dtype=jnp.float32",
    ),
    "integer buffer": (
        lambda: kernels.pack([ONE], dtype=int),
        TypeError,
        "pack: dtype needs a floating-point dtype or None, got int64: use jnp.concatenate for "
        "others",
    ),
    "scales": (
        lambda: kernels.pack([ONE], scale=jnp.ones(2)),
        ValueError,
        "pack: scale needs to be a scalar, got shape (2,): multiply the arrays themselves to "
        "scale each by its own factor",
    ),
    "too short": (
        lambda: kernels.unpack(ONE, [ONE, ONE]),
        ValueError,
        "unpack: flat needs the shape (6,), all elements of like, got (3,): pass the tree that "
        "was packed, or shapes like its own, and leave padding out",
    ),
    "not flat": (
        lambda: kernels.unpack(ONE[None], ONE),
        ValueError,
        "unpack: flat needs the shape (3,), all elements of like, got (1, 3): pass the tree "
        "that was packed, or shapes like its own, and leave padding out",
    ),
    "like integers": (
        lambda: kernels.unpack(ONE, {"n": jnp.arange(3)}),
        TypeError,
        "unpack: like['n'] needs a floating-point dtype, got int32: keep what is not "
        "floating-point out of the buffer",
    ),
    "integer buffer to unpack": (
        lambda: kernels.unpack(jnp.arange(3), ONE),
        TypeError,
        "unpack: flat needs a floating-point dtype, got int32: cast it, for example "
        "flat.astype(jnp.float32)",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_arguments_are_refused(bad):
    call, error, text = BAD[bad]
    with pytest.raises(error, match=re.escape(text)):
        call()


@machine.cpu_only("a GPU compiles it")
def test_triton_ir_is_refused_where_nothing_compiles_it():
    text = (
        "pack: implementation='triton_ir' was asked for, but its kernel is Triton's, and nothing "
        "compiles that for cpu: pass 'xla' or 'pallas_triton' or 'mosaic_tpu', or leave "
        "implementation out to have one chosen"
    )
    with pytest.raises(NotImplementedError, match=re.escape(text)):
        kernels.pack([ONE], implementation="triton_ir")


@BOTH
def test_more_arrays_than_a_kernel_takes_and_empty_ones(implementation):
    random = np.random.default_rng(0)
    leaves = [jnp.asarray(random.normal(size=n), jnp.float32) for n in [3, 0, 1, 17] * 10]
    packed = jax.jit(lambda *x: kernels.pack(x, scale=2.0, implementation=implementation))(*leaves)
    np.testing.assert_array_equal(packed, 2 * np.concatenate(leaves))
    back = jax.jit(lambda x: kernels.unpack(x, leaves, scale=0.5, implementation=implementation))
    for got, want in zip(back(packed), leaves, strict=True):
        np.testing.assert_array_equal(got, want)


def kernel_calls(function, *args):
    """Return the text of a program lowered for a GPU that is not here, and its kernels' number."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100", num_cores=None, platform="gpu")
    mesh = jax.sharding.AbstractMesh((), (), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        lowered = jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",))
    text = lowered.as_text()
    return text, text.count("stablehlo.custom_call @__gpu$xla.gpu.triton")


@pytest.mark.parametrize("scale", [None, 0.5])
def test_triton_ir_packs_200_arrays_in_one_launch(scale):
    leaves = [jax.ShapeDtypeStruct((64 + i,), jnp.float32) for i in range(200)]
    text, calls = kernel_calls(
        lambda *x: kernels.pack(x, dtype="bfloat16", scale=scale, implementation="triton_ir"),
        *leaves,
    )
    assert calls == 1
    assert "grid_x = 200 : i32" in text
    flat = jax.ShapeDtypeStruct((sum(x.size for x in leaves),), jnp.bfloat16)
    _, calls = kernel_calls(
        lambda x: kernels.unpack(x, leaves, scale=scale, implementation="triton_ir"), flat
    )
    assert calls == 1


def test_triton_ir_packs_each_dtype_and_every_256_arrays_in_one_launch():
    dtypes = [jnp.float32] * 300 + [jnp.bfloat16] * 2
    leaves = [jax.ShapeDtypeStruct((5,), dtype) for dtype in dtypes]
    text, calls = kernel_calls(
        lambda *x: kernels.pack(x, dtype="float32", implementation="triton_ir"), *leaves
    )
    assert calls == 3
    # The others fill more of the first's buffer.
    assert text.count("#stablehlo.output_operand_alias<") == 2
