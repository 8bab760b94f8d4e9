"""Translate a printed collective's numbers into devices: XLA's group modes.

Device (replica, partition) of a program has the number replica x partitions + partition. What the
numbers in a collective's groups or pairs stand for, and who is together:

| mode                        | numbers are of | in one group are                            |
|-----------------------------|----------------|---------------------------------------------|
| cross_replica               | replicas       | those replicas, each partition by itself    |
| cross_partition             | partitions     | those partitions, each replica by itself    |
| cross_replica_and_partition | replicas       | those replicas with all of their partitions |
| flattened_id                | devices        | those devices                               |

No groups, `{}`, mean one group of all that the numbers are of.
(xla/hlo/ir/collective_op_group_mode.h, GetParticipatingDevicesGroups in collective_ops_utils.cc)
"""

from collections.abc import Mapping

from txcore.profiling.hlo.groups import NO_GROUPS, Groups, groups_of_block, sort_groups
from txcore.profiling.hlo.read_groups import Allow, Pairs, check_listing
from txcore.profiling.hlo.text import Module
from txcore.profiling.hlo.types import HloError

MODES = ("cross_replica", "cross_partition", "cross_replica_and_partition", "flattened_id")
# These have no use_global_device_ids: a channel alone means partitions.
_OF_PARTITIONS = (
    *("all-to-all", "ragged-all-to-all", "collective-broadcast", "collective-permute", "send"),
)


def mode_of(kind: str, attributes: Mapping[str, str]) -> str:
    """Return the mode that tells what an op's groups mean.

    Args:
      kind: HLO's name of the collective.
      attributes: as printed on its line.

    Example:
      >>> mode_of("all-reduce", {"channel_id": "1"}), mode_of("all-to-all", {"channel_id": "1"})
      ('cross_replica_and_partition', 'cross_partition')
    """
    if attributes.get("mode") in MODES:  # as recent XLA may print it
        return attributes["mode"]
    if attributes.get("use_global_device_ids") == "true":
        return "flattened_id"
    if "channel_id" not in attributes:
        return "cross_replica"
    return "cross_partition" if kind in _OF_PARTITIONS else "cross_replica_and_partition"


def groups_of_devices(
    printed: Groups, mode: str, module: Module, devices: int | None, allow: Allow
) -> Groups:
    """Turn the numbers in printed groups into devices.

    Args:
      printed: the groups as they are printed, none for `{}`.
      mode: from `mode_of`.
      module: its module, whose header may say how many replicas and partitions there are.
      devices: how many there are together, where the header says nothing; None if not known.
      allow: as for `parse_groups`.

    Returns:
      The groups of devices; none where the text does not say how many talk to each other.

    Raises:
      HloError: a number is of none of the header's replicas, partitions or devices, or the
        groups may not be listed.
    """
    replicas, partitions = _replicas_and_partitions(printed, mode, module, devices)
    if replicas is None or partitions is None:
        return NO_GROUPS if mode == "cross_replica_and_partition" else printed
    if _are_devices(printed.last, mode, replicas, partitions):
        return printed
    count = {"cross_partition": partitions, "flattened_id": replicas * partitions}
    numbered = printed if printed else groups_of_block([(count.get(mode, replicas), True)])
    if mode == "cross_partition":
        return _spread_groups(
            numbered, replicas, partitions, major=True, together=False, allow=allow
        )
    if mode == "flattened_id":
        return numbered
    together = mode == "cross_replica_and_partition"
    return _spread_groups(
        numbered, replicas, partitions, major=False, together=together, allow=allow
    )


def pairs_of_devices(printed: Pairs, mode: str, module: Module, allow: Allow) -> Pairs:
    """Turn the numbers in printed pairs into devices, as `groups_of_devices`."""
    replicas, partitions = module.replica_count, module.num_partitions
    last = max(map(max, printed), default=-1)
    if replicas is None or partitions is None or replicas * partitions == 1:
        return printed
    if _are_devices(last, mode, replicas, partitions) or mode == "flattened_id":
        return printed
    if mode == "cross_partition":
        check_listing(len(printed) * replicas, allow)
        firsts = (replica * partitions for replica in range(replicas))
        return tuple(sorted((first + a, first + b) for first in firsts for a, b in printed))
    check_listing(len(printed) * partitions, allow)
    return tuple(
        sorted(
            (a * partitions + p, b * partitions + p) for p in range(partitions) for a, b in printed
        )
    )


def _replicas_and_partitions(
    printed: Groups, mode: str, module: Module, devices: int | None
) -> tuple[int | None, int | None]:
    """Return the numbers of replicas and partitions, or None where they matter and are unknown."""
    if module.replica_count is not None or devices is None:
        return module.replica_count, module.num_partitions
    if mode == "cross_partition":
        return 1, devices
    named = printed.last + 1
    if mode == "cross_replica_and_partition" and named > 0 and devices % named == 0:
        return named, devices // named
    return devices, 1


def _are_devices(last: int, mode: str, replicas: int, partitions: int) -> bool:
    """Tell whether numbers must mean devices, since only one replica or partition exists.

    A header's count of 1 may stand for none: XLA's own verifier accepts any number then.
    """
    own = {"cross_partition": partitions, "flattened_id": replicas * partitions}.get(mode, replicas)
    if last < own:
        return False
    if own == 1 and (last < replicas * partitions or replicas * partitions == 1):
        return True
    what = {"cross_partition": "partition", "flattened_id": "device"}.get(mode, "replica")
    raise HloError(f"{what} {last} is in a group, but the header counts {own} of them")


def _spread_groups(
    numbered: Groups, replicas: int, partitions: int, *, major: bool, together: bool, allow: Allow
) -> Groups:
    """Repeat groups of one count's numbers for the other count, which is the major or minor one."""
    count, others = (partitions, replicas) if major else (replicas, partitions)
    if numbered.dims is not None and numbered.devices == count:
        dims = [(others, together)]
        return groups_of_block([*dims, *numbered.dims] if major else [*numbered.dims, *dims])
    check_listing(numbered.devices * others, allow)

    def device_of(number: int, other: int) -> int:
        return other * partitions + number if major else number * partitions + other

    if together:
        return sort_groups(
            [device_of(n, o) for n in group for o in range(others)] for group in numbered
        )
    return sort_groups(
        [device_of(n, o) for n in group] for group in numbered for o in range(others)
    )
