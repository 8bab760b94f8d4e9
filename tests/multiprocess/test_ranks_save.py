"""Real ranks of which one alone cannot save or restore, or has other data or settings."""

import pathlib

import pytest
from test_ranks_agree import found, refusal, run, sweep

pytest.importorskip("orbax.checkpoint")
pytestmark = pytest.mark.slow
WORKER = pathlib.Path(__file__).with_name("saves_worker.py")
MOST_S = 25  # for what one fault costs; a save of the ranks that wait for one took 300 s
SAVED = ["step_00000002", "step_00000004", "step_00000006"]
# What is said of each fault; those of process 0 come on it alone.
FAULTS = {
    "disk full at the manifest": (0, "No space left on device"),
    "cannot merge": (0, "No space left on device"),
    "no more open files": (None, "Too many open files"),
    "file too large": (None, "File too large"),
    "no memory": (None, "std::bad_alloc"),
    "no thread": (None, "can't start new thread"),
    "no room": (None, "it is full"),
}


def faulty(cases, world=2):
    """Run the cases on all ranks; return what each rank found, by case."""
    return found(run(cases, world, worker=WORKER))


def check_saves(rows, folder, odd, faults=FAULTS):
    """Every rank says who failed and goes on; once nothing fails, all is saved."""
    assert [row.keys() for row in rows] == [dict.fromkeys(faults).keys()] * len(rows)
    for name in faults:
        who, reason = FAULTS[name]
        who = odd if who is None else who
        for row in (row[name] for row in rows):
            assert row["seconds"] < MOST_S, row
            here = folder / name
            failed = [f"{here / step} was not saved: rank {who}: {reason}" for step in SAVED]
            assert row["said"] == [
                f"txcore: {text}; the run goes on. There is no checkpoint yet" for text in failed
            ]
            assert row["error"] == "CheckpointError"
            assert row["text"] == f"{failed[-1]}. There is no checkpoint yet"
            assert row["left"] == [".lock", *SAVED]
            assert row["then"]["said"] == []
            assert row["then"]["ok"] == rows[0][name]["then"]["ok"]


def check_restores(rows, folder, odd):
    """Every rank refuses by the name of the one that cannot, at once."""
    saved = folder / "restores"
    texts = {
        "cannot read": f"{saved / SAVED[-1]} cannot be read: I/O error. All processes need the "
        "folder on a file system that they share",
        "cannot save": "float3 cannot be saved",
        "a fault": "TypeError: unexpected",
        "cannot write": "OSError: Read-only file system",
        "not shared": f"the checkpoint folder {folder / 'elsewhere'} is not shared: a file that "
        "rank 0 made in it is not there. Give a folder on a file system that all processes share",
    }
    for row in rows:
        for case, text in texts.items():
            assert row[case]["error"] == "CheckpointError", row[case]
            assert row[case]["text"] == f"rank {odd}: {text}"
            assert row[case]["seconds"] < MOST_S
        assert row["none of these"]["ok"] == 6
        assert row["left"] == [".lock", *SAVED]


def check_data(rows, world, odd):
    """A leaf that is not split over the ranks has to be equal on them."""
    who = "rank 1 differs from rank 0"
    if world > 2:
        others = " and ".join(str(rank) for rank in range(world) if rank != odd)
        who = f"rank {odd} differs from ranks {others}"
    for case in ("first", "later"):
        text = refusal([row[case] for row in rows])
        assert text.startswith(
            "the ranks would run weighted_step on different data (compared bit for bit):\n"
            f"  batch['weights'] float32[3]: {who} (device"
        )
        assert text.endswith(
            "\nThat step was not run. Give the same values on every rank to a leaf that "
            "Plan(batch=) does not split over them: make it by the same seed, files and numbers"
        )
    assert [row["equal"]["ok"] for row in rows] == [None] * world


SETTINGS = {
    "jax_default_matmul_precision": "-jax_default_matmul_precision=None\n"
    "+jax_default_matmul_precision=highest",
    "jax_enable_x64": "-jax_enable_x64=False\n+jax_enable_x64=True",
    "jax_default_prng_impl": "-jax_default_prng_impl=threefry2x32\n+jax_default_prng_impl=rbg",
    "jax_threefry_partitionable": "-jax_threefry_partitionable=True\n"
    "+jax_threefry_partitionable=False",
    "jax_numpy_dtype_promotion": "-jax_numpy_dtype_promotion=standard\n"
    "+jax_numpy_dtype_promotion=strict",
    "jax_debug_nans": "-jax_debug_nans=False\n+jax_debug_nans=True",
    "jax_disable_most_optimizations": "-jax_disable_most_optimizations=False\n"
    "+jax_disable_most_optimizations=True",
    "fast math": "compiler flags:\n--- rank 0\n+++ rank 1\n"
    "+XLA_FLAGS --xla_cpu_enable_fast_math=true",
    "flags of TPU": "+LIBTPU_INIT_ARGS --xla_tpu_enable_something=true",
    "tf32": "+NVIDIA_TF32_OVERRIDE=0",
}


def check_surroundings(rows):
    """Every setting that changes results is refused by name; what changes none is not."""
    assert rows[0].keys() == SETTINGS.keys() | {"harmless"}
    for case, change in SETTINGS.items():
        text = refusal([row[case] for row in rows])
        assert text.startswith("the ranks would run different programs: rank 1 differs from rank 0")
        assert change in text.replace("\n  ", "\n"), text
    for row in rows:
        assert row["harmless"]["ok"] is None


def test_one_of_two_ranks_fails_alone(tmp_path):
    # One run of them all, since starting two ranks takes longer than all this.
    given = {"folder": str(tmp_path), "odd": 1}
    cases = [["saves", given], ["restores", given], ["data", {"odd": 1}]]
    ranks = faulty([*cases, ["surroundings", {"odd": 1}]])
    check_saves([rank["saves"] for rank in ranks], tmp_path, 1)
    check_restores([rank["restores"] for rank in ranks], tmp_path, 1)
    check_data([rank["data"] for rank in ranks], 2, 1)
    check_surroundings([rank["surroundings"] for rank in ranks])


def check_evaluations(world, odd):
    """An evaluation that fails on all is theirs to go on from; on one alone it ends the run."""
    ended = run([["evaluations", {"odd": odd}]], world, worker=WORKER)
    codes = [code for code, _, _ in ended]
    assert codes == [0 if rank == odd else 70 for rank in range(world)]  # it has caught its error
    for rank, (_, out, err) in enumerate(ended):
        (row,) = found([(0, out, err)])
        alike, well = row["alike"]
        assert (alike["error"], alike["text"]) == ("FloatingPointError", "the metric is NaN")
        assert "ok" in well
        if rank != odd:
            assert f"rank {odd} failed at step 2" in err, err
            assert "FloatingPointError: the metric is NaN" in err


@pytest.mark.parametrize("world", [2, pytest.param(3, marks=sweep)])
def test_an_evaluation_that_fails_on_one_rank_alone(world):
    check_evaluations(world, world - 1)


@sweep
def test_an_evaluation_that_fails_on_rank_0_alone():
    check_evaluations(2, 0)


def test_one_of_three_ranks_fails_alone(tmp_path):
    some = ["disk full at the manifest", "file too large"]
    given = {"folder": str(tmp_path), "odd": 1}
    cases = [["saves", {**given, "only": some}], ["restores", given], ["data", {"odd": 1}]]
    ranks = faulty(cases, 3)
    check_saves([rank["saves"] for rank in ranks], tmp_path, 1, some)
    check_restores([rank["restores"] for rank in ranks], tmp_path, 1)
    check_data([rank["data"] for rank in ranks], 3, 1)


@sweep
@pytest.mark.parametrize("odd", [0, 1, 2])
def test_each_of_three_ranks_fails_alone(odd, tmp_path):
    ranks = faulty([["saves", {"folder": str(tmp_path), "odd": odd}]], 3)
    check_saves([rank["saves"] for rank in ranks], tmp_path, odd)
