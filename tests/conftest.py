"""Test settings: deterministic, strict about ranks, slow tests on request."""

import importlib.metadata
import os
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight simulated devices for the sharding tests. The other flags make programs compile faster and
# run slower: almost all of the tests' time is compilation.
XLA_FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# The older emitters compile a training step in a third of the time; XLA refuses flags that it does
# not know, and jaxlib 0.11 has no such flag any more.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    XLA_FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ.setdefault("XLA_FLAGS", " ".join(XLA_FLAGS))

# librosa's compiled functions are cached on disk by numba, whose cache two processes must not write
# at once: a damaged entry crashes whoever loads it. Every test process has its own.
os.environ["NUMBA_CACHE_DIR"] = str(
    Path(__file__).parents[1] / ".pytest_cache" / f"numba-{os.getenv('PYTEST_XDIST_WORKER', '0')}"
)

import jax
import pytest
from absl import logging

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Programs that several tests compile are compiled once, and kept where a cache is set.

    pytest-xdist's processes share the cache; JAX locks only one whose size is limited.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(folder / "jax_cache"))
    jax.config.update("jax_compilation_cache_max_size", 2**30)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


@pytest.fixture(autouse=True)
def verbosity():
    """Commands choose how much is logged; what one chose must not hold for the next test."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Folder of simulated clips, their records, and the workdir of a run with random weights."""
    from small_runs import make_world

    return make_world(tmp_path_factory.mktemp("world"), 40)


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow")


def pytest_collection_modifyitems(config, items):
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: give --slow to run it")
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(skip)
