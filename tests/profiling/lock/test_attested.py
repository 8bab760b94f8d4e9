"""A run that is held to a lock file runs the locked program, or says what differs."""

import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audit_cases import P, mesh_of, on

import txcore as tx
from txcore.profiling import audit
from txcore.profiling.gate import attested as attested_block
from txcore.profiling.lock import LockError, update
from txcore.profiling.lock.attest import AttestationError
from txcore.profiling.lock.proof import list_differences, make_proof

FILE = pathlib.Path("step.lock.json")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(attested_block, "_found", {})


def make_step(total=lambda x: tx.psum(x * 2, "data", name="total"), **options):
    mesh = mesh_of(data=8)

    def step(x):
        return total(x)

    return jax.jit(on(mesh, P("data"), P())(step), **options)


def ones(dtype=np.float32):
    return jax.device_put(
        np.ones((8, 4), dtype), jax.sharding.NamedSharding(mesh_of(data=8), P("data"))
    )


def locked(step, x):
    with tx.attested(FILE, update=True):
        step(x)


def test_the_locked_program_runs_however_it_is_written():
    locked(make_step(), ones())
    with tx.attested(FILE):
        first = make_step()(ones())
        jnp.arange(3).sum()  # sends nothing: not held to anything
    renamed = make_step(lambda y: tx.psum(y * 2, "data", name="total"))
    with tx.attested(FILE):
        np.testing.assert_array_equal(renamed(ones()), first)


def other_tag(x):
    return tx.psum(x * 2, "data", name="loss")


def one_more(x):
    return tx.psum(x * 2, "data", name="total") + tx.psum(x[:1], "data", name="other")


OTHERS = {
    "one psum more": (make_step(one_more), np.float32, "  + psum/other  all-reduce  data  float32"),
    "another name": (make_step(other_tag), np.float32, "  - psum/total  all-reduce  data  float32"),
    "another dtype": (make_step(), jnp.bfloat16, "its arguments or results have other dtypes"),
    "another factor": (
        make_step(lambda x: tx.psum(x * 3, "data", name="total")),
        np.float32,
        "computes something else with as many instructions of each kind",
    ),
    "one operation more": (
        make_step(lambda x: jnp.sin(tx.psum(x * 2, "data", name="total"))),
        np.float32,
        "its optimized module has other instructions: ",
    ),
    "a compiler option": (
        make_step(compiler_options={"xla_cpu_enable_fast_math": True}),
        np.float32,
        "compiler option xla_cpu_enable_fast_math: True, locked with none",
    ),
    "nothing sent": (
        make_step(lambda x: jnp.ones(4)),
        np.float32,
        "  - psum/total  all-reduce  data",
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_program_is_refused_with_what_differs(name):
    step, dtype, said = OTHERS[name]
    locked(make_step(), ones())
    with pytest.raises(AttestationError) as error, tx.attested(FILE):
        step(ones(dtype))
    assert said in str(error.value)
    assert str(error.value).startswith(
        f"a run that is held to {FILE} needs its locked program, but jit(step) is another:\n"
    )


@pytest.mark.parametrize(
    "change,said",
    [
        (lambda p: (p[0], p[1] | {"jax": "0.9"}), "jax: {jax}, locked with 0.9"),
        (lambda p: (["--xla_foo=1"], p[1]), "--xla_foo=1 is not set"),
    ],
    ids=["versions", "flags"],
)
def test_another_compiler_is_named_and_nothing_that_follows_from_it(change, said, monkeypatch):
    text = make_step().lower(ones()).compile().as_text()
    now = make_proof("jit(step)", text, {})
    flags, versions = change((list(now.flags), dict(now.versions)))
    was = make_proof("jit(step)", text.replace("f32", "f64"), {})
    was = was.__class__(**{**vars(was), "flags": tuple(flags), "versions": versions})
    assert list_differences(was, now) == [said.format(jax=jax.__version__)]


def test_flags_that_dump_or_count_devices_are_no_difference(monkeypatch):
    before = make_proof("f", "", {"xla_dump_to": "x"})
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/tmp/x --xla_force_host_platform_device_count=2")
    after = make_proof("f", "", {})
    assert after.flags == tuple(f for f in before.flags if "device_count" not in f)
    assert before.options == {}
    monkeypatch.setenv("XLA_FLAGS", "--xla_b=1  --xla_a=2")
    assert make_proof("f", "", {}).flags == ("--xla_a=2", "--xla_b=1")


def test_what_was_compiled_before_is_compiled_anew():
    locked(make_step(), ones())
    step, x = make_step(one_more), ones()
    step(x)
    with pytest.raises(AttestationError), tx.attested(FILE):
        step(x)


def test_a_block_in_which_the_locked_program_never_came_is_an_error():
    step, x = make_step(), ones()
    locked(step, x)
    compiled = step.lower(x).compile()
    said = "needs a program in its block that is that of"
    with pytest.raises(AttestationError, match=said), tx.attested(FILE):
        compiled(x)


def test_a_file_without_the_target_or_the_proof_is_refused():
    step, x = make_step(), ones()
    FILE.write_text('{"format": "txcore-lock", "version": 1, "targets": {}}')
    said = "it is for cpu:8 data=8, and the file has none"
    with pytest.raises(AttestationError, match=said), tx.attested(FILE):
        step(x)
    update(FILE, audit(step, x))
    said = "has what it sends, but not what it is: lock it"
    with pytest.raises(AttestationError, match=said), tx.attested(FILE):
        step(x)
    with pytest.raises(LockError, match=r"cannot read no\.json"), tx.attested("no.json"):
        step(x)


def test_several_files_hold_several_programs():
    locked(make_step(), ones())
    other = make_step(one_more)
    with tx.attested("other.lock.json", update=True):
        other(ones())
    with tx.attested(FILE, "other.lock.json"):
        make_step()(ones())
        other(ones())
    several = tx.attested(FILE, "other.lock.json", update=True)
    with pytest.raises(TypeError, match="needs one lock file, but got 2"), several:
        pass
    with pytest.raises(TypeError, match="needs lock files, but got 0"), tx.attested():
        pass


def test_a_block_that_locks_takes_one_program():
    said = re.escape("another that communicates, jit(step)")
    with pytest.raises(AttestationError, match=said), tx.attested(FILE, update=True):
        make_step()(ones())
        make_step(one_more)(ones())


def test_updates_keep_the_proofs_of_other_versions_of_jax():
    step, x = make_step(), ones()
    locked(step, x)
    text = FILE.read_text().replace(f'"jax": "{jax.__version__}"', '"jax": "0.9.9"')
    FILE.write_text(text)
    locked(step, x)
    assert FILE.read_text().count('"name": "jit(step)"') == 2
    assert os.path.getsize(FILE) < 4000
    with tx.attested(FILE):
        step(x)


KERNEL = """HloModule jit_f, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}, \
num_partitions=2

ENTRY %main.3 (x.1: f32[8]) -> f32[8] {
  %x.1 = f32[8]{0} parameter(0), metadata={op_name="x" stack_frame_id=3}
  ROOT %c.2 = f32[8]{0} custom-call(%x.1), custom_call_target="TARGET", \
backend_config={"body":"AAA","sizes":{"a":[1,{"b":2}]}}, metadata={op_name="jit(f)/} {k" }
}
"""


def test_the_code_of_a_kernel_counts_and_what_a_library_measured_does_not():
    def digest(target, body, name="x"):
        text = KERNEL.replace("TARGET", target).replace("AAA", body).replace("x.1", name)
        return make_proof("f", text, {}).module

    assert digest("tpu_custom_call", "AAA") != digest("tpu_custom_call", "BBB")
    assert digest("__cublas$gemm", "AAA") == digest("__cublas$gemm", "BBB")
    assert digest("tpu_custom_call", "AAA") == digest("tpu_custom_call", "AAA", "renamed.7")
    assert make_proof("f", KERNEL, {}).opcodes == {"custom-call": 1, "parameter": 1}
