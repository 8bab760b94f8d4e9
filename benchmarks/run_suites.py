"""Run all suites of this folder, compare them with the last run here, and draw one page.

    make bench                              # or python benchmarks/run_suites.py
    make bench BENCH_ARGS="-k collective"   # pytest's arguments; a part is compared as a part

Writes .benchmarks/<time>.json, as pytest-benchmark does, and .benchmarks/latest.png. What is said
are ratios to the last run on this machine and versions of Python and jax, or to the fastest of a
suite: a time alone says nothing where others share the machine.
"""

import datetime
import importlib.util
import json
import math
import pathlib
import statistics
import subprocess
import sys

ROOT = pathlib.Path(__file__).resolve().parents[1]
SAVED = ROOT / ".benchmarks"
CHANGED = 1.25  # times as long, and apart by more than both spread: worth a look
SHOWN = 12  # changes in the terminal
# Enough rounds for a median, and all suites within ten minutes on two cores.
LIMITS = ("--benchmark-max-time=0.25", "--benchmark-min-rounds=3", "--benchmark-warmup=off")


def run_pytest(path, arguments):
    """Run the suites; return pytest's exit code."""
    command = [sys.executable, "-m", "pytest", str(ROOT / "benchmarks"), "-q", "--no-header"]
    command += ["--benchmark-enable", "--benchmark-only", "--benchmark-group-by=group", *LIMITS]
    command += ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-sort=name"]
    return subprocess.call([*command, f"--benchmark-json={path}", *arguments], cwd=ROOT)


def read_run(path):
    """Return what a saved file holds; None of a run that was ended before it was written."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None


def key_of(run):
    """Return what two runs must have in common to be compared."""
    machine = run["machine_info"]
    cpu = machine.get("cpu", {})
    versions = machine["python_version"].rpartition(".")[0], machine.get("jax")
    return machine["node"], cpu.get("brand_raw"), cpu.get("count"), *versions


def find_last(now, path):
    """Return the newest earlier run that `now` compares with, and its name; None without one.

    It is of the same machine and versions, and has a benchmark in common: others may be parts.
    """
    for other in sorted(SAVED.glob("*.json"), reverse=True):
        run = None if other == path else read_run(other)
        if run is not None and key_of(run) == key_of(now) and compare(now, run):
            return run, other.name
    return None


def medians_of(run):
    """Return (group, name) to (median, spread) of a run's benchmarks, in seconds."""
    rows = {}
    for one in run["benchmarks"]:
        stats = one["stats"]
        rows[one["group"], one["name"]] = (stats["median"], stats["iqr"])
    return rows


def compare(now, last):
    """Return (group, name) to (ratio, whether it is more than both spread) of what both have."""
    before, rows = medians_of(last), {}
    for key, (median, spread) in medians_of(now).items():
        if key in before:
            old, old_spread = before[key]
            ratio = median / old
            apart = abs(median - old) > (spread + old_spread)
            rows[key] = (ratio, apart and not 1 / CHANGED < ratio < CHANGED)
    return rows


def geometric_mean(ratios):
    """Return the ratio whose logarithm is the mean of all."""
    return math.exp(statistics.fmean(map(math.log, ratios)))


def describe(compared, name):
    """Return the lines that say what changed since the last run."""
    lines = [f"now / {name}: median times, geometric means of each suite"]
    for group in sorted({group for group, _ in compared}):
        ratios = [ratio for (own, _), (ratio, _) in compared.items() if own == group]
        lines.append(f"  {geometric_mean(ratios):5.2f}  {group} ({len(ratios)})")
    changed = {key: ratio for key, (ratio, apart) in compared.items() if apart}
    lines.append(f"{len(changed)} of {len(compared)} changed by {CHANGED} times or more:")
    by_size = sorted(changed.items(), key=lambda pair: -abs(math.log(pair[1])))
    lines += [f"  {ratio:5.2f}  {group}: {own}" for (group, own), ratio in by_size[:SHOWN]]
    return lines + (["  ..."] if len(changed) > SHOWN else [])


def draw(now, compared, name, path):
    """Draw one page: each suite's times relative to its fastest, and to the last run."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = medians_of(now)
    groups = sorted({group for group, _ in rows})
    figure, (own, changes) = pyplot.subplots(
        1, 2, figsize=(12, 2 + 0.55 * len(groups)), layout="constrained", sharey=True
    )
    for place, group in enumerate(groups):
        times = {key: median for key, (median, _) in rows.items() if key[0] == group}
        fastest = min(times.values())
        _scatter(own, place, [time / fastest for time in times.values()], "tab:blue")
        both = [compared[key] for key in times if key in compared]
        _scatter(changes, place, [ratio for ratio, apart in both if not apart], "tab:gray")
        _scatter(changes, place, [ratio for ratio, apart in both if apart], "tab:red")
    own.set_yticks(range(len(groups)), groups)
    own.set_ylim(len(groups) - 0.5, -0.5)
    own.set_xlabel("times the fastest of its suite, median")
    changes.axvline(1, color="black", linewidth=1)
    changes.set_xlabel(f"now / {name}" if name else "no earlier run on this machine")
    changes.set_title(f"red: by {CHANGED} times or more, beyond the spread", fontsize="medium")
    for panel in (own, changes):
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter("{x:g}")
        panel.grid(True, axis="x", alpha=0.25)
    if compared:
        far = max(CHANGED, *(max(ratio, 1 / ratio) for ratio, _ in compared.values())) * 1.1
        changes.set_xlim(1 / far, far)
        ticks = [tick for tick in (0.1, 0.25, 0.5, 0.8, 1, 1.25, 2, 4, 10) if 1 / far < tick < far]
        changes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        changes.minorticks_off()
    machine = now["machine_info"]
    cpu = machine.get("cpu", {}).get("brand_raw") or machine["machine"]
    figure.suptitle(f"{len(rows)} benchmarks, {cpu}, jax {machine.get('jax')}: ratios alone count")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _scatter(axes, place, values, color):
    """Draw the values of a suite in its row, spread up and down so that they can be told apart."""
    offsets = [place + 0.5 * ((i * 0.618) % 1 - 0.5) for i in range(len(values))]
    axes.plot(values, offsets, "o", color=color, markersize=4, alpha=0.6)


def main():
    """Run, save, compare, draw; the exit code is pytest's."""
    SAVED.mkdir(exist_ok=True)
    path = SAVED / f"{datetime.datetime.now():%Y%m%d_%H%M%S}.json"
    code = run_pytest(path, sys.argv[1:])
    now = read_run(path) if path.exists() else None
    if now is None:
        path.unlink(missing_ok=True)
        return code or 1
    last = find_last(now, path)
    compared = compare(now, last[0]) if last else {}
    if compared:
        print("\n".join(describe(compared, last[1])))
    else:
        print("no earlier run of these on this machine and these versions to compare with")
    print(f"saved {path.relative_to(ROOT)}")
    if importlib.util.find_spec("matplotlib") is None:
        print("no page of plots: it needs matplotlib, found none: install txcore[examples]")
    else:
        draw(now, compared, last[1] if compared else "", SAVED / "latest.png")
        print(f"drawn {(SAVED / 'latest.png').relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
