"""What the benchmarks share: timing, the machine's peak, inputs, the JSON line."""

import json
import os
import platform
import resource
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np

from vcm_jax.models import Conditions


def timings(call, repeats: int, warmup: int = 1) -> list[float]:
    """Milliseconds of each `call()`, its result awaited."""
    ms = []
    for _ in range(warmup + repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        ms.append(1e3 * (time.perf_counter() - start))
    return ms[warmup:]


def timed(call, repeats: int, warmup: int = 1) -> dict[str, float]:
    """Minimum, median and maximum of `timings`, and how many they are."""
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
    """XLA's own count of the compiled program, all devices' parts together.

    The count is of one device's program; a program for several devices does so on each of them.
    """
    return executable.cost_analysis()["flops"] * len(jax.devices())


def peak_tflops(dtype) -> float:
    """Best rate of a large square matrix product on one device, in TFLOP/s."""
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda a: a @ a)
    return 2 * size**3 / timed(lambda: product(a), repeats=10)["ms_min"] / 1e9


def peak_memory_bytes() -> int:
    """Most memory in use so far: of the first accelerator, or of this process on a CPU."""
    stats = jax.devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def conditions(config, batch_size: int) -> Conditions:
    """Shapes of the raw features of a batch."""
    shape = lambda name: (
        batch_size,
        getattr(config, f"{name}_seq_len"),
        getattr(config, f"{name}_dim"),
    )
    like = lambda name: jax.ShapeDtypeStruct(shape(name), jnp.float16)
    return Conditions(*map(like, ("clip", "sync", "text")))


def random_like(tree, seed: int = 0):
    """Standard normal arrays (and True for bools) in place of a tree of shapes."""
    rng = np.random.default_rng(seed)

    def fill(leaf):
        if leaf.dtype == bool:
            return np.ones(leaf.shape, bool)
        return rng.standard_normal(leaf.shape, np.float32).astype(leaf.dtype)

    return jax.tree.map(fill, tree)


def print_line(**figures) -> None:
    """One JSON line: the figures, rounded, and the machine they were taken on."""
    device = jax.devices()[0]
    machine = {
        "device": device.device_kind if device.platform != "cpu" else platform.machine(),
        "devices": len(jax.devices()),
        "cpus": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
    }
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded | {"machine": machine}), flush=True)
