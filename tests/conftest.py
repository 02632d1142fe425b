"""Test settings: deterministic, strict about ranks, slow tests on request."""

import ctypes
import gc
import os
import resource
from pathlib import Path

import environment  # noqa: F401 (comes first: it sets variables that jax reads)
import golden
import jax
import pytest
from absl import logging

jax.config.update("jax_numpy_rank_promotion", "raise")

LARGE = 2 * 2**30  # bytes


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs that several tests compile are compiled once, and kept where a cache is set.

    pytest-xdist's processes share the cache; JAX locks only one whose size is limited. Nothing else
    may write to it: with programs that were kept without a limit JAX can write no more.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    cache = Path(jax.config.jax_compilation_cache_dir or folder / "jax_cache") / "tests"
    jax.config.update("jax_compilation_cache_dir", str(cache))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(scope="module", autouse=True)
def memory():
    """Releases compiled programs after a module if the process has become large (on Linux)."""
    yield
    status = Path("/proc/self/statm")
    pages = int(status.read_text().split()[1]) if status.exists() else 0
    if pages * resource.getpagesize() > LARGE:
        jax.clear_caches()
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # the allocator keeps what was freed otherwise


@pytest.fixture(autouse=True)
def verbosity():
    """Commands choose how much is logged; what one chose must not hold for the next test."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="session")
def shared():
    """name -> path of a file of the full set of reference numbers, beside the checkout.

    Tests that ask for this fixture have the marker `shared`.
    """

    def path(name: str) -> Path:
        found = golden.SHARED / name
        if not found.exists():
            pytest.skip(f"shared: needs {found}, which is not there")
        return found

    return path


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of simulated clips, their records, and the workdir of a run with random weights."""
    from small_runs import make_world

    return make_world(tmp_path_factory.mktemp("world"), 40)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


@pytest.hookimpl(tryfirst=True)  # before -m selects by the markers
def pytest_collection_modifyitems(config, items):
    slow = pytest.mark.skip(reason="slow: give --slow to run it")
    shared = pytest.mark.skip(reason=f"shared: needs {golden.SHARED}, which is not there")
    for item in items:
        if "shared" in item.fixturenames:
            item.add_marker("shared")
            if not golden.SHARED.is_dir():
                item.add_marker(shared)
        if "slow" in item.keywords and not config.getoption("--slow"):
            item.add_marker(slow)
