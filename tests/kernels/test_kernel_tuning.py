"""What was measured is used where it can run, and a file that cannot be used says why."""

import dataclasses
import json
import os
import time
from typing import Literal

import jax
import jax.numpy as jnp
import pytest

from txcore.kernels.dispatch import registry, tuned
from txcore.kernels.dispatch.problem import Problem
from txcore.kernels.dispatch.tuning_file import Entry, TuningError, read_entries, write_entries


@dataclasses.dataclass(frozen=True)
class Blocks:
    rows: int = 8
    order: Literal["rows", "columns"] = "rows"
    depth: int | None = None

    def __post_init__(self):
        if self.rows < 1:
            raise ValueError(f"rows needs at least 1, got {self.rows}")


def configs(problem):
    return [Blocks(rows) for rows in (8, 16) if rows <= problem.shapes[0][0]]


def run(x, *, config):
    return x


KERNELS: registry.Kernels = {
    "xla": registry.Kernel(run),
    "pallas_triton": registry.Kernel(run, configs),
    "triton_ir": registry.Kernel(run, refuse=lambda problem: "it needs one dtype"),
}


def problem(rows=60, platform="gpu"):
    x = jax.ShapeDtypeStruct((rows, 3), jnp.float32)
    return Problem.from_call("scan", (platform, "a card"), (x,), {})


KEY = problem().key
PLATFORMS = ("cpu", "gpu", "tpu", "other")
CONFIG = {"rows": 16, "order": "rows", "depth": None}
LABEL = "pallas_triton(rows=16, order=rows, depth=None)"
BEST = Entry("pallas_triton", CONFIG, {"xla": 20.0, LABEL: 12.5}, "0.10.2", "a laptop")
XLA = Entry("xla", {}, {"xla": 3}, "0.10.2", "a laptop")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    path = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv("TXCORE_TUNING", str(path))
    return path


@pytest.fixture
def recorded(monkeypatch):
    def record(entries):
        monkeypatch.setattr(tuned, "read_recorded", lambda platform: entries)

    return record


class TestChoice:
    def test_the_file_then_what_is_recorded_then_the_guess(self, cache, recorded):
        recorded({})
        assert registry.choose_implementation(problem(), KERNELS, None).source == "heuristic"
        recorded({KEY: BEST})
        chosen = registry.choose_implementation(problem(), KERNELS, None)
        assert chosen == registry.Choice("pallas_triton", Blocks(16), "recorded")
        write_entries(cache, {KEY: XLA})
        chosen = registry.choose_implementation(problem(), KERNELS, None)
        assert chosen == registry.Choice("xla", None, str(cache))

    def test_what_is_named_goes_before_the_file(self, cache):
        write_entries(cache, {KEY: BEST})
        assert registry.choose_implementation(problem(), KERNELS, "xla").implementation == "xla"
        chosen = registry.choose_implementation(problem(), KERNELS, "pallas", Blocks(8))
        assert chosen.config == Blocks(8)

    def test_it_serves_the_whole_class_and_no_other(self, cache):
        write_entries(cache, {KEY: BEST})
        sources = {
            n: registry.choose_implementation(problem(n), KERNELS, None).source
            for n in (33, 64, 32, 65)
        }
        assert sources == {33: str(cache), 64: str(cache), 32: "heuristic", 65: "heuristic"}

    @pytest.mark.parametrize(
        "entry",
        [
            Entry("triton_ir", {}, {"triton_ir": 1}, "0.11", "another machine"),
            Entry(
                "pallas_triton", CONFIG | {"rows": 32}, {}, "0.11", "blocks that it does not try"
            ),
        ],
    )
    def test_what_cannot_run_is_passed_over(self, recorded, entry):
        recorded({KEY: entry})
        assert registry.choose_implementation(problem(), KERNELS, None).source == "heuristic"

    def test_an_interpreted_kernel_runs_only_where_it_is_named(self, recorded):
        here = problem(platform="cpu")
        recorded({here.key: BEST})
        assert registry.choose_implementation(here, KERNELS, None).implementation == "xla"
        named = registry.choose_implementation(here, KERNELS, "pallas")
        assert named.implementation == "pallas_triton"

    def test_an_op_without_a_kernel_of_that_name(self, recorded):
        recorded({KEY: BEST})
        assert (
            registry.choose_implementation(problem(), {"xla": KERNELS["xla"]}, None).source
            == "heuristic"
        )


class TestCandidates:
    def test_all_that_can_run_and_are_compiled(self):
        found = registry.list_candidates(problem(), KERNELS)
        assert [(c.implementation, c.config) for c in found] == [
            ("xla", None),
            ("pallas_triton", Blocks(8)),
            ("pallas_triton", Blocks(16)),
        ]
        interpreted = registry.list_candidates(problem(platform="cpu"), KERNELS)
        assert [c.implementation for c in interpreted] == ["xla"]

    def test_the_interpreted_ones_that_are_named(self):
        asked = ["pallas", "triton_ir"]
        found = registry.list_candidates(problem(8, "cpu"), KERNELS, asked)
        assert [(c.implementation, c.config) for c in found] == [("pallas_triton", Blocks(8))]

    @pytest.mark.parametrize(
        "name, platforms",
        {
            **{"xla": "cpu gpu tpu other", "pallas_triton": "gpu", "mosaic_tpu": "tpu"},
            **{"mosaic_gpu": "gpu", "triton_ir": "gpu", "jax_triton": "gpu"},
        }.items(),
    )
    def test_what_each_back_end_compiles_for(self, name, platforms):
        platform_of = {p: Problem.from_call("x", (p, "kind"), (), {}) for p in PLATFORMS}
        compiled = [p for p in PLATFORMS if registry.is_compiled(platform_of[p], name)]
        assert compiled == platforms.split()


class TestPath:
    def test_the_variable_then_the_cache_folder(self, monkeypatch):
        monkeypatch.setenv("TXCORE_TUNING", "here.json")
        assert tuned.cache_path() == "here.json"
        monkeypatch.setenv("TXCORE_TUNING", "")
        assert tuned.cache_path() is None
        monkeypatch.delenv("TXCORE_TUNING")
        monkeypatch.setenv("HOME", "/home/one")
        monkeypatch.setenv("XDG_CACHE_HOME", "/cache")
        assert tuned.cache_path() == "/cache/txcore/tuning.json"
        for ignored in ("", "relative"):
            monkeypatch.setenv("XDG_CACHE_HOME", ignored)
            assert tuned.cache_path() == "/home/one/.cache/txcore/tuning.json"

    def test_none_reads_nothing(self, monkeypatch, recorded):
        recorded({})
        monkeypatch.setenv("TXCORE_TUNING", "")
        monkeypatch.setattr(tuned, "read_entries", None)
        assert list(tuned.find_entries(problem())) == []


class TestFile:
    def test_what_is_written_is_read(self, cache):
        entries = {KEY: BEST, "another|key": XLA}
        write_entries(cache, entries)
        assert read_entries(cache) == entries
        assert list(read_entries(cache)) == sorted(entries)
        first = cache.read_bytes()
        write_entries(cache, dict(reversed(entries.items())))
        assert cache.read_bytes() == first
        assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]

    def test_no_entries(self, cache):
        write_entries(cache, {})
        assert read_entries(cache) == {}

    def test_a_missing_file_is_an_empty_one(self, cache):
        assert read_entries(cache) == {}

    def test_it_is_read_once_until_it_changes(self, cache, monkeypatch, recorded):
        recorded({})
        write_entries(cache, {KEY: XLA})
        reads = []

        def counted(path):
            reads.append(path)
            return read_entries(path)

        monkeypatch.setattr(tuned, "read_entries", counted)
        for _ in range(3):
            assert list(tuned.find_entries(problem())) == [(str(cache), XLA)]
        assert len(reads) == 1
        write_entries(cache, {KEY: BEST})
        assert list(tuned.find_entries(problem())) == [(str(cache), BEST)]
        cache.unlink()
        assert list(tuned.find_entries(problem())) == []
        assert len(reads) == 3

    def test_a_failed_write_leaves_the_file_and_no_draft(self, cache, monkeypatch):
        write_entries(cache, {KEY: XLA})
        monkeypatch.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError("full")))
        text = f"the tuning file {cache} cannot be written (full): name another"
        with pytest.raises(TuningError) as raised:
            write_entries(cache, {KEY: BEST})
        assert str(raised.value) == text
        assert read_entries(cache) == {KEY: XLA}
        assert [path.name for path in cache.parent.iterdir()] == ["tuning.json"]


def document(**changes):
    data = {"format": "txcore-tuning", "version": 1, "entries": {"a": dataclasses.asdict(BEST)}}
    return json.dumps(data | changes)


def with_entry(**changes):
    return document(entries={"a": dataclasses.asdict(BEST) | changes})


TIME = "entries['a']['microseconds']"
DAMAGED = {
    "binary": (b"\xff\xfe", "needs text in UTF-8, got other bytes at 0"),
    "cut off": (document()[:-3], "needs JSON, got other text (Expecting ',' delimiter"),
    "empty": ("", "needs JSON, got other text (Expecting value"),
    "nested": ("[" * 100_000, "needs at most 16 levels of brackets, got more"),
    "a list": ("[]", 'needs an object with "format": "txcore-tuning", got []'),
    "another format": (document(format="x"), '"format": "txcore-tuning", got \'x\''),
    "another version": (document(version=2), "needs version 1 for this txcore, got 2"),
    "true as version": (document(version=True), "needs version 1 for this txcore, got True"),
    "a name too many": (document(entry={}), "no name but format, version, entries in the file"),
    "no entries": (document(entries=[]), "needs an object as entries, got []"),
    "no entry": (document(entries={"a": 1}), "needs an object as entries['a'], got 1"),
    "a name twice": ('{"a": 1, "a": 2}', "needs each name once, got 'a' twice"),
    "not finite": (with_entry(config={"rows": float("nan")}), "needs finite numbers, got NaN"),
    "a field too many": (
        with_entry(more=1),
        "needs no name but implementation, config, microseconds, jax, machine in entries['a'], "
        "got 'more'",
    ),
    "no such kernel": (
        with_entry(implementation="cuda"),
        "needs 'jax_triton' or 'mosaic_gpu' or 'mosaic_tpu' or 'pallas_triton' or "
        "'triton_ir' or 'xla' as entries['a']['implementation'], got 'cuda'",
    ),
    "an unhashable kernel": (with_entry(implementation=[]), "['implementation'], got []"),
    "config": (with_entry(config=[]), "needs an object as entries['a']['config'], got []"),
    "a config's value": (
        with_entry(config={"rows": [1]}),
        "needs a whole number or null or text or true or false as entries['a']['config']['rows'], "
        "got a list of 1",
    ),
    "a time of text": (
        with_entry(microseconds={"xla": "1"}),
        f"needs a number as {TIME}['xla'], got '1'",
    ),
    "a time of zero": (
        with_entry(microseconds={"xla": 0}),
        f"needs positive numbers in {TIME}, got 0 for 'xla'",
    ),
    "a time of 1e999": (
        with_entry(microseconds={"xla": 1}).replace(": 1}", ": 1e999}"),
        "needs finite numbers, got 1e999",
    ),
    "what was chosen has no time": (
        with_entry(microseconds={"xla": 1}),
        f"needs the time of the chosen candidate in {TIME}, got none",
    ),
    "jax": (with_entry(jax=11), "needs text as entries['a']['jax'], got 11"),
    "a long number": (
        with_entry(microseconds={"xla": 1}).replace(": 1}", f": {'9' * 5000}}}"),
        "needs numbers of at most 18 digits, got one of 5000",
    ),
    "a long name twice": (
        f'{{"{"n" * 999}": 1, "{"n" * 999}": 2}}',
        f"got '{'n' * 76}... twice",
    ),
    "a long version": (document(version="v" * 999), f"got '{'v' * 76}..."),
    "a long machine": (with_entry(machine="x" * 999, more=1), "got 'more'"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_with_what_to_do(name, cache):
    content, reason = DAMAGED[name]
    cache.parent.mkdir()
    cache.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(TuningError) as raised:
        registry.choose_implementation(problem(), KERNELS, None)
    text = str(raised.value)
    assert text.startswith(f"the tuning file {cache} ")
    assert reason in text
    assert text.endswith(
        ": delete it, and run `txcore tune` to measure again, or name another by TXCORE_TUNING "
        "(empty for none)"
    )


HOSTILE = {
    "many names, the last one twice": lambda n: (
        "{" + ",".join(f'"{i}":1' for i in range(n // 12)) + ',"0":1}'
    ),
    "nested lists": lambda n: "[" * n,
    "nested objects": lambda n: '{"a":' * (n // 5),
    "one long number": lambda n: "9" * n,
    "one long text": lambda n: f'"{"a" * n}"',
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_file_is_refused_in_time_that_grows_with_its_length(kind, tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(HOSTILE[kind](2_000_000))
    start = time.process_time()
    with pytest.raises(TuningError) as refused:
        read_entries(path)
    assert time.process_time() - start < 10  # what grows with the square takes minutes
    assert len(str(refused.value)) < 500 + len(str(path))


def test_the_limit_is_an_option(tmp_path):
    path = tmp_path / "tuning.json"
    path.write_text(document())
    assert read_entries(path, max_bytes=path.stat().st_size)
    with pytest.raises(TuningError, match="needs at most 10 bytes, and is longer"):
        read_entries(path, max_bytes=10)


def test_a_long_file_is_refused(cache):
    cache.parent.mkdir()
    with open(cache, "wb") as file:
        file.truncate((1 << 24) + 1)
    with pytest.raises(TuningError, match="needs at most 16777216 bytes, and is longer"):
        read_entries(cache)


def test_a_folder_is_refused(tmp_path):
    with pytest.raises(TuningError, match=r"cannot be read \(Is a directory\)"):
        read_entries(tmp_path)


def test_a_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(TuningError, match=r"cannot be read \(it is a pipe, and no regular file\)"):
        read_entries(tmp_path / "pipe")


@pytest.mark.parametrize(
    "config",
    [
        {"rows": 16},
        CONFIG | {"columns": 3},
        CONFIG | {"rows": "16"},
        CONFIG | {"rows": True},
        CONFIG | {"order": "depth"},
        CONFIG | {"depth": "1"},
    ],
    ids=str,
)
def test_a_configuration_of_another_class_is_refused(config, recorded):
    recorded({KEY: dataclasses.replace(BEST, config=config)})
    with pytest.raises(TuningError) as raised:
        registry.choose_implementation(problem(), KERNELS, None)
    assert str(raised.value) == (
        f"scan: the configuration of 'pallas_triton' for {KEY!r} needs rows: int, order: "
        f"typing.Literal['rows', 'columns'], depth: int | None, got {config} in recorded (other "
        "fields or types): run `txcore tune scan` to measure again, or delete the file"
    )


def test_a_configuration_that_its_class_refuses(recorded):
    recorded({KEY: dataclasses.replace(BEST, config=CONFIG | {"rows": 0})})
    with pytest.raises(TuningError, match=r"in recorded \(rows needs at least 1, got 0\)"):
        registry.choose_implementation(problem(), KERNELS, None)


def test_a_configuration_for_what_has_none_is_refused(recorded):
    recorded({KEY: Entry("xla", {"rows": 1}, {}, "", "")})
    with pytest.raises(TuningError, match=r"needs no field, got \{'rows': 1\}"):
        registry.choose_implementation(problem(), KERNELS, None)


@pytest.mark.parametrize("platform", ["cpu"])
def test_what_comes_with_txcore_is_sound_and_there(platform):
    path = os.path.join(os.path.dirname(tuned.__file__), "recorded", f"{platform}.json")
    assert os.path.getsize(path) > 0
    assert tuned.read_recorded(platform) == read_entries(path)


def test_no_record_of_a_platform_is_an_empty_one():
    assert tuned.read_recorded("abacus") == {}
