"""What surrounds the gate: nesting, threads, decorators, the disk cache; nothing stays behind."""

import asyncio
import logging
import os
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, mesh_of
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import NamedSharding

from txcore import _compat
from txcore.profiling import AutoShardingError, no_auto_collectives

LOG = "txcore.profiling.gate"


def sharded(*dims):
    sharding = NamedSharding(mesh_of(data=8), P("data"))
    return jax.device_put(np.ones(dims, np.float32), sharding)


def total():
    """A function of its own each time, so that jax has compiled none of it."""
    return jax.jit(lambda x: x.sum())


def seams():
    return {name: getattr(*place) for name, place in _compat.compilation_seams().items()}


@pytest.fixture(autouse=True)
def nothing_stays_behind():
    before = seams()
    yield
    assert seams() == before
    total()(sharded(8))


def test_jax_is_as_before_after_a_block_and_after_an_error():
    before = seams()
    with no_auto_collectives():
        assert all(seams()[name] is not before[name] for name in before)
    assert seams() == before
    with pytest.raises(ZeroDivisionError), no_auto_collectives():
        _ = 1 / 0
    assert seams() == before
    with pytest.raises(AutoShardingError), no_auto_collectives():
        total()(sharded(8))
    assert seams() == before


def test_an_error_inside_the_block_can_be_caught_there_and_the_block_goes_on():
    x = sharded(8)
    with no_auto_collectives():
        with pytest.raises(AutoShardingError):
            total()(x)
        jnp.sin(x)
        with pytest.raises(AutoShardingError):
            total()(x)


def test_of_nested_blocks_every_one_must_agree():
    x, whole = sharded(8), NamedSharding(mesh_of(data=8), P())
    with no_auto_collectives(allow={"reshard"}):
        jax.device_put(x, whole)
        with no_auto_collectives(allow={"partitioner"}):  # forbids reshards; the outer one, sums
            with pytest.raises(AutoShardingError):
                jax.device_put(x, whole)
            with pytest.raises(AutoShardingError):
                total()(x)
        jax.device_put(x, whole)


def test_what_a_lax_gate_compiled_a_strict_one_refuses():
    x, fn = sharded(8), total()
    with no_auto_collectives(allow={"partitioner"}):
        fn(x)
    with pytest.raises(AutoShardingError), no_auto_collectives():
        fn(x)


def test_one_gate_can_be_entered_again_and_inside_of_itself():
    gate, x = no_auto_collectives(), sharded(8)
    for _ in range(2):
        with gate, gate:
            pass
        with gate, pytest.raises(AutoShardingError):
            total()(x)
    total()(x)


def test_as_a_decorator_it_guards_each_call():
    @no_auto_collectives(allow={"reshard"})
    def both(x, *, add):
        """Add them up."""
        return total()(x) if add else jnp.sin(x)

    x = sharded(8)
    assert (both.__name__, both.__doc__) == ("both", "Add them up.")
    for _ in range(2):
        both(x, add=False)
        with pytest.raises(AutoShardingError):
            both(x, add=True)
    assert float(total()(x)) == 8


def test_a_decorated_function_may_call_itself():
    @no_auto_collectives()
    def count(n):
        return jnp.int32(0) if n == 0 else count(n - 1) + 1

    assert int(count(3)) == 3


def test_generator_and_coroutine_functions_are_refused():
    def generator():
        yield

    async def coroutine():
        await asyncio.sleep(0)

    async def both():
        yield

    for function in (generator, coroutine, both, 3):
        with pytest.raises(TypeError) as error:
            no_auto_collectives()(function)
        assert "guards a function from its call to its return, but got" in str(error.value)
        assert "write 'with no_auto_collectives():' around the calls inside it" in str(error.value)


def in_thread(fn):
    """Run a function in another thread; return what it returned or raised."""
    result = []

    def run():
        try:
            result.append(fn())
        except Exception as error:
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    return result[0]


def test_another_thread_is_not_stopped():
    x = sharded(8)
    with no_auto_collectives():
        assert float(in_thread(lambda: total()(x))) == 8
        assert in_thread(lambda: jax.device_put(x, jax.devices()[0])).shape == (8,)
        with pytest.raises(AutoShardingError):
            total()(x)


def test_a_thread_has_a_gate_of_its_own():
    x = sharded(8)

    def guarded():
        with no_auto_collectives():
            return total()(x)

    assert isinstance(in_thread(guarded), AutoShardingError)
    with no_auto_collectives(allow={"partitioner"}):
        assert isinstance(in_thread(guarded), AutoShardingError)
        assert float(total()(x)) == 8


def test_many_threads_at_once_each_keep_their_verdict():
    x, start = sharded(8), threading.Barrier(8)
    verdicts = {}

    def run(number):
        start.wait(60)
        for _ in range(3):
            if number % 2:
                verdicts.setdefault(number, []).append(float(total()(x)))
                continue
            try:
                with no_auto_collectives():
                    total()(x)
            except AutoShardingError:
                verdicts.setdefault(number, []).append("refused")

    threads = [threading.Thread(target=run, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert verdicts == {n: [8.0] * 3 if n % 2 else ["refused"] * 3 for n in range(8)}


def test_a_gate_that_ends_while_another_threads_is_open_leaves_that_one_watching():
    x, opened, closed = sharded(8), threading.Event(), threading.Event()

    def guarded():
        with no_auto_collectives():
            opened.set()
            closed.wait(60)
            return total()(x)

    verdict = []
    thread = threading.Thread(target=lambda: verdict.append(_caught(guarded)))
    with no_auto_collectives():
        thread.start()
        opened.wait(60)
    closed.set()
    thread.join(60)
    assert isinstance(verdict[0], AutoShardingError)


def _caught(fn):
    try:
        return fn()
    except AutoShardingError as error:
        return error


@pytest.fixture
def disk_cache(tmp_path):
    """A cache on disk that keeps everything; jax's settings are as before afterwards."""
    settings = {
        "jax_compilation_cache_dir": str(tmp_path),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
        "jax_enable_compilation_cache": True,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def entries(folder):
    return {name for name in os.listdir(folder) if name.endswith("-cache")}


def test_the_disk_cache_is_bypassed_and_the_log_says_so_once(disk_cache, caplog):
    x = sharded(8)

    def add_up(x):
        return (x * 5).sum()

    jax.jit(add_up)(x)
    filled = entries(disk_cache)
    assert filled
    jax.clear_caches()  # from here on a compilation of it is a hit
    with caplog.at_level(logging.WARNING, logger=LOG), no_auto_collectives():
        with pytest.raises(AutoShardingError):
            jax.jit(add_up)(x)
        jax.jit(lambda x: x * 7)(x)
    (record,) = [r for r in caplog.records if r.name == LOG]
    assert record.getMessage() == (
        f"jax's compilation cache on disk ({disk_cache}) is neither read nor written while txcore "
        "watches what is compiled"
    )
    assert entries(disk_cache) == filled
    jax.jit(lambda x: x * 11)(x)
    assert entries(disk_cache) > filled  # in use again


def test_without_a_disk_cache_nothing_is_said(caplog):
    with caplog.at_level(logging.WARNING, logger=LOG), no_auto_collectives():
        jax.jit(lambda x: x * 2)(1.0)
    assert not [r for r in caplog.records if r.name == LOG]


def test_importing_it_does_not_make_jax_trace_again():
    program = (
        "import jax; traced = []\n"
        "fn = jax.jit(lambda x: traced.append(1) or x * 2); fn(1.0)\n"
        "from txcore.profiling import no_auto_collectives; fn(1.0)\n"
        "print(len(traced))\n"
    )
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ran.stdout.strip() == "1"


def test_a_jax_that_cannot_be_watched_is_refused(monkeypatch):
    owner, name = _compat.compilation_seams()["lower"]
    monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError) as error, no_auto_collectives():
        pass
    assert f"watching compilations needs {name} of jax 0.10 to 0.12, but jax" in str(error.value)
    assert "use an older jax, or audit the function" in str(error.value)
    monkeypatch.undo()
