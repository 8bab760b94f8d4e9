"""A second fit counts on from the state's step; loggers that fail are left out; Basic's numbers."""

import io
import logging
import re

import checkpoint_cases as cases
import float16_steps as f16
import numpy as np
import pytest
import toys

import txcore as tx


class Records(list):
    def __call__(self, record):
        self.append(record)

    def of(self, kind):
        return [r.step for r in self if r.kind == kind]


def test_a_second_fit_goes_on_where_the_state_is():
    records, out = Records(), io.StringIO()
    engine = cases.engine(1)
    engine.loggers = (records, tx.loggers.Basic(every=4, stream=out))
    data, evaluate = cases.batches(0), lambda state: {}
    state = engine.fit(cases.step, cases.start(engine), data, steps=6)
    records.clear()
    out.seek(0)
    out.truncate(0)
    state = engine.fit(cases.step, state, data, steps=13, evaluate=evaluate, eval_every=5)
    assert int(state.step) == 13
    assert records.of("step") == [7, 8, 9, 10, 11, 12, 13]
    assert records.of("eval") == [10, 13], "eval_every counts from the beginning of the run"
    assert {r.total_steps for r in records} == {13}
    end = records[-1]
    assert end.since == (6, 0.0, 0)
    assert end.examples == sum(int(data[i % 4]["mask"].sum()) for i in range(7))
    half = next(r for r in records if r.step == 10)
    assert half.eta_s == pytest.approx(half.seconds / 4 * 3)
    lines = [line for line in out.getvalue().splitlines() if "step" in line[:8]]
    assert re.search(r"8/13 +61\.5%", lines[0]), "where Basic is due counts on too"
    (ms,) = (float(x) for x in re.findall(r"([\d.]+) ms", lines[0]))
    assert ms == pytest.approx(1e3 * next(r for r in records if r.step == 8).seconds / 2, abs=0.06)


def test_steps_are_those_in_all(caplog):
    engine = cases.engine(1)
    data = cases.batches(0)
    state = engine.fit(cases.step, cases.start(engine), data, steps=4)
    text = (
        "fit is to make steps=3 in all, and the state has made 4 already: give steps=7 for 3 more"
    )
    with pytest.raises(ValueError, match=f"^{text}$") as caught:
        engine.fit(cases.step, state, data, steps=3)
    assert caught.value.state is state
    assert toys.messages(caplog) == []
    assert engine.fit(cases.step, state, data, steps=4) is state
    text = "fit has no step to make: of steps=4 the state has made all: give steps=8 for 4 more"
    assert toys.messages(caplog) == [f"txcore: {text}"]


def test_epochs_are_passes_over_the_data_of_this_call():
    records = Records()
    engine = cases.engine(1)
    engine.loggers = (records,)
    data = cases.batches(0)
    state = engine.fit(cases.step, cases.start(engine), data, epochs=1)
    state = engine.fit(cases.step, state, data, epochs=2)
    assert int(state.step) == 12
    assert records.of("step") == list(range(1, 13))
    assert [r.total_steps for r in records if r.kind == "end"] == [4, 12]


def test_skipped_steps_count():
    data = [f16.huge(toys.batch(seed=i), 3) if i == 1 else toys.batch(seed=i) for i in range(4)]
    records = Records()
    engine = f16.engine(1, precision=f16.policy(initial=256), loggers=[records])
    state = engine.fit(f16.train_step, engine.create_state(toys.params()), data, steps=4)
    assert int(state.step) == 3
    engine.fit(f16.train_step, state, data[2:], steps=6)
    assert records.of("step") == [1, 2, 3, 4, 5, 6]


def test_saves_count_on(tmp_path):
    pytest.importorskip("orbax.checkpoint")
    engine = cases.engine(1)
    data = cases.batches(0)
    state = engine.fit(cases.step, cases.start(engine), data, steps=4)
    checkpoints = tx.Checkpoints(tmp_path, every=3)
    engine.fit(cases.step, state, data, steps=7, checkpoints=checkpoints)
    assert cases.saved(tmp_path) == ["step_00000006", "step_00000007"]
    state = engine.fit(cases.step, cases.start(engine), data, steps=8, checkpoints=checkpoints)
    assert int(state.step) == 8, "resumed after 7"


def test_a_state_that_is_newer_than_the_checkpoint(tmp_path, caplog):
    pytest.importorskip("orbax.checkpoint")
    engine = cases.engine(1)
    data = cases.batches(0)
    checkpoints = tx.Checkpoints(tmp_path, every=3)
    engine.fit(cases.step, cases.start(engine), data, steps=3, checkpoints=checkpoints)
    newer = engine.fit(cases.step, cases.start(engine), data, steps=5)
    with caplog.at_level(logging.WARNING, "txcore"):  # another test may have left it lower
        state = engine.fit(cases.step, newer, data, steps=6, checkpoints=checkpoints)
    assert int(state.step) == 6
    assert toys.messages(caplog) == [
        "txcore: the checkpoint is after 3 steps, and the state given to fit after 5: it goes on "
        "from the checkpoint"
    ]


@pytest.mark.parametrize("error", [ValueError("no"), RuntimeError("no"), TimeoutError("no")])
def test_a_logger_that_raises_is_reported_once_and_left_out(error, caplog):
    calls, records = [], Records()

    def broken(record):
        calls.append(record.step)
        if record.step == 2:
            raise error

    engine = cases.engine(1)
    engine.loggers = (broken, records)
    with caplog.at_level(logging.WARNING, "txcore"):
        engine.fit(cases.step, cases.start(engine), cases.batches(0), steps=4)
    assert calls == [1, 2]
    assert records.of("step") == [1, 2, 3, 4]
    assert toys.messages(caplog) == [
        "txcore: the logger broken failed at step 2, and is left out from now on: "
        f"{type(error).__name__}: no"
    ]


def test_a_logger_that_never_could_write_is_left_out(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    engine = cases.engine(1, tx.loggers.JSONL(tmp_path / "file" / "log.jsonl"))
    state = engine.fit(cases.step, cases.start(engine), cases.batches(0), steps=2)
    assert int(state.step) == 2
    (said,) = toys.messages(caplog)
    assert said.startswith("txcore: the logger JSONL failed at step 1, and is left out from now")


@pytest.mark.parametrize(
    "value, text",
    [
        (3e-5, "3e-5"),
        (-3.14159e-7, "-3.142e-7"),
        (0.00125, "0.00125"),
        (0.25, "0.2500"),
        (0.0123456, "0.0123"),
        (0.0, "0.0000"),
        (12345.678, "12345.6780"),
        (1.5e9, "1.5e9"),
        (1e22, "1e22"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
        (3, "3"),
    ],
)
def test_basic_shows_every_number_in_three_digits(value, text):
    out = io.StringIO()
    tx.loggers.Basic(stream=out)(tx.loggers.Record("step", 1, 4, {"rate": value}, 1.0, 8, 0.0))
    assert f"  rate {text}  " in out.getvalue()
    shown = float(text)
    assert np.isnan(value) or shown == pytest.approx(value, rel=5e-3)


class Unsized:
    """Batches whose number nobody knows, as of a torch loader of an IterableDataset."""

    def __len__(self):
        raise TypeError("object of type 'IterableDataset' has no len()")

    def __iter__(self):
        return iter([toys.batch(seed=i) for i in range(3)])


def test_data_whose_length_nobody_knows():
    records = []
    engine = toys.engine(1, loggers=[records.append])
    state = engine.fit(toys.train_step, engine.create_state(toys.params()), Unsized(), epochs=2)
    assert int(state.step) == 6
    assert {record.total_steps for record in records} == {None}
