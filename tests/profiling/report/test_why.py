"""Why a collective is there that nobody asked for: line, operation, scope, and what to write."""

import os
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from audit_cases import P, mesh_of, shape

from txcore.profiling import Collective, Part, Report, audit
from txcore.profiling.declared import source
from txcore.profiling.hlo import Shape
from txcore.profiling.matching.arrays import Unit
from txcore.profiling.matching.rows import _types_of
from txcore.profiling.report.why import explain_rows

HERE = pathlib.Path(__file__)


def part(place="", op_name="", payload=64):
    short = os.path.basename(place)
    return Part("", "float32", "float32", 16, payload, short, (), op_name, place)


def row(op_name, *parts, kind="all-reduce", origin="partitioner", axes=("data",), trips=1):
    return Collective(
        kind=kind, origin=origin, tags=(), axes=axes, group_size=8, dtype="float32",
        wire_dtype="float32", payload_bytes=64, wire_bytes=112, trips=trips, source="",
        op_name=op_name, explained=False, parts=parts,
    )  # fmt: skip


def test_arrays_of_one_line_are_one_reason_whatever_op_sends_them(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    file = tmp_path / "model" / "block.py"
    file.write_text("\n  y = x @ w + b\nz = y.sum()\n")
    monkeypatch.chdir(tmp_path)
    at = f"{file}:2"
    back = "transpose(jvp(Block))"
    merged = f"jit(step)/({back}/mlp/dot_general:{back}/mlp/reduce_sum:jvp(Block)/reduce_sum)"
    rows = (
        row(merged, part(at), part(at, payload=8), part(f"{file}:3", payload=4), trips=2),
        row(f"jit(step)/{back}/mlp/dot_general", part(at)),
    )
    first, second = explain_rows(rows)
    assert (first.place, first.text) == ("model/block.py:2", "y = x @ w + b")
    assert (first.arrays, first.payload_bytes, first.backward) == (3, 2 * 64 + 2 * 8 + 64, True)
    assert (first.module, first.operations) == ("Block/mlp", ("dot_general", "reduce_sum"))
    assert (second.place, second.text, second.backward) == (
        "model/block.py:3",
        "z = y.sum()",
        False,
    )
    said = Report(rows).why().splitlines()
    assert "  model/block.py:2 +2  Block/mlp: dot_general, reduce_sum  208 B a call" in said
    assert "    | y = x @ w + b" in said


def test_what_is_explained_has_no_reason():
    report = Report((row("jit(f)/dot_general", part("/a.py:1")),))
    assert report.why()
    assert report.allowing({"partitioner"}).why() == ""


@pytest.mark.parametrize(
    "kind,op_name,instead",
    [
        ("all-reduce", "jit(f)/dot_general", "tx.psum(y, 'data'), "),
        ("all-reduce", "jit(f)/reduce_max", "tx.pmax(y, 'data'), "),
        ("all-reduce", "jit(f)/transpose(jvp(f))/dot_general", "tx.pmean(grads, 'data') of "),
        ("reduce-scatter", "jit(f)/dot_general", "tx.psum_scatter(y, 'data'), "),
        ("all-gather", "jit(f)/sort", "tx.all_gather(x, 'data', ...) before it"),
        ("all-to-all", "jit(f)/transpose", "tx.all_to_all(x, 'data', ...) before it"),
        ("collective-permute", "jit(f)/slice", "tx.shift(x, 'data', ...) or "),
        ("all-gather", "jit(f)/shard_map", "the sharding of one at the other"),
        ("all-gather", "x", "the sharding of one at the other"),
        ("collective-broadcast", "jit(f)/sort", "it in jax.shard_map"),
    ],
)
def test_each_kind_has_an_explicit_line(kind, op_name, instead):
    (why,) = explain_rows([row(op_name, part("/nowhere/a.py:7"), kind=kind)])
    assert why.instead.startswith(instead)
    assert (why.place, why.text) == ("a.py:7", "")


def test_the_line_is_the_users_while_the_stack_holds_one():
    jaxs, own = jax.__file__, str(HERE)
    flax = os.path.join(os.sep, "x", "site-packages", "flax", "linear.py")
    python = os.path.join(os.path.dirname(os.__file__), "functools.py")
    stack = [(jaxs, 1), (flax, 2), (python, 3), ("<frozen runpy>", 4), (own, 5), ("/b/main.py", 6)]
    assert source.user_source_line(stack) == f"{HERE.name}:5"
    assert source.user_source_line(stack[:4]) == "linear.py:2", "an installed one, without another"
    assert source.user_source_line(stack[:1]) == f"{os.path.basename(jaxs)}:1"
    assert source.user_source_line([]) == ""


def test_lines_and_modules_of_a_flax_model():
    pytest.importorskip("flax")
    from flax import linen as nn

    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            h = nn.Dense(32, name="up")(x)
            return x + nn.Dense(16, name="down")(nn.gelu(h))

    lines = [text.strip() for text in HERE.read_text().splitlines()]
    up_line, down_line = (
        1 + lines.index(text)
        for text in (
            'h = nn.Dense(32, name="up")(x)',
            'return x + nn.Dense(16, name="down")(nn.gelu(h))',
        )
    )
    mesh, model = mesh_of(data=2, model=4), Block()
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.ones((8, 16)))["params"]
    specs = {"up": (P(None, "model"), P("model")), "down": (P("model", None), P())}
    params = {
        name: {"kernel": shape(mesh, w, *params[name]["kernel"].shape),
               "bias": shape(mesh, b, *params[name]["bias"].shape)}
        for name, (w, b) in specs.items()
    }  # fmt: skip

    def step(params, x):
        def loss(params):
            return (model.apply({"params": params}, x) ** 2).sum()

        return jax.grad(loss)(params)

    report = audit(step, params, shape(mesh, P("data"), 8, 16))
    reasons = explain_rows(report.collectives)
    assert reasons
    folder = pathlib.Path(source.near_line(f"{HERE}:1").rpartition(":")[0])
    assert {why.place.rpartition(":")[0] for why in reasons} == {str(folder)}
    forward = [why for why in reasons if not why.backward]
    assert [(w.module, w.axes, w.operations) for w in forward] == [
        ("Block/down", ("model",), ("dot_general",))
    ]
    assert forward[0].place.endswith(f":{down_line}")
    assert forward[0].text.startswith("return x + nn.Dense(16")
    up = {why.axes for why in reasons if why.backward and why.place.endswith(f":{up_line}")}
    assert up == {("data",)}, "the gradients of its weights: x is not differentiated"


def test_cells_of_notebooks_are_named_as_they_are_shown(monkeypatch):
    assert source.short_line(("<ipython-input-3-0f>", 12)) == "In [3]:12"
    assert source.near_line("<ipython-input-3-0f>:12") == "In [3]:12"
    file = "/tmp/ipykernel_7/123.py"
    assert source.short_line((file, 2)) == "123.py:2", "without a shell nobody knows its number"
    compiler = types.SimpleNamespace(_filename_map={file: 5})
    shell = types.SimpleNamespace(compile=compiler)
    fake = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", fake)
    assert source.short_line((file, 2)) == "In [5]:2"
    assert source.near_line(f"{file}:2") == "In [5]:2"


@pytest.mark.parametrize(
    "kind,dims,dim,wanted",
    [
        ("all-reduce", (4, 8), -1, ("float32[4,8]{U:data}", "float32[4,8]")),
        ("all-gather", (4, 8), 0, ("float32[32@data,8]", "float32[32,8]")),
        ("reduce-scatter", (16, 8), 0, ("float32[16,8]{U:data}", "float32[16@data,8]")),
        ("all-to-all", (4, 8), -1, ("", "")),
        ("all-gather", (4, 8), 2, ("", "")),
    ],
)
def test_how_an_array_lies_and_has_to(kind, dims, dim, wanted):
    shape_ = Shape("float32", dims, 32)
    unit = Unit(0, kind, shape_, 32, laid=shape_, dim=dim)
    assert _types_of(unit, ("data",), 8) == wanted
    assert _types_of(unit, (), 8) == ("", "")


def test_types_stand_below_the_line():
    lies = ("float32[16@data]", "float32[16]")
    parts = [Part("", "float32", "float32", 16, 64, "a.py:1", (), "jit(f)/sort", "", lies)] * 2
    said = Report((row("jit(f)/sort", *parts, kind="all-gather"),)).why().splitlines()
    assert said[-1] == "    float32[16@data] -> float32[16]", "alike ones once"


def test_an_argument_that_is_moved_is_named():
    (why,) = explain_rows([row("x", part(), kind="collective-permute")])
    assert why.module == "the argument x"
