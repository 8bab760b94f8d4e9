"""Real ranks that differ in their state, their loop or what they do later: refused, or named."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
from processes import finish, free_port, rank_environment

WORKER = pathlib.Path(__file__).with_name("agreement_worker.py")
sweep = pytest.mark.skipif(
    os.environ.get("TXCORE_ALL_RANKS") != "1", reason="a sweep: set TXCORE_ALL_RANKS=1"
)
BEGIN = "the ranks would begin step with different states (compared bit for bit):"
REMEDY = (
    "Nothing was run. Make the same state on every rank (by the same seed, files and numbers), or "
    "send one rank's to all: engine.create_state(params, broadcast_from=0)"
)
LOOP = "the ranks would run different loops: rank 1 differs from rank 0"


def run(cases, world=2, devices=1, seconds=240, worker=WORKER):
    """Run all ranks to their ends; return (exit code, stdout, stderr) of each."""
    port = free_port()
    ranks = []
    for rank in range(world):
        environment = rank_environment()
        environment |= {"JAX_NUM_CPU_DEVICES": str(devices), "JAX_PROCESS_ID": str(rank)}
        environment |= {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}"}
        ranks.append(
            subprocess.Popen(
                [sys.executable, "-W", "error", worker, json.dumps(cases)],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment | {"JAX_NUM_PROCESSES": str(world)},
            )
        )
    return finish(*ranks, deadline_s=seconds)


def found(ended):
    """Return what each rank found, by case."""
    for code, _, err in ended:
        assert code == 0, err
    rows = [
        dict(json.loads(line) for line in out.splitlines() if line.startswith('["'))
        for _, out, _ in ended
    ]
    return rows


def refusal(rows):
    """Return the text with which every rank refused, the same on all."""
    assert [row.get("error") for row in rows] == ["MismatchError"] * len(rows), rows
    (text,) = {row["text"] for row in rows}
    return text


def check_flips(ranks, cases):
    """Hold every run to its refusal, with the one leaf in which a bit was flipped."""
    assert [len(rows) for rows in ranks] == [cases] * len(ranks)
    world = len(ranks)
    for rows in zip(*ranks, strict=True):
        head, line, remedy = refusal(rows).splitlines()
        odd = rows[0]["odd"]
        who = "rank 1 differs from rank 0"  # of two ranks the first is the reference
        if world > 2:
            others = [str(rank) for rank in range(world) if rank != odd]
            who = f"rank {odd} differs from ranks {' and '.join(others)}"
        assert (head, remedy) == (BEGIN, REMEDY)
        pattern = rf"  {re.escape(rows[0]['leaf'])} \w+\[[\d,]*\]: {who} \(devices? [\d, and]+\)"
        assert re.fullmatch(pattern, line), line


def check_beginnings(rows):
    """Ranks that begin differently are refused, and one can send its state to all."""
    for case, leaves in DIFFERENT_STATES.items():
        lines = refusal([row[case] for row in rows]).splitlines()
        assert (lines[0], lines[-1]) == (BEGIN, REMEDY)
        assert lines[1:-1] == [
            f"  {leaf}: rank 1 differs from rank 0 (device 2048)" for leaf in leaves
        ]
    assert rows[0] == rows[1]
    equal = np.array(rows[0]["equal"]["ok"])
    for case in ("sent", "sent seed", "sent moments"):
        assert rows[0][case]["ok"] == rows[0]["equal"]["ok"]
    # Rank 1's parameters are larger by 1; the first steps of AdamW are as long.
    np.testing.assert_allclose(np.array(rows[0]["sent from 1"]["ok"]), equal + 1, atol=0.03)


DIFFERENT_STATES = {
    "params": ["stored_params['w1'] float32[4,8]"],
    "seed": ["seed uint32[]"],
    "moments": [
        "opt_state['m']['w1'] float32[4,8]",
        "opt_state['m']['w2'] float32[8,1]",
        "opt_state['v']['w1'] float32[4,8]",
        "opt_state['v']['w2'] float32[8,1]",
    ],
}


def check_bits(rows):
    """Every bit arrives as it was sent."""
    words = np.array([0x7FC12345, 0xFFC00001, 0x7F800001, 0x80000000], "<u4")
    halves, bytes_ = (words >> 16).astype("<u2"), (words >> 24).astype(np.uint8)
    for row in rows:
        assert row == {
            "report": [True, True],
            "float32": ["float32", words.tobytes().hex()],
            "bfloat16": ["bfloat16", halves.tobytes().hex()],
            "bool": ["bool", (words > 2**31).tobytes().hex()],
            "int8": ["int8", bytes_.tobytes().hex()],
            "key": ["uint32", words[:2].tobytes().hex()],
        }


def check_unsent(rows):
    """What cannot be sent is refused."""
    text = refusal([row["sent wider"] for row in rows])
    head, remedy = text.splitlines()[0], text.splitlines()[-1]
    assert head == "one rank's state does not fit the others: rank 1 differs from rank 0"
    assert (
        "  -stored_params['w1'] float32[4,8]\n  +stored_params['w1'] float32[4,16]\n"
        "   stored_params['w2'] float32[8,1]\n"
    ) in text
    assert remedy == (
        "Nothing was sent. create_state(broadcast_from=) needs the same leaves on every rank, of "
        "any values: give it the same structure, dtypes and shapes"
    )
    two = refusal([row["sent by two"] for row in rows])
    assert "  -broadcast_from=0\n  +broadcast_from=1\n" in two
    for row in rows:
        assert row["no rank"] == {
            "error": "ValueError",
            "text": "create_state needs broadcast_from= a rank from 0 to 1, got 2",
        }


def check_later(rows):
    """A state that was changed by hand is compared again; so are copies in the run."""
    for case, name in (("by hand", "step"), ("evaluated", "eval_step")):
        assert refusal([row[case] for row in rows]) == (
            f"the ranks would begin {name} with different states (compared bit for bit):\n"
            f"  extra['mean'] float32[]: rank 1 differs from rank 0 (device 2048)\n{REMEDY}"
        )
    assert [row["copied"] for row in rows] == [{"ok": None}] * 2
    assert refusal([row["in fit"] for row in rows]).splitlines()[:2] == [
        "copies of the state that have to be equal bit for bit differ after step 6; after step 3 "
        "they were equal:",
        "  stored_params['w1'] float32[4,8]: rank 1 differs from rank 0 (device 2048)",
    ]


@pytest.mark.slow
def test_ranks_with_different_states():
    # One run of them all, since starting two ranks takes longer than all this.
    cases = [["flips", {"runs": 6, "seed": 3}], ["beginnings", {}], ["bits", {}], ["later", {}]]
    ranks = found(run(cases))
    check_flips([rank["flips"] for rank in ranks], 6)
    check_beginnings([rank["beginnings"] for rank in ranks])
    check_unsent([rank["beginnings"] for rank in ranks])
    check_bits([rank["bits"] for rank in ranks])
    check_later([rank["later"] for rank in ranks])


DIFFERENT = {
    "steps": "-steps=2\n+steps=3",
    "epochs": "-epochs=1\n+epochs=2",
    "steps or epochs": "-steps=2\n-epochs=None\n+steps=None\n+epochs=1",
    "data": "-batches in data: 2\n+batches in data: 3",
    "kind of data": "-batches in data: 2\n+batches in data: not known",
    "evaluate": "-evaluate=None\n+evaluate=given",
    "eval_every": "-eval_every=2\n+eval_every=1",
    "check_replicas_every": "-check_replicas_every=2\n+check_replicas_every=1",
    "checkpoints": "-checkpoints=None\n+checkpoints.every=2",
    "checkpoints every": "-checkpoints.every=2\n+checkpoints.every=1",
    "checkpoints keep": "-checkpoints.keep=2\n+checkpoints.keep=1",
    "checkpoints resume": "-checkpoints.resume=auto\n+checkpoints.resume=never",
    "checkpoints directory": "-checkpoints.directory=",
    "precision": "-precision=Precision(compute='float32', loss_scale=None)\n+precision=",
    "on_nonfinite": "-on_nonfinite=stop\n+on_nonfinite=ignore",
    "optimizer": "-optimizer=txcore.optim.adamw.adamw\n+optimizer=txcore.optim.sgd.sgd",
    "compiler_options": "-compiler_options=[('xla_cpu_enable_fast_math', False)]\n+compiler",
}


@pytest.mark.slow
def test_every_argument_of_fit_that_differs_is_refused_by_name(tmp_path):
    rows = [rank["arguments"] for rank in found(run([["arguments", {"directory": str(tmp_path)}]]))]
    assert rows[0].keys() == DIFFERENT.keys() | {"equal", "loggers", "rate"}
    for case, change in DIFFERENT.items():
        text = refusal([row[case] for row in rows])
        assert text.startswith(f"{LOOP}\n"), text
        assert change in text.replace("\n  ", "\n"), text
        assert text.endswith(
            "Nothing was run. Call fit with the same arguments, data and engine on every rank "
            "(loggers may differ)"
        )
    assert "StableHLO" in refusal([row["rate"] for row in rows])
    for row in rows:
        assert [row[case]["ok"] for case in ("equal", "loggers")] == [None, None]


# What only one rank does later; what the others are told of it.
ALONE = {
    "run in evaluation": "-eval_step\n  +the state for step\n",
    "evaluation in evaluation": "rank 1 came to a run of eval_step",
    "longer evaluation": "rank 1 came to a run of eval_step",
    "epoch that ends early": "rank 1 came to the end of fit, after 4 steps, where rank 0 came to "
    "batch 5 of epoch 0, step 5 of fit",
    "epochs of other lengths": "  -rows=96\n  +epoch=2\n  +batch=4\n",
    "barrier in data": "rank 1 came to the barrier 'one rank alone', where rank 0 came to batch 4 "
    "of epoch 0, step 4 of fit",
    "run after fit": "rank 0 ended the program, but rank 1 came to a run of step after that",
    "evaluation after fit": "rank 0 ended the program at step 6 (after fit), but rank 1 waits",
    "barrier after fit": "rank 0 ended the program, but rank 1 came to the barrier",
    "second fit": "rank 0 ended the program, but rank 1 came to a comparison of the ranks",
    "run before a barrier": "rank 1 came to a run of step, where rank 0 came to the barrier 'both'",
}


def check_alone(what):
    ended = run([["alone", {"what": what}]], seconds=90)
    assert any(code != 0 for code, _, _ in ended)
    assert any(ALONE[what] in err for _, _, err in ended), "\n".join(err for _, _, err in ended)
    for code, _, err in ended:
        assert code in (0, 1, 70), err  # 0: it had ended before


@pytest.mark.slow
@pytest.mark.parametrize("what", ["epoch that ends early", "barrier after fit"])
def test_what_one_rank_does_alone_is_named(what):
    check_alone(what)


@sweep
@pytest.mark.slow
@pytest.mark.parametrize("what", sorted(ALONE))
def test_all_that_one_rank_does_alone_is_named(what):
    check_alone(what)


@sweep
@pytest.mark.slow
def test_a_slow_rank_is_not_named():
    ended = run([["alone", {"what": "slow"}]], seconds=200)
    assert [code for code, _, _ in ended] == [0, 0], ended


@sweep
@pytest.mark.slow
@pytest.mark.parametrize("world, devices", [(2, 1), (2, 2), (3, 1)])
def test_one_bit_in_40_runs(world, devices):
    ranks = found(run([["flips", {"runs": 40, "seed": world * devices}]], world, devices))
    check_flips([rank["flips"] for rank in ranks], 40)
