"""Every pair of options of DP goes together or is refused, as docs/gradients.md says."""

import itertools
import pathlib
import re
from typing import Any

import pytest

import txcore as tx

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "gradients.md"
OPTIONS: dict[str, dict[str, Any]] = {
    'shard="optimizer"': {"shard": "optimizer"},
    'shard="gradients"': {"shard": "gradients"},
    'shard="parameters"': {"shard": "parameters"},
    "buckets": {"buckets": 1},
    "algorithm": {"algorithm": "ring"},
    "compression": {"compression": "bf16"},
    "adasum": {"reduction": "adasum"},
    "delay": {"delay": 1},
    "sync_every": {"sync_every": 4},
}
PAIRS = [
    (one, other)
    for one, other in itertools.combinations(OPTIONS, 2)
    if not (one.startswith("shard") and other.startswith("shard"))
]


def told():
    """Return the pairs that the page's table has a "yes" for."""
    table = re.search(r"^\| \| `buckets`.*?\n\n", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    assert table is not None
    head, _, *rows = [line.strip("| ").split("|") for line in table[0].strip().splitlines()]
    columns = [cell.strip(" `") for cell in head]
    pairs = set()
    for cells in rows:
        name, *answers = (cell.strip() for cell in cells)
        answers += [""] * (len(columns) - len(answers))
        for column, answer in zip(columns, answers, strict=True):
            first = re.search(r"`(?:reduction=\"(adasum)\"|([^`]*?)=?)`", name)
            assert first is not None
            if answer.startswith("yes"):
                pairs.add(frozenset((first[1] or first[2], column)))
    return pairs


@pytest.mark.parametrize("one,other", PAIRS)
def test_a_pair_is_as_the_page_says(one, other):
    options = {**OPTIONS[one], **OPTIONS[other]}
    if frozenset((one, other)) in told():
        assert tx.DP("data", **options) == tx.DP("data", **options)
        return
    with pytest.raises(ValueError, match=r"DP needs .*got .*: ") as found:
        tx.DP("data", **options)
    names = [*OPTIONS[one], *OPTIONS[other]]
    assert all(name in str(found.value) for name in names), str(found.value)


def test_the_page_tells_of_pairs():
    assert len(told()) == 15


@pytest.mark.parametrize("shard", ["gradients", "parameters"])
@pytest.mark.parametrize("compression", ["int8", tx.compression.powersgd(2)], ids=str)
def test_what_a_compression_keeps_has_no_place_there(shard, compression):
    """As the note of the page's table says."""
    with pytest.raises(ValueError, match=r"DP needs shard= .*got '\w+': what it keeps"):
        tx.DP("data", shard=shard, compression=compression)
