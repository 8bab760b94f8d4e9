"""The corpus on machines that are not here: the same programs, classes, lines and bytes.

A few of each kind always; all of them with TXCORE_ALL_TARGETS=1 in the environment.
"""

import importlib.util
import os

import pytest
from corpus.corpus_added import ADDED
from corpus.corpus_checks import check_added, check_clean, check_lie
from corpus.corpus_clean import CLEAN
from corpus.corpus_lies import LIES

from txcore.profiling import audit

TARGETS = {"tpu:v5e:2x4": "libtpu", "cuda:h100:8": "jax_cuda12_plugin"}
ALL = os.environ.get("TXCORE_ALL_TARGETS") == "1"
FEW = {
    *("matmul_over_a_sharded_dim", "shard_map_argument", "sharding_constraint_inside", "at_add"),
    *("sort", "convolution_halo", "matmul_inside_a_scan", "autodiffs_own_psum"),
    *("tx_psum_over_three_axes", "all_gather_tiled", "psum_scatter_tiled", "all_to_all_tiled"),
    *("nested_scan", "tree_of_three", "gradient_through_all_gather", "tensor_parallel_mlp"),
    *("partial_auto_matmul", "merged_with_a_real_one", "in_the_place_of_a_dead_one"),
    *("in_the_place_of_a_deduplicated_one", "sum_under_the_tag_of_a_real_one"),
    *("boundary_in_the_place_of_a_dead_gather", "in_the_other_branch", "function_called_psum"),
}


@pytest.fixture(params=TARGETS)
def target(request):
    if importlib.util.find_spec(TARGETS[request.param]) is None:
        pytest.skip(f"{TARGETS[request.param]} is not installed: no compiler for {request.param}")
    return request.param


def chosen(programs):
    return [name for name in programs if ALL or name in FEW]


def audited(program, target):
    platform = target.split(":")[0]
    if platform not in program.platforms:
        pytest.skip(f"jax does not lower {program.build.__name__} for {platform}")
    return audit(program.build, target=target, mesh=program.axes), platform


@pytest.mark.parametrize("name", chosen(n for n in ADDED if not ADDED[n].only_when_run))
def test_added(name, target):
    check_added(ADDED[name], *audited(ADDED[name], target))


@pytest.mark.parametrize("name", chosen(CLEAN))
def test_clean(name, target):
    check_clean(CLEAN[name], *audited(CLEAN[name], target))


@pytest.mark.parametrize("name", chosen(LIES))
def test_lie(name, target):
    check_lie(LIES[name], *audited(LIES[name], target))


def test_the_few_exist():
    assert {*ADDED, *CLEAN, *LIES} >= FEW
