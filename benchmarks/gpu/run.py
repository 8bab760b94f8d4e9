"""Time of every kernel on one GPU, beside XLA's and PyTorch's: `python benchmarks/gpu/run.py`.

Each part is a process of its own with a time limit, so that a part that hangs costs the others
nothing. Device time is what the profiler records of kernels and copies (`timing.device_times`),
without the start of a program. Writes FOLDER/gpu_CARD.json, and its table beside it as .txt.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import time

import gpu_kernels
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
    "torch": 90,
}


def main() -> None:
    """Run the parts, or the one that is named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], help="default: all")
    parser.add_argument("--out", type=pathlib.Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--rows", help="(a part's own process) the file of its rows")
    parser.add_argument("--record", type=pathlib.Path, help="record what a .json found fastest")
    options = parser.parse_args()
    if options.record:
        gpu_results.record_fastest(options.record)
        return
    if options.rows:
        rows = RUN[options.parts[0]]()
        pathlib.Path(options.rows).write_text(json.dumps(rows))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    found, seconds = {}, {}
    for part in options.parts or PARTS:
        start = time.monotonic()
        found[part] = run_part(part, options.out)
        seconds[part] = round(time.monotonic() - start, 1)
        # After each part, so that a limit from outside loses one part alone.
        gpu_results.write_results(found, seconds, options.out)
    print((options.out / f"{gpu_results.file_name(found)}.txt").read_text())


def run_part(part: str, folder: pathlib.Path) -> list[dict]:
    """Run one part in a process of its own, and return its rows, or one row with its failure."""
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
                timeout=PARTS[part],
                check=True,
            )
        except subprocess.SubprocessError as error:
            tail = log.read_text(errors="replace").strip().splitlines()[-1:]
            return [{"case": part, "name": "failed", "why": f"{type(error).__name__}: {tail}"}]
    rows = json.loads(file.read_text())
    file.unlink()
    log.unlink()
    return rows


def time_torch() -> list[dict]:
    """Time the same in PyTorch: eager, replayed as a CUDA graph, and compiled."""
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
}

if __name__ == "__main__":
    main()
