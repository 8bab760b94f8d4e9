"""The wheel: txcore alone at top level, the same from git and from an export without symlinks."""

import pathlib
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
FOLDERS = {"txcore": "txcore", "kernels": "txcore.kernels", "profiling": "txcore.profiling"}
LINKS = ("txcore/kernels", "txcore/profiling")
CONTENTS = (
    *("txcore/kernels/conv/xla.py", "txcore/profiling/hlo/text.py", "txcore/py.typed"),
    "txcore/kernels/dispatch/recorded/cpu.json",
    *(f"txcore/profiling/report/html/{name}" for name in ("style.css", "script.js")),
)


def run(*command, cwd, code=0):
    """Run a command; fail with all that it wrote."""
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout + done.stderr
    return done


def checkout(folder):
    """Clone the repository."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("this is no git checkout, or git is not installed")
    run("git", "clone", "--quiet", "--config", "core.symlinks=true", ROOT, folder, cwd=ROOT)
    assert all((folder / link).is_symlink() for link in LINKS)


def export_without_links(folder):
    """Export the files as a zip download does for a system that has no symlinks."""
    checkout(folder)
    shutil.rmtree(folder / ".git")
    (folder / LINKS[0]).unlink()
    target = (folder / LINKS[1]).readlink()
    (folder / LINKS[1]).unlink()
    (folder / LINKS[1]).write_text(str(target))  # git writes a link's target into a plain file


@pytest.fixture(scope="module", params=[checkout, export_without_links])
def wheel(request, tmp_path_factory):
    """The wheel built from one kind of source folder, and that folder."""
    folder = tmp_path_factory.mktemp("source") / "txcore"
    request.param(folder)
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    run(*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", out, folder, cwd=out)
    (path,) = out.glob("*.whl")
    return path, folder


def test_listed_packages_are_the_folders():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    found = [
        ".".join([name, *init.parent.relative_to(ROOT / folder).parts])
        for folder, name in FOLDERS.items()
        for init in (ROOT / folder).rglob("__init__.py")  # does not follow the two links
    ]
    assert sorted(listed) == sorted(found)


def test_wheel_has_one_top_level_name(wheel):
    names = zipfile.ZipFile(wheel[0]).namelist()
    tops = {name.partition("/")[0] for name in names}
    (metadata,) = (top for top in tops if top.endswith(".dist-info"))
    assert tops == {"txcore", metadata}


def test_wheel_has_every_module_once(wheel):
    path, source = wheel
    names = zipfile.ZipFile(path).namelist()
    assert len(set(names)) == len(names)
    assert set(CONTENTS) <= set(names)
    modules = {
        pathlib.PurePosixPath(package.replace(".", "/"), file.relative_to(source / folder))
        for folder, package in FOLDERS.items()
        for file in (source / folder).rglob("*.py")
    }
    assert {name for name in names if name.endswith(".py")} == set(map(str, modules))


def test_unpacked_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel[0]).extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); "
        "import txcore, txcore.kernels, txcore.profiling, txcore.cli; "
        "print(txcore.__file__, txcore.kernels.__file__, txcore.profiling.__file__, sep='\\n')"
    )
    lines = run(sys.executable, "-P", "-c", code, tmp_path, cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 3
    assert all(pathlib.Path(line).is_relative_to(tmp_path / "txcore") for line in lines)


@pytest.mark.parametrize("name", ["kernels", "profiling"])
def test_bare_name_is_refused(name):
    errors = run(sys.executable, "-c", f"import {name}", cwd=ROOT, code=1).stderr
    text = f"'{name}' is installed as txcore.{name}: write 'import txcore.{name}'"
    assert errors.splitlines()[-1] == f"ImportError: {text}"


def test_ruff_sees_each_file_once():
    pytest.importorskip("ruff")
    shown = run(sys.executable, "-m", "ruff", "check", "--show-files", cwd=ROOT).stdout
    files = [pathlib.Path(line) for line in shown.splitlines()]
    assert ROOT / "kernels/conv/xla.py" in files
    assert len({file.resolve() for file in files}) == len(files)
    assert not [f for f in files if any(f.is_relative_to(ROOT / link) for link in LINKS)]


def test_mypy_sees_each_file_once(monkeypatch):
    main = pytest.importorskip("mypy.main")
    monkeypatch.chdir(ROOT)
    sources, _ = main.process_options(["-p", "txcore"])  # what it would check, without checking
    files = [pathlib.Path(source.path).resolve() for source in sources]
    assert ROOT / "kernels/conv/xla.py" in files
    assert len(set(files)) == len(files)
    assert {source.module.partition(".")[0] for source in sources} == {"txcore"}
