"""Reports made by hand for the tests of the page and of the diff."""

import dataclasses
from typing import Any

from txcore.profiling import Collective, Declared, Report
from txcore.profiling.declared.divergence import Divergence
from txcore.profiling.report import Fate, Part, PlanLine

HOSTILE = (
    "</script><script>window.pwned = 1</script>",
    "</style><img src=x onerror='window.pwned = 1'>",
    '" onmouseover="window.pwned = 1" x="',
    "' autofocus onfocus='window.pwned = 1",
    "<!-- --> ]]> &lt; &amp;amp; `${1}` {{x}}",
    "a\u202eb\u2066c\u200bd\x00e\x1bf\ud800g\nh",
    "שלום/مرحبا/日本語/e\u0301",
)
ROW = Collective(
    kind="all-reduce",
    origin="txcore",
    tags=("psum/grads.kernel",),
    axes=("data",),
    group_size=4,
    dtype="bfloat16",
    wire_dtype="float32",
    payload_bytes=1000,
    wire_bytes=3000,
    trips=1,
    source="train.py:40",
    op_name="jit(step)/shard_map/psum",
    op="all-reduce.1",
)
DECLARED = Declared(
    *("all-reduce", "psum", ("data",), 4, "bfloat16", 1000, 1),
    *("psum/grads.kernel", "train.py:40", False),
)
MESH = (("data", 4), ("model", 2))


def row(**changes: Any) -> Collective:
    """Return the row with something else in it."""
    return dataclasses.replace(ROW, **changes)


def added(**changes: Any) -> Collective:
    """Return a row that nobody asked for."""
    fixed = {"origin": "partitioner", "explained": False, "tags": (), "note": "made by a dot"}
    return row(**{**fixed, **changes})


def part(tag: str, number: int = 500) -> Part:
    """Return an array of a merged row."""
    fates = ("combined", "promoted")
    return Part(tag, "bfloat16", "float32", number // 2, number, "train.py:41", fates)


def failed() -> Report:
    """Return a report with every section that a page can have."""
    merged = row(tags=("psum/a", "psum/b", "psum/c"), parts=(part("psum/a"), part("psum/b")))
    gathered = row(
        kind="all-gather", axes=("model",), group_size=2, payload_bytes=20_000, wire_bytes=10_000,
        dtype="float32", trips=3, trips_known=False, source="model.py:7", origin="user", tags=(),
    )  # fmt: skip
    gone = dataclasses.replace(DECLARED, tag=None, axes=("model",), source="loss.py:3")
    both = added(axes=("data", "model"), group_size=8, source="train.py:52", payload_bytes=50)
    opaque = row(kind="custom-call", origin="opaque", axes=(), group_size=0, source="", tags=())
    hang = Divergence(
        *("hangs", "data", "psum/x", "all-reduce", ("data",), "a.py:1", "cond", "a.py:2")
    )
    return Report(
        (merged, gathered, both, opaque, row(origin="autodiff", wire_bytes=4)),
        missing=(gone,),
        fates=(Fate(DECLARED, ("combined", "promoted"), (0,)), Fate(gone, ("missing",))),
        mesh=MESH,
        target="cpu:8",
        divergent=(hang,),
        plan=(PlanLine("gradients", "all-reduce", ("data",), "float32", 4000, 1000),),
    )


def hostile(text: str) -> Report:
    """Return a report in which every text, however unlikely, is one of an attacker's."""
    said = Part(text, text, f"{text}2", 1, 4, text, (text,))
    bad = Collective(
        *(text, text, (text,) * 3, (text,), 2, text, f"{text}2", 4, 4, 1, text, text),
        explained=False,
        note=text,
        op=text,
        parts=(said,),
    )
    asked = Declared(text, text, (text,), 2, text, 4, 1, text, text, False)
    return Report(
        (bad, dataclasses.replace(bad, explained=True, parts=())),
        missing=(asked,),
        fates=(Fate(asked, (text,), (0,)),),
        mesh=((text, 2), ("data", 4)),
        target=text,
        divergent=(Divergence(text, text, text, text, (text,), text, text, text),),
        plan=(PlanLine(text, text, (text,), text, 8, 4),),
    )


def large(number: int) -> Report:
    """Return a report as of an unrolled model; every other row has two arrays merged."""
    rows, fates = [], []
    for i in range(number):
        tags = (f"psum/layers.{i}.attention.kernel", f"psum/layers.{i}.mlp.kernel")[: 1 + i % 2]
        parts = tuple(part(tag, 4 * i + 2) for tag in tags)
        path = f"jit(train_step)/jit(main)/shard_map/transpose(jvp(Block_{i}))/psum_invariant"
        rows.append(row(tags=tags, parts=parts, payload_bytes=8 * i + 4, op_name=path))
        declared = [dataclasses.replace(DECLARED, tag=tag) for tag in tags]
        fates += [Fate(d, ("combined", "promoted"), (i,)) for d in declared]
    return Report(
        tuple(rows), fates=tuple(fates), mesh=(("data", 4096),), target="tpu:v5p:16x16x16"
    )
