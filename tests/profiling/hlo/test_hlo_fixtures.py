"""Real modules of three compilers and hand-made ones of older forms, each with its reading.

The figures are counted by hand from the programs in `fixtures/hlo/generate.py`: the arrays that
one device puts in, and S, nccl-tests' bytes (n x an all-gather's operand).
"""

import pathlib
import re

import pytest

from txcore.profiling.hlo import find_collectives

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "hlo"

# A mesh of data=2 x model=4: device = 4 * data + model.
DATA = ((0, 4), (1, 5), (2, 6), (3, 7))
MODEL = ((0, 1, 2, 3), (4, 5, 6, 7))
ALL = ((0, 1, 2, 3, 4, 5, 6, 7),)
RING = ((0, 1), (1, 2), (2, 3), (3, 0), (4, 5), (5, 6), (6, 7), (7, 4))  # along model
SWAP = ((0, 4), (1, 5), (2, 6), (3, 7), (4, 0), (5, 1), (6, 2), (7, 3))  # along data
UNKNOWN = None


def one(kind, among, inputs, s_bytes, *, trips=1, marked=False):
    """Describe one collective; `inputs` as "float32 8,128 tag, float32 7" in the compiled order."""
    return kind, tuple(sorted(among)), inputs, s_bytes, trips, marked


def reduced(tag_and_array, s_bytes, among=DATA, **more):
    return one("all-reduce", among, tag_and_array, s_bytes, **more)


MERGED_APART = [
    reduced("bfloat16 6,2 sum.d", 2 * 6 * 2),
    reduced("float32 7 max.c", 4 * 7),
]
LOOPS = [
    reduced("float32 32,128 inner", 4 * 32 * 128, MODEL, trips=5 * 3),
    reduced("float32 32,128 outer", 4 * 32 * 128, trips=5),
    reduced("float32 32,128 branch.sum", 4 * 32 * 128),
]
PERMUTES_IN_LOOPS = [
    one("collective-permute", SWAP, "float32 32,128 while", 4 * 32 * 128, trips=UNKNOWN),
    one("collective-permute", SWAP, "float32 32,128 branch.shift", 4 * 32 * 128),
]
GATHERED = [
    one("all-gather", DATA, "float32 128,128 gather.rows", 2 * 4 * 128 * 128),
    one("all-gather", MODEL, "float32 128,128 gather.columns", 4 * 4 * 128 * 128),
    one("reduce-scatter", MODEL, "float32 1024,1024 scatter", 4 * 1024 * 1024),
]
AUTOMATIC = [
    # x @ w: each device has 256 x 256 and 256 x 128, so that the product is a partial sum.
    reduced("float32 256,128 marked", 4 * 256 * 128, marked=True),
    reduced("float32 8,16 by.hand", 4 * 8 * 16, MODEL),
]
# x=2, y=2, z=2: device = 4x + 2y + z; the i-th array has 128i elements on a device.
AXES = [
    reduced("float32 1,128 sum.x", 4 * 128, ((0, 4), (1, 5), (2, 6), (3, 7))),
    reduced("float32 1,256 sum.y", 4 * 256, ((0, 2), (1, 3), (4, 6), (5, 7))),
    reduced("float32 1,384 sum.z", 4 * 384, ((0, 1), (2, 3), (4, 5), (6, 7))),
    reduced("float32 1,512 sum.xy", 4 * 512, ((0, 2, 4, 6), (1, 3, 5, 7))),
    reduced("float32 1,640 sum.xz", 4 * 640, ((0, 1, 4, 5), (2, 3, 6, 7))),
    reduced("float32 1,768 sum.yz", 4 * 768, ((0, 1, 2, 3), (4, 5, 6, 7))),
    reduced("float32 1,896 sum.xyz", 4 * 896, ALL),
]
SUM_OF_LAYERS = reduced("float32 512,1024 sum.h", 4 * 512 * 1024, MODEL, trips=4)
# On TPU a matrix product takes bfloat16, and the weights are gathered as such.
LAYERS_TPU = [
    one("all-gather", DATA, "bfloat16 1,1024,512 gather.w2", 2 * 2 * 1024 * 512, trips=4),
    one("all-gather", DATA, "bfloat16 1,512,1024 gather.w1", 2 * 2 * 512 * 1024, trips=4),
    SUM_OF_LAYERS,
]

EXPECTED = {
    # CPU combines across dtypes, since it sums bfloat16 as float32.
    "cpu/merged": [
        reduced(
            "float32 8,128 sum.a, float32 1,5,3, float32 7 sum.c, float32 6,2 sum.d",
            4 * (8 * 128 + 5 * 3 + 7 + 6 * 2),
        ),
        reduced("float32 7 max.c", 4 * 7),
    ],
    "gpu/merged": [
        reduced(
            "float32 1046 sum.a+sum.c [float32 1024 sum.a; float32 15; float32 7 sum.c]",
            4 * (8 * 128 + 5 * 3 + 7),
        ),
        *MERGED_APART,
    ],
    "tpu/merged": [
        reduced("float32 8,128 sum.a", 4 * 8 * 128),
        reduced("float32 1,5,3", 4 * 5 * 3),
        reduced("float32 7 sum.c", 4 * 7),
        *MERGED_APART,
    ],
    "cpu/sharded": GATHERED,
    "gpu/sharded": GATHERED,
    "tpu/sharded": GATHERED,
    # On these chips a small one becomes an all-reduce of which each keeps its slice.
    "tpu/scattered": [reduced("float32 64,16 scatter", 4 * 64 * 16, ALL)],
    # CPU cuts the array of an all-to-all, TPU gives it a dim of as many parts, GPU leaves it.
    "cpu/moves": [
        one("all-to-all", MODEL, ", ".join(["float32 2,128 swap.model"] * 4), 4 * 8 * 128),
        one("all-to-all", DATA, ", ".join(["float32 8,64 swap.data"] * 2), 4 * 8 * 128),
        one("collective-permute", RING, "float32 8,128 shift.x", 4 * 8 * 128),
        one("collective-permute", RING, "int32 2 shift.y", 4 * 2),
    ],
    "gpu/moves": [
        one("all-to-all", MODEL, "float32 8,128 swap.model", 4 * 8 * 128),
        one("all-to-all", DATA, "float32 8,128 swap.data", 4 * 8 * 128),
        one(
            "collective-permute",
            RING,
            "float32 8,128 shift.x, int32 2 shift.y",
            4 * (8 * 128 + 2),
        ),
    ],
    "tpu/moves": [
        one("all-to-all", MODEL, "float32 4,2,128 swap.model", 4 * 8 * 128),
        one("all-to-all", DATA, "float32 2,1,512 swap.data", 4 * 8 * 128),
        one("collective-permute", RING, "float32 8,128 shift.x", 4 * 8 * 128),
        one("collective-permute", RING, "int32 2 shift.y", 4 * 2),
    ],
    "cpu/loops": LOOPS + PERMUTES_IN_LOOPS,
    "gpu/loops": LOOPS + PERMUTES_IN_LOOPS,
    "tpu/loops": LOOPS + PERMUTES_IN_LOOPS,
    # A ring is broken in two halves, here one send each way: each has its own senders.
    "gpu/loops_as_sends": [
        *LOOPS,
        *(
            one("collective-permute", half, f"float32 32,128 {tag}", 4 * 32 * 128, trips=trips)
            for half in (SWAP[:4], SWAP[4:])
            for tag, trips in (("while", UNKNOWN), ("branch.shift", 1))
        ),
    ],
    "cpu/layers": [
        one("all-gather", DATA, "float32 512,1024 gather.w1", 2 * 4 * 512 * 1024, trips=4),
        one("all-gather", DATA, "float32 1024,512 gather.w2", 2 * 4 * 1024 * 512, trips=4),
        SUM_OF_LAYERS,
    ],
    # GPU combines the two in an order of its own, one of them transposed.
    "gpu/layers": [
        one(
            "all-gather",
            DATA,
            "float32 512,1024 gather.w2, float32 512,1024 gather.w1",
            2 * 4 * 2 * 512 * 1024,
            trips=4,
        ),
        SUM_OF_LAYERS,
    ],
    "tpu/layers": LAYERS_TPU,
    "tpu/layers_on_sparse_core": LAYERS_TPU,
    # Six in all: five in the loop and the last after it.
    "gpu/stacked": [
        one("reduce-scatter", DATA, "float32 1024,1024 scatter.h", 4 * 1024 * 1024, trips=trips)
        for trips in (5, 1)
    ],
    "cpu/automatic": AUTOMATIC,
    "gpu/automatic": AUTOMATIC,
    "tpu/automatic": AUTOMATIC,
    "cpu/mixed": [
        reduced(
            "float32 256,128 marked, float32 16,16 by.hand",
            4 * (256 * 128 + 16 * 16),
            marked=True,
        ),
    ],
    "gpu/mixed": [
        reduced(
            "float32 33024 by.hand marked [float32 32768 marked; float32 256 by.hand]",
            4 * (256 * 128 + 16 * 16),
            marked=True,
        ),
    ],
    "tpu/mixed": [
        reduced("float32 256,128 marked", 4 * 256 * 128, marked=True),
        reduced("float32 16,16 by.hand", 4 * 16 * 16),
    ],
    "cpu/axes": AXES,
    "gpu/axes": AXES,
    "tpu/axes": AXES,
}
FILES = sorted(FIXTURES.glob("[cgt]pu/*.hlo"))


def reading(op):
    among = op.pairs if op.kind == "collective-permute" else tuple(op.groups)
    trips = op.trips.count if op.trips.known else UNKNOWN
    return op.kind, among, ", ".join(map(written, op.inputs)), op.bytes, trips, op.marked


def written(array):
    pieces = "; ".join(map(written, array.pieces))
    words = [
        array.shape.dtype,
        ",".join(map(str, array.shape.dims)),
        array.tag.replace(",", "+"),
        "marked" if array.marked else "",
        f"[{pieces}]" if pieces else "",
    ]
    return " ".join(word for word in words if word)


def ordered(rows):
    return sorted(rows, key=repr)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_real_module_reads_as_counted_by_hand(path):
    program = f"{path.parent.name}/{re.sub('-jax.*', '', path.stem)}"
    ops = find_collectives(path.read_text())
    assert ordered(map(reading, ops)) == ordered(EXPECTED[program])


def test_every_program_is_there_for_every_target():
    there = {f"{p.parent.name}/{re.sub('-jax.*', '', p.stem)}" for p in FILES}
    assert there == set(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_collective_names_the_program_or_its_primitive(path):
    for op in find_collectives(path.read_text()):
        assert op.tags or op.op_name, op.name
        assert {file for file, _ in op.frames} <= {"program.py"}, op.frames


def test_fixtures_hold_no_path_of_the_machine_that_made_them():
    for path in FILES:
        assert not re.search(r'"/[^"]+/[^"]+"', path.read_text()), path


PAIRS = ((0, 1), (2, 3))
HANDMADE = {
    # async-start with typed operands, async-update, a start that names what it runs, iota groups.
    "async_generic": [
        one("reduce-scatter", ALL, "float32 64,8 grad.w, float32 32 grad.b", 4 * (64 * 8 + 32)),
        one("all-to-all", DATA, "bfloat16 16,4 swap", 2 * 16 * 4),
    ],
    # A call to %command_buffer; one fusion that reads both slices of the flat array.
    "command_buffer": [
        reduced(
            "float32 32 grad.w+grad.b [float32 24 grad.w; float32 8 grad.b]", 4 * (24 + 8), PAIRS
        ),
    ],
    # An all-reduce within a fusion that scatters, and one behind fusion-start.
    "hidden_in_fusion": [
        reduced("bfloat16 64,16", 2 * 64 * 16, ((0, 1, 2, 3),)),
        reduced("bfloat16 4,4 norm", 2 * 4 * 4, ((0, 1, 2, 3),)),
    ],
    # No % before names; a start with context, in place, four in one, a send, no pairs at all.
    "permutes": [
        one("collective-permute", ((0, 1), (1, 0), (2, 3), (3, 2)), "float32 8,128", 4 * 1024),
        one("collective-permute", ((0, 1), (1, 2)), "float32 4,128", 4 * 512),
        one(
            "collective-permute",
            ((0, 3), (3, 0)),
            "float32 2, float32 3, float32 5, float32 7",
            4 * (2 + 3 + 5 + 7),
        ),
        one("collective-permute", ((0, 1), (1, 2), (2, 3)), "float32 8,128 pipe", 4 * 1024),
        one("collective-permute", (), "float32 8,128", 4 * 1024),
    ],
    # Four replicas of two partitions: device = 2 * replica + partition.
    "replicas": [
        reduced("float32 16", 64, ((0, 2), (1, 3), (4, 6), (5, 7))),
        reduced("float32 16", 64, ((0, 1, 4, 5), (2, 3, 6, 7))),
        one("all-to-all", ((0, 1), (2, 3), (4, 5), (6, 7)), "float32 16", 64),
        reduced("float32 16", 64, MODEL, trips=7),
        one("all-gather", ((0, 2, 4, 6), (1, 3, 5, 7)), "float32 16", 4 * 64),
    ],
    # Two of different kinds behind one async-start, in a loop.
    "nccl_group": [
        reduced("float32 64 grad", 4 * 64, PAIRS, trips=3),
        one("all-gather", ((0, 1, 2, 3),), "float32 16 param", 4 * 4 * 16, trips=3),
    ],
    # Sub-axes, device_ids, offsets that nobody sends, a kernel that says it sends, small types.
    "opaque_and_rare": [
        one("ragged-all-to-all", ((0, 2, 4, 6), (1, 3, 5, 7)), "float32 8,4", 4 * 8 * 4),
        one("collective-broadcast", ((0, 1), (2, 3), (4, 5), (6, 7)), "float32 8,4", 4 * 8 * 4),
        one("custom-call", (), "", 0),
        one("all-gather", DATA, "float8_e4m3fn 8,4, int4 4", 2 * (8 * 4 + 4 // 2)),
    ],
}


@pytest.mark.parametrize("name", HANDMADE)
def test_a_form_that_none_of_the_real_modules_shows(name):
    ops = find_collectives((FIXTURES / "handmade" / f"{name}.hlo").read_text())
    assert ordered(map(reading, ops)) == ordered(HANDMADE[name]), [op.problem for op in ops]


def test_every_handmade_module_has_its_reading():
    assert {path.stem for path in FIXTURES.glob("handmade/*.hlo")} == set(HANDMADE)


def test_inline_source_lines_and_names_of_old_primitives():
    ops = find_collectives((FIXTURES / "handmade" / "permutes.hlo").read_text())
    (old,) = (op for op in ops if op.name == "old")
    assert old.frames == (("/u/old.py", 4),)
    assert old.op_name.endswith("ppermute[axis_name=data perm=((0, 1), (1, 0))]")
