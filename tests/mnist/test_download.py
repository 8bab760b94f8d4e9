"""Downloads from mirrors on loopback, good and bad ones: the file comes whole or not at all."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import os
import pathlib
import signal
import subprocess
import sys
import threading
import time

import fake_mnist
import pytest
from data import download, idx
from machine import within

FOLDER = pathlib.Path(download.__file__).parents[1]
SCRIPT = FOLDER / "download.py"
BODIES = {
    f"{name}.gz": gzip.compress(data, mtime=0) for name, data in fake_mnist.contents().items()
}
FIRST = next(iter(BODIES))
CLOSED = "http://127.0.0.1:9/"  # the discard port: nobody listens


class Server(http.server.ThreadingHTTPServer):
    """Listens on loopback, remembers what it was asked, and tells its threads to end."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Mirror)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.asked: list[str] = []
        self.closing = threading.Event()


class Mirror(http.server.BaseHTTPRequestHandler):
    """Serves BODIES under /<behaviour>/<file name>."""

    server: Server

    def do_GET(self):
        _, behaviour, name = self.path.split("/")
        self.server.asked.append(self.path)
        body = BODIES[name]
        length: int | None = len(body)
        if behaviour in ("short", "stalled"):
            body = body[: len(body) // 2]
        if behaviour == "long":
            body, length = body + bytes(100_000), None
        if behaviour == "other":
            body = body[:-1] + b"?"
        if behaviour == "slow":
            body, length = bytes(1), 10_000
        with contextlib.suppress(ConnectionError):
            self.answer(behaviour, body, length)

    def answer(self, behaviour, body, length):
        if behaviour == "nonsense":
            self.wfile.write(b"nonsense\r\n\r\n")
            return
        self.send_response(int(behaviour) if behaviour.isdigit() else 200)
        if length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self.wfile.write(body)
        while behaviour in ("slow", "stalled") and not self.server.closing.wait(0.02):
            if behaviour == "slow":
                self.wfile.write(bytes(1))

    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "TXCORE_DATA"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.closing.set()
        server.shutdown()


@pytest.fixture
def mirrors(server, monkeypatch):
    """Set the mirrors by their behaviours, and the checksums to those of the small files."""
    canonical = {
        name.removesuffix(".gz"): download.Canonical(len(body), hashlib.md5(body).hexdigest())
        for name, body in BODIES.items()
    }
    monkeypatch.setattr(download, "FILES", canonical)

    def use(*behaviours):
        urls = [CLOSED if b == "closed" else f"{server.url}/{b}/" for b in behaviours]
        monkeypatch.setattr(download, "MIRRORS", tuple(urls))

    return use


def assert_complete(folder):
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == BODIES


def failure(folder, **options):
    with pytest.raises(idx.DataError) as error:
        download.ensure(folder, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_good_mirror(tmp_path, mirrors, server, capsys):
    mirrors("200", "200")
    folder = tmp_path / "new" / "folder"
    assert download.ensure(folder) == folder
    assert_complete(folder)
    assert server.asked == [f"/200/{name}" for name in BODIES]
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.split()[1] for line in captured.err.splitlines()] == [
        f"{server.url}/200/{name}" for name in BODIES
    ]


def test_the_folder_is_as_readable_as_any_file(tmp_path, mirrors):
    mirrors("200")
    (tmp_path / "other").touch()
    download.ensure(tmp_path / "data")
    assert (tmp_path / "data" / FIRST).stat().st_mode == (tmp_path / "other").stat().st_mode


@pytest.mark.parametrize("first", ["closed", "404", "503", "204", "short", "long", "other"])
def test_the_second_mirror_when_the_first_fails(tmp_path, mirrors, first):
    mirrors(first, "200")
    download.ensure(tmp_path)
    assert_complete(tmp_path)


LENGTH = len(BODIES[FIRST])
OTHER_MD5 = hashlib.md5(BODIES[FIRST][:-1] + b"?").hexdigest()
BAD_MIRRORS = {
    "closed": "gave: <urlopen error",
    "404": "gave: HTTP Error 404: Not Found",
    "503": "gave: HTTP Error 503: Service Unavailable",
    "206": "gave: HTTP status 206 instead of 200",
    "short": f"gave: {LENGTH // 2} instead of {LENGTH} bytes",
    "long": f"gave: more instead of {LENGTH} bytes",
    "other": f"gave: md5 {OTHER_MD5} instead of {hashlib.md5(BODIES[FIRST]).hexdigest()}",
    "nonsense": "gave: nonsense",
}


@pytest.mark.parametrize("behaviour, text", BAD_MIRRORS.items(), ids=BAD_MIRRORS)
def test_both_mirrors_bad(tmp_path, mirrors, behaviour, text):
    mirrors(behaviour, "404")
    message = failure(tmp_path)
    assert message.startswith(f"{tmp_path / FIRST}: required a download from one of 2 mirrors")
    assert f"{download.MIRRORS[0]} {text}" in message
    assert f" and {download.MIRRORS[1]} gave: HTTP Error 404: Not Found; " in message
    assert message.endswith(
        "; check the network, or copy the four files to a folder and name it with --data-dir "
        "or TXCORE_DATA"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_mirror_that_stops_sending(tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(download, "SILENCE_S", 0.1)
    mirrors("stalled")
    assert "gave: timed out" in failure(tmp_path)


def test_a_mirror_that_sends_too_slowly(tmp_path, mirrors, monkeypatch):
    monkeypatch.setattr(download, "FILE_S", 0.2)
    mirrors("slow")
    start = time.monotonic()
    assert f"of {LENGTH} bytes in 0 s" in failure(tmp_path)
    assert within(time.monotonic() - start, 5)


def test_only_what_is_missing_is_downloaded(tmp_path, mirrors, server):
    mirrors("200")
    (tmp_path / FIRST).write_bytes(BODIES[FIRST])
    download.ensure(tmp_path)
    download.ensure(tmp_path)
    assert len(server.asked) == 3
    assert_complete(tmp_path)


@pytest.mark.parametrize("name", ["changed", "plain", "dots"])
def test_a_part_of_another_set_is_not_completed(tmp_path, mirrors, server, name):
    """Its rest would be of MNIST: labels of 10,000 other images, in the same form."""
    mirrors("200")
    plain = FIRST.removesuffix(".gz")
    file, data = {
        "changed": (FIRST, BODIES[FIRST][:-1] + b"?"),
        "plain": (plain, gzip.decompress(BODIES[FIRST])),
        "dots": (f"{plain.replace('-idx', '.idx')}.gz", BODIES[FIRST]),
    }[name]
    (tmp_path / file).write_bytes(data)
    if name == "dots":  # MNIST's own by its checksum
        download.ensure(tmp_path)
        assert len(server.asked) == 3
        return
    assert failure(tmp_path).startswith(
        f"{tmp_path}: required all four files of a set, found {file} and no train-labels-idx1-ubyte"
    )
    assert server.asked == []


def test_what_came_before_a_failure_is_kept(tmp_path, mirrors, monkeypatch):
    mirrors("200")
    last = list(download.FILES)[-1]
    monkeypatch.setitem(download.FILES, last, download.Canonical(1, "wrong"))
    assert last in failure(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(BODIES) - {f"{last}.gz"}


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_nothing(tmp_path, mirrors, monkeypatch, step):
    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    mirrors("200")
    monkeypatch.setattr(os, step, full)
    assert failure(tmp_path) == (
        f"{tmp_path}: required a folder to write to, with 12 MB free, found no space left on "
        "device; name another with --data-dir or TXCORE_DATA"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_noticed_before_the_download(tmp_path, mirrors, server):
    mirrors("200")
    (tmp_path / "file").touch()
    assert "required a folder to write to, with 12 MB free, found not a directory" in failure(
        tmp_path / "file" / "folder"
    )
    assert "found another file; name the folder that it is in" in failure(tmp_path / "file")
    assert server.asked == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder(tmp_path, mirrors):
    mirrors("200")
    tmp_path.chmod(0o500)
    assert "found permission denied" in failure(tmp_path)


KILLED = """
import os, signal, sys
sys.path.insert(0, {folder!r})
from data import download
download.MIRRORS = ({mirror!r},)
{more}
download.ensure(sys.argv[1])
"""


def start_to_be_killed(folder, mirror, more=""):
    code = KILLED.format(folder=str(FOLDER), mirror=mirror, more=more)
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], stderr=subprocess.DEVNULL)


def test_killed_in_the_download_leaves_nothing(tmp_path, mirrors, server):
    process = start_to_be_killed(tmp_path, f"{server.url}/stalled/")
    try:
        deadline = time.monotonic() + 20
        while not server.asked and time.monotonic() < deadline:
            time.sleep(0.02)
        assert server.asked
    finally:
        process.kill()
        process.wait()
    assert list(tmp_path.iterdir()) == []


def test_killed_in_the_writing_leaves_no_half_file_under_the_name(tmp_path, mirrors, server):
    name = FIRST.removesuffix(".gz")
    want = download.FILES[name]
    kill = (
        f"download.FILES = {{{name!r}: download.Canonical({want.size_bytes}, {want.md5!r})}}\n"
        "os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = start_to_be_killed(tmp_path, f"{server.url}/200/", kill)
    assert process.wait(20) == -signal.SIGKILL
    assert not (tmp_path / FIRST).exists()
    (stale,) = tmp_path.iterdir()
    mirrors("200")
    download.ensure(tmp_path)
    stale.unlink()
    assert_complete(tmp_path)


class Ranks:
    """Runs `ensure` on two ranks in threads with a barrier that must see both."""

    def __init__(self, folders):
        self.meeting = threading.Barrier(2, timeout=20)
        self.order: list[str] = []
        self.results: list[object] = [None, None]
        threads = [
            threading.Thread(target=self.run, args=(rank, folder))
            for rank, folder in enumerate(folders)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def barrier(self, name):
        self.order.append(name)
        self.meeting.wait()

    def run(self, rank, folder):
        try:
            self.results[rank] = download.ensure(folder, rank=rank, barrier=self.barrier)
        except idx.DataError as error:
            self.results[rank] = error


def test_one_rank_downloads_and_the_others_wait(tmp_path, mirrors, server):
    mirrors("200")
    ranks = Ranks([tmp_path, tmp_path])
    assert ranks.results == [tmp_path, tmp_path]
    assert ranks.order == ["mnist-download"] * 2
    assert len(server.asked) == len(BODIES)


def test_no_rank_hangs_when_rank_0_fails(tmp_path, mirrors):
    mirrors("404", "closed")
    first, second = Ranks([tmp_path, tmp_path]).results
    assert "required a download from one of 2 mirrors" in str(first)
    assert f"{tmp_path}: required the 4 MNIST files on every rank, found no train-" in str(second)
    assert "on rank 1; see rank 0 for a failed download, or set --data-dir" in str(second)


def test_a_rank_with_another_disk(tmp_path, mirrors):
    mirrors("200")
    first, second = Ranks([tmp_path / "0", tmp_path / "1"]).results
    assert first == tmp_path / "0"
    assert str(second).endswith("to a folder that every host sees")


def test_an_unforeseen_error_on_rank_0_frees_the_others(tmp_path, monkeypatch):
    def interrupted(folder):
        raise KeyboardInterrupt

    called: list[str] = []
    monkeypatch.setattr(download, "_download_missing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        download.ensure(tmp_path, barrier=called.append)
    assert called == ["mnist-download"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_on_a_terminal(tmp_path, mirrors, monkeypatch):
    pytest.importorskip("tqdm")
    mirrors("200")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    download.ensure(tmp_path)
    shown = terminal.getvalue()
    assert f"{FIRST}: 100%" in shown
    assert "downloading" not in shown


def test_a_line_on_a_terminal_without_tqdm(tmp_path, mirrors, monkeypatch):
    mirrors("200")
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setitem(sys.modules, "tqdm", None)
    download.ensure(tmp_path)
    assert terminal.getvalue().count("downloading ") == len(BODIES)


def test_the_folder_rule(monkeypatch):
    monkeypatch.delenv("TXCORE_DATA", raising=False)
    assert download.data_folder() == pathlib.Path("data/mnist")
    monkeypatch.setenv("TXCORE_DATA", "~/elsewhere")
    assert download.data_folder() == pathlib.Path.home() / "elsewhere"
    assert download.data_folder("given") == pathlib.Path("given")
    monkeypatch.setenv("TXCORE_DATA", "")
    assert download.data_folder() == pathlib.Path("data/mnist")
    assert download.data_folder("~/there") == pathlib.Path.home() / "there"
    with pytest.raises(idx.DataError) as error:
        download.data_folder("~nobody-of-this-name/there")
    assert str(error.value) == (
        "~nobody-of-this-name/there: required a folder, found no such user's; write the path out"
    )


def test_the_canonical_files(mnist_dir):
    """The real files have the canonical sizes and checksums where they are said to."""
    for name in ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte", "train-labels-idx1-ubyte"):
        data = (mnist_dir / f"{name}.gz").read_bytes()
        got = download.Canonical(len(data), hashlib.md5(data).hexdigest())
        assert got == download.FILES[name]


def run_script(*arguments, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"no_proxy": "", "NO_PROXY": ""} | environment,
    )


def assert_one_line_and_no_traceback(done, *texts):
    assert done.returncode == 1
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    *progress, last = done.stderr.splitlines()
    assert all(line.startswith("downloading ") for line in progress)
    assert last.startswith("error: ")
    for text in texts:
        assert text in last


def test_script_without_a_network(tmp_path):
    # A proxy that nobody runs is as good as no network, whatever this machine can reach.
    done = run_script("--data-dir", str(tmp_path), https_proxy=CLOSED, HTTPS_PROXY=CLOSED)
    assert_one_line_and_no_traceback(
        done, "ossci-datasets", "cvdf-datasets", "Connection refused", "; check the network"
    )
    assert list(tmp_path.iterdir()) == []


def test_script_with_a_file_for_a_folder(tmp_path):
    (tmp_path / "file").touch()
    done = run_script("--data-dir", str(tmp_path / "file"))
    assert_one_line_and_no_traceback(done, "required a folder, or a file like mnist.npz")


def test_script_with_the_files_there(tmp_path):
    fake_mnist.write(tmp_path)
    done = run_script(TXCORE_DATA=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (0, f"MNIST is in {tmp_path}\n", "")


def test_script_with_a_wrong_option():
    done = run_script("--data", "x", "--nothing")
    assert done.returncode == 2
    assert "unrecognized arguments: --nothing" in done.stderr
