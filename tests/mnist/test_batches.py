"""Every example once an epoch, in one order for any number of processes."""

import numpy as np
import pytest
from data import batches
from hypothesis import given, settings
from hypothesis import strategies as st


def dataset(count):
    """Images whose first pixel is the number of the example, counted from 1."""
    images = np.zeros((count, 28, 28, 1), np.float32)
    images[:, 0, 0, 0] = np.arange(1, count + 1)
    return images, (np.arange(count) % 10).astype(np.int32)


def epoch(count, **options):
    return list(batches.epoch_batches(*dataset(count), **{"seed": 0, "epoch": 0, **options}))


def numbers(batch):
    """The numbers of the real examples in a batch."""
    return batch["image"][batch["mask"] == 1][:, 0, 0, 0].astype(int).tolist()


def order(count, **options):
    return [n for batch in epoch(count, batch_size=4, **options) for n in numbers(batch)]


@settings(deadline=None)  # the machine may be busy
@given(count=st.integers(1, 60), batch_size=st.integers(1, 70), shuffle=st.booleans())
def test_each_example_once(count, batch_size, shuffle):
    got = epoch(count, batch_size=batch_size, shuffle=shuffle)
    assert len(got) == batches.batches_per_epoch(count, batch_size)
    seen = [n for batch in got for n in numbers(batch)]
    assert sorted(seen) == list(range(1, count + 1))
    if not shuffle:
        assert seen == sorted(seen)


@settings(deadline=None)  # the machine may be busy
@given(count=st.integers(1, 60), part=st.integers(1, 9), processes=st.integers(1, 8))
def test_the_parts_of_all_processes_are_the_batch(count, part, processes):
    options = {"batch_size": part * processes, "seed": 3, "epoch": 2}
    whole = epoch(count, **options)
    parts = [
        epoch(count, **options, process_index=p, process_count=processes) for p in range(processes)
    ]
    assert {len(p) for p in parts} == {len(whole)}
    for index, batch in enumerate(whole):
        for key, values in batch.items():
            joined = np.concatenate([p[index][key] for p in parts])
            assert joined.dtype == values.dtype
            np.testing.assert_array_equal(joined, values)


def test_labels_stay_with_their_images():
    for batch in epoch(50, batch_size=8):
        want = [(n - 1) % 10 for n in numbers(batch)]
        assert batch["label"][batch["mask"] == 1].tolist() == want


def test_shapes_dtypes_and_the_masked_rest():
    got = epoch(10, batch_size=8)
    for batch in got:
        assert batch["image"].shape == (8, 28, 28, 1)
        assert batch["label"].shape == batch["mask"].shape == (8,)
        dtypes = [batch[k].dtype for k in ("image", "label", "mask", "weight")]
        assert dtypes == ["f4", "i4", "f4", "f4"]
    assert got[0]["mask"].tolist() == [1] * 8
    assert got[1]["mask"].tolist() == [1, 1, 0, 0, 0, 0, 0, 0]
    assert got[0]["weight"].tolist() == [1] * 8
    assert got[1]["weight"].tolist() == [4, 4, 0, 0, 0, 0, 0, 0]
    assert not got[1]["image"][2:].any()
    assert not got[1]["label"][2:].any()


@pytest.mark.parametrize("processes", [1, 4])
def test_the_weighted_mean_over_all_rows_is_that_of_the_real_examples(processes):
    """With the parts of the processes averaged, as pmean averages devices."""
    parts = [
        epoch(50, batch_size=12, process_index=p, process_count=processes) for p in range(processes)
    ]
    for index, share in enumerate((12, 12, 12, 12, 2)):
        labels = np.concatenate([part[index]["label"] for part in parts])
        got = np.mean([np.mean(b["weight"] * (b["label"] + 1)) for b in (p[index] for p in parts)])
        assert got == pytest.approx((labels[:share] + 1).mean(), rel=1e-6)


def test_a_process_whose_part_is_padding_only():
    last = epoch(9, batch_size=8, process_index=3, process_count=4)[-1]
    assert last["mask"].tolist() == last["weight"].tolist() == [0, 0]
    assert last["image"].shape == (2, 28, 28, 1)


def test_orders_differ_by_epoch_and_seed_and_are_reproducible():
    first = order(40)
    assert order(40) == first
    assert order(40, epoch=1) != first
    assert order(40, seed=1) != first
    # Seed and epoch are not added up.
    assert order(40, seed=1, epoch=0) != order(40, seed=0, epoch=1)


def test_the_order_does_not_depend_on_the_batch_size():
    one = [n for b in epoch(40, batch_size=5) for n in numbers(b)]
    assert one == [n for b in epoch(40, batch_size=16) for n in numbers(b)]


def test_the_order_is_the_documented_one():
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([7, 2])))
    want = [int(n) + 1 for n in generator.permutation(12)]
    assert order(12, seed=7, epoch=2) == want


def test_the_data_is_copied():
    images, labels = dataset(4)
    for batch in batches.epoch_batches(images, labels, batch_size=4, seed=0, epoch=0):
        batch["image"][:] = -1
        batch["label"][:] = -1
    assert (images >= 0).all()
    assert (labels >= 0).all()


@pytest.mark.parametrize(
    "count, batch_size, want", [(60_000, 128, 469), (128, 128, 1), (129, 128, 2), (1, 128, 1)]
)
def test_batches_per_epoch(count, batch_size, want):
    assert batches.batches_per_epoch(count, batch_size) == want


BAD = {
    "batch 0": ({"batch_size": 0}, "batch_size: required a whole number of at least 1, given 0"),
    "batch -4": ({"batch_size": -4}, "batch_size: required a whole number of at least 1, given -4"),
    "batch 2.5": (
        {"batch_size": 2.5},
        "batch_size: required a whole number of at least 1, given 2.5",
    ),
    "batch True": (
        {"batch_size": True},
        "batch_size: required a whole number of at least 1, given True",
    ),
    "epoch -1": ({"epoch": -1}, "epoch: required a whole number of at least 0, given -1"),
    "epoch 1.0": ({"epoch": 1.0}, "epoch: required a whole number of at least 0, given 1.0"),
    "seed -1": ({"seed": -1}, "seed: required a whole number of at least 0, given -1"),
    "seed None": ({"seed": None}, "seed: required a whole number of at least 0, given None"),
    "no process": (
        {"process_count": 0},
        "process_count: required a whole number of at least 1, given 0",
    ),
    "process -1": (
        {"process_index": -1},
        "process_index: required a whole number of at least 0, given -1",
    ),
    "process 2 of 2": (
        {"process_index": 2, "process_count": 2},
        "process_index: required less than process_count 2, given 2; count the processes from 0",
    ),
    "64 by 3": (
        {"batch_size": 64, "process_count": 3},
        "batch_size: required a multiple of the 3 processes, given 64; use 66",
    ),
    "2 by 4": (
        {"batch_size": 2, "process_count": 4},
        "batch_size: required a multiple of the 4 processes, given 2; use 4",
    ),
    "labels short": (
        {"labels": np.zeros(9, np.int32)},
        "images and labels: required shapes [n, ...] and [n] with n at least 1, given "
        "[10, 28, 28, 1] and [9]; pass one label for each image",
    ),
    "labels one-hot": ({"labels": np.zeros((10, 10))}, "given [10, 28, 28, 1] and [10, 10]"),
    "nothing": (
        {"images": np.zeros((0, 28, 28, 1)), "labels": np.zeros(0)},
        "given [0, 28, 28, 1] and [0]",
    ),
}


@pytest.mark.parametrize("options, text", BAD.values(), ids=BAD)
def test_bad_arguments_are_refused_at_the_call(options, text):
    images, labels = dataset(10)
    arguments = {"images": images, "labels": labels, "batch_size": 4, "seed": 0, "epoch": 0}
    with pytest.raises(ValueError) as error:
        batches.epoch_batches(**(arguments | options))
    assert text in str(error.value)


def test_batches_per_epoch_refuses():
    with pytest.raises(ValueError, match="count: required a whole number of at least 1, given 0"):
        batches.batches_per_epoch(0, 8)
    with pytest.raises(
        ValueError, match="batch_size: required a whole number of at least 1, given 0"
    ):
        batches.batches_per_epoch(8, 0)
