"""Seconds and peak memory of reading files made to stop the reader, at once and ten times the size.

    python benchmarks/hostile_files.py [KIND ...]

Each in a process of its own: its CPU seconds for the reading alone, and its memory at the peak, the
imports (the first line) among it. Every file of issue 19's lines 5 and 6 is here; the texts of HLO
that are merely long are in tests/profiling/hlo/hostile_hlo.py.
"""

import argparse
import gzip
import hashlib
import json
import os
import pathlib
import resource
import struct
import sys
import tempfile
import time
import zipfile

ROOT = pathlib.Path(__file__).parents[1]
sys.path.append(str(ROOT / "tests"))

from processes import call_in_process  # noqa: E402

SECONDS, MEGABYTES = 10, 2000
COMMON = "channel_id=1, use_global_device_ids=true"


def make_hlo(line, head="HloModule m, num_partitions=8", before=""):
    return (
        f"{head}\n{before}ENTRY %e (x: f32[8]) -> f32[8] {{\n  %x = f32[8]{{0}} parameter(0)\n"
        f"  {line}\n}}\n"
    )


def hlo_of_blanks(n):
    b = " " * n
    groups = f"mesh[{b}'a'{b}={b}2{b},'b'=4]{b},{b}device_ids=({b}[{b}8{b}]{b}){b}{{{b}'a'{b}x}}"
    return make_hlo(f"%r = f32[8] all-reduce(%x), {COMMON}, replica_groups={groups}")


def hlo_of_partitions(n):
    head = f"HloModule m, num_partitions={10**9 * n}"
    return make_hlo(f"%r = f32[8] all-reduce(%x), {COMMON}, replica_groups={{}}", head)


def hlo_of_iotas(n):
    lines = (
        f"%r{i} = f32[8] all-reduce(%x), channel_id={i + 1}, replica_groups="
        f"[{2 * (50_000 + i)},3]<=[2,{3 * (50_000 + i)}]T(1,0), use_global_device_ids=true"
        for i in range(n // 117)
    )
    return make_hlo("\n  ".join(lines), "HloModule m")


def hlo_of_trips(n):
    loops = "".join(
        f"%l{i} (p: f32[8]) -> f32[8] {{\n  %p = f32[8] parameter(0)\n  ROOT %w = f32[8] while(%p),"
        f' condition=%c, body=%l{i + 1}, backend_config={{"known_trip_count":{{"n":"{10**17}"}}}}\n'
        "}\n"
        for i in range(n)
    )
    last = f"%l{n} (x: f32[8]) -> f32[8] {{\n  %x = f32[8] parameter(0)\n  ROOT %r = f32[8] "
    last += f"all-reduce(%x), {COMMON}, replica_groups={{}}\n}}\n"
    return make_hlo("%y = f32[8] call(%x), to_apply=%l0", before=loops + last)


def hlo_of_negative(n):
    return make_hlo("\n  ".join([f"%r = f32[-8] all-reduce(f32[-8] %x), {COMMON}"] * n))


def small_float(n):
    return make_hlo(f"%r = f8e4m{'3' * n}[8] all-reduce(%x), {COMMON}, replica_groups={{}}")


def read_hlo(text, folder):
    import jax

    from txcore.profiling import audit_text

    count = text[: text.index("\n")].rpartition("num_partitions=")[2]
    mesh = jax.sharding.AbstractMesh((int(count),), ("data",)) if count.isdecimal() else None
    report = audit_text(text, mesh=mesh)
    report.to_json()
    report.to_html(folder / "page.html", report)
    return str(report).splitlines()[-1]


def read_lock(text, folder):
    from txcore.profiling.lock.file import read_locks

    (folder / "x.lock.json").write_text(text)
    return read_locks(folder / "x.lock.json")


def read_tuning(text, folder):
    from txcore.kernels.dispatch.tuning_file import read_entries

    (folder / "tuning.json").write_text(text)
    return read_entries(folder / "tuning.json")


def read_checkpoint(text, folder):
    from txcore.train.checkpoints.manifest import NAME, read_manifest

    digest = hashlib.sha256(text.encode()).hexdigest()
    (folder / NAME).write_text(f"{digest}\n{text}\n")
    return read_manifest(folder)


WHOLE = {
    "format": "txcore-checkpoint",
    "version": 1,
    "position": {"steps": 3, "epoch": 0, "batch": 3, "rows": 48, "examples": 48, "seconds": 0.5},
    "leaves": [["stored_params['w']", "float32[3]"]],
    "precision": "float32",
    "files": {},
    "versions": {},
}


def pack_idx(header, zeros):
    """Return a gzip file of a header and as many zeros, made piece by piece."""
    piece = bytes(1 << 20)
    path = pathlib.Path(tempfile.mkdtemp(), "packed")
    with gzip.open(path, "wb", 9) as file:
        file.write(header)
        for _ in range(zeros >> 20):
            file.write(piece)
        file.write(piece[: zeros & ((1 << 20) - 1)])
    return path.read_bytes()


def read_mnist(arrays, folder):
    """Write four files of images and labels, and load them as training does: as float32."""
    sys.path.insert(0, str(ROOT / "examples" / "mnist"))
    import dataset

    names = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")
    for name, data in zip(names, arrays * 2, strict=True):
        (folder / f"{name}-ubyte.gz").write_bytes(data)
    return dataset.load("mnist", folder).train_images.shape


def make_bomb(n, promise=None):
    """Return images of nothing, n of them, and their labels."""
    header = struct.pack(">4I", 0x803, promise or n, 28, 28)
    return pack_idx(header, n * 784), pack_idx(struct.pack(">2I", 0x801, promise or n), n)


def make_members(n):
    data = pack_idx(struct.pack(">2I", 0x801, 10), 0)
    return make_bomb(10)[0], data + gzip.compress(b"") * (n // 20)


def read_npz(n, folder):
    sys.path.insert(0, str(ROOT / "examples" / "mnist"))
    import dataset

    with zipfile.ZipFile(folder / "mnist.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        for part in ("train", "test"):
            for kind, dtype, dims in (("x", "|u1", "28, 28"), ("y", "<i8", "")):
                shape = f"({n}, {dims})" if dims else f"({n},)"
                head = f"{{'descr': '{dtype}', 'fortran_order': False, 'shape': {shape}, }}\n"
                with archive.open(f"{kind}_{part}.npy", "w") as file:
                    file.write(b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head.encode())
                    for _ in range(n // 1000):
                        file.write(bytes(1000 * (784 if dims else 8)))
    return dataset.load("mnist", folder / "mnist.npz").train_images.shape


# Of each: what makes it, of a size, and what reads it; the size that was slow.
KINDS = {
    "nothing": (lambda n: make_hlo("%y = f32[8] copy(%x)"), read_hlo, 1),
    "5 blanks of a mesh's axes": (hlo_of_blanks, read_hlo, 889),
    "5 a billion partitions": (hlo_of_partitions, read_hlo, 1),
    "5 iota groups": (hlo_of_iotas, read_hlo, 27_000),
    "5 trips over 4,300 digits": (hlo_of_trips, read_hlo, 300),
    "5 f32[-8]": (hlo_of_negative, read_hlo, 1_000),
    "5 a dtype of digits": (small_float, read_hlo, 30_000),
    "6 a doubled name in a lock": (
        lambda n: "{" + ",".join(f'"{i}":1' for i in [*range(n // 20)] * 2) + "}",
        read_lock,
        600_000,
    ),
    "6 objects in a lock": (lambda n: "[" + "{}," * (n // 3) + "{}]", read_lock, 1_600_000),
    "6 unknown names of a lock": (
        lambda n: json.dumps({"format": "txcore-lock", "version": 1, "targets": {}}
                             | {f"x{i}": i for i in range(n // 12)}),
        read_lock,
        600_000,
    ),
    "6 a doubled name in a tuning file": (
        lambda n: "{" + ",".join(f'"{i}":1' for i in [*range(n // 20)] * 2) + "}",
        read_tuning,
        600_000,
    ),
    "6 a doubled name in a manifest": (
        lambda n: "{" + ",".join(f'"{i}":1' for i in [*range(n // 20)] * 2) + "}",
        read_checkpoint,
        600_000,
    ),
    "6 steps of 1e400 in a manifest": (
        lambda n: json.dumps(WHOLE).replace('"steps": 3', f'"steps": 1e4{"0" * n}'),
        read_checkpoint,
        1_000,
    ),
    "6 bad dtypes in a manifest": (
        lambda n: json.dumps(WHOLE | {"leaves": [[f"p{i}", f"f{i}[3]"] for i in range(n, 0, -1)]}),
        read_checkpoint,
        20_000,
    ),
    "6 objects in a manifest": (
        lambda n: "[" + "{}," * (n // 3) + "{}]",
        read_checkpoint,
        6_000_000,
    ),
    "6 a gzip bomb as MNIST": (make_bomb, read_mnist, 100_000),
    "6 a gzip bomb, at the limit": (make_bomb, read_mnist, 250_000),
    "6 a gzip bomb that promises one": (lambda n: make_bomb(n, 1), read_mnist, 1_000_000),
    "6 empty members of gzip": (make_members, read_mnist, 763_000),
    "6 a zip bomb as MNIST": (lambda n: n, read_npz, 25_000),
}  # fmt: skip


def measure_kind(kind, times, pipe):
    make, read, size = KINDS[kind]
    made = make(size * times)
    is_text = isinstance(made, str)
    length = len(made) if is_text else sum(map(len, made)) if isinstance(made, tuple) else 0
    with tempfile.TemporaryDirectory() as folder:
        if read is not read_npz:
            read_first(read, pathlib.Path(folder))  # so that imports are not counted
        start = time.process_time()
        try:
            said = str(read(made, pathlib.Path(folder)))
        except ValueError as error:
            said = f"{type(error).__name__}: {str(error).replace(folder, '')}"
        except RuntimeError as error:  # CheckpointError
            said = f"{type(error).__name__}: {str(error).replace(folder, '')}"
        seconds = time.process_time() - start
        length = length or sum(p.stat().st_size for p in pathlib.Path(folder).iterdir())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    pipe.send((length, seconds, peak, said))


def read_first(read, folder):
    if read is read_hlo:
        read_hlo(make_hlo("%y = f32[8] copy(%x)"), folder)
    elif read is not read_mnist:
        try:
            read("{}", folder)
        except (ValueError, RuntimeError):
            return


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kinds", nargs="*")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    wrong = 0
    for kind in parser.parse_args().kinds or KINDS:
        for times in (1,) if kind == "nothing" or "limit" in kind else (1, 10):
            found = call_in_process(measure_kind, kind, times)
            if found is None:
                print(f"{kind:34} {times:2}x  did not end", flush=True)
                wrong += 1
                continue
            length, seconds, peak, said = found
            wrong += seconds > SECONDS or peak > MEGABYTES
            print(f"{kind:34} {times:2}x {length:10,} bytes {seconds:6.2f} s {peak:5.0f} MB  "
                  f"{ascii(said)[1:-1][:90]}", flush=True)  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
