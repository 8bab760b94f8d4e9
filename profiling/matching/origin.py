"""Tell the origin of a compiled collective by its own line of HLO.

Three witnesses: txcore's tag, the partitioner's mark, and the op_name, whose last part is the jax
primitive. The first row that fits decides; a mark beats a tag, and so does an op_name that ends
in something that is no collective (the compiler copies tags from the op that it splits):

| mark | op_name ends in                      | tag | origin                               |
|------|--------------------------------------|-----|--------------------------------------|
| any  | (a line that cannot be read)         | any | unknown                              |
| any  | (a custom call that can communicate) | any | opaque                               |
| any  | reshard                              | any | reshard                              |
| yes  | anything, but a reshard uses it      | any | reshard                              |
| yes  | nothing, an argument, shard_map      | any | boundary                             |
| yes  | anything else                        | any | partitioner                          |
| no   | several ops, one no collective       | any | partitioner (merged with the user's) |
| no   | nothing                              | yes | txcore                               |
| no   | a collective                         | yes | txcore                               |
| no   | nothing, an argument, shard_map      | no  | boundary                             |
| no   | a collective, under transpose(       | no  | autodiff                             |
| no   | a collective                         | no  | user                                 |
| no   | anything else                        | any | partitioner                          |

A line can lie: jax 0.10 prints no mark, and its partitioner copies op_name and tag of a user's
collective. So `match.py` compares the result with the traced program.
"""

import functools

from txcore.profiling.declared.equations import KIND_OF, made_by_autodiff
from txcore.profiling.hlo import Op
from txcore.profiling.hlo.scan import split_outside
from txcore.profiling.report.findings import UNEXPLAINED as UNEXPLAINED

_EDGES = {"", "shard_map"}


def origin_of(op: Op) -> tuple[str, str]:
    """Return the origin that an op's own line gives it, and a note where its witnesses disagree."""
    if op.kind == "unknown":
        return "unknown", op.problem
    if op.kind == "custom-call":
        return "opaque", f"custom call {op.target or '(no target)'} can communicate unseen"
    ends = _last_parts(op.op_name)
    note = f"carries the tag {','.join(op.tags)} of another op" if op.tags else ""
    # A compiler that marks what it inserts names it after its operand, an older one after its use.
    wanted = _last_parts(op.wanted_by) if op.marked or "/" not in op.op_name else ends
    if "reshard" in ends or ("reshard" in wanted and (op.marked or is_inserted(op))):
        return "reshard", ""
    if is_inserted(op):
        return ("boundary" if set(wanted) <= _EDGES else "partitioner"), note
    if op.marked or any(end and end not in KIND_OF for end in ends):
        return "partitioner", note
    if op.tags:
        return "txcore", ""
    return ("autodiff" if made_by_autodiff(op.op_name) else "user"), ""


def is_inserted(op: Op) -> bool:
    """Tell whether an op's own name says nothing of what it is for: it was put in for another."""
    return set(_last_parts(op.op_name)) <= _EDGES and (op.marked or not op.tags)


@functools.lru_cache(maxsize=4096)
def _last_parts(op_name: str) -> tuple[str, ...]:
    """Return the last part of each op that was merged; an argument's name, without a path, is "".

    XLA writes the path of merged ops as "jit(f)/shard_map/(transpose(jvp())/psum:reduce_sum)".
    """
    is_balanced = all(op_name.count(a) == op_name.count(b) for a, b in ("()", "[]", "{}"))
    parts = split_outside(op_name, "/") if is_balanced else op_name.split("/")  # a scope's name
    if len(parts) < 2:
        return ("",)
    last = parts[-1]
    if not (last.startswith("(") and last.endswith(")")):
        return (_without_start(last),)
    merged = split_outside(last[1:-1], ":")
    return tuple(_without_start(path.rsplit("/", 1)[-1]) for path in merged) or ("",)


def _without_start(name: str) -> str:
    """Return a primitive's name; the start of an async pair (`lax.psum_start`) has the op's."""
    return name.removesuffix("_start")
