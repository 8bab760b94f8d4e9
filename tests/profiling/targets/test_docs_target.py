"""The Markdown files' blocks for machines that are not here, beside the compilers they need."""

import pytest
from docs_cases import PAGES, blocks, commands, run_python, run_txcore
from target_cases import available

WITH_COMMANDS = sorted({page for page, _, _ in commands("bash targets")})
WITH_CODE = [page for page in PAGES if blocks(page, "python targets")]


@pytest.fixture(autouse=True)
def _compilers():
    available("tpu:v5e:2x4")
    available("cuda:h100:8")


@pytest.mark.parametrize("page", WITH_CODE)
def test_python_blocks(page):
    run_python(page, "python", "python targets")


@pytest.mark.parametrize("page", WITH_COMMANDS)
def test_txcore_commands(page, tmp_path):
    run_txcore(page, "bash targets", tmp_path)
