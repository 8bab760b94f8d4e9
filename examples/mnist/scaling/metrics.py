"""What the runs say beside each other: speedup over the same work, efficiency, throughput."""

from collections.abc import Mapping, Sequence
from typing import Any

from scaling import model

Results = Mapping[str, Any]


def compare_runs(runs: Sequence[Results], carried: Mapping[str, Any], cores: int) -> dict[str, Any]:
    """Return the metrics of an experiment.

    Args:
      runs: the results of all cases; the first is the serial one.
      carried: what carry.py has found.
      cores: that could be used.

    Returns:
      What performance_metrics.json holds.
    """
    serial, again = runs[0], runs[-1]
    bare = model.read_bare(serial)
    drift = again["step_seconds"] / serial["step_seconds"] - 1
    rows = [compare_run(run, serial, bare, cores) for run in runs if run["trains"]]
    return {
        "serial": serial["name"],
        "cores": cores,
        "cores_per_worker": serial["cores_per_worker"],
        # How much longer the same bare step took at the end: no smaller difference says anything.
        "drift": drift,
        "runs": rows,
        "model": carry_on(runs, bare, carried),
    }


def compare_run(
    run: Results, serial: Results, bare: Mapping[int, float], cores: int
) -> dict[str, Any]:
    """Return one run's metrics beside the serial one."""
    workers, group = run["workers"], run["group"]
    sharing = workers * run["cores_per_worker"] / cores
    together = model.slowest(run["all_reduce"])
    row: dict[str, Any] = {
        "name": run["name"],
        "group": group,
        "way": run["way"],
        "workers": workers,
        "oversubscribed": run["oversubscribed"],
        "batch_size": run["batch_size"],
        "rate_scaling": run["rate_scaling"],
        "examples": run["examples"],
        "set_on_devices": run["set_on_devices"],
        "throughput": run["images_per_second"],
        "accuracy": run["test_accuracy"],
        "test_examples": run["test_examples"],
        "seconds": {
            "compile": run["compile_seconds"],
            "train": run["train_seconds"],
            "a_step": run["step_seconds"],
            "input_of_a_step": run["input_seconds"],
            "all_reduce_alone": together,
        },
    }
    if group == "strong":
        check_same_work(run, serial)
        speedup = serial["train_seconds"] / run["train_seconds"]
        expected = model.expect_speedup(
            bare, serial["batch_size"], workers, together=together, sharing=sharing
        )
        row |= {"speedup": speedup, "efficiency": speedup / workers, "expected_speedup": expected}
        row["expected_efficiency"] = None if expected is None else expected / workers
    elif group == "weak":
        pace = run["images_per_second"] / serial["images_per_second"]
        row |= {"scaled_speedup": pace, "efficiency": pace / workers}
        row["expected_efficiency"] = model.expect_efficiency(
            bare, serial["batch_size"], together=together, sharing=sharing
        )
    return row


def check_same_work(run: Results, serial: Results) -> None:
    """Refuse to call a speedup what is one over other work."""
    for what in ("examples", "steps", "batch_size"):
        if run[what] != serial[what]:
            raise RuntimeError(
                f"a speedup needs the same work, got {what} {run[what]} of {run['name']} and "
                f"{serial[what]} of the serial run"
            )


def carry_on(
    runs: Sequence[Results], bare: Mapping[int, float], carried: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the expected speedups of more ranks, from what was measured, and from data sheets."""
    measured = find_link(runs)
    found: dict[str, Any] = {"predicted_on_targets": add_ratios(carried["predicted"])}
    if measured is None:
        return found
    run, link = measured
    programs = {int(ranks): program for ranks, program in carried["programs"].items()}
    rows = model.carry_to_ranks(bare, runs[0]["batch_size"], link, programs)
    ends = {"latency_seconds": link.latency, "bytes_per_second": link.bandwidth}
    return {**found, "link": {"measured_in": run["name"], **ends}, "carried": rows}


def find_link(runs: Sequence[Results]) -> tuple[Results, model.Link] | None:
    """Return the run by whose all-reduces the link is known, and the link; processes first."""
    joined = [run for run in runs if run["all_reduce"]]
    joined.sort(key=lambda run: (run["oversubscribed"], run["way"] != "processes", run["workers"]))
    if not joined:
        return None
    return joined[0], model.fit_link(joined[0]["workers"], *joined[0]["all_reduce"])


def add_ratios(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of targets with speedup and efficiency over one chip of the same kind."""
    ones = {_chip(row): row for row in rows if row["ranks"] == 1 and "left_out" not in row}
    found = []
    for row in rows:
        one = ones.get(_chip(row), {}).get("weak_step_seconds")
        more = {}
        if one and row.get("weak_step_seconds"):
            more["weak_efficiency"] = one / row["weak_step_seconds"]
        if one and row.get("strong_step_seconds"):
            more["strong_speedup"] = one / row["strong_step_seconds"]
        found.append({**row, **more})
    return found


def _chip(row: Mapping[str, Any]) -> str:
    return str(row["target"]).rpartition(":")[0]
