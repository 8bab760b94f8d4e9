"""What a run on a GPU says of each problem: the fastest of each, as a table and as a plot."""

import math
import pathlib

# The parts whose problems have a ceiling; a step has none.
PARTS = ("updates", "packing", "loss", "conv")
SERIES = {"txcore": ("tab:blue", "o"), "XLA": ("tab:orange", "s"), "PyTorch": ("tab:green", "^")}
MATMUL = {"float32": "matmul f32 (TF32)", "bfloat16": "matmul bf16"}


def list_problems(result: dict) -> list[dict]:
    """Return of each problem its name, the fastest time of each series, and the ceiling's.

    The ceiling is the time of the card's own copy of the bytes that must move, or of its own
    product of as many operations in the dtype (float32 by TF32), whichever is longer. XLA is its
    fastest expression, PyTorch the fastest of eager, graph and compiled.

    Args:
      result: what a run wrote as JSON.
    """
    parts = result["parts"]
    measured = {row["name"]: row["value"] for row in parts["ceilings"] if "value" in row}
    theirs = _group_by_case(parts.get("torch", []))
    found = []
    for part in PARTS:
        for case, rows in _group_by_case(parts.get(part, [])).items():
            timed = {
                "txcore": [row for row in rows if row.get("implementation", "xla") != "xla"],
                "XLA": [row for row in rows if row["name"].startswith("xla")],
                "PyTorch": theirs.get(case, []),
            }
            best = {
                name: min(some, key=lambda row: row["us"]) for name, some in timed.items() if some
            }
            if "XLA" not in best:
                continue
            found.append(
                {
                    "part": part,
                    "case": case,
                    "ceiling": _ceiling_us(rows[0], case, measured),
                    "us": {name: row["us"] for name, row in best.items()},
                    "name": best["txcore"]["implementation"] if "txcore" in best else "",
                }
            )
    return found


def _group_by_case(rows: list[dict]) -> dict[str, list[dict]]:
    found: dict[str, list[dict]] = {}
    for row in rows:
        if "us" in row:
            found.setdefault(row["case"], []).append(row)
    return found


def _ceiling_us(row: dict, case: str, measured: dict[str, float]) -> float:
    dtype = case.rpartition(" ")[2]
    copied = row["bytes"] / measured["copy"]
    multiplied = row.get("flops", 0) / measured[MATMUL[dtype]]
    return 1e6 * max(copied, multiplied)


def format_summary(result: dict) -> str:
    """Return a Markdown table: of each problem who is faster, and by how much."""
    headers = (
        "problem",
        "ceiling µs",
        "XLA µs",
        "PyTorch µs",
        "ours µs",
        "our back end",
        "times as fast as XLA",
    )
    rows = [headers, ("---",) * len(headers)]
    for problem in list_problems(result):
        us = problem["us"]
        rows.append(
            (
                problem["case"],
                f"{problem['ceiling']:,.1f}",
                *(f"{us[name]:,.1f}" if name in us else "" for name in ("XLA", "PyTorch")),
                f"{us['txcore']:,.1f}" if "txcore" in us else "",
                problem["name"],
                _compare(us),
            )
        )
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _compare(us: dict[str, float]) -> str:
    """Say how many times as fast as XLA ours is; within 5% it only matches."""
    if "txcore" not in us:
        return "XLA's"
    ratio = us["XLA"] / us["txcore"]
    if abs(math.log(ratio)) <= math.log(1.05):
        return f"{ratio:.2f}: matches"
    return f"**{ratio:.2f}**" if ratio > 1 else f"{ratio:.2f}: slower"


def draw_plot(result: dict, file: pathlib.Path) -> None:
    """Draw each problem's share of its ceiling, by txcore's kernel, XLA and PyTorch.

    Args:
      result: what a run wrote as JSON.
      file: a .png, whose folder is there.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    problems = list_problems(result)
    machine = result["machine"]
    figure, axes = pyplot.subplots(figsize=(10, 1.8 + 0.32 * len(problems)), layout="constrained")
    for y, problem in enumerate(problems):
        shares = {name: problem["ceiling"] / us for name, us in problem["us"].items()}
        axes.plot([min(shares.values()), max(shares.values())], [y, y], color="0.8", zorder=1)
        for name, share in shares.items():
            colour, marker = SERIES[name]
            axes.scatter(share, y, color=colour, marker=marker, s=42, zorder=2)
    for name, (colour, marker) in SERIES.items():
        axes.scatter([], [], color=colour, marker=marker, s=42, label=name)
    axes.axvline(1, color="0.4", linewidth=1, linestyle="--", zorder=0)
    axes.set_yticks(range(len(problems)), [_label(problem) for problem in problems], fontsize=8)
    for y in range(1, len(problems)):
        if problems[y]["part"] != problems[y - 1]["part"]:
            axes.axhline(y - 0.5, color="0.8", linewidth=0.8)
    axes.set_ylim(len(problems) - 0.4, -0.6)
    axes.set_xlim(left=-0.02)
    axes.grid(axis="x", color="0.92", zorder=0)
    axes.set_xlabel(
        "share of the ceiling: the time of the card's own copy of the bytes, or of its own "
        "product,\nover the time taken (above 1: the arrays stay in the cache)"
    )
    axes.set_title(
        f"{machine['card']}, jax {machine['jax']}, device time, gradients included: "
        "the fastest of each, with ours in µs",
        fontsize=10,
    )
    axes.legend(loc="lower right", fontsize=10)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def _label(problem: dict) -> str:
    ours = problem["us"].get("txcore")
    return f"{problem['case']}  {ours:,.1f} µs" if ours is not None else problem["case"]
