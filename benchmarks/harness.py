"""What the benchmarks share: timing, the peak rate of the machine, inputs, the JSON line."""

import json
import os
import platform
import resource
import statistics
import time

import jax
import numpy as np


def timings(call, repeats: int, warmup: int = 1) -> list[float]:
    """Milliseconds of each `call()`, until its result is ready."""
    ms = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        ms.append(1e3 * (time.perf_counter() - start))
    return ms[warmup:]


def timed(call, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Minimum, median and maximum of `timings`, and their number."""
    ms = timings(call, repeats, warmup)
    return {
        "ms_min": min(ms),
        "ms_median": statistics.median(ms),
        "ms_max": max(ms),
        "repeats": repeats,
    }


def compiled(function, *args):
    """(executable, seconds to lower and compile)."""
    start = time.perf_counter()
    executable = function.lower(*args).compile()
    return executable, time.perf_counter() - start


def xla_flops(executable) -> float:
    """XLA's own count of the operations of a compiled program, on all devices together.

    XLA counts the program of one device; every device runs one.
    """
    return executable.cost_analysis()["flops"] * len(jax.devices())


def peak_tflops(dtype) -> float:
    """The best rate of a large square matrix product on one device, in TFLOP/s."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / timed(lambda: product(a), repeats=10)["ms_min"] / 1e9


def peak_memory_bytes() -> int:
    """Peak memory so far: of the first accelerator, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def random_like(tree, seed: int = 0):
    """Standard normal arrays with the shapes and dtypes of a tree; True where it has bools."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    return jax.tree.map(fill, tree)


def print_line(**results) -> None:
    """Prints one JSON line: the results, rounded, and the machine that gave them."""
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind if device.platform != "cpu" else platform.machine(),
        "devices": len(jax.devices()),
        "cpus": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in results.items()}
    print(json.dumps(rounded | {"machine": machine}), flush=True)
