"""Every form of the XLA convolution at every kind of size, also where it is not the best guess."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import kernel_oracles as oracles
import machine
import numpy as np
import pytest

from txcore import kernels
from txcore.kernels.conv.xla import Config

pytestmark = [pytest.mark.usefixtures("unoptimized"), pytest.mark.sampled(2)]

FORMS = ("direct", "windows", "winograd")
OPTIONS = list(itertools.product(("SAME", "VALID"), (None, 2), (None, "relu")))


def compare(form, image, filter_size, channels, *, batch=2, images=None, **options):
    """Compare the op and its gradients with float64 NumPy."""
    random = np.random.default_rng(0)
    shapes = ((batch, *image, channels), (*filter_size, channels, 4), (4,))
    args = [random.normal(size=shape).astype(np.float32) for shape in shapes]

    def cotangent(out):
        return np.cos(np.arange(out.size)).reshape(out.shape)

    wanted, gradients = oracles.conv2d(*args, cotangent, **options)

    def run(*args):
        config = Config(form, on_cpu=True, images=images)
        return kernels.conv2d(*args, **options, implementation="xla", config=config)

    @jax.jit
    def both(*args):
        out, vjp = jax.vjp(run, *args)
        return out, *vjp(jnp.asarray(cotangent(wanted), jnp.float32))

    for ours, theirs in zip(both(*args), (wanted, *gradients), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("padding, pool, activation", OPTIONS)
def test_an_odd_image(form, padding, pool, activation):
    compare(form, (7, 5), (3, 3), 3, padding=padding, pool=pool, activation=activation)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("image", [(4, 4), (3, 3), (3, 4), (8, 3), (5, 9)])
def test_small_and_mixed_images(form, image):
    compare(form, image, (3, 3), 2, padding="SAME", pool=2, activation="relu")
    if min(image) > 3:
        compare(form, image, (3, 3), 2, padding="VALID", pool=2, activation="relu")


@pytest.mark.parametrize("form", ["direct", "windows"])
@pytest.mark.parametrize("filter_size", [(1, 1), (5, 5), (2, 4)])
@pytest.mark.parametrize("padding, pool", [("SAME", 2), ("VALID", None)])
def test_other_filters(form, filter_size, padding, pool):
    compare(form, (8, 9), filter_size, 2, padding=padding, pool=pool, activation="relu")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("images", [1, 2, 3, 7, 8])
def test_some_images_at_a_time(form, images):
    compare(form, (6, 5), (3, 3), 2, batch=7, images=images, padding="SAME", pool=2)


@pytest.mark.parametrize("padding, pool, activation", OPTIONS)
def test_some_images_at_a_time_with_every_option(padding, pool, activation):
    options = {"padding": padding, "pool": pool, "activation": activation}
    compare("winograd", (6, 7), (3, 3), 3, batch=5, images=2, **options)


@pytest.mark.parametrize("images", [0, -1, 1.5, "8"])
def test_a_wrong_number_of_images_is_refused(images):
    with pytest.raises(ValueError) as error:
        Config("winograd", images=images)
    assert str(error.value) == (
        f"conv2d: images of Config needs an integer of at least 1, got {images!r}: pass None for "
        "the whole batch at once"
    )


@machine.cpu_only("it is a form for CPUs")
def test_on_cpu_the_guess_keeps_the_products_of_some_images_in_the_cache():
    """2.5 MiB: 8 images of 7x7 tiles, whose 16 products have 32 + 64 channels of 4 bytes."""
    x, w, b = jnp.ones((64, 14, 14, 32)), jnp.ones((3, 3, 32, 64)), jnp.zeros(64)
    hlo = jax.jit(partial(kernels.conv2d, pool=2)).lower(x, w, b).compile().as_text()
    assert "f32[392,64]{1,0} dot(" in hlo
    assert "f32[3136,64]{1,0} dot(" not in hlo


def test_winograd_refuses_other_filters():
    x, w, b = jnp.ones((1, 8, 8, 2)), jnp.ones((5, 5, 2, 4)), jnp.zeros(4)
    with pytest.raises(ValueError) as error:
        kernels.conv2d(x, w, b, implementation="xla", config=Config("winograd"))
    assert str(error.value) == (
        "conv2d: the form 'winograd' needs a 3x3 filter, got w (5, 5, 2, 4): pass "
        "config=Config('direct') or 'windows', or leave config and implementation out"
    )


@machine.cpu_only("it is the guess on CPUs alone")
def test_the_winograd_form_makes_sixteen_products_and_no_convolution():
    x, w, b = jnp.ones((2, 8, 8, 8)), jnp.ones((3, 3, 8, 8)), jnp.zeros(8)
    hlo = jax.jit(kernels.conv2d).lower(x, w, b).compile().as_text()
    assert "convolution(" not in hlo
    assert hlo.count("f32[32,8]{1,0} dot(") == 16  # 2 images of 4x4 tiles
