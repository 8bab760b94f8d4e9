"""The small GPT: one curve under any plan, what it sends by a formula, its memory, its script."""

import itertools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
from gpt_modules import gpt

import txcore as tx

ROWS = 8
TEXT = gpt.data.load(None)[1]
SMALL = {"length": 32, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2}


def make_engine(config, mesh, pipeline=None, precision="float32", **dp):
    sizes = gpt.cli.read_mesh(mesh)
    config.check(sizes)
    return sizes, tx.Engine(
        mesh=gpt.cli.make_mesh(sizes, 1),
        plan=tx.Plan(
            data_parallel=tx.DP("data", **dp),
            tensor_parallel=tx.TP("model", rules=config.tensor_rules),
            pipeline=pipeline,
            context="context",
        ),
        optimizer=tx.optim.sgd(0.1),
        precision=precision,
    )


def make_batches(config, sizes, count=1):
    windows = gpt.data.Windows(ROWS, config.length, sizes["context"], (1, 0))
    return [b for b, _ in zip(windows.shuffled(TEXT, 0, 0), range(count), strict=False)]


def declared_by_layers(report):
    """Count the collectives of a step that are none of the plan's or of the loss."""
    found = Counter()
    for fate in report.fates:
        d = fate.declared
        averages = d.kind != "collective-permute" and set(d.axes) <= {"data", "context"}
        if d.live and "pipe" not in d.axes and not averages:
            found[d.kind, d.axes, d.dtype, d.elements] += d.trips
    return found


ZERO_BUBBLE = tx.PP("pipe", microbatches=4, schedule="zb-h1")
CASES = [
    ("data=2,model=2,pipe=2", {}, tx.PP("pipe", microbatches=2), "float32"),
    ("context=2,model=2", {"sequence": True, "positions": "learned"}, None, "float32"),
    pytest.param(
        *("context=2,pipe=2", {"tied": True}, ZERO_BUBBLE, "float32"), marks=pytest.mark.extra
    ),
    ("context=4,model=2", {}, None, "bfloat16"),
]


MESHES = ["data=2,model=2,pipe=2", "context=2,model=2", "context=2,pipe=2", "context=4,model=2"]


@pytest.mark.parametrize("mesh,options,pipeline,precision", CASES, ids=MESHES)
def test_the_curve_is_that_of_one_device_and_the_layers_send_what_the_formula_says(
    mesh, options, pipeline, precision
):
    config = gpt.model.GPT(**SMALL, **options)
    step = gpt.train.make_steps(config)[0]
    curves = {}
    for name in ("data=1", mesh):
        sizes, engine = make_engine(config, name, pipeline, precision)
        state = engine.create_state(gpt.model.init(config))
        curves[name] = []
        for batch in make_batches(config, sizes, 3):
            state, metrics = step(state, batch)
            curves[name].append(float(metrics["loss"]))
    rtol = 1e-5 if precision == "float32" else 2e-2
    np.testing.assert_allclose(curves[mesh], curves["data=1"], rtol=rtol)
    report = engine.audit(step, state, batch)
    assert report.exact, str(report)
    formula = Counter()
    for sent in gpt.communication.predict(config, engine.plan, sizes, ROWS, precision):
        formula[sent.kind, (sent.axis,), sent.dtype, sent.elements] += sent.times
    assert declared_by_layers(report) == formula


def temporary_bytes(config, mesh):
    sizes, engine = make_engine(config, mesh)
    step = gpt.train.make_steps(config)[0]
    state = engine.create_state(gpt.model.init(config))
    placed = engine._steps.place(make_batches(config, sizes)[0])
    compiled = engine._steps.compile(step, state, placed, train=True)[1].call
    return compiled.memory_analysis().temp_size_in_bytes, compiled.as_text()


def test_activation_memory_shrinks_with_the_parts_of_the_sequence():
    config = gpt.model.GPT(length=256, width=32, layers=1, heads=8, kv_heads=8)
    context = [temporary_bytes(config, f"context={n}")[0] for n in (1, 2, 4)]
    for more, less in itertools.pairwise(context):
        assert less < 0.72 * more, context


def test_sequence_parallelism_keeps_less_than_tensor_parallelism_alone():
    def of(n, sequence):
        config = gpt.model.GPT(
            length=256, width=32, layers=2, heads=4, kv_heads=4, sequence=sequence
        )
        return temporary_bytes(config, f"model={n}")[0]

    split = [of(n, True) for n in (1, 2, 4)]
    assert split[1] < 0.65 * split[0]
    assert split[2] < 0.65 * split[1]
    assert split[2] < of(4, False)


def test_no_device_holds_whole_logits():
    config = gpt.model.GPT(**{**SMALL, "vocabulary": 4096, "kv_heads": 4})
    _, hlo = temporary_bytes(config, "model=4")
    assert not re.search(r"\[(?:\d+,)*4096(?:,\d+)*\]", hlo)
    assert re.search(r"\[(?:\d+,)*1024(?:,\d+)*\]", hlo)
    assert re.search(r"\[(?:\d+,)*4096(?:,\d+)*\]", temporary_bytes(config, "data=1")[1])


def run_script(folder, *flags):
    assert gpt.train.main([*flags, "--results", str(folder)]) == 0
    return json.loads((folder / "results.json").read_text())


@pytest.mark.slow
def test_the_script_learns_more_than_pairs(tmp_path, capsys):
    flags = "--layers 1 --width 64 --heads 4 --length 32 --batch-size 32 --learning-rate 5e-3"
    flags += " --mesh data=2 --sample 20 --steps 200"
    found = run_script(tmp_path, *flags.split())
    assert found["test_loss"] < found["bigram_loss"], found["test_loss"]
    assert found["audit"] == "proved"
    assert len(found["loss_curve"]) == 200
    out = capsys.readouterr().out
    for text in ("proved", "drawn after", "collectives of a step", "tokens/s"):
        assert text in out


@pytest.mark.extra  # tests/compositions resumes more of them
@pytest.mark.slow
def test_a_run_goes_on_under_another_plan(tmp_path):
    saved = tmp_path / "saved"
    small = "--layers 2 --width 32 --heads 4 --length 16 --sample 0 --steps 12 --no-audit"
    flags = [*small.split(), "--checkpoint-dir", str(saved), "--save-every", "6"]
    whole = run_script(tmp_path, *flags, "--mesh", "data=2")
    newest = max(saved.iterdir(), key=lambda path: path.name)
    assert "12" in newest.name
    shutil.rmtree(newest)
    mesh = ["--mesh", "model=2,pipe=2", "--microbatches", "2"]
    rest = run_script(tmp_path, *flags, *mesh)
    np.testing.assert_allclose(rest["loss_curve"], whole["loss_curve"][6:], rtol=1e-4)


def test_the_bigram_model_is_what_its_pairs_say():
    train = np.frombuffer(b"ababab", np.uint8)
    share = (3 + 1) / (3 + 256)  # of b after a: 3 pairs, one more for each byte
    assert gpt.data.bigram_loss(train, np.frombuffer(b"ab", np.uint8)) == pytest.approx(
        -np.log(share)
    )


def test_windows_are_cut_for_each_process_alike():
    whole = next(gpt.data.Windows(8, 16, 2, (1, 0)).shuffled(TEXT, 3, 1))
    parts = [next(gpt.data.Windows(8, 16, 2, (2, i)).shuffled(TEXT, 3, 1)) for i in range(2)]
    for key, leaf in whole.items():
        np.testing.assert_array_equal(leaf, np.concatenate([part[key] for part in parts]))
    tokens, labels = (tx.context.merge_chunks(whole[k], 2) for k in ("tokens", "labels"))
    np.testing.assert_array_equal(tokens[:, 1:], labels[:, :-1])


@pytest.mark.parametrize(
    "flags,text",
    [
        ("--mesh data=2,row=2", "--mesh needs axes of data, context, pipe, model"),
        ("--mesh model=8 --heads 4", "divide"),
        ("--mesh context=8 --length 24", "multiple of 16"),
        ("--width 20 --heads 4", "even multiple of the 4 heads"),
        ("--mesh data=3 --batch-size 8", "cannot share equally"),
        ("--mesh pipe=2 --layers 3", "layers"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_in_a_line(flags, text, capsys):
    assert gpt.train.main([*flags.split(), "--steps", "1"]) == 2
    error = capsys.readouterr().err.strip()
    assert text in error, error
    assert len(error.splitlines()) == 1
