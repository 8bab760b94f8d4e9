"""Batches padded to one size, and as many on every rank; here the other ranks are made up."""

import json
import re

import jax
import numpy as np
import pytest
import toys

import txcore as tx
from txcore.launch import key_value

X = np.arange(6, dtype=np.float32).reshape(3, 2)
ONE = {"x": X, "y": np.array([1, 2, 3], np.int32)}


def test_padding_has_a_mask():
    padded = tx.pad_batch(ONE, 5)
    assert {k: (v.shape, v.dtype.name) for k, v in padded.items()} == {
        "x": ((5, 2), "float32"),
        "y": ((5,), "int32"),
        "mask": ((5,), "float32"),
    }
    np.testing.assert_array_equal(padded["x"], [*X, [0, 0], [0, 0]])
    np.testing.assert_array_equal(padded["mask"], [1, 1, 1, 0, 0])
    assert "mask" not in ONE
    jax.tree.map(np.testing.assert_array_equal, tx.pad_batch(padded, 5), padded)
    nothing = {"x": X[:0], "y": ONE["y"][:0]}
    assert tx.pad_batch(nothing, 2)["mask"].tolist() == [0, 0]


def test_a_mask_of_its_own_is_kept():
    tokens = {"x": X, "mask": np.array([[1, 1], [1, 0], [0, 0]], bool)}
    padded = tx.pad_batch(tokens, 4)
    assert padded["mask"].dtype == bool
    np.testing.assert_array_equal(padded["mask"], [[1, 1], [1, 0], [0, 0], [0, 0]])


@pytest.mark.parametrize(
    "batch, size, error, text",
    [
        (ONE, 2, ValueError, "tx.pad_batch needs a batch of at most size=2 rows, got 3: give a"),
        (ONE, 0, ValueError, "tx.pad_batch needs size= a number of rows from 1 on, got 0"),
        (ONE, 2.5, ValueError, "tx.pad_batch needs size= a number of rows from 1 on, got 2.5"),
        ([X], 4, TypeError, "tx.pad_batch needs a dict, or a batch with a leaf 'mask', got list"),
        (
            {"x": X, "classes": np.ones(7)},
            4,
            ValueError,
            "tx.pad_batch needs one row for each example in every leaf, got 7 at "
            "batch['classes'], 3 at batch['x']: what all examples share is added afterwards",
        ),
        ({"x": X, "n": 3}, 4, TypeError, "got int at batch['n']: what all examples share is added"),
        ({}, 4, ValueError, "tx.pad_batch needs one row for each example in every leaf, got none"),
    ],
)
def test_what_cannot_be_padded(batch, size, error, text):
    with pytest.raises(error, match=re.escape(text)):
        tx.pad_batch(batch, size)


PARTS = [{"x": X}, {"x": X[:1]}]


def masks(*args, **kwargs):
    return [batch["mask"].tolist() for batch in tx.even_batches(*args, **kwargs)]


def others_say(monkeypatch, *others):
    """Let other ranks say (count, size, has_like)."""
    monkeypatch.setattr(
        key_value, "gather", lambda _, own: [own, *(json.dumps(other) for other in others)]
    )


def test_alone_the_last_batch_is_padded():
    assert masks(PARTS, 3) == [[1, 1, 1], [1, 0, 0]]
    assert masks(iter(PARTS), 3, count=2) == [[1, 1, 1], [1, 0, 0]]
    assert masks([], 3) == []


def test_as_many_as_the_rank_with_the_most(monkeypatch):
    others_say(monkeypatch, (4, 3, False), (1, 3, True))
    assert masks(PARTS, 3) == [[1, 1, 1], [1, 0, 0], [0, 0, 0], [0, 0, 0]]
    shapes = {"x": jax.ShapeDtypeStruct((1, 2), np.float32)}
    batches = list(tx.even_batches([], 3, like=shapes))
    assert [batch["mask"].tolist() for batch in batches] == [[0, 0, 0]] * 4
    np.testing.assert_array_equal(batches[0]["x"], np.zeros((3, 2), np.float32))


@pytest.mark.parametrize(
    "others, text",
    [
        (
            [(2, 5, False)],
            "tx.even_batches needs the same size= on every rank, got [3, 5] by rank: a global "
            "batch consists of equal parts",
        ),
        (
            [(0, 3, False), (0, 3, True), (0, 3, False)],
            "tx.even_batches needs like= on a rank that has no batch, got none on ranks 1 and 3: "
            'give a batch (arrays or shapes) of what it would have, like={"x": np.zeros((1,',
        ),
    ],
)
def test_all_ranks_are_refused_together(monkeypatch, others, text):
    others_say(monkeypatch, *others)
    with pytest.raises(ValueError, match=re.escape(text)):
        tx.even_batches(PARTS, 3)


@pytest.mark.parametrize(
    "batches, count, error, text",
    [
        (
            iter(PARTS),
            None,
            TypeError,
            "tx.even_batches needs batches with a length, or count= how many there are, got "
            "list_iterator: the ranks agree on the number of steps before the first one. Give "
            "count=, or list(batches)",
        ),
        (PARTS, -1, ValueError, "tx.even_batches needs count= a number from 0 on, got -1"),
        (
            PARTS,
            1,
            ValueError,
            "tx.even_batches needs the batches that were counted, 1 (by count=, or their length), "
            "got more than 1: the ranks have agreed on the number of steps already. Give count= as "
            "many as there are",
        ),
        (PARTS, 3, ValueError, "were counted, 3 (by count=, or their length), got 2: the ranks"),
    ],
)
def test_batches_that_are_not_counted_right(batches, count, error, text):
    with pytest.raises(error, match=re.escape(text)):
        list(tx.even_batches(batches, 3, count=count))


def test_fit_and_evaluate_over_all_of_the_data():
    """21 examples in batches of 8 on 4 devices: each counts once, whatever the padding."""
    whole = toys.batch(24)
    whole = {key: leaf[:21] for key, leaf in whole.items() if key != "mask"}
    parts = [{key: leaf[i : i + 8] for key, leaf in whole.items()} for i in (0, 8, 16)]
    engine = toys.engine(4)
    state = engine.create_state(toys.params())

    def eval_step(state, batch):
        loss = toys.local_loss(state.params, batch)
        return {"loss": tx.pmean(loss, "data")}

    wanted = np.mean(np.asarray(toys.losses(toys.params(), whole), np.float64))
    found = engine.evaluate(eval_step, state, tx.even_batches(parts, 8))
    assert found["loss"] == pytest.approx(wanted, rel=1e-5)
    state = engine.fit(toys.train_step, state, lambda epoch: tx.even_batches(parts, 8), epochs=2)
    assert int(state.step) == 6
