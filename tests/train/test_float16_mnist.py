"""The MNIST script in float16 learns as it does in float32."""

import json
import pathlib
import sys

import numpy as np

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "examples" / "mnist"))

import train


def test_the_script_gives_the_loss_curve_of_float32_and_shows_the_scale(tmp_path, capsys):
    """On the digits that come with scikit-learn; within 5% of the loss at each of 60 steps."""
    curves = []
    for precision in ("float32", "float16"):
        path = tmp_path / f"{precision}.json"
        args = ["--dataset", "digits", "--model", "mlp", "--steps", "60", "--warmup", "20"]
        args += ["--devices", "2", "--precision", precision, "--results", str(path)]
        assert train.main(args) == 0
        curves.append(json.loads(path.read_text())["loss_curve"])
    printed = capsys.readouterr().out
    assert "loss scale 65536; no step was skipped" in printed
    assert printed.count("loss_scale 65536.0000") > 0
    assert printed.count("as the plan predicts") == 2
    assert curves[0][-1] < curves[0][0] / 3
    np.testing.assert_allclose(curves[1], curves[0], rtol=0.05)
