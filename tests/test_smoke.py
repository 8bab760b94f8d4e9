import jax


def test_eight_devices():
    assert jax.device_count() == 8
