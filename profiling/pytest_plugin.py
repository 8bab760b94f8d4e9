"""The pytest fixture `collectives_lock`: a snapshot of a program's communication.

Write in the conftest.py at the root of the tests, for pytest imports no jax in other projects:

    pytest_plugins = ["txcore.profiling.pytest_plugin"]

The locks are `__collectives__/FILE.TEST.lock.json` beside each test file: commit them.
`pytest --update-collectives` writes them; see `txcore.profiling.lock` for what is in them.
"""

import hashlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from txcore.profiling import Report, audit, lock

_SHOWN = "collectives_lock"


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option that writes locks."""
    parser.getgroup("txcore").addoption(
        "--update-collectives",
        action="store_true",
        help="write the lock files of the tests that run and use collectives_lock",
    )


@pytest.fixture
def collectives_lock(request: pytest.FixtureRequest) -> Callable[..., Report]:
    """Return a function that compares a program with its lock file.

    Call it as `collectives_lock(report)`, or as `collectives_lock(fn, *args, target=...,
    mesh=...)` with `audit`'s arguments. Its own keywords are `name`, for tests that lock several
    programs for one target, and `exact`, which fails on less communication, too. It returns the
    report.

    The test fails where the program's communication grew or its audit failed, and where there is
    no lock file yet: only `pytest --update-collectives` writes one.
    """
    used: set[tuple[Path, str]] = set()

    def hold_to_lock(
        program: Any, *args: Any, name: str = "", exact: bool = False, **options: Any
    ) -> Report:
        report = _report_of(program, args, options)
        path = _path_of_lock(request.node, name)
        if (path, lock.target_of(report)) in used:
            pytest.fail("collectives_lock holds two programs of this test to one lock: give name=")
        used.add((path, lock.target_of(report)))
        outcome = _check_or_update(path, report, exact, request)
        if not outcome.ok:
            pytest.fail(outcome.text, pytrace=False)
        if outcome.changed:
            request.node.user_properties.append((_SHOWN, f"{request.node.nodeid}\n{outcome.text}"))
        return report

    return hold_to_lock


def _report_of(program: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Report:
    if not isinstance(program, Report):
        return audit(program, *args, **options)
    if more := [*map(repr, args), *options]:
        raise TypeError(
            "collectives_lock needs a report alone or a function with its arguments, but got a "
            f"report and {', '.join(more)}: leave them out"
        )
    return program


def _check_or_update(
    path: Path, report: Report, exact: bool, request: pytest.FixtureRequest
) -> lock.Outcome:
    try:
        if not request.config.getoption("--update-collectives"):
            return lock.check(path, report, exact=exact)
        return lock.update(path, report)
    except lock.LockError as error:
        text = f"{error}; pytest --update-collectives writes what the test sends now"
        return lock.Outcome(ok=False, changed=False, text=text)


def _path_of_lock(node: pytest.Item, name: str) -> Path:
    parts = node.nodeid.split("::")[1:]
    test = ".".join([*parts, name] if name else parts)
    readable = re.sub(r"[^A-Za-z0-9_.,=\[\]-]", "_", test)[:120]
    if readable != test:  # two tests must not share a file
        readable += "." + hashlib.sha256(test.encode()).hexdigest()[:8]
    return node.path.parent / "__collectives__" / f"{node.path.stem}.{readable}.lock.json"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Show the written locks, and the entries that shrank."""
    # User properties reach the main process of pytest-xdist, too.
    passed = terminalreporter.stats.get("passed", [])
    properties = [pair for report in passed for pair in report.user_properties]
    texts = [text for key, text in properties if key == _SHOWN]
    if texts:
        terminalreporter.section("collectives")
        for text in texts:
            terminalreporter.write_line(text)
