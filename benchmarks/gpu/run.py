"""Time of every kernel on one GPU, beside XLA's and PyTorch's: `python benchmarks/gpu/run.py`.

Each part is a process of its own with a time limit, so that a part that hangs costs the others
nothing, and all together end after --seconds. Device time is what the profiler records of kernels
and copies (`timing.device_times`), without the start of a program. Writes FOLDER/gpu_CARD.json, and
beside it its table as .txt and its plot as .png (with the package matplotlib).

--dry-run traces all kernels that would be timed, for an H200 that need not be here, and runs one
step on the CPU: a machine without a GPU shows that the script is whole.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_cases
import gpu_kernels
import gpu_multimem
import gpu_plot
import gpu_results
import gpu_step

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parent.parent
PARTS = {
    "ceilings": 60,
    "updates": 60,
    "packing": 90,
    "loss": 90,
    "conv": 120,
    "step": 90,
    "torch": 60,
    "multimem": 60,
    "tests": 120,
}
TESTS = ("values", "updates", "gradients")


def main() -> None:
    """Run the parts, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rows", help="(a part's own process) the file of its rows")
    parser.add_argument("--seconds", type=float, default=345, help="for all parts; default 345")
    parser.add_argument("--dry-run", action="store_true", help="trace the programs, and time none")
    parser.add_argument("--record", type=pathlib.Path, help="record what a .json found fastest")
    parser.add_argument("--show", type=pathlib.Path, help="the table and plot of a .json")
    options = parser.parse_args()
    if options.record:
        gpu_results.record_fastest(options.record)
        return
    if options.show:
        result = json.loads(options.show.read_text())
        gpu_plot.draw_plot(result, options.show.with_suffix(".png"))
        print(gpu_plot.format_summary(result))
        return
    if options.dry_run:
        dry_run(options.parts or [part for part in PARTS if part not in ("torch", "tests")])
        return
    if options.rows:
        rows = RUN[options.parts[0]]()
        pathlib.Path(options.rows).write_text(json.dumps(rows))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    found, seconds = {}, {}
    end = time.monotonic() + options.seconds
    for part in options.parts or PARTS:
        start = time.monotonic()
        found[part] = run_part(part, options.out, min(PARTS[part], end - start))
        seconds[part] = round(time.monotonic() - start, 1)
        # After each part, so that a limit from outside loses one part alone.
        file = gpu_results.write_results(found, seconds, options.out)
    print(file.with_suffix(".txt").read_text())
    if importlib.util.find_spec("matplotlib") and found.get("ceilings"):
        gpu_plot.draw_plot(json.loads(file.read_text()), file.with_suffix(".png"))


def dry_run(parts: list[str]) -> None:
    """Lower what each part would time, and print its cases with their candidates."""
    sys.path[:0] = [str(ROOT), str(ROOT / "examples" / "mnist")]
    for part in parts:
        with gpu_cases.tracing_only():
            for row in RUN[part]():
                print(part, row["case"], row["name"], row.get("why", ""), sep=" | ", flush=True)


def run_part(part: str, folder: pathlib.Path, limit: float) -> list[dict]:
    """Run one part in a process of its own, and return its rows, or one row with its failure."""
    if limit <= 0:
        return [{"case": part, "name": "failed", "why": "no time was left: give more --seconds"}]
    file = folder / f"part_{part}.json"
    log = folder / f"part_{part}.log"
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'examples' / 'mnist'}"}
    command = [sys.executable, __file__, part, "--rows", str(file)]
    with log.open("w") as output:
        try:
            subprocess.run(
                command,
                env=environment,
                stdout=output,
                stderr=output,
                timeout=limit,
                check=True,
            )
        except subprocess.SubprocessError as error:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            return [{"case": part, "name": "failed", "why": f"{type(error).__name__}: {tail}"}]
    rows = json.loads(file.read_text())
    file.unlink()
    log.unlink()
    return rows


def run_tests() -> list[dict]:
    """Run the kernels' tests on the GPU; they set float32 products to full precision by themselves.

    In several processes where pytest-xdist is there, which then share the GPU's memory.
    """
    files = [str(f) for name in TESTS for f in sorted((ROOT / "tests/kernels").glob(f"*{name}.py"))]
    several = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cuda,cpu",
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *several, *files]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = done.stdout.strip().splitlines() or [done.stderr.strip()[-300:]]
    failed = [line for line in lines if line.startswith("FAILED")]
    rows = [{"case": "tests/kernels", "name": "pytest", "why": lines[-1]}]
    return rows + [
        {"case": "tests/kernels", "name": "failed", "why": line[:300]} for line in failed
    ]


def time_torch() -> list[dict]:
    """Time the same in PyTorch: eager, replayed as a CUDA graph, and compiled; [] without it."""
    if importlib.util.find_spec("torch") is None:
        return []
    from torch_cases import time_all

    return time_all()


RUN = {
    "ceilings": gpu_kernels.measure_ceilings,
    "updates": gpu_kernels.time_updates,
    "packing": gpu_kernels.time_packing,
    "loss": gpu_kernels.time_losses,
    "conv": gpu_kernels.time_convolutions,
    "step": gpu_step.time_steps,
    "torch": time_torch,
    "multimem": gpu_multimem.time_collectives,
    "tests": run_tests,
}

if __name__ == "__main__":
    main()
