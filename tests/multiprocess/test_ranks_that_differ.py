"""Ranks that would run different programs: refused before the first step, with the difference."""

import pytest
import runs


@pytest.mark.parametrize(
    "odd, differs",
    [
        ("batch", ["shapes", "-[1]['x'] float32[24,4]", "+[1]['x'] float32[22,4]"]),
        ("collective", ["collectives", "+pmax/odd over 'data', 1 elements (long_run.py:"]),
        ("version", ["versions", "-txcore 0.1.0", "+txcore 0.0.1"]),
        ("constant", ["StableHLO:", "-sha256 ", "+sha256 "]),
    ],
)
def test_all_end_with_the_difference(odd, differs, tmp_path):
    ranks = runs.start(tmp_path, 2, "--odd", odd)
    codes = runs.wait(ranks, runs.patience(runs.START_S))
    runs.stop(ranks)
    texts = runs.said(tmp_path, 2)
    assert codes == [1, 1], texts
    for text in texts:
        assert "MismatchError" in text
        missing = [words for words in differs if words not in text]
        assert not missing, (missing, text)
    assert not (tmp_path / "losses.jsonl").exists(), "a step was made"


def test_an_error_on_one_rank_ends_all_and_is_named(tmp_path):
    ranks = runs.start(tmp_path, 2, "--odd", "error")
    codes = runs.wait(ranks, runs.patience(runs.START_S))
    runs.stop(ranks)
    texts = runs.said(tmp_path, 2)
    assert codes == [70, 1], texts  # another attempt would fail as well
    assert "ValueError: batch 2 of epoch 4 is damaged" in texts[1]
    assert "rank 1" in texts[0]
    assert "batch 2 of epoch 4 is damaged" in texts[0]
