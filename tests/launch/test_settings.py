"""Settings that have to be the same on all ranks: those that change results, and no others."""

import jax
import pytest

from txcore.launch import preflight, settings


@pytest.fixture(autouse=True)
def _no_flags(monkeypatch):
    for name in (*settings.FLAGS, *settings.VARIABLES):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables, lines",
    [
        ({}, []),
        ({"XLA_FLAGS": ""}, []),
        (
            {"XLA_FLAGS": "--xla_cpu_enable_fast_math=true  --xla_a=1"},
            ["XLA_FLAGS --xla_a=1", "XLA_FLAGS --xla_cpu_enable_fast_math=true"],
        ),
        (
            {"XLA_FLAGS": "--xla_cpu_enable_fast_math"},
            ["XLA_FLAGS --xla_cpu_enable_fast_math=true"],
        ),
        ({"XLA_FLAGS": "--xla_a=1 --xla_a=2"}, ["XLA_FLAGS --xla_a=2"]),
        ({"XLA_FLAGS": "--xla_force_host_platform_device_count=8"}, []),
        ({"XLA_FLAGS": "--xla_dump_to=/tmp/rank1 --xla_dump_hlo_as_text"}, []),
        ({"LIBTPU_INIT_ARGS": "--xla_tpu_x=true"}, ["LIBTPU_INIT_ARGS --xla_tpu_x=true"]),
        ({"NVIDIA_TF32_OVERRIDE": "0"}, ["NVIDIA_TF32_OVERRIDE=0"]),
        ({"TF_CPP_MIN_LOG_LEVEL": "3", "XLA_PYTHON_CLIENT_MEM_FRACTION": ".9"}, []),
    ],
)
def test_flags_that_change_results(variables, lines, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert settings.compiler_flags() == lines


def test_flags_in_a_file(tmp_path, monkeypatch):
    path = tmp_path / "flags"
    path.write_text("--xla_cpu_enable_fast_math=true\n--xla_dump_to=/tmp/a\n")
    monkeypatch.setenv("XLA_FLAGS", str(path))
    assert settings.compiler_flags() == ["XLA_FLAGS --xla_cpu_enable_fast_math=true"]
    monkeypatch.setenv("XLA_FLAGS", str(tmp_path / "none"))
    (line,) = settings.compiler_flags()
    assert "none" in line


def changed(name, value):
    """The lines that one of jax's settings changes."""
    before = settings.program_settings()
    old = getattr(jax.config, name)
    jax.config.update(name, value)
    try:
        return sorted(set(settings.program_settings()) - set(before))
    finally:
        jax.config.update(name, old)


@pytest.mark.parametrize(
    "name, value",
    [
        ("jax_default_matmul_precision", "highest"),
        ("jax_enable_x64", True),
        ("jax_default_prng_impl", "rbg"),
        ("jax_threefry_partitionable", False),
        ("jax_debug_nans", True),
        ("jax_debug_infs", True),
        ("jax_numpy_dtype_promotion", "strict"),
    ],
)
def test_settings_that_change_results(name, value):
    assert changed(name, value) == [f"{name}={value}"]


@pytest.mark.parametrize(
    "name, value",
    [
        ("jax_log_compiles", True),
        ("jax_compilation_cache_dir", "/tmp/rank1"),
        ("jax_traceback_filtering", "off"),
        ("jax_default_device", jax.devices()[-1]),
    ],
)
def test_settings_that_do_not(name, value):
    assert changed(name, value) == []


def test_a_context_counts():
    with jax.default_matmul_precision("float32"):
        assert "jax_default_matmul_precision=float32" in settings.program_settings()


def test_they_are_among_the_facts_of_a_program():
    facts = preflight.facts_of(jax.make_mesh((1,), ("data",)), {})
    assert facts["jax settings"] == settings.program_settings()
    assert facts["compiler flags"] == []
