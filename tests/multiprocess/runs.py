"""Start the ranks of a run on this machine, signal one, and look at what comes of it."""

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

sys.path.append(str(pathlib.Path(__file__).resolve().parents[1]))  # where this is a script

import machine
from processes import free_port, patience, rank_environment

SCRIPT = pathlib.Path(__file__).with_name("long_run.py")
START_S = 120  # until the first checkpoint
ENDED = 75  # the exit code of a rank that ends because of another one
ABORTED = -signal.SIGABRT  # how jax ends the others where the coordinator is gone
# Its own thread throws where a survivor is an operation ahead of another one that lost the victim.
GLOO_ABORTS = "terminate called after throwing an instance of 'gloo::"


def start(folder, world, *args, out="out", devices=1):
    """Start all ranks, each with so many devices; each writes its output to a file."""
    port = free_port()
    ranks = []
    for rank in range(world):
        environment = rank_environment(JAX_NUM_CPU_DEVICES=str(devices))
        if world > 1:
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{port}"
            environment |= {"JAX_NUM_PROCESSES": str(world), "JAX_PROCESS_ID": str(rank)}
        with open(folder / f"{out}.{rank}", "wb") as file:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, SCRIPT, folder, *map(str, args)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                )
            )
    return ranks


def wait(ranks, seconds):
    """Wait for all; return their exit codes, None for those that have not ended by then."""
    end = time.monotonic() + seconds
    for rank in ranks:
        try:
            rank.wait(max(0.01, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            continue
    return [rank.poll() for rank in ranks]


def stop(ranks):
    """Kill all that run."""
    for rank in ranks:
        rank.kill()
        rank.wait()


def losses(folder):
    """Return {step: metrics} of all parts of a run, and check that they agree bit for bit."""
    found = {}
    # The steps that a run made again are beside, as they were before.
    parts = [folder / "losses.jsonl.old", folder / "losses.jsonl"]
    text = "".join(part.read_text() for part in parts if part.exists())
    for line in text.splitlines():
        record = json.loads(line)
        if record["kind"] == "step":
            before = found.setdefault(record["step"], record["metrics"])
            assert before == record["metrics"], f"step {record['step']} was another one again"
    return found


def uninterrupted(folder, world, *args):
    """Run to the end; return its losses and the seconds from its first checkpoint on."""
    folder.mkdir(parents=True)
    ranks = start(folder, world, *args)
    try:
        wait_for_checkpoint(folder, ranks)
        began = time.monotonic()
        assert wait(ranks, patience(START_S)) == [0] * world, shown(said(folder, world))
        return losses(folder), time.monotonic() - began
    finally:
        stop(ranks)


def has_saved_its_last_step(folder):
    """Tell whether a run has made all its steps; some of its ranks may not have left yet."""
    first_row = (folder / "losses.jsonl").read_text().partition("\n")[0]
    if not first_row:  # a run that starts anew has moved the rows, and told nothing yet
        return False
    first = json.loads(first_row)
    return (folder / "saved" / f"step_{first['total_steps']:08d}").exists()


def wait_for_checkpoint(folder, ranks, pattern="step_????????"):
    """Wait until there is a folder of that name among the checkpoints."""
    seconds = patience(START_S)
    end = time.monotonic() + seconds
    while not any((folder / "saved").glob(pattern)):
        assert time.monotonic() < end, f"no {pattern} came in {seconds:.0f} s"
        assert all(rank.poll() is None for rank in ranks), shown(said(folder, len(ranks)))
        time.sleep(0.001 if "tmp" in pattern else 0.01)  # a save under way is soon over


def said(folder, world, out="out"):
    """Return what each rank wrote."""
    return [(folder / f"{out}.{rank}").read_text(errors="replace") for rank in range(world)]


def shown(texts):
    """Return what the ranks wrote as one text, which pytest does not shorten."""
    return "\n".join(f"--- rank {rank} wrote:\n{text}" for rank, text in enumerate(texts))


def hit(folder, world, victim, number, after, *args):
    """Start a run and send a signal to one rank; see what the others do.

    Args:
      folder: of the run; made.
      world: ranks.
      victim: the rank to hit.
      number: the signal.
      after: seconds after the first checkpoint, or "saving": while a later one is written.
      *args: of the script.

    Returns:
      {"survivors": exit codes by rank, "seconds": until the last of them ended, "saving": whether
      a checkpoint was under way, "said": by rank}; None where the run had ended before.
    """
    folder.mkdir(parents=True)
    ranks = start(folder, world, *args)
    try:
        wait_for_checkpoint(folder, ranks)
        if after == "saving":
            wait_for_checkpoint(folder, ranks, "step_*tmp*")
        else:
            time.sleep(after)
        saving = any((folder / "saved").glob("step_*tmp*"))
        if any(rank.poll() is not None for rank in ranks):
            return None
        ranks[victim].send_signal(number)
        began = time.monotonic()
        others = {i: rank for i, rank in enumerate(ranks) if i != victim}
        codes = dict(zip(others, wait(others.values(), patience(60)), strict=True))
        seconds = time.monotonic() - began
    finally:
        stop(ranks)
    if set(codes.values()) == {0} or (0 in codes.values() and has_saved_its_last_step(folder)):
        return None  # the victim had made its last step before, and was about to leave
    return {
        "survivors": codes,
        "seconds": round(seconds, 1),
        "saving": saving,
        "said": said(folder, world),
    }


def check_ended(found, victim):
    """Check that all survivors ended in time, by themselves, and named the rank."""
    assert machine.within(found["seconds"], 30), f"{found['seconds']} s\n{shown(found['said'])}"
    named = 0
    for rank, code in found["survivors"].items():
        text = found["said"][rank]
        ended = f"rank {rank} ended with {code} and wrote:\n{text}"
        if code == ABORTED and GLOO_ABORTS in text and len(found["survivors"]) > 1:
            continue  # about once in a hundred kills
        # The coordinator lies in rank 0: jax ends the others itself, and speaks of the leader.
        assert code == ENDED or (victim == 0 and code == ABORTED), ended
        assert re.search(rf"\branks? ([\d, ]|and )*\b{victim}\b", text) or (
            victim == 0 and "leader" in text
        ), ended
        named += 1
    assert named, shown(found["said"])


def resume(folder, world, *args):
    """Run the rest of a run that was hit; return its losses, all parts of them."""
    ranks = start(folder, world, *args, "--resume", "must", out="resumed")
    try:
        codes = wait(ranks, patience(START_S))
        assert codes == [0] * world, shown(said(folder, world, "resumed"))
    finally:
        stop(ranks)
    return losses(folder)


def kill_and_resume(folder, whole, world, runs, seed, *args):
    """Kill a random rank at a random moment, so many times; yield a line of text for each.

    `whole` is what `uninterrupted` returns. The moments are uniform over that run after its first
    checkpoint; every second one is chosen while a later checkpoint is being written.
    """
    rng = random.Random(seed)
    curve, seconds = whole
    done = tried = 0
    while done < runs:
        victim = rng.randrange(world)
        after = "saving" if done % 2 == 1 else round(rng.uniform(0, seconds), 2)
        here, tried = folder / f"run-{world}-{tried}", tried + 1
        found = hit(here, world, victim, signal.SIGKILL, after, *args)
        if found is None:
            continue
        check_ended(found, victim)
        assert resume(here, world, *args) == curve, (here, "another curve")
        done += 1
        codes = ", ".join(f"rank {r}: {code}" for r, code in found["survivors"].items())
        moment = after if after == "saving" else f"at {after} s"
        moment += ", a save under way" if found["saving"] else ""
        yield (
            f"{world} ranks, rank {victim} killed {moment}; the others ended within "
            f"{found['seconds']} s and named it ({codes}); resumed, bit-equal"
        )


def main(runs, world, seed, folder):
    """Print a line for each kill: `python runs.py RUNS WORLD SEED FOLDER`."""
    whole = uninterrupted(folder / "whole", world)
    for i, line in enumerate(kill_and_resume(folder, whole, world, runs, seed)):
        print(f"{i + 1:3d}: {line}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), pathlib.Path(sys.argv[4]))
