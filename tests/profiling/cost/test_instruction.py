"""FLOPs and bytes of single instructions, counted by hand, by brute force and by XLA."""

import itertools

import jax
import jax.numpy as jnp
import pytest

from txcore.profiling.cost.flops import flops_of
from txcore.profiling.cost.instruction import Work, count_work, memory_bytes
from txcore.profiling.hlo import HloError, read_modules
from txcore.profiling.hlo.graph import Graph


def count(line, operands, before=""):
    """Return the work of one instruction whose operands have the given types."""
    lines = [f"%p{i} = {t} parameter({i})" for i, t in enumerate(operands)]
    text = f"HloModule m\n{before}\nENTRY %main (...) -> f32[] {{\n" + "\n".join([*lines, line])
    (module,) = read_modules(text + "\n}\n")
    graph = Graph(module)
    scope = graph.scope_of("main")
    return count_work(scope.computation.instructions[-1], scope, graph)


@pytest.mark.parametrize(
    "operands, line, flops",
    [
        (("bf16[8,4]{1,0}", "bf16[4,16]{1,0}"),
         "%d = f32[8,16]{1,0} dot(%p0, %p1), lhs_contracting_dims={1}, rhs_contracting_dims={0}",
         2 * 8 * 16 * 4),
        (("bf16[3,8,4]{2,1,0}", "bf16[3,4,16]{2,1,0}"),
         "%d = f32[3,8,16]{2,1,0} dot(%p0, %p1), lhs_batch_dims={0}, lhs_contracting_dims={2}, "
         "rhs_batch_dims={0}, rhs_contracting_dims={1}", 2 * 3 * 8 * 16 * 4),
        (("bf16[8,4,5]{2,1,0}", "bf16[4,5]{1,0}"),
         "%d = f32[8]{0} dot(%p0, %p1), lhs_contracting_dims={1,2}, rhs_contracting_dims={0,1}",
         2 * 8 * 20),
        (("bf16[8]{0}", "bf16[4]{0}"), "%d = f32[8,4]{1,0} dot(%p0, %p1)", 2 * 32),
        (("bf16[8,4]{1,0}", "bf16[4,16]{1,0}"),
         "%d = (bf16[8,16]{1,0}, s8[0]{0}) custom-call(%p0, %p1), "
         'custom_call_target="__cublas$gemm", backend_config={"gemm_backend_config":'
         '{"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}}', 2 * 8 * 16 * 4),
        (("bf16[8,4]{1,0}", "bf16[4,16]{1,0}"),
         '%d = bf16[8,16]{1,0} custom-call(%p0, %p1), custom_call_target="tpu_custom_call", '
         'backend_config={"custom_call_config":{"body":"x","cost_estimate":{"flops":"777",'
         '"transcendentals":"0","bytes_accessed":"9"}}}', 777),
    ],
)  # fmt: skip
def test_matrix_products(operands, line, flops):
    assert count(line, operands).flops == (("bfloat16", flops),)


def brute_force(sizes, window):
    """Count the products of a one-dim convolution element by element."""
    inputs, filters, outputs = sizes
    stride, low, dilate_input, dilate_filter = window
    total = 0
    for o, k in itertools.product(range(outputs), range(filters)):
        at = o * stride + k * dilate_filter - low
        total += at % dilate_input == 0 and 0 <= at // dilate_input < inputs
    return total


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("low", [-1, 0, 2])
@pytest.mark.parametrize("dilate_input, dilate_filter", [(1, 1), (2, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("inputs, filters, outputs", [(9, 3, 5), (4, 7, 6), (5, 1, 5)])
def test_convolutions(inputs, filters, outputs, stride, low, dilate_input, dilate_filter):
    line = (
        f"%c = bf16[2,{outputs},8]{{2,1,0}} convolution(%p0, %p1), window={{size={filters} "
        f"stride={stride} pad={low}_7 lhs_dilate={dilate_input} rhs_dilate={dilate_filter}}}, "
        "dim_labels=b0f_0io->b0f"
    )
    found = count(line, (f"bf16[2,{inputs},6]{{2,1,0}}", f"bf16[{filters},6,8]{{2,1,0}}"))
    window = stride, low, dilate_input, dilate_filter
    products = brute_force((inputs, filters, outputs), window)
    assert found.flops == (("bfloat16", 2 * 2 * 6 * 8 * products),)


def test_groups_of_features():
    line = (
        "%c = f32[2,5,8]{2,1,0} convolution(%p0, %p1), window={size=1}, dim_labels=b0f_0io->b0f, "
        "feature_group_count=4"
    )
    found = count(line, ("f32[2,5,12]{2,1,0}", "f32[1,3,8]{2,1,0}"))
    assert found.flops == (("float32", 2 * 2 * 5 * 3 * 8),)


def test_a_batched_product_as_xla_for_tpu_writes_it():
    # 2 x 16 products of (512 x 64) and (64 x 512): the dilation skips all other pairs.
    line = (
        "%c = bf16[2,16,512,512]{2,3,1,0} convolution(%p0, %p1), window={size=2x16 stride=1x15 "
        "lhs_dilate=2x16}, dim_labels=0b1f_0o1i->01bf"
    )
    found = count(line, ("bf16[2,512,16,64]{3,2,1,0}", "bf16[2,512,16,64]{3,2,1,0}"))
    assert found.flops == (("bfloat16", 2 * 2 * 16 * 512 * 512 * 64),)


@pytest.mark.parametrize(
    "target, operands, result",
    [
        ("__cudnn$convForward", ("2,8,8,3", "4,3,3,3"), "2,6,6,4"),
        ("__cudnn$convBackwardInput", ("2,6,6,4", "4,3,3,3"), "2,8,8,3"),
        ("__cudnn$convBackwardFilter", ("2,8,8,3", "2,6,6,4"), "4,3,3,3"),
    ],
)
def test_cudnn_calls_count_as_their_forward_convolution(target, operands, result):
    line = (
        f"%c = (bf16[{result}], u8[0]) custom-call(%p0, %p1), window={{size=3x3}}, "
        f'dim_labels=b01f_o01i->b01f, custom_call_target="{target}"'
    )
    found = count(line, [f"bf16[{dims}]" for dims in operands])
    assert found.flops == (("bfloat16", 2 * 2 * 6 * 6 * 4 * 3 * 3 * 3),)


@pytest.mark.parametrize(
    "line, says",
    [
        ("%d = f32[8] dot(%p0, %p9), lhs_contracting_dims={1}", "needs two operands"),
        ("%d = f32[8] dot(%p0, %p1), lhs_contracting_dims={5}", "contracts dim 5 of"),
        ("%d = f32[8] convolution(%p0, %p1)", "has no dim_labels"),
        ("%d = f32[8,4] convolution(%p0, %p1), dim_labels=b0f_0io->b0f", "labels .* with 'b0f'"),
        ("%d = f32[8,4] convolution(%p0, %p1), dim_labels=xy_io->bf", "has no dim 'b'"),
        ("%d = f32[8,4] convolution(%p0, %p1), dim_labels=bf_i0->bf", "has no dim 'o'"),
        ("%d = f32[8,4] convolution(%p0, %p1), dim_labels=bf_io->bf, window={pad=?}", "no window"),
    ],
)
def test_what_cannot_be_read_is_refused(line, says):
    with pytest.raises(HloError, match=says):
        count(line, ("f32[8,4]", "f32[4,8]"))


MIB = "f32[512,512]{1,0}"  # of 4 bytes: a mebibyte
FUSED = """%fused (a: f32[512,512], i: s32[]) -> f32[512,512] {{
  %a = f32[512,512]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
{}
}}
"""
FUSE = f"%f = {MIB} fusion(%p0, %p1), kind=kLoop, calls=%fused"


@pytest.mark.parametrize(
    "line, operands, bytes_",
    [
        (f"%x = {MIB} add(%p0, %p1)", (MIB, MIB), 3 << 20),
        (f"%x = {MIB} multiply(%p0, %p0)", (MIB,), 2 << 20),  # one array, read once
        (f"%x = {MIB} bitcast(%p0)", (MIB,), 0),
        (f"%x = ({MIB}, {MIB}) tuple(%p0, %p1)", (MIB, MIB), 0),
        ("%x = f32[1,512] dynamic-slice(%p0, %p1, %p1)", (MIB, "s32[]"), 2 * 2048),
        (f"%x = {MIB} dynamic-update-slice(%p0, %p1, %p2)", (MIB, "f32[1,512]", "s32[]"),
         2 * 2048),
        ("%x = bf16[512]{0:T(512)S(1)} convert(%p0)", ("f32[512]{0:T(512)}",), 2048),
        ("%x = f32[512]{0:T(512)} copy(%p0)", ("f32[512]{0:T(512)S(1)}",), 2048),
        (f'%x = {MIB} custom-call(%p0), custom_call_target="my_kernel"', (MIB,), 2 << 20),
        (f'%x = {MIB} custom-call(%p0), custom_call_target="ConcatBitcast"', (MIB,), 0),
    ],
)  # fmt: skip
def test_bytes(line, operands, bytes_):
    assert count(line, operands) == Work((), bytes_)


@pytest.mark.parametrize(
    "body, result, bytes_",
    [
        (f"ROOT %r = {MIB} negate(%a)", MIB, 2 << 20),  # nothing reads the other operand
        ("ROOT %r = f32[1,512] dynamic-slice(%a, %i, %i)", "f32[1,512]", 4 + 2 * 2048),
        # A slice and the whole: the whole is read.
        (f"%s = f32[1,512] dynamic-slice(%a, %i, %i)\n%n = {MIB} negate(%a)\n"
         f"ROOT %r = {MIB} add(%n, %s)", MIB, 4 + (2 << 20)),
        (f"%u = f32[1,512] broadcast(%i)\n"
         f"ROOT %r = {MIB} dynamic-update-slice(%a, %u, %i)", MIB, 4 + 2048),
    ],
)  # fmt: skip
def test_bytes_of_a_fusion(body, result, bytes_):
    line = FUSE.replace(MIB, result, 1)
    assert count(line, (MIB, "s32[]"), FUSED.format(body)).bytes == bytes_


def test_products_in_a_fusion_of_fusions_count():
    dot = "ROOT %r = f32[512,512] dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}"
    outer = FUSED.replace("%fused", "%outer").format(
        f"ROOT %q = {MIB} fusion(%a, %i), kind=kLoop, calls=%fused"
    )
    before = FUSED.format(dot) + outer
    found = count(FUSE.replace("%fused", "%outer"), (MIB, "s32[]"), before)
    assert found.flops == (("float32", 2 * 512**3),)
    assert found.total_flops == 2 * 512**3


def test_memory_bytes():
    assert memory_bytes("(f32[8]{0}, bf16[16]{0:T(128)S(1)}, /*index=2*/u32[]{:S(2)})") == 32
    assert memory_bytes("token[]") == 0


def model(x, w, k):
    """A convolution, attention and a two-layer perceptron."""
    dims = ("NHWC", "HWIO", "NHWC")
    x = jax.lax.conv_general_dilated(x, k, (2, 2), "SAME", dimension_numbers=dims)
    x = x.reshape(x.shape[0], -1, x.shape[-1])
    scores = jnp.einsum("btd,bsd->bts", x @ w, x)
    x = jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), x)
    return (jax.nn.relu(x @ w) @ w).sum()


@pytest.mark.parametrize("differentiate", [False, True])
def test_against_xlas_own_analysis(differentiate):
    x, w, k = jnp.ones((4, 32, 32, 16)), jnp.ones((64, 64)), jnp.ones((3, 3, 16, 64))
    fn = jax.grad(model, argnums=(0, 1, 2)) if differentiate else model
    compiled = jax.jit(fn).lower(x, w, k).compile()
    said = compiled.cost_analysis()
    if not said or "flops" not in said:
        pytest.skip("this jax gives no cost analysis")
    (module,) = read_modules(compiled.as_text())
    graph = Graph(module)
    found = 0
    for name in module.computations:
        scope = graph.scope_of(name)
        for instruction in scope.computation.instructions:
            flops = flops_of(instruction, scope)
            found += flops[1] if flops else 0
    # XLA counts elementwise operations too, a few percent here.
    assert found <= said["flops"] <= 1.1 * found
    if not differentiate:
        conv = 2 * 4 * 64 * 16 * (16 * 3 - 1) ** 2  # one of 48 positions is on padding
        products = 3 * 2 * 4 * 256 * 64 * 64 + 2 * 2 * 4 * 256 * 256 * 64
        assert found == conv + products
