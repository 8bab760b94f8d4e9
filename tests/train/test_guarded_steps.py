"""A step gives the numbers of one device on any number, or is refused: a hundred of them.

With TXCORE_ALL_GUARDS=1 each runs on 1, 2 and 4 devices, and the wrong ones also with the guards
off, where they must give another number: else they would not be wrong.
"""

import os

import jax
import numpy as np
import pytest
from guard_data import run
from right_steps import RIGHT
from wrong_steps import ASKED, WRONG

from txcore.train.steps import compile as compiling

pytestmark = pytest.mark.sampled(2)

ALL = os.environ.get("TXCORE_ALL_GUARDS") == "1"
ON = (1, 2, 4) if ALL else (4,)


def assert_close(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), got, wanted)


@pytest.mark.parametrize("n", ON)
@pytest.mark.parametrize("name", RIGHT)
def test_right(name, n):
    step, *truth, axes = RIGHT[name]
    assert_close(run(step, n, axes), tuple(truth))


@pytest.mark.parametrize("n", (2, 4) if ALL else (4,))
@pytest.mark.parametrize("name", WRONG)
def test_wrong(name, n):
    step, text, axes = WRONG[name]
    with pytest.raises(ValueError, match=text):
        run(step, n, axes)


@pytest.mark.parametrize("n", ON)
@pytest.mark.parametrize("name", ASKED)
def test_a_sum_that_is_asked_for(name, n):
    step, truth = ASKED[name]
    assert float(run(step, n)[0]["m"]) == pytest.approx(truth(n), rel=1e-6)


@pytest.mark.skipif(not ALL, reason="TXCORE_ALL_GUARDS=1 runs the wrong steps without guards")
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_step_is_wrong(name, monkeypatch):
    step, text, axes = WRONG[name]
    for check in ("_check_reductions", "_check_predicates"):
        monkeypatch.setattr(compiling, check, lambda *_: None)
    if text.startswith(("needs the mask of the whole batch", "needs all axes")):
        pytest.skip("refused at once, while it is traced")
    one, four = run(step, 1, axes), run(step, 4, axes)
    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(four), strict=True))
    assert not all(a.shape == b.shape and np.allclose(a, b, 1e-3, 1e-5) for a, b in pairs)
