"""Environment variables of the tests, which JAX and numba read when they are imported.

conftest.py imports this module before both.
"""

import importlib.metadata
import os
import shutil
from pathlib import Path

CACHES = Path(__file__).parents[2] / ".pytest_cache"

# Eight simulated devices for the sharding tests. The other flags make programs compile faster and
# run slower: almost all of the tests' time is compilation.
FLAGS = [
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
]
# The older emitters compile a training step in a third of the time and memory. XLA refuses flags
# that it does not know, and jaxlib 0.11 does not have this one any more.
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")


def numba_cache() -> Path:
    """A folder for functions of librosa that numba has compiled, of this process alone.

    Two processes must not write to one cache at once: a damaged entry crashes whoever loads it. The
    folder begins as a copy of the environment's cache, if launch/env.sh has made one.
    """
    own = CACHES / f"numba-{os.getenv('PYTEST_XDIST_WORKER', 'main')}"
    filled = Path(os.getenv("NUMBA_CACHE_DIR", own))
    if filled.is_dir() and filled != own:
        shutil.copytree(filled, own, dirs_exist_ok=True)
    return own


os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))
os.environ["NUMBA_CACHE_DIR"] = str(numba_cache())
