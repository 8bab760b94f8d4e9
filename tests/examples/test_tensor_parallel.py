"""The page on tensor parallelism, run as it stands."""

import pathlib
import re
import subprocess
import sys

SCRIPT = pathlib.Path(__file__).resolve().parents[2] / "examples" / "tensor_parallel_mlp.py"


def test_tensor_parallel_mlp_is_run():
    done = subprocess.run(
        [sys.executable, "-W", "error", SCRIPT], capture_output=True, text=True, check=True
    )
    losses = re.findall(r"^data=\d, model=\d: loss (\S+);", done.stdout, re.M)
    held = re.findall(r"^  (\d+) kB of parameters; proved: ", done.stdout, re.M)
    assert len(losses) == 3
    assert len(set(losses)) == 1
    assert held == ["396", "198", "99"]
    assert "0/up       float32  (64, 256)  -, model    (64, 128)    mean over data" in done.stdout
    assert "gradient norm          all-reduce  model  float32  4 B" in done.stdout
