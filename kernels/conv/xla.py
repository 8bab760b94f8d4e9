"""The convolution in XLA's own ops, with a VJP that keeps what autodiff would compute again."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from txcore.kernels.common import checks, chunks
from txcore.kernels.conv import pooling, windows, winograd
from txcore.kernels.conv.geometry import Geometry
from txcore.kernels.conv.windows_geometry import Windows, windows_of
from txcore.kernels.dispatch.problem import Problem

Form = Literal["direct", "windows", "winograd"]

WINDOWS_PATCH = 64  # the largest patch for which "windows" is worth trying, in elements
WINOGRAD_CHANNELS = 8  # with fewer, its transforms cost more than it saves
CHUNK_BYTES = 5 << 19  # the most that a chunk's products may take, to stay in a core's caches


@dataclass(frozen=True)
class Config:
    """Hold how the convolution's products are computed.

    Args:
      form: "direct" is XLA's convolution, "windows" one product over patches (few input
        channels), "winograd" 16 products instead of 36 (3x3 filters).
      on_cpu: whether to avoid what XLA's CPU compiler is slow at: products in half precision,
        sums over rows, comparisons of bytes, and values computed again in each of their users.
      images: how many images at a time, in a loop; None for the whole batch at once. XLA:CPU runs
        its own convolution ("direct") ten times slower inside a loop.

    Raises:
      ValueError: `images` is not a count.

    Example:
      >>> from txcore.kernels.conv.xla import Config
      >>> Config("winograd", on_cpu=True, images=8).form
      'winograd'
    """

    form: Form = "direct"
    on_cpu: bool = False
    images: int | None = None

    def __post_init__(self) -> None:
        if self.images is not None and (not isinstance(self.images, int) or self.images < 1):
            raise ValueError(
                "conv2d: images of Config needs an integer of at least 1, got "
                f"{self.images!r}: pass None for the whole batch at once"
            )


def list_configs(problem: Problem) -> list[Config]:
    """Return the configurations worth trying, the best guess first."""
    if problem.platform != "cpu":
        return [Config()]
    _, rows, columns, _ = problem.shapes[0]
    *size, inputs, outputs = problem.shapes[1]
    direct = Config(on_cpu=True)
    if size == [3, 3] and min(inputs, outputs) >= WINOGRAD_CHANNELS:
        tiles = -(-rows // 2) * -(-columns // 2)
        return [*_in_chunks("winograd", tiles * 16 * (inputs + outputs), problem), direct]
    window = problem.get_option("pool") or 1
    patch = (size[0] + window - 1) * (size[1] + window - 1) * inputs
    if (size[0] + 1) * (size[1] + 1) * inputs <= WINDOWS_PATCH:
        windows = (rows // window) * (columns // window)
        made = windows * (patch + window**2 * outputs)
        return [*_in_chunks("windows", made, problem), direct]
    return [direct]


def _in_chunks(form: Form, elements: int, problem: Problem) -> list[Config]:
    """Return a form with as many images at a time as fit the caches, and with all at once."""
    size = checks.accumulator(jnp.dtype(problem.dtypes[0])).itemsize * elements
    images = 1 << max((CHUNK_BYTES // max(size, 1)).bit_length() - 1, 0)
    return [Config(form, True, images), Config(form, True)]


def conv2d(
    x: jax.Array,
    w: jax.Array,
    b: jax.Array,
    *,
    config: Config,
    activation: str | None,
    pool: int | None,
    padding: str,
) -> jax.Array:
    """Compute the op of `txcore.kernels.conv2d` on checked operands."""
    if config.form == "winograd" and w.shape[:2] != (3, 3):
        raise ValueError(
            f"conv2d: the form 'winograd' needs a 3x3 filter, got w {w.shape}: pass "
            "config=Config('direct') or 'windows', or leave config and implementation out"
        )
    return _conv2d(x, w, b, _Fixed(activation, pool, padding, config))


class _Fixed(NamedTuple):
    """Hold what is known when the convolution is traced."""

    activation: str | None
    pool: int | None
    padding: str
    config: Config


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _conv2d(x: jax.Array, w: jax.Array, b: jax.Array, fixed: _Fixed) -> jax.Array:
    return _forward(x, w, b, fixed)[0]


def _forward(x: jax.Array, w: jax.Array, b: jax.Array, fixed: _Fixed) -> tuple[jax.Array, Any]:
    activation, pool, _, config = fixed
    filters = _prepare_filters(x, w, fixed)

    def run_images(x: jax.Array) -> tuple[tuple[jax.Array, jax.Array | None], None]:
        outputs = _compute_outputs(_widen_on_cpu(config, x), w, filters, fixed)
        # The maximum of y + b is (the maximum of y) + b, rounded or not, with a quarter of the
        # additions.
        top = pooling.max_of_windows(outputs) if pool else outputs[0]
        out = top + checks.lift_rank(b.astype(top.dtype), top)
        passed = None
        if activation == "relu":
            out = jnp.maximum(out, 0)
            out = _compute_once(out) if config.on_cpu else out
            passed = out > 0
        place = None
        if pool:
            dtype = top.dtype if config.on_cpu else jnp.dtype(jnp.int8)
            place = pooling.argmax_of_windows(outputs, top, passed, dtype)
            place = _compute_once(place) if config.on_cpu else place
        return (out.astype(x.dtype), place), None

    (out, place), _ = chunks.run_chunks(run_images, config.images, None, x)
    return out, (x, w, b, place, out if activation and not pool else None)


def _backward(fixed: _Fixed, kept: Any, g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x, w, b, place, out = kept
    config = fixed.config
    filters, transpose = jax.vjp(lambda w: _prepare_filters(x, w, fixed), w)

    def run_images(
        x: jax.Array, place: jax.Array | None, out: jax.Array | None, g: jax.Array
    ) -> tuple[jax.Array, tuple[Any, jax.Array]]:
        if out is not None:
            g = jnp.where(out > 0, g, 0)
        wide, g = _widen_on_cpu(config, x), _widen_on_cpu(config, g)
        db = _sum_rows(g if place is None else jnp.where(place == pooling.NO_PLACE, 0, g), config)
        dx, dfilters = _product_gradients(wide, w, filters, place, g, fixed)
        return dx.astype(x.dtype), (dfilters, db)

    zeros = jax.tree.map(jnp.zeros_like, filters), jnp.zeros(b.shape, checks.accumulator(g.dtype))
    dx, (dfilters, db) = chunks.run_chunks(run_images, config.images, zeros, x, place, out, g)
    (dw,) = transpose(dfilters)
    return dx, dw, db.astype(b.dtype)


_conv2d.defvjp(_forward, _backward)


def _prepare_filters(x: jax.Array, w: jax.Array, fixed: _Fixed) -> Any:
    """Return w as the form multiplies by it, computed once for all chunks."""
    w = _widen_on_cpu(fixed.config, w)
    if fixed.config.form == "winograd":
        return winograd.transform_filters(w)
    return (
        windows.place_filters(w, _windows_of_form(x, w, fixed))
        if fixed.config.form == "windows"
        else w
    )


def _windows_of_form(x: jax.Array, w: jax.Array, fixed: _Fixed) -> Windows:
    """Return the windows of a form other than "direct"."""
    if fixed.config.form == "winograd":
        return windows_of(x, w, fixed.padding, 2, partial=not fixed.pool)
    return windows_of(x, w, fixed.padding, fixed.pool or 1)


def _compute_outputs(x: jax.Array, w: jax.Array, filters: Any, fixed: _Fixed) -> list[jax.Array]:
    """Return the outputs: four arrays of windows' elements with a pool, one array without."""
    form, pool, padding = fixed.config.form, fixed.pool, fixed.padding
    if form == "direct":
        y = _convolve_directly(x, filters, padding, checks.accumulator(x.dtype))
        return pooling.split_windows(y) if pool else [y]
    at = _windows_of_form(x, w, fixed)
    if form == "windows":
        return windows.forward(x, filters, at)
    tiles = winograd.forward(x, filters, at)
    return tiles if pool else [pooling.join_windows(tiles, *_unpooled_size(x, w, padding))]


def _product_gradients(
    x: jax.Array,
    w: jax.Array,
    filters: Any,
    place: jax.Array | None,
    g: jax.Array,
    fixed: _Fixed,
) -> tuple[jax.Array, Any]:
    """Return the gradients of x and of the filters.

    The forms transform x again here. XLA reuses the transform of the forward pass, except where a
    loop lies between.
    """
    form, padding = fixed.config.form, fixed.padding
    if form == "direct":
        full = (
            g
            if place is None
            else pooling.scatter_to_image(place, g, *_unpooled_size(x, w, padding))
        )
        if fixed.config.on_cpu:
            return _gradients_on_cpu(x, filters, full, padding)
        _, transpose = jax.vjp(lambda x, w: _convolve_directly(x, w, padding), x, filters)
        dx, dw = transpose(full)
        return dx, dw
    at = _windows_of_form(x, w, fixed)
    if form == "windows":
        return windows.backward(
            x, filters, [g] if place is None else pooling.scatter_to_corners(place, g), at
        )
    if place is None:
        odd = [(0, 0), (0, 2 * at.rows - g.shape[1]), (0, 2 * at.columns - g.shape[2]), (0, 0)]
        return winograd.backward(x, filters, pooling.split_windows(jnp.pad(g, odd)), at)
    return winograd.backward(x, filters, pooling.scatter_to_corners(place, g), at)


def _unpooled_size(x: jax.Array, w: jax.Array, padding: str) -> tuple[int, int]:
    """Return height and width before pooling."""
    return Geometry.from_shapes(x, w, None, None, padding).unpooled_size


def _convolve_directly(
    x: jax.Array,
    w: jax.Array,
    padding: str | Sequence[tuple[int, int]],
    out_dtype: jnp.dtype | None = None,
) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        w,
        window_strides=(1, 1),
        padding=padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        preferred_element_type=out_dtype,
    )


def _gradients_on_cpu(
    x: jax.Array, w: jax.Array, g: jax.Array, padding: str
) -> tuple[jax.Array, jax.Array]:
    """Return the gradients of x and of the filters, each as a convolution of the usual form.

    XLA for CPU brings those that autodiff makes into this form itself, but not inside of a loop
    (microbatches, a pipeline's ticks): there they are 20 times slower.
    """
    sizes = w.shape[:2]
    pads = lax.padtype_to_pads(x.shape[1:3], sizes, (1, 1), padding)
    of_w = _convolve_directly(x.transpose(3, 1, 2, 0), g.transpose(1, 2, 0, 3), pads)
    reversed_pads = [
        (k - 1 - low, k - 1 - high) for k, (low, high) in zip(sizes, pads, strict=True)
    ]
    of_x = _convolve_directly(g, w[::-1, ::-1].swapaxes(2, 3), reversed_pads)
    return of_x, of_w.transpose(1, 2, 0, 3)


def _widen_on_cpu(config: Config, array: jax.Array) -> jax.Array:
    """Return an array in the dtype to multiply in: float32 or wider on CPU."""
    return array.astype(checks.accumulator(array.dtype)) if config.on_cpu else array


def _sum_rows(g: jax.Array, config: Config) -> jax.Array:
    """Sum over all dims but the last."""
    dtype = checks.accumulator(g.dtype)
    if not config.on_cpu:
        return jnp.sum(g, (0, 1, 2), dtype=dtype)
    # One product for each image row: a single product over all rows has five times the error.
    rows = g.reshape(-1, g.shape[2], g.shape[3])
    ones = jnp.ones((rows.shape[0], 1, rows.shape[1]), dtype)
    return jnp.sum(jnp.matmul(ones, rows, precision="highest"), (0, 1))


def _compute_once(x: jax.Array) -> jax.Array:
    """Return x in a form that XLA does not compute again inside each of its users.

    Fused into them, it would read all the windows each time, through the users' reshapes. XLA
    does not repeat a division, and a division by ones is exact. It must not know that they are
    ones, or it would remove it: so they are made of x's own bits.
    """
    bits = lax.bitcast_convert_type(x, jnp.dtype(f"uint{8 * x.dtype.itemsize}"))
    return x / jnp.minimum(jnp.maximum(bits, 1), 1).astype(x.dtype)
