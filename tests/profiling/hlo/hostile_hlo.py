"""HLO made to be slow or large: each kind grows to any size and is one that a careless reader
takes time or memory beyond the text's length for.

    python tests/profiling/hlo/hostile_hlo.py [KIND ...] [--sizes 1,2,4]

prints the seconds of its own time that a process takes for `audit_text` and the report's text, for
each kind at each size in MB, and its memory at the peak.
"""

import argparse
import pathlib
import resource
import sys
import time

sys.path.append(str(pathlib.Path(__file__).parents[2]))  # the tests' own helpers

from processes import call_in_process

HEAD = "HloModule m, replica_count=2, num_partitions=4\n"
ENTRY = "ENTRY %e (x: f32[8]) -> f32[8] {\n  %x = f32[8]{0} parameter(0)\n"
COMMON = "channel_id=1, replica_groups={{0,1,2,3,4,5,6,7}}, use_global_device_ids=true"
REDUCE = f"f32[8]{{0}} all-reduce(%x), {COMMON}"


def module(body, head=HEAD, before=""):
    return f"{head}{before}{ENTRY}{body}\n}}\n"


def line(more, name="r"):
    return module(f"  %{name} = {REDUCE}, {more}")


def repeat(piece, size):
    """Repeat a text, or what a function makes of 0, 1, 2, ..., up to a size."""
    if isinstance(piece, str):
        return piece * (size // len(piece))
    parts, length = [], 0
    while length < size:
        parts.append(piece(len(parts)))
        length += len(parts[-1])
    return "".join(parts)


def quotes(size):
    return '"' + repeat('\\"', size) + '"'


def in_string(text):
    return lambda size: line(f'metadata={{op_name="{repeat(text, size)}"}}')


def loop(name, callee, trips):
    return (
        f"%{name} (p: f32[8]) -> f32[8] {{\n  %p = f32[8] parameter(0)\n  ROOT %w = f32[8] "
        f'while(%p), condition=%c, body=%{callee}, backend_config={{"known_trip_count":'
        f'{{"n":"{trips}"}}}}\n}}\n'
    )


BODY = "%body (x: f32[8]) -> f32[8] {\n  %x = f32[8] parameter(0)\n  ROOT %r = " + REDUCE + "\n}\n"


def nested_loops(size):
    count = size // 160
    loops = "".join(loop(f"l{i}", f"l{i + 1}", 10**18 - 1) for i in range(count))
    return module(f"  %r = {REDUCE}", before=loops + BODY.replace("%body", f"%l{count}"))


def doubling_calls(size):
    count = size // 120
    calls = "".join(
        f"%c{i} (p: f32[8]) -> f32[8] {{\n  %p = f32[8] parameter(0)\n"
        f"  %a = f32[8] call(%p), to_apply=%c{i + 1}\n"
        f"  ROOT %b = f32[8] call(%a), to_apply=%c{i + 1}\n}}\n"
        for i in range(count)
    )
    return module("  %y = f32[8] call(%x), to_apply=%c0",
                  before=calls + BODY.replace("%body", f"%c{count}"))  # fmt: skip


def one_line(size):
    count = size // 22
    types = ", ".join(["f32[8]{0}"] * count)
    operands = ", ".join(["f32[8] %x"] * count)
    return module(f"  %r = ({types}) all-reduce({operands}), {COMMON}")


def with_tags(size):
    """One op of many arrays that say nothing, with as many tags on its own line."""
    count = size // 45
    types, operands = ", ".join(["f32[8]{0}"] * count), ", ".join(["%x"] * count)
    tags = ",".join(f"psum/leaf{i}" for i in range(count))
    return module(f"  %r = ({types}) all-reduce({operands}), {COMMON}, "
                  f'frontend_attributes={{txcore="{tags}"}}')  # fmt: skip


def with_elements(size):
    """One op of many arrays, whose op_name is long, and each array with words of its own."""
    count = size // 230
    types, operands = ", ".join(["f32[8]{0}"] * count), ", ".join(["%x"] * count)
    name = "jit(f)/(" + ":".join(["mul"] * (size // 8)) + ")"
    elements = "".join(
        f'  %g{i} = f32[8] get-tuple-element(%r), index={i}, frontend_attributes={{txcore="t{i}"}},'
        f' metadata={{op_name="jit(f)/shard_map/leaf{i}/psum"}}\n  %v{i} = f32[8] copy(%g{i})\n'
        for i in range(count)
    )
    return module(f"  %r = ({types}) all-reduce({operands}), {COMMON}, "
                  f'metadata={{op_name="{name}"}}\n{elements}')  # fmt: skip


def into_one_tuple(size):
    count = size // 150
    lines = "\n".join(f"  %r.{i} = {REDUCE}" for i in range(count))
    names = ", ".join(f"%r.{i}" for i in range(count))
    types = ", ".join(["f32[8]"] * count)
    return module(f"{lines}\n  ROOT %t = ({types}) tuple({names})")


def of_one_concatenation(size):
    pieces, count = size // 50, size // 300
    joined = ", ".join(["%x"] * pieces)
    lines = "\n".join(
        f"  %r.{i} = f32[{8 * pieces}]{{0}} all-reduce(%j), {COMMON}\n"
        f"  %s.{i} = f32[8] slice(%r.{i}), slice={{[0:8]}}"
        for i in range(count)
    )
    return module(f"  %j = f32[{8 * pieces}]{{0}} concatenate({joined}), dimensions={{0}}\n{lines}")


def of_one_tuple(size):
    types = ", ".join(["f32[8]"] * (size // 16))
    operands = repeat("%t, ", size // 4)[:-2]
    lines = repeat(lambda i: f"  %r.{i} = f32[8] all-reduce(%t), {COMMON}\n", size // 4)
    return module(
        f"  %t = ({types}) parameter(1)\n{lines}  %z = f32[8] all-reduce({operands}), {COMMON}"
    )


def through_one_fusion(size):
    """Collectives of flat arrays that all go through the same long chain of another computation."""
    chain = repeat(lambda i: f"  %c{i + 1} = f32[16] copy(%c{i})\n", size // 2)
    inner = f"%f (c0: f32[16]) -> f32[16] {{\n  %c0 = f32[16] parameter(0)\n{chain}}}\n"
    lines = repeat(
        lambda i: (
            f"  %r.{i} = f32[16]{{0}} all-reduce(%j), {COMMON}\n"
            f"  %u.{i} = f32[16] fusion(%r.{i}), kind=kLoop, calls=%f\n"
        ),
        size // 2,
    )
    joined = "  %j = f32[16]{0} concatenate(%x, %x), dimensions={0}\n"
    return module(joined + lines, before=inner)


def of_many_operands(size):
    """Collectives that one line of all their results uses, which is read for each of them."""
    count = size // 260
    lines = "".join(
        f"  %j.{i} = f32[16]{{0}} concatenate(%x, %x), dimensions={{0}}\n"
        f"  %r.{i} = f32[16]{{0}} all-reduce(%j.{i}), {COMMON}\n"
        for i in range(count)
    )
    names = ", ".join(f"%r.{i}" for i in range(count))
    inner = "%f (c0: f32[16]) -> f32[16] {\n  %c0 = f32[16] parameter(0)\n}\n"
    return module(f"{lines}  %u = f32[16] fusion({names}), kind=kLoop, calls=%f", before=inner)


def loops_over_one_chain(size):
    """Loops without a printed length, whose counter is behind a long chain of copies."""
    state = "(s32[], f32[8])"
    chain = repeat(lambda i: f"  %n{i + 1} = s32[] copy(%n{i})\n", size // 2)
    last = chain.count("\n")
    body = (f"%b (p: {state}) -> {state} {{\n  %p = {state} parameter(0)\n"
            f"  %n0 = s32[] get-tuple-element(%p), index=0\n{chain}"
            f"  ROOT %t = {state} tuple(%n{last}, %n{last})\n}}\n")  # fmt: skip
    test = (f"%c (p: {state}) -> pred[] {{\n  %p = {state} parameter(0)\n"
            "  %i = s32[] get-tuple-element(%p), index=0\n  %k = s32[] constant(7)\n"
            "  ROOT %l = pred[] compare(%i, %k), direction=LT\n}\n")  # fmt: skip
    lines = repeat(lambda i: f"  %w.{i} = {state} while(%s), condition=%c, body=%b\n", size // 2)
    zero = f"  %z = s32[] constant(0)\n  %s = {state} tuple(%z, %x)\n"
    return module(zero + lines, before=body + test)


def in_steps(size):
    """TPU's steps of collectives: as many starts as steps, all on one channel."""
    step = 'backend_config={"async_collective_fusion_config":{}}'
    lines = repeat(
        lambda i: (
            f"  %r.{i} = {REDUCE}, {step}\n  %a.{i} = f32[8] custom-call(%r.{i}), "
            'custom_call_target="AsyncCollectiveStart"\n'
        ),
        size,
    )
    return module(lines)


def deep_stacks(size):
    rows = size // 90
    tables = 'FileNames\n1 "/u/a.py"\n\nFileLocations\n1 {file_name_id=1 line=5}\n\nStackFrames\n'
    tables += "".join(f"{i} {{file_location_id=1 parent_frame_id={i}}}\n" for i in range(1, rows))
    lines = repeat(
        lambda i: f"  %r.{i} = {REDUCE}, metadata={{stack_frame_id={rows - 1}}}\n", size // 2
    )
    return module(lines, before=f"\n{tables}\n")


def under_a_long_path(size):
    path = "jit(f)/" + "scope/" * (size // 12)
    lines = repeat(lambda i: f'  %r.{i} = {REDUCE}, metadata={{op_name="psum"}}\n', size // 2)
    called = f"%b (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n{lines}}}\n"
    call = f'  %y = f32[8] call(%x), to_apply=%b, metadata={{op_name="{path}"}}'
    return module(call, before=called)


def wanted_by_one(size):
    """Collectives without a path, that a long line and its many users use."""
    lines = repeat(lambda i: f"  %r.{i} = {REDUCE}\n", size // 3)
    names = ", ".join(f"%r.{i}" for i in range(lines.count("\n")))
    users = repeat(lambda i: f"  %g.{i} = f32[8] get-tuple-element(%t), index={i}\n", size // 3)
    return module(f"{lines}  %t = (f32[8]) tuple({names})\n{users}")


def iotas(size):
    """Lines of 100 characters whose groups hold billions of devices."""
    groups = "[2,1000000000]<=[2,2,500000000]T(1,0,2)"
    lines = repeat(
        lambda i: (
            f"  %r.{i} = f32[8]{{0}} all-reduce(%x), channel_id={i}, replica_groups={groups}"
            ", use_global_device_ids=true\n"
        ),
        size,
    )
    return module(lines, head="HloModule m, num_partitions=2000000000\n")


def irregular_iotas(size):
    """Groups that cut a block across its dims: they have to be listed, 100,000 devices a line."""
    lines = repeat(
        lambda i: (
            f"  %r.{i} = f32[8]{{0}} all-reduce(%x), replica_groups="
            f"[{2 * (50_000 + i)},3]<=[2,{3 * (50_000 + i)}]T(1,0)\n"
        ),
        size,
    )
    return module(lines, head="HloModule m\n")


def many_partitions(size):
    groups = ("{}", "{{0}}", "{{0,1}}", "[1,2]<=[2]")
    lines = repeat(
        lambda i: (
            f"  %r.{i} = f32[8]{{0}} all-reduce(%x), replica_groups={groups[i % 4]}\n"
            f"  %p.{i} = f32[8]{{0}} collective-permute(%x), source_target_pairs={{{{0,{i}}}}}\n"
        ),
        size,
    )
    return module(lines, head="HloModule m, replica_count=2000000, num_partitions=1000000000\n")


KINDS = {
    "quotes in the header": lambda n: module("", head=f"HloModule m, x={quotes(n)}\n"),
    "quotes in a shape": lambda n: module(f"  %r = ({quotes(n)} f32[8]) all-reduce(%x), {COMMON}"),
    "quotes in an attribute": lambda n: line(f"backend_config={quotes(n)}"),
    "quotes in the operands": lambda n: module(f"  %r = f32[8] all-reduce({quotes(n)}), {COMMON}"),
    "quotes that do not end": lambda n: line(f"backend_config={quotes(n)[:-1]}"),
    "quotes in a table": lambda n: module("", before=f"\nFileNames\n1 {quotes(n)[:-1]}\n\n"),
    "metadata={ in a string": in_string("metadata={"),
    "frontend_attributes={ in a string": in_string("frontend_attributes={"),
    "custom_call_target= in a string": in_string('custom_call_target=\\"'),
    "metadata={ without an end": lambda n: line(repeat("metadata={", n)),
    "a frontend value without an end": lambda n: line(f"frontend_attributes={{{repeat('a=', n)}}}"),
    "one collective of many arrays": one_line,
    "replica groups listed": lambda n: module(
        "  %r = f32[8] all-reduce(%x), replica_groups={"
        + ",".join(f"{{{2 * i},{2 * i + 1}}}" for i in range(n // 16))
        + "}",
        head="HloModule m\n",
    ),
    "replica groups in no order": lambda n: module(
        "  %r = f32[8] all-reduce(%x), replica_groups={"
        + ",".join(f"{{{i},{n - i}}}" for i in range(n // 16))
        + "}",
        head="HloModule m\n",
    ),
    "pairs of a permute": lambda n: module(
        "  %r = f32[8] collective-permute(%x), source_target_pairs={"
        + ",".join(f"{{{i},{i + 1}}}" for i in range(n // 16))
        + "}"
    ),
    "a billion partitions": many_partitions,
    "groups of billions": iotas,
    "groups that have to be listed": irregular_iotas,
    "digits of a trip count": lambda n: module("", before=loop("l", "body", "9" * n) + BODY),
    "digits of a dim": lambda n: module(f"  %r = f32[8] all-reduce(f32[{'9' * n}] %x), {COMMON}"),
    "digits everywhere": lambda n: line(
        f'metadata={{source_file="a" source_line={"9" * n} stack_frame_id={"9" * n}}}'
    ),
    "digits of partitions": lambda n: module(
        "  %r = f32[8] all-reduce(%x), replica_groups={}",
        head=f"HloModule m, num_partitions={'9' * n}\n",
    ),
    "products of trips": nested_loops,
    "calls that double": doubling_calls,
    "loops over one chain": loops_over_one_chain,
    "tags of silent arrays": with_tags,
    "words of each array": with_elements,
    "all into one tuple": into_one_tuple,
    "all of one concatenation": of_one_concatenation,
    "all of one tuple": of_one_tuple,
    "all through one fusion": through_one_fusion,
    "all into one fusion": of_many_operands,
    "all in steps": in_steps,
    "all wanted by one": wanted_by_one,
    "deep stacks": deep_stacks,
    "a caller's long path": under_a_long_path,
    "comments without an end": lambda n: module(
        f"  %r = f32[8] all-reduce(%x, {repeat('/*', n)}), {COMMON}"
    ),
    "comments in a type": lambda n: module(
        f"  %r = (f32[8], {repeat('/*', n)}) all-reduce(%x), {COMMON}"
    ),
    "one long word": lambda n: module(f"  {'a' * n}"),
    "one long name": lambda n: line(f'metadata={{op_name="jit(f)/{"a" * n}/psum x"}}', "r" * n),
    "one long dtype": lambda n: module(f"  %r = ({'a' * n}) all-reduce(%x), {COMMON}"),
    "blanks": lambda n: module(f"  ROOT {' ' * n}%r = {REDUCE},{' ' * n}to_apply=%add{' ' * n}x"),
    "opening braces": lambda n: line("x=" + "{" * n),
    "opening brackets": lambda n: module(f"  %r = {'(' * n}f32[8] all-reduce(%x), {COMMON}"),
    "nested tuples": lambda n: module(
        f"  %r = {'(' * (n // 2)}f32[8]{')' * (n // 2)} all-reduce(%x), {COMMON}"
    ),
    "many modules": lambda n: repeat(lambda i: module(f"  %r.{i} = {REDUCE}"), n),
    "many computations of one name": lambda n: HEAD + repeat(BODY, n),
    "elements named short": lambda n: module(repeat("  %y = f32[8] add(%t#1, %t#2)\n", n)),
    "lines that cannot be read": lambda n: module(repeat("  %r = f32[8 all-reduce(%x)\n", n)),
    "a log's prefix": lambda n: repeat("[rank0]: I0101 a.cc:1] ", n) + module(f"  %r = {REDUCE}"),
}


def measure(kind, size, pipe):
    """Audit one text and send what it took: seconds, MB at the peak, and the verdict."""
    from txcore.profiling import audit_text

    audit_text(module(f"  %r = {REDUCE}"))  # so that imports are not counted
    text = KINDS[kind](size)
    start = time.process_time()
    try:
        said = str(audit_text(text)).splitlines()[-1]
    except ValueError as error:
        said = f"ValueError: {error}"
    seconds = time.process_time() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    pipe.send((seconds, peak, len(text), said))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    parser.add_argument("--sizes", default="1,2,4", help="in MB")
    options = parser.parse_args()
    sizes = [float(size) for size in options.sizes.split(",")]
    print(f"{'':36}", *(f"{size:>8g} MB {'':8}" for size in sizes), "verdict")
    for kind in options.kinds or KINDS:
        cells, said = [], ""
        for size in sizes:
            found = call_in_process(measure, kind, int(size * 1e6))
            cells.append(f"{found[0]:7.2f} s {found[1]:6.0f} MB" if found else f"{'none':>19}")
            said = found[3] if found else said
        print(f"{kind:36}", *cells, ascii(said[:60]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
