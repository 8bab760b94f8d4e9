"""The files that a run on a GPU writes: the rows, their table, and the fastest of each problem."""

import json
import math
import pathlib

ROOT = pathlib.Path(__file__).resolve().parents[2]
LEAST_GAIN = 1.05  # of another implementation over XLA's, to be recorded as the fastest


def write_results(found: dict, seconds: dict, folder: pathlib.Path) -> pathlib.Path:
    """Write the rows with what they were measured on, and the table of them; return the .json."""
    here = machine_of(found)
    result = {"machine": here, "seconds": seconds, "parts": found}
    file = folder / f"{file_name(found)}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    file.with_suffix(".txt").write_text(format_table(found, here))
    return file


def machine_of(found: dict) -> dict:
    """Return the first part's description of the machine."""
    return next((r for r in found.get("ceilings", []) if r["name"] == "machine"), {})


def file_name(found: dict) -> str:
    """Return the name of the results' files, without its suffix."""
    return f"gpu_{machine_of(found).get('card', 'unknown').replace(' ', '_')}"


def format_table(found: dict, here: dict) -> str:
    """Return the table of all parts."""
    from tabulate import tabulate

    ceilings = {r["name"]: r["value"] for r in found.get("ceilings", []) if "value" in r}
    lines = [f"{name}: {value}" for name, value in here.items() if name not in ("name", "case")]
    lines += [f"measured {name}: {value:.4g}" for name, value in ceilings.items()]
    rows = []
    for part in found.values():
        best = {}
        for r in part:
            if "us" in r and r["name"].startswith("xla"):
                best[r["case"]] = min(best.get(r["case"], math.inf), r["us"])
        for r in part:
            if "us" not in r and "why" not in r:
                continue
            rows.append(
                (
                    r["case"],
                    r["name"],
                    f"{r['us']:.1f}" if "us" in r else "failed",
                    r.get("kernels", ""),
                    f"{r['bytes'] / r['us'] * 1e6 / ceilings['copy']:.2f}"
                    if {"bytes", "us"} <= set(r) and "copy" in ceilings
                    else "",
                    f"{best[r['case']] / r['us']:.2f}" if "us" in r and r["case"] in best else "",
                    f"{r['error']:.1e}" if "error" in r else r.get("why", "")[:70],
                    f"{r['temp_mb']:.0f}" if "temp_mb" in r else "",
                )
            )
    headers = ("case", "what", "us", "kernels", "of copy", "x XLA", "error", "temp MB")
    return "\n".join([*lines, "", tabulate(rows, headers, disable_numparse=True)]) + "\n"


def record_fastest(file: pathlib.Path) -> None:
    """Add the fastest candidate of each problem to what txcore has recorded for GPUs."""
    from txcore.kernels.dispatch import tuning_file

    result = json.loads(file.read_text())
    by_key: dict[str, list[dict]] = {}
    for row in (r for part in result["parts"].values() for r in part if "key" in r):
        by_key.setdefault(row["key"], []).append(row)
    entries = {}
    for key, rows in by_key.items():
        best = min(rows, key=lambda row: row["us"])
        xla = min((r for r in rows if r["implementation"] == "xla"), key=lambda row: row["us"])
        if xla["us"] <= LEAST_GAIN * best["us"]:
            best = xla
        times = {
            tuning_file.label_candidate(r["implementation"], r["config"]): float(f"{r['us']:.4g}")
            for r in rows
        }
        here = result["machine"]
        entries[key] = tuning_file.Entry(
            best["implementation"], best["config"], times, here["jax"], here["card"]
        )
    target = ROOT / "kernels" / "dispatch" / "recorded" / "gpu.json"
    tuning_file.write_entries(target, {**tuning_file.read_entries(target), **entries})
