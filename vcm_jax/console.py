"""The console commands that `pip install` makes: each runs a module as `python -m` does.

This module loads nothing: `vcm_jax.main` answers signals before it loads JAX.
"""

import runpy
import sys
from pathlib import Path

COMMANDS = {
    "vcm-train": "vcm_jax.main",
    "vcm-generate": "vcm_jax.generate",
    "vcm-extract": "vcm_jax.features.extract",
    "vcm-train-codec": "vcm_jax.codec.train",
    "vcm-evaluate": "vcm_jax.evaluate",
    "vcm-compare": "vcm_jax.compare",
    "vcm-pretrained": "vcm_jax.pretrained",
    "vcm-web": "vcm_jax.web",
    "vcm-build": "vcm_jax.data.builder",
    "vcm-validate": "vcm_jax.data.validate",
    "vcm-search-times": "vcm_jax.search_times",
    "vcm-reconstruct": "vcm_jax.reconstruct",
    "vcm-import-torch": "vcm_jax.interop.import_torch",
    "vcm-export-torch": "vcm_jax.interop.export_torch",
    "vcm-av-benchmark": "vcm_jax.interop.av_benchmark",
    "vcm-impacts": "vcm_jax.impacts",
    "vcm-impacts-report": "vcm_jax.impacts.report",
}


def start() -> None:
    """Runs the command that this process was started as."""
    module = COMMANDS[Path(sys.argv[0]).name.removesuffix(".exe")]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
