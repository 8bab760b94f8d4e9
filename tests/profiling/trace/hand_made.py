"""Traces and programs written by hand: every figure of them can be counted on paper."""

import jax

from txcore.profiling.trace.model import Event, Rank, Work
from txcore.profiling.trace.programs import read_program

# Two devices: a matmul, an all-reduce that the user tagged, and one that the partitioner added.
HLO = """HloModule jit_step, num_partitions=2, is_scheduled=true

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

ENTRY %main (x: f32[250]) -> f32[250] {
  %x = f32[250]{0} parameter(0)
  %dot.1 = f32[250]{0} multiply(%x, %x), metadata={op_name="jit(step)/dot" source_file="m.py" \
source_line=7}
  %all-reduce.1 = f32[250]{0} all-reduce(%dot.1), channel_id=1, replica_groups={{0,1}}, \
use_global_device_ids=true, to_apply=%add, frontend_attributes={txcore="pmean/grads"}, \
metadata={op_name="jit(step)/shard_map/psum" source_file="m.py" source_line=9}
  ROOT %tail.2 = f32[250]{0} negate(%all-reduce.1), metadata={op_name="jit(step)/neg"}
}
"""
ADDED = HLO.replace(
    'frontend_attributes={txcore="pmean/grads"}, metadata={op_name="jit(step)/shard_map/psum"',
    'frontend_attributes={is_spmd_generated="true"}, metadata={op_name="jit(step)/dot_general"',
)
US = 1000  # nanoseconds


def make_event(op, start, end, device=0, run=1, module="jit_step", latest=None, **more):
    """Return an event with times in microseconds."""
    times = (start * US, end * US, (end if latest is None else latest) * US)
    return Event(device, module, op, run, *times, **more)


def make_run(at, run=1, device=0, arrive=10, leave=30, done=40):
    """Return a run that computes until `arrive`, communicates until `leave`, and computes."""
    return (
        make_event("dot.1", at, at + arrive, device, run),
        make_event("all-reduce.1", at + arrive, at + leave, device, run),
        make_event("tail.2", at + leave, at + done, device, run),
    )


def make_rank(events, rank=0, clock=1, host="a", hlo=HLO, work=(), **more):
    devices = more.pop("devices", tuple(sorted({event.device for event in events})))
    programs = (read_program(hlo, checked=False),) if hlo else ()
    ordered = tuple(sorted(events, key=lambda e: (e.start, -e.end)))
    waited = tuple(Work(what, start * US, end * US) for what, start, end in work)
    return Rank(rank, clock, host, devices, "cpu", ordered, waited, programs, **more)


def make_xspace(events, *, host="vm", clock=0, extra="", plane="/host:CPU"):
    """Return the bytes of an .xplane.pb of (line, name, start, duration in ns, stats)."""
    names = {name: i + 1 for i, name in enumerate(dict.fromkeys(e[1] for e in events))}
    keys = {key: i + 1 for i, key in enumerate(dict.fromkeys(k for e in events for k in e[4]))}
    lines = {}
    for line, name, start, duration, stats in events:
        said = "".join(
            f"stats {{ metadata_id: {keys[key]} "
            + (f'str_value: "{value}"' if isinstance(value, str) else f"int64_value: {value}")
            + " } "
            for key, value in stats.items()
        )
        times = f"offset_ps: {start * 1000} duration_ps: {duration * 1000}"
        lines.setdefault(line, []).append(f"events {{ metadata_id: {names[name]} {times} {said} }}")
    body = "".join(f'lines {{ name: "{n}" {" ".join(e)} }}\n' for n, e in lines.items())
    for field, table in (("event_metadata", names), ("stat_metadata", keys)):
        for name, i in table.items():
            body += f'{field} {{ key: {i} value {{ id: {i} name: "{name}" }} }}\n'
    start = (
        'planes { name: "Task Environment" stats { metadata_id: 1 '
        f"uint64_value: {clock} }} stat_metadata {{ key: 1 value {{ id: 1 "
        'name: "profile_start_time" } } }\n'
    )
    text = f'planes {{ name: "{plane}" {body} }}\n{start}hostnames: "{host}"\n{extra}'
    return jax.profiler.ProfileData.text_proto_to_serialized_xspace(text)
