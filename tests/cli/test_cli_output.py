"""What commands print where nobody reads it, or where the disk is full."""

import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
HLO = "\n".join(
    [
        "HloModule m, num_partitions=4",
        "ENTRY %main (x: f32[8]) -> f32[8] {",
        "  %x = f32[8]{0} parameter(0)",
        *(
            f"  %r{i} = f32[8]{{0}} all-reduce(%x), channel_id={i + 1}, "
            "replica_groups={{0,1,2,3}}, to_apply=%add"
            for i in range(2000)
        ),
        "  ROOT %r = f32[8]{0} all-reduce(%r1999), channel_id=9999, replica_groups={{0,1,2,3}}, "
        "to_apply=%add",
        "}\n",
    ]
)
PROGRAM = """
import jax.numpy as jnp

def sine():
    return jnp.sin, (jnp.ones(3),)
"""
FULL = pathlib.Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="this system has no /dev/full")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "many.hlo").write_text(HLO)
    (tmp_path / "prog.py").write_text(PROGRAM)
    return tmp_path


def run(folder, *arguments, **streams):
    """Run a command as a user does; return its exit code and what it wrote on stderr."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "txcore", *arguments],
        cwd=folder,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | streams,
    )
    return done.returncode, done.stderr


def closed_pipe():
    """Return the end to write to of a pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize(
    "arguments, code",
    [
        (["inspect", "--hlo", "many.hlo"], 1),  # 4,002 lines: more than a pipe holds
        (["--help"], 0),
    ],
    ids=lambda a: " ".join(a) if isinstance(a, list) else "",
)
def test_a_closed_pipe_is_quiet_and_the_exit_code_stays(arguments, code, folder):
    pipe = closed_pipe()
    try:
        assert run(folder, *arguments, stdout=pipe) == (code, "")
    finally:
        os.close(pipe)


def test_an_error_on_a_closed_pipe(folder):
    pipe = closed_pipe()
    try:
        assert run(folder, "inspect", "--hlo", "absent", stdout=pipe, stderr=pipe) == (2, None)
    finally:
        os.close(pipe)


@needs_full
@pytest.mark.parametrize(
    "arguments",
    [["inspect", "--hlo", "many.hlo"], ["--help"]],
    ids=" ".join,
)
def test_a_full_disk_is_one_line(arguments, folder):
    with FULL.open("w") as full:
        assert run(folder, *arguments, stdout=full) == (
            2,
            "txcore: error: cannot write the output: No space left on device\n",
        )


@needs_full
def test_a_full_disk_for_errors(folder):
    with FULL.open("w") as full:
        assert run(folder, "inspect", "--hlo", "absent", stderr=full)[0] == 2


def test_an_encoding_that_lacks_a_letter(folder):
    """A name in the table, or a microsecond's sign, is no reason to end."""
    (folder / "é.hlo").write_text(HLO)
    done = subprocess.run(
        [sys.executable, "-m", "txcore", "inspect", "--hlo", "é.hlo.absent"],
        cwd=folder,
        capture_output=True,
        env=os.environ
        | {"PYTHONIOENCODING": "ascii", "PYTHONPATH": str(FULL.parents[0])}
        | {"PYTHONPATH": str(pathlib.Path(__file__).resolve().parents[2])},
    )
    assert done.returncode == 2
    assert b"cannot read \\xe9.hlo.absent: No such file" in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 16 kB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "none", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small disk needs root that may mount one")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    "arguments, what",
    [
        (["dump", "prog.py:sine", "disk/out"], "disk/out"),
        (["inspect", "--hlo", "many.hlo", "--html", "disk/page.html"], "disk/page.html"),
    ],
    ids=["dump", "page"],
)
def test_a_full_disk_leaves_no_half_file(arguments, what, folder, small_disk):
    (small_disk / "filler").write_bytes(bytes(12_000))
    code, err = run(folder, *arguments)
    assert (code, err) == (2, f"txcore: error: cannot write {what}: No space left on device\n")
    left = [path for path in small_disk.rglob("*") if path.is_file() and path.name != "filler"]
    assert all(path.stat().st_size for path in left)
    assert not (small_disk / "page.html").exists()
