"""`txcore launch`: what is refused, what runs, and what each rank is given."""

import contextlib
import inspect
import os
import re
import socket
import subprocess
import sys

import pytest
from launched_cases import REPORT, collect_reports, environment, launch, write_script

from txcore import cli
from txcore.cli import launch as launch_command
from txcore.cli.load import BadInput
from txcore.launch.launcher import hosts, placement

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="tested on Linux")

WAYS = "launch needs SCRIPT.py, -m MODULE or a command (see txcore launch --help)"
UNKNOWN = "([Errno -2] Name or service not known): name one that does, or give --coordinator and a "
REFUSED = [
    ("x.py", "the following arguments are required: -n (see txcore launch --help)"),
    (
        "-n 0 x.py",
        "argument -n: needs a number of at least 1, but got '0' (see txcore launch --help)",
    ),
    (
        "-n two x.py",
        "argument -n: needs a number of at least 1, but got 'two' (see txcore launch --help)",
    ),
    ("-n 2", WAYS),
    ("-n 2 --", WAYS),
    ("-n 2 -m", WAYS),
    ("-n 2 absent.py", "launch needs a script, but there is no file absent.py"),
    ("-n 2 folder.py", "launch needs a script, but there is no file folder.py"),
    (
        "-n 2 no-such-command --flag",
        "launch needs SCRIPT.py or a command, but found no command no-such-command",
    ),
    (
        "-n 2 --devices-per-process 0 x.py",
        "argument --devices-per-process: needs a number of at least 1, but got '0' (see txcore "
        "launch --help)",
    ),
    (
        "-n 2 --grace -1 x.py",
        "argument --grace: needs seconds, 0 or more, but got '-1' (see txcore launch --help)",
    ),
    (
        "-n 2 --grace soon x.py",
        "argument --grace: needs seconds, 0 or more, but got 'soon' (see txcore launch --help)",
    ),
    ("-n 2 --coordinator here x.py", "--coordinator needs HOST:PORT, but got 'here'"),
    ("-n 2 --coordinator a:0 x.py", "--coordinator needs HOST:PORT, but got 'a:0'"),
    ("-n 2 --coordinator a:65536 x.py", "--coordinator needs HOST:PORT, but got 'a:65536'"),
    ("-n 2 --coordinator ::1:1 x.py", "--coordinator needs HOST:PORT, but got '::1:1'"),
    (
        "-n 2 --hosts a,,b x.py",
        "--hosts needs hosts as in A,B or A:2,B:4, but got 'a,,b'",
    ),
    (
        "-n 2 --hosts=-oProxyCommand=x x.py",
        "--hosts needs hosts as in A,B or A:2,B:4, but got '-oProxyCommand=x'",
    ),
    ("-n 2 --hosts a:0 x.py", "--hosts needs hosts as in A,B or A:2,B:4, but got 'a:0'"),
    ("-n 2 --hosts a,b,a x.py", "--hosts needs each host once, as in A:4, but got 'a,b,a'"),
    ("-n 4 --hosts a:2,b x.py", "--hosts a:2,b has 3 slots, but -n asks for 4 ranks"),
    (
        "-n 2 --hosts localhost,no.such.host.invalid x.py",
        f"host no.such.host.invalid does not resolve {UNKNOWN}--remote-shell that knows it",
    ),
    (
        "-n 2 --hosts no.such.host.invalid --remote-shell env x.py",
        f"host no.such.host.invalid does not resolve {UNKNOWN}--remote-shell that knows it",
    ),
    (
        "-n 2 --hosts a,b --coordinator no.such.host.invalid:1 --remote-shell env x.py",
        f"host no.such.host.invalid does not resolve {UNKNOWN}--remote-shell that knows it",
    ),
    (
        "-n 2 --hosts a,b --coordinator localhost:12345 --remote-shell env x.py",
        "localhost is 127.0.0.1 here, where other hosts do not reach it: give --coordinator with "
        "an address that they do",
    ),
    (
        "-n 2 --hosts a --coordinator 127.0.0.1:1 --remote-shell no-such-command x.py",
        "--remote-shell needs a command, but got 'no-such-command'",
    ),
    ("-n 2 -x NO_SUCH x.py", "-x needs a variable that is set, but NO_SUCH is not"),
    (
        "-n 2 --output-dir x.py/below x.py",
        "launch cannot start the ranks: [Errno 20] Not a directory: 'x.py/below'",
    ),
    (
        "-n 2 ./no-program",
        "launch cannot start the ranks: [Errno 8] Exec format error: './no-program'",
    ),
]


@pytest.mark.parametrize("line, says", REFUSED, ids=[line for line, _ in REFUSED])
def test_what_is_refused(line, says, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.py").mkdir()
    write_script(tmp_path, "open('ran', 'w')", "x.py")
    (tmp_path / "no-program").write_bytes(b"\0\0\0\0")
    (tmp_path / "no-program").chmod(0o755)

    assert cli.main(["launch", *line.split()]) == 2
    assert capfd.readouterr() == ("", f"txcore: error: {says}\n")
    assert not (tmp_path / "ran").exists()


def test_ranks_are_told_their_places():
    first, second, third = collect_reports("-n", 3, REPORT)
    for rank, report in enumerate((first, second, third)):
        assert report["env"]["JAX_NUM_PROCESSES"] == "3"
        assert report["env"]["JAX_PROCESS_ID"] == str(rank)
        assert report["env"]["JAX_LOCAL_PROCESS_ID"] == str(rank)
        assert "JAX_NUM_CPU_DEVICES" not in report["env"]
    coordinators = {r["env"]["JAX_COORDINATOR_ADDRESS"] for r in (first, second, third)}
    assert len(coordinators) == 1


def test_the_coordinator_is_on_loopback_and_no_port_of_outgoing_connections():
    (report,) = collect_reports("-n", 1, REPORT)
    host, _, port = report["env"]["JAX_COORDINATOR_ADDRESS"].rpartition(":")
    low, high = map(int, placement._EPHEMERAL.read_text().split())
    assert host == "127.0.0.1"
    assert not low <= int(port) <= high
    assert report["env"]["JAX_COORDINATOR_BIND_ADDRESS"] == f"127.0.0.1:{port}"


def test_a_port_that_is_taken_or_held_is_not_chosen(monkeypatch):
    with socket.socket() as taken, socket.socket() as other, contextlib.ExitStack() as held:
        for free in (taken, other):
            free.bind(("127.0.0.1", 0))
        ports = [s.getsockname()[1] for s in (taken, other)]
        taken.listen()
        other.close()
        monkeypatch.setattr(placement, "_candidate_ports", lambda: ports)
        assert placement.hold_port("127.0.0.1", held) == ports[1]
        with pytest.raises(
            BadInput, match=r"^no port of 127\.0\.0\.1 is free: give --coordinator$"
        ):
            placement.hold_port("127.0.0.1", held)


@pytest.mark.parametrize("share", ["SO_REUSEADDR", "SO_REUSEPORT"])  # tx.initialize and jax
def test_rank_0_can_listen_at_the_port_that_is_held(share):
    with contextlib.ExitStack() as held:
        port = placement.hold_port("127.0.0.1", held)
        listener = held.enter_context(socket.socket())
        listener.setsockopt(socket.SOL_SOCKET, getattr(socket, share), 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
        peer = held.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        held.enter_context(listener.accept()[0])
        peer.sendall(b"x")


def test_a_coordinator_that_cannot_be_had_here_is_refused(tmp_path, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        here = f"127.0.0.1:{taken.getsockname()[1]}"
        elsewhere = "192.0.2.1:23456"  # an address for documents, nobody's
        for given, why in (
            (here, "Address already in use"),
            (elsewhere, "Cannot assign requested address"),
        ):
            assert cli.main(["launch", "-n", "2", "--coordinator", given, "true"]) == 2
            says = f"--coordinator {given}: rank 0 cannot listen there ({why})"
            assert capfd.readouterr().err == f"txcore: error: {says}\n"


def test_the_coordinator_as_given():
    given = ["--coordinator", "localhost:23456"]
    (report,) = collect_reports("-n", 1, *given, REPORT)
    assert report["env"]["JAX_COORDINATOR_ADDRESS"] == "localhost:23456"
    assert report["env"]["JAX_COORDINATOR_BIND_ADDRESS"] == "127.0.0.1:23456"
    own = {"JAX_COORDINATOR_BIND_ADDRESS": "0.0.0.0:23456"}
    (report,) = collect_reports("-n", 1, *given, REPORT, changes=own)
    assert report["env"]["JAX_COORDINATOR_BIND_ADDRESS"] == "0.0.0.0:23456"
    (report,) = collect_reports("-n", 1, REPORT, changes=own)
    assert report["env"]["JAX_COORDINATOR_BIND_ADDRESS"].startswith("127.0.0.1:")


def test_a_coordinator_with_an_address_of_ipv6():
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError as error:
            pytest.skip(f"no IPv6 here: {error}")
    given = ["--coordinator", "[::1]:23456"]
    (report,) = collect_reports("-n", 1, *given, REPORT)
    assert report["env"]["JAX_COORDINATOR_ADDRESS"] == "[::1]:23456"
    assert report["env"]["JAX_COORDINATOR_BIND_ADDRESS"] == "[::1]:23456"


def test_simulated_devices():
    for report in collect_reports("-n", 2, "--devices-per-process", 3, REPORT):
        assert report["env"]["JAX_NUM_CPU_DEVICES"] == "3"
        assert "CUDA_VISIBLE_DEVICES" not in report["env"]


@pytest.mark.parametrize(
    "options, given, expected",
    [
        (["-n", 2, "--devices-per-process", 2], "0,1,2,3", ["0,1", "2,3"]),
        (["-n", 2, "--devices-per-process", 1], "4, 7,6", ["4", "7"]),
        (["-n", 2], "GPU-a,GPU-b,GPU-c,GPU-d", ["GPU-a,GPU-b", "GPU-c,GPU-d"]),
        (["-n", 1], "2,5", ["2,5"]),
        (["-n", 3], "0,1", ["0,1"] * 3),  # fewer GPUs than ranks: nobody asked for any
        (["-n", 2, "--devices-per-process", 2], "", [""] * 2),
        (["-n", 2, "--devices-per-process", 2], "-1", ["-1"] * 2),
    ],
)
@pytest.mark.parametrize("platforms", [None, "cuda,cpu"])
def test_each_rank_has_its_own_gpus(options, given, expected, platforms):
    changes = {"JAX_PLATFORMS": platforms, "CUDA_VISIBLE_DEVICES": given}
    found = collect_reports(*options, REPORT, changes=changes)
    assert [report["env"]["CUDA_VISIBLE_DEVICES"] for report in found] == expected


def test_on_the_cpu_gpus_are_left_alone():
    changes = {"CUDA_VISIBLE_DEVICES": "0,1"}
    found = collect_reports("-n", 2, "--devices-per-process", 4, REPORT, changes=changes)
    assert [report["env"]["CUDA_VISIBLE_DEVICES"] for report in found] == ["0,1"] * 2


def test_too_few_gpus(monkeypatch, capfd):
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    assert cli.main(["launch", "-n", "2", "--devices-per-process", "2", "true"]) == 2
    assert capfd.readouterr().err == (
        "txcore: error: --devices-per-process 2 for 2 ranks on a host needs 4 GPUs, but there are "
        "3: lower it, or set JAX_PLATFORMS=cpu to simulate devices on the CPU\n"
    )


def test_a_script_gets_its_arguments_untouched():
    words = ["-n", "3", "--grace", "--", "a b", "", "*", "--no-pin", "ü\n'\""]
    for separator in ([], ["--"]):
        for report in collect_reports("-n", 2, *separator, REPORT, *words):
            assert report["argv"] == words
            assert report["executable"] == sys.executable
            assert report["cwd"] == os.getcwd()


def test_a_module():
    for options in (["-m", "-n", 2], ["-n", 2, "-m"]):
        found = collect_reports(*options, "launched_report", "-m", "x", cwd=REPORT.parent)
        assert [report["argv"] for report in found] == [["-m", "x"]] * 2


@pytest.mark.parametrize("separator", [[], ["--"]])
def test_a_command(separator):
    done = launch("-n", 2, *separator, "sh", "-c", 'echo "$0 $JAX_PROCESS_ID"', "--", "-x")
    assert sorted(done.stdout.splitlines()) == ["[0] -- 0", "[1] -- 1"]


def test_each_rank_leads_a_session_of_its_own():
    assert all(report["session"] == report["pid"] for report in collect_reports("-n", 2, REPORT))


def test_pinning_shares_the_cores():
    allowed = os.sched_getaffinity(0)
    if len(allowed) < 3:
        pytest.skip("needs three cores")
    first, second, third = (set(r["cores"]) for r in collect_reports("-n", 3, REPORT))
    assert len(first) == len(second) == len(third) == len(allowed) // 3
    assert len(first | second | third) == 3 * (len(allowed) // 3)
    assert first | second | third <= allowed


def test_fewer_cores_than_ranks():
    allowed = os.sched_getaffinity(0)
    core = min(allowed)
    os.sched_setaffinity(0, {core})
    try:
        found = collect_reports("-n", 2, REPORT)
    finally:
        os.sched_setaffinity(0, allowed)
    assert [report["cores"] for report in found] == [[core]] * 2


def test_without_pinning():
    for report in collect_reports("-n", 2, "--no-pin", REPORT):
        assert set(report["cores"]) == os.sched_getaffinity(0)


def test_siblings_of_a_core_go_to_one_rank(tmp_path, monkeypatch):
    for core, physical in enumerate([0, 1, 0, 1]):  # 2 is 0's sibling, 3 is 1's
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "core_id").write_text(f"{physical}\n")
        (folder / "physical_package_id").write_text("0\n")
    monkeypatch.setattr(hosts, "_CPU", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3})
    assert [hosts.cores_of(rank, 2) for rank in range(2)] == [{0, 2}, {1, 3}]


@pytest.mark.parametrize(
    "size, text, expected",
    [
        (3, None, ["", "", ""]),
        (3, "localhost", ["", "", ""]),
        (4, "a,b", ["a", "a", "b", "b"]),
        (5, "a,b,c", ["a", "a", "b", "b", "c"]),
        (1, "a,b", ["a"]),
        (4, "a:1,u@b:3", ["a", "u@b", "u@b", "u@b"]),
        (3, "a:2,b", ["a", "a", "b"]),
        (2, "a:4,b:4", ["a", "a"]),
        (2, "[fe80::1],127.0.0.1", ["[fe80::1]", ""]),
    ],
)
def test_ranks_are_spread_over_hosts(size, text, expected):
    assert placement.place_ranks(size, text) == expected


def test_a_folder_that_is_deleted_meanwhile_hides_no_exit_code(tmp_path):
    folder = tmp_path / "out"
    both = f"until [ -e {folder}/rank-1.err ]; do sleep 0.01; done"
    done = launch(
        "-n", 2, "--output-dir", folder, "--", "sh", "-c", f"{both}; rm -r {folder}; exit 3"
    )
    assert done.returncode == 3
    assert re.fullmatch(r"txcore: rank \d \(pid \d+\) ended with exit code 3\n", done.stderr)


def test_rank_0_has_our_stdin(tmp_path):
    reads = write_script(tmp_path, "print(os.environ['JAX_PROCESS_ID'], repr(sys.stdin.read()))")
    done = launch("-n", 2, reads, input="told\n")
    assert sorted(done.stdout.splitlines()) == ["[0] 0 'told\\n'", "[1] 1 ''"]


def test_neither_jax_nor_numpy_is_needed():
    done = launch("-n", 1, "true")  # which fails if one was imported
    assert (done.returncode, done.stderr) == (0, "")


def test_the_installed_command():
    line = [sys.executable, "-W", "error", "-m", "txcore", "launch", "-n", "2", REPORT]
    done = subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(line[:5] for line in done.stdout.splitlines()) == ["[0] {", "[1] {"]


def test_help_names_every_option(capsys):
    assert cli.main(["launch", "--help"]) == 0
    text = capsys.readouterr().out
    source = inspect.getsource(launch_command.add_command)
    options = re.findall(r'"(--?[a-z-]+)"', source)
    assert len(options) == 13
    assert all(re.search(rf"^  {name}\b", text, re.MULTILINE) for name in options)
