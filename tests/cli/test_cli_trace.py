"""`txcore trace`: its outputs, exit codes and errors."""

import gzip
import json
import pathlib
import re
import sys

import jax
import pytest

from txcore.cli import main

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "profiling" / "trace"))
from hand_made import ADDED, HLO, make_xspace
from test_read import EVENTS, write_folder


def call(capsys, *args):
    code = main(["trace", *map(str, args)])
    out = capsys.readouterr()
    return code, out.out, out.err


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "trace")


def test_the_report(folder, capsys):
    code, out, err = call(capsys, folder, "--check")
    assert (code, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == (
        "2 cpu device(s) of 1 rank(s), 1 step(s) of jit_step; 4 of 4 events joined to HLO"
    )
    assert lines[4].split()[:5] == ["all-reduce", "data", "2", "2", "0.0345"]
    assert lines[-1] == "ok: every collective that ran (1) was declared"


def test_check_fails_where_a_collective_is_not_declared(tmp_path, capsys):
    file = tmp_path / "x.xplane.pb"
    file.write_bytes(make_xspace(EVENTS))
    for text, code in ((HLO, 0), (ADDED, 1)):
        hlo = tmp_path / "step.hlo"
        hlo.write_text(text)
        assert call(capsys, file, "--hlo", hlo, "--check")[0] == code
        assert call(capsys, file, "--hlo", hlo)[0] == 0
    code, out, _ = call(capsys, file, "--check")  # of which no program is known
    assert code == 1
    assert (
        "failed: the program did not declare all-reduce all-reduce.1 of jit_step (unknown)" in out
    )


def test_json_has_seconds_and_bytes(folder, capsys):
    code, out, _ = call(capsys, folder, "--json")
    found = json.loads(out)
    assert code == 0
    assert found["ok"]
    (row,) = found["collectives"]
    assert (row["op"], row["tags"], row["calls"]) == ("all-reduce.1", ["pmean/grads"], 2)
    assert row["seconds"] == pytest.approx(69e-9)
    assert row["waiting_seconds"] + row["moving_seconds"] == pytest.approx(row["seconds"])
    assert {step["device"] for step in found["steps"]} == {0, 1}


def test_against_an_earlier_trace(folder, tmp_path, capsys):
    earlier = tmp_path / "earlier"
    write_folder(earlier)
    slow = [(*event[:3], event[3] * 2, event[4]) for event in EVENTS]
    (folder / "rank0.xplane.pb").write_bytes(make_xspace(slow, clock=100))
    code, out, _ = call(capsys, folder, "--against", earlier)
    assert code == 0
    assert out.startswith("since the earlier trace:\n")
    (line,) = [line for line in out.splitlines() if line.startswith("all-reduce data pmean/grads")]
    assert line.split()[3:8] == ["0.0345", "us", "0.069", "us", "+100%"]
    assert call(capsys, folder, "--against", earlier, "--json")[0] == 2


def test_a_perfetto_file_has_every_event_and_step(folder, tmp_path, capsys):
    for name in ("merged.json", "merged.json.gz"):
        assert call(capsys, folder, "--perfetto", tmp_path / name)[0] == 0
    data = gzip.decompress((tmp_path / "merged.json.gz").read_bytes())
    assert data == (tmp_path / "merged.json").read_bytes()
    events = json.loads(data)["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    named = [event for event in spans if event.get("cat") == "collective"]
    assert [(e["name"], e["pid"], e["tid"], e["ts"], e["dur"]) for e in named] == [
        ("all-reduce all-reduce.1", 0, 1, 0.011, 0.039),
        ("all-reduce all-reduce.1", 0, 0, 0.02, 0.03),
    ]
    assert named[0]["args"]["tags"] == "pmean/grads"
    assert {event["name"] for event in spans if event["tid"] >= 1000} == {"input", "host", "step 0"}


def test_the_page_escapes_and_fetches_nothing(tmp_path, capsys):
    hostile = HLO.replace("jit_step", "jit_<script>").replace('"m.py"', '"<script>alert(1)"')
    hostile = hostile.replace("pmean/grads", "pmean/<b onload=1>")
    folder = tmp_path / "trace"
    events = [
        (*e[:4], e[4] | {"hlo_module": "jit_<script>"}) if "hlo_op" in e[4] else e for e in EVENTS
    ]
    folder.mkdir()
    (folder / "vm.xplane.pb").write_bytes(make_xspace(events))
    (tmp_path / "x.hlo").write_text(hostile)
    page = tmp_path / "page.html"
    assert call(capsys, folder, "--hlo", tmp_path / "x.hlo", "--html", page)[0] == 0
    text = page.read_text()
    assert "<script" not in text
    assert "<b onload" not in text
    assert "jit_&lt;script&gt;" in text
    assert "&lt;script&gt;alert(1):9" in text
    assert "pmean/&lt;b onload=1&gt;" in text
    assert not re.search(r"https?://|src=|url\(|@import", text)
    assert "default-src &#x27;none&#x27;" in text
    assert "prefers-color-scheme: dark" in text
    code, _, err = call(capsys, folder, "--html", tmp_path / "absent" / "page.html")
    assert (code, "cannot write" in err) == (2, True)


@pytest.mark.parametrize("source", ["bench", "recorded"])
def test_bandwidth_against_this_machines_best(folder, tmp_path, capsys, monkeypatch, source):
    # The all-reduce of 1000 bytes moves in 30 ns, of the 60 ns that the best would take.
    about = {"platform": "cpu", "processes": 1, "group_size": 2}
    rows = [{"operation": "psum", "size_bytes": 1000, "bus_bandwidth": 5e9, "wrong": 0}]
    bench = tmp_path / "bench.json"
    bench.write_text(json.dumps(about | {"rows": rows}))
    file = json.loads((folder / "rank0.json").read_text())
    file["programs"][0]["collectives"][0] |= {"payload_bytes": 1000, "wire_bytes": 1000}
    (folder / "rank0.json").write_text(json.dumps(file))
    extra = ["--bench", bench]
    if source == "recorded":
        tuning = tmp_path / "tuning.json"
        entry = {"implementation": "xla", "config": {"algorithm": "xla"}, "machine": "m"}
        entry |= {"microseconds": {"xla(algorithm=xla)": 1024e-3 / 5}, "jax": jax.__version__}
        key = "pmean|cpu|float32|256|devices=2,processes=1"
        said = {"format": "txcore-tuning", "version": 1, "entries": {key: entry}}
        tuning.write_text(json.dumps(said))
        monkeypatch.setenv("TXCORE_TUNING", str(tuning))
        extra = []
    (row,) = json.loads(call(capsys, folder, "--json", *extra)[1])["collectives"]
    assert row["best_bus_bandwidth"] == pytest.approx(5e9)
    assert row["bus_bandwidth"] == pytest.approx(1000 / 30e-9)


def test_bad_input_is_one_line(folder, tmp_path, capsys):
    other = tmp_path / "other.json"
    other.write_text("{}")
    for args, said in (
        ((tmp_path / "absent",), "a trace needs an .xplane.pb, but"),
        ((folder, "--program", "jit_x"), "needs runs of the program 'jit_x'"),
        ((folder, "--hlo", other), "the HLO of a trace needs the text of an HLO module, got none"),
        ((folder, "--hlo", tmp_path / "no"), "cannot read"),
        ((folder, "--bench", other), "needs to be what `txcore bench --json FILE` writes"),
    ):
        code, _, err = call(capsys, *args)
        assert (code, len(err.splitlines())) == (2, 1), err
        assert said in err
