"""Devices that are not there: what the compilers for TPUs and GPUs know about them.

XLA compiles for a described slice or node on any machine that has the compiler: `libtpu` for TPUs,
the CUDA plugin for GPUs. Memory and communication of the compiled program are the real ones; its
speed cannot be known without the device.
"""

import dataclasses
import importlib.util
import os
import re

import jax
import numpy as np

GIB = 2**30
# GiB that XLA gives a program on a device, by the generation of the TPU: the limits in its error
# messages (libtpu 0.0.42). A device of v2, v3, v4 and tpu7x is one of the two cores of a chip here.
# (On a machine, both cores of a v4 chip form one device.)
TPU_MEMORY = {
    "v2": 7.48,
    "v3": 15.48,
    "v4": 15.25,
    "v5e": 15.75,
    "v5p": 95.74,
    "v6e": 31.25,
    "tpu7x": 94.75,
}
# The share of a GPU's memory that JAX takes, as in launch/.
_GPU_SHARE = 0.92
_GPU_HOST = 8  # GPUs of a machine

# What XLA must know about a GPU. H100 and H200 differ in their memory.
_GPU = dict(
    threads_per_block_limit=1024,
    threads_per_warp=32,
    shared_memory_per_block=49152,
    threads_per_core_limit=2048,
    block_dim_limit_x=2147483647,
    block_dim_limit_y=65535,
    block_dim_limit_z=65535,
    registers_per_core_limit=65536,
    registers_per_block_limit=65536,
)
_HOPPER = _GPU | dict(
    shared_memory_per_core=233472,
    shared_memory_per_block_optin=232448,
    core_count=132,
    fpus_per_core=128,
    l2_cache_size=52428800,
    clock_rate_ghz=1.98,
    compute_capability=(9, 0),
)
_AMPERE = _GPU | dict(
    shared_memory_per_core=167936,
    shared_memory_per_block_optin=166912,
    core_count=108,
    fpus_per_core=64,
    l2_cache_size=41943040,
    clock_rate_ghz=1.41,
    compute_capability=(8, 0),
)
# {name: (the maker's name, description, bytes of memory, bytes per second)}
GPUS = {
    "a100": ("NVIDIA A100-SXM4-80GB", _AMPERE, 84_974_239_744, 2_039_000_000_000),
    "h100": ("NVIDIA H100 80GB HBM3", _HOPPER, 84_978_434_048, 3_352_320_000_000),
    "h200": ("NVIDIA H200", _HOPPER, 150_109_880_320, 4_800_000_000_000),
}
# Autotuning and Triton's matrix products need the device itself.
_GPU_OPTIONS = {"xla_gpu_enable_triton_gemm": False, "xla_gpu_autotune_level": 0}

KNOWN = (
    f"a TPU slice such as v5e:4x4 ({', '.join(TPU_MEMORY)}; 2xv5e:4x4 is two slices), "
    f"or GPUs such as h100x8 ({', '.join(GPUS)})"
)
_TPU_NAME = re.compile(r"(?:([1-9]\d*)x)?([a-z]+\d+[a-z]*):(\d+(?:x\d+){1,2})")
_GPU_NAME = re.compile(r"([a-z]+\d+)x(\d+)")


class TopologyError(ValueError):
    """A topology that is not known, or whose compiler is not installed; one line."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Described devices.

    Attributes:
      name: what `describe` was asked for.
      platform: "tpu" or "gpu".
      devices: as `jax.devices()`; they can be compiled for, and hold nothing.
      memory: bytes of one device that a program can use.
      compiler_options: with which programs have to be compiled.
    """

    name: str
    platform: str
    devices: list
    memory: float
    compiler_options: dict


def describe(name: str) -> Topology:
    """The devices of a name: `v5e:4x4`, `2xv5e:4x4` (two slices) or `h100x8`.

    It has to be called before anything is computed: JAX then uses the CPU for everything else.

    Raises:
      TopologyError: the name is not known, or the compiler is not installed.
    """
    tpu, gpu = _TPU_NAME.fullmatch(name), _GPU_NAME.fullmatch(name)
    if tpu and tpu[2] in TPU_MEMORY:
        return _tpu(name, int(tpu[1] or 1), tpu[2], tpu[3])
    if gpu and gpu[1] in GPUS and int(gpu[2]):
        return _gpu(name, gpu[1], int(gpu[2]))
    raise TopologyError(f"{name!r} is not known: give {KNOWN}")


def _tpu(name: str, slices: int, generation: str, shape: str) -> Topology:
    if importlib.util.find_spec("libtpu") is None:
        raise TopologyError(f'{name} needs the compiler for TPUs: pip install "jax[tpu]"')
    # libtpu looks for a machine with TPUs, and its metadata server, where these are not set.
    for variable, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-16",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # nothing is run, so that several may compile
    }.items():
        os.environ.setdefault(variable, value)
    options = {"num_slices": slices} if slices > 1 else {}
    if np.prod([int(n) for n in shape.split("x")]) == 1:
        options["chips_per_host_bounds"] = [1, 1, 1]
    devices = _devices(name, "tpu", topology_name=f"{generation}:{shape}", **options)
    return Topology(name, "tpu", devices, TPU_MEMORY[generation] * GIB, {})


def _gpu(name: str, kind: str, count: int) -> Topology:
    found = (importlib.util.find_spec(f"jax_cuda{version}_plugin") for version in (12, 13))
    if not any(found):
        raise TopologyError(f'{name} needs the compiler for GPUs: pip install "jax[cuda13]"')
    per_host = min(count, _GPU_HOST)
    if count % per_host:
        raise TopologyError(f"{name}: more than {_GPU_HOST} GPUs must be a multiple of {_GPU_HOST}")
    description, _, memory, _ = GPUS[kind]
    devices = _devices(
        name,
        "cuda",
        target_config=_gpu_target(kind),
        topology=f"1x{count // per_host}x{per_host}",
    )
    return Topology(name, "gpu", devices, _GPU_SHARE * memory, dict(_GPU_OPTIONS))


def _devices(name: str, platform: str, **options) -> list:
    jax.config.update("jax_platforms", "cpu")
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(platform=platform, **options).devices
    except (jax.errors.JaxRuntimeError, RuntimeError, ValueError, NotImplementedError) as error:
        reason = str(error).splitlines()[0].removeprefix("INVALID_ARGUMENT: ")
        raise TopologyError(f"{name}: {reason}; give {KNOWN}") from None


def _gpu_target(kind: str) -> str:
    """The description of a GPU that XLA takes, a text protocol buffer (`GpuTargetConfigProto`)."""
    description, sizes, memory, bandwidth = GPUS[kind]
    sizes = dict(sizes)
    major, minor = sizes.pop("compute_capability")
    lines = [f"{field}: {value}" for field, value in sizes.items()]
    lines += [
        f"device_memory_size: {memory}",
        f"memory_bandwidth: {bandwidth}",
        f"cuda_compute_capability {{\nmajor: {major}\nminor: {minor}\n}}",
    ]
    info = "\n".join(lines)
    return (
        f'gpu_device_info {{\n{info}\n}}\nplatform_name: "CUDA"\n'
        "dnn_version_info {\nmajor: 9\nminor: 10\npatch: 0\n}\nruntime_version {\nmajor: 13\n}\n"
        f'device_description_str: "{description}"\n'
    )
