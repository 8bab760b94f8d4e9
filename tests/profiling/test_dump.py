"""The module right after partitioning: what is in it, with the cache on, and what stays behind."""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.dump import compile_with_partitioned


@pytest.fixture
def temporary(tmp_path, monkeypatch):
    """The folder in which temporary folders are made."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


@pytest.fixture
def cache(tmp_path_factory):
    """jax's cache on disk, on for one test; a function that names its entries."""
    from jax.experimental.compilation_cache import compilation_cache

    folder = tmp_path_factory.mktemp("cache")
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield lambda: sorted(path.name for path in folder.glob("*-cache"))
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def two_sums():
    """Two psums, which XLA:CPU combines into one all-reduce."""

    def body(x):
        return tx.psum(x, "data", name="a"), tx.psum(2 * x[:1], "data", name="b")

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    fn = jax.jit(jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P()))
    return fn.lower(
        jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    )


def all_reduces(text):
    return [line for line in text.splitlines() if " all-reduce(" in line]


def test_collectives_are_still_by_themselves(temporary):
    compiled, text = compile_with_partitioned(two_sums())
    assert [("txcore[psum/a]" in r, "txcore[psum/b]" in r) for r in all_reduces(text)] == [
        (True, False),
        (False, True),
    ]
    assert len(all_reduces(compiled.as_text())) == 1
    assert [x.tolist() for x in compiled(np.arange(8.0, dtype=np.float32))] == [[12, 16], [24]]
    assert list(temporary.iterdir()) == []


def test_the_program_is_the_same_without_the_dump():
    lowered = two_sums()
    plain, dumped = (
        lowered.compile().as_text(),
        compile_with_partitioned(lowered)[0].as_text(),
    )
    assert dumped == plain


def test_one_device_has_nothing_to_partition(temporary):
    _, text = compile_with_partitioned(jax.jit(jnp.sin).lower(jnp.ones(3)))
    assert text == ""


def test_a_cached_program_is_compiled_again(cache):
    two_sums().compile()
    [entry] = cache()
    for _ in range(2):
        assert len(all_reduces(compile_with_partitioned(two_sums())[1])) == 2
    assert cache() == [entry]
    jax.jit(lambda x: x * 3).lower(jnp.ones(3)).compile()
    assert len(cache()) > 1, "the cache must work again afterwards"


def test_a_cached_program_compiled_under_other_names_is_proved_all_the_same(cache):
    """jax's key has no names in it: what was compiled as "a" is found for "b"."""

    def report(name):
        mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
        total = jax.shard_map(
            lambda x: tx.psum({"w": x}, "data", name=name), mesh=mesh, in_specs=P("data"),
            out_specs=P(),
        )  # fmt: skip
        return audit(jax.jit(total), np.arange(8.0, dtype=np.float32))

    for name in ("a", "b"):
        found = report(name)
        assert found.exact
        assert [row.tags for row in found.collectives] == [(f"psum/{name}.w",)]
    assert [row.note for row in found.collectives] == ["compiled under the name psum/a.w"]
    assert len(cache()) == 1


def test_options_reach_the_compiler_and_a_failure_leaves_nothing(temporary, cache):
    with pytest.raises(Exception, match="xla_no_such_option"):
        compile_with_partitioned(two_sums(), {"xla_no_such_option": 1})
    assert list(temporary.iterdir()) == []
    assert jax.config.jax_enable_compilation_cache


def test_an_audit_can_read_it():
    def body(x):
        return tx.psum(x, "data", name="a"), tx.psum(2 * x[:1], "data", name="b")

    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    fn = jax.shard_map(body, mesh=mesh, in_specs=P("data"), out_specs=P())
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, P("data")))
    early, late = audit(fn, x, after_spmd=True), audit(fn, x)
    assert [c.tags for c in early.collectives] == [("psum/a",), ("psum/b",)]
    assert [c.tags for c in late.collectives] == [("psum/a", "psum/b")]
    assert early.ok
    assert late.ok
    assert early.payload_bytes == late.payload_bytes == 8 + 4
