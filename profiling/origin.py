"""Where a compiled collective comes from, by what its own line says.

Three witnesses: txcore's tag, the partitioner's mark, and the op_name, whose last part is the jax
primitive. The first row that fits decides; a mark beats a tag, and so does an op_name that ends
in something that is no collective (the compiler copies tags from the op that it splits):

| mark | op_name ends in                      | tag | origin                               |
|------|--------------------------------------|-----|--------------------------------------|
| any  | (a line that cannot be read)         | any | unknown                              |
| any  | (a custom call that can communicate) | any | opaque                               |
| any  | reshard                              | any | reshard                              |
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

from txcore.profiling.hlo import Op
from txcore.profiling.hlo.attributes import split_outside
from txcore.profiling.jaxpr import KIND_OF, made_by_autodiff

UNEXPLAINED = ("partitioner", "boundary", "unknown")


def origin_of(op: Op) -> tuple[str, str]:
    """Return the origin that an op's own line gives it, and a note where its witnesses disagree."""
    if op.kind == "unknown":
        return "unknown", op.problem
    if op.kind == "custom-call":
        return "opaque", f"custom call {op.target or '(no target)'} can communicate unseen"
    ends = _last_parts(op.op_name)
    if "reshard" in ends:
        return "reshard", ""
    inserted = all(end in ("", "shard_map") for end in ends)
    foreign = [end for end in ends if end not in KIND_OF and end]
    note = f"carries the tag {','.join(op.tags)} of another op" if op.tags else ""
    if op.marked:
        return ("boundary" if inserted else "partitioner"), note
    if foreign and not (inserted and not op.tags):
        return "partitioner", note
    if op.tags:
        return "txcore", ""
    if inserted:
        return "boundary", ""
    return ("autodiff" if made_by_autodiff(op.op_name) else "user"), ""


def _last_parts(op_name: str) -> list[str]:
    """Return the last part of each op that was merged; an argument's name, without a path, is "".

    XLA writes the path of merged ops as "jit(f)/shard_map/(transpose(jvp())/psum:reduce_sum)".
    """
    parts = split_outside(op_name, "/")
    if len(parts) < 2:
        return [""]
    last = parts[-1]
    if not (last.startswith("(") and last.endswith(")")):
        return [last]
    merged = split_outside(last[1:-1], ":")
    return [path.rsplit("/", 1)[-1] for path in merged] or [""]
