"""The dry run: what a run would take, from its compiled step."""

import dataclasses
import re
import time
from collections import defaultdict

import jax
import numpy as np
from absl import logging
from clu import parameter_overview
from ml_collections import ConfigDict

from vcm_jax.devices import hlo, sharding
from vcm_jax.models.mmdit import REMAT
from vcm_jax.training import monitor
from vcm_jax.training.program import Program, make_program
from vcm_jax.training.setup import Setup, SetupError, check_batch

_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA for TPUs refuses programs that do not fit: "the total memory required for HLO temporaries
# (34.33G) exceeds available HBM (15.75G)", or "Used 18.35G of 15.75G hbm".
_REFUSED = re.compile(r"([\d.]+)([KMGT])\b\D*?([\d.]+)([KMGT])\b")


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one device that a compiled step takes.

    Attributes:
      arguments: the state and the batch; the new state takes the place of the old one.
      temporaries: activations, gradients, gathered weights.
      code: the program itself; 0 where the compiler does not say it.
      capacity: what the device has; None where that is not known.
      total: all of it together.
    """

    arguments: float
    temporaries: float
    code: float
    capacity: float | None
    total: float

    @property
    def fits(self) -> bool:
        return self.capacity is None or self.total <= self.capacity

    def __str__(self) -> str:
        of = f" of {_gib(self.capacity)}" if self.capacity else ""
        held = f"arguments {_gib(self.arguments)}, temporaries {_gib(self.temporaries)}, "
        if not self.temporaries:
            held = ""
        verdict = "" if not self.capacity else "; it fits" if self.fits else "; it does not fit"
        return f"{_gib(self.total)}{of} ({held}code {_gib(self.code)}){verdict}"


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f} GiB"


def _nbytes(tree) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _capacity(setup: Setup) -> float | None:
    if setup.topology:
        return setup.topology.memory
    stats = setup.mesh.devices.flat[0].memory_stats() or {}
    return stats.get("bytes_limit")


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A compiled step; `step` and `flops` (of the model, per sample) are None where XLA refused."""

    step: jax.stages.Compiled | None
    flops: float | None
    memory: Memory
    seconds: float


def compile_step(program: Program) -> Compiled:
    """Compiles the step of a program; XLA for TPUs refuses one that does not fit."""
    started, capacity = time.perf_counter(), _capacity(program.setup)
    try:
        step, flops = program.compile()
    except jax.errors.JaxRuntimeError as error:
        found = _REFUSED.search(str(error))
        if not found or "RESOURCE_EXHAUSTED" not in str(error):
            raise
        used, has = (float(found[i]) * _UNITS[found[i + 1]] for i in (1, 3))
        refused = Memory(0, 0, 0, has, used)
        return Compiled(None, None, refused, time.perf_counter() - started)
    found = step.memory_analysis()
    arguments, code = found.argument_size_in_bytes, found.generated_code_size_in_bytes
    kept = found.output_size_in_bytes - found.alias_size_in_bytes
    temporaries = found.temp_size_in_bytes
    memory = Memory(arguments, temporaries, code, capacity, arguments + kept + temporaries + code)
    return Compiled(step, flops, memory, time.perf_counter() - started)


def describe(program: Program) -> tuple[str, Memory]:
    """Compiles the step and describes it, one topic a line.

    Returns:
      The text: parameters, memory, FLOPs, communication, input; and the memory.
    """
    compiled = compile_step(program)
    memory = compiled.memory
    mesh, batch, abstract = program.setup.mesh, program.batch, program.abstract
    devices, batch_size = mesh.devices.size, len(batch["latent_mean"])
    held = {
        name: sharding.device_bytes(getattr(abstract, name), getattr(program.shardings, name))
        for name in ("params", "opt_state", "ema", "target", "frozen")
        if jax.tree.leaves(getattr(abstract, name))
    }
    kind = mesh.devices.flat[0].device_kind
    lines = [
        parameter_overview.get_parameter_overview(abstract.params, include_stats=False),
        f"mesh: {dict(mesh.shape)}, {devices} devices ({kind}), {jax.process_count()} processes",
        f"state per device: {_gib(sum(held.values()))} of {_gib(_nbytes(abstract))} in all: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in held.items()),
    ]
    rows = f"(batch {batch_size}, {batch_size / devices:g} rows per device)"
    if compiled.step is None:
        lines.append(f"memory per device: XLA refuses the step, which takes {memory} {rows}")
        return "\n".join(lines), memory
    lines += [
        f"activations and other temporaries per device: {_gib(memory.temporaries)} {rows}",
        f"memory per device: {memory}",
        f"compiled in {compiled.seconds:.0f} s",
        *_operations(program, compiled),
        *_input(program, compiled.flops, kind),
    ]
    return "\n".join(lines), memory


def _operations(program: Program, compiled: Compiled) -> list[str]:
    """Lines on FLOPs and communication."""
    mesh, batch_size = program.setup.mesh, len(program.batch["latent_mean"])
    flops = compiled.flops
    computations = hlo.parse(compiled.step.as_text())
    line = (
        f"model FLOPs: {flops / 1e9:.4g} G per sample, {flops * batch_size / 1e12:.4g} T per step"
    )
    counted = hlo.product_flops(computations) * mesh.devices.size
    if counted:  # on GPUs products are calls of libraries
        line += f"; the compiled products take {counted / 1e12:.4g} T per step"
        tiled = hlo.product_flops(computations, tiled=True) * mesh.devices.size
        if tiled > counted:
            line += f", {tiled / 1e12:.4g} T with the padding of their tiles"
    found = defaultdict(lambda: [0.0, 0.0, set()])
    for collective in hlo.collectives(computations, mesh):
        if collective.axes:
            entry = found[collective.kind, " and ".join(collective.axes)]
            entry[0] += collective.runs * collective.bytes
            entry[1] += collective.runs
            entry[2].update(collective.dtypes)
    lines = [line, "communication per device and step:" + ("" if found else " none")]
    for (kind, axes), (size, runs, dtypes) in sorted(found.items(), key=lambda i: -i[1][0]):
        lines.append(
            f"  {kind} over {axes}: {size / 1e6:.4g} MB in {runs:.0f} ({', '.join(sorted(dtypes))})"
        )
    return lines


def _input(program: Program, flops: float, kind: str) -> list[str]:
    """Lines on the input, and the bandwidth that it needs."""
    batch, devices = program.batch, program.setup.mesh.devices.size
    batch_size = len(batch["latent_mean"])
    sample = _nbytes(batch) / batch_size
    lines = [
        f"input: {sample / 2**10:.1f} KiB per sample, {_nbytes(batch) / 1e6:.4g} MB per step",
    ]
    peak = next((p for name, p in monitor.PEAK_TFLOPS.items() if kind.startswith(name)), None)
    rate = 0.4 * peak * 1e12 * devices / flops if peak else 1000.0
    at = f"at an MFU of 40% of {peak} TFLOP/s: " if peak else "at "
    lines.append(f"{at}{rate:.4g} samples/s, which need {rate * sample / 1e9:.3g} GB/s of input")
    return lines


def largest_batch(config: ConfigDict, setup: Setup) -> str:
    """A line with the largest batch whose step fits, found by bisection; each try compiles.

    The batch is a multiple of the smallest one that the mesh and `accumulate` divide, and is found
    within a sixteenth.

    Raises:
      SetupError: the memory of the devices is not known, or no batch fits.
    """
    if _capacity(setup) is None:
        raise SetupError("--fit needs the memory of the devices: give config.topology")
    unit = _unit(config, setup)
    sizes = {}

    def fits(count: int) -> bool:
        config_now = config.copy_and_resolve_references()
        config_now.batch_size = count * unit
        memory = sizes[count] = compile_step(make_program(config_now, setup)).memory
        logging.info("batch %d: %s", count * unit, memory)
        return memory.fits

    low, high = 0, max(1, config.batch_size // unit)
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    if not low:
        raise SetupError(f"no batch fits: {high * unit} samples take {sizes[high]}")
    return (
        f"largest batch that fits: {low * unit} ({low * unit / setup.mesh.devices.size:g} rows per "
        f"device, {sizes[low]}); {high * unit} takes {_gib(sizes[high].total)}"
    )


def fitting_remat(config: ConfigDict, setup: Setup) -> str:
    """A line with the first setting of `remat`, from less computation to more, that fits."""
    names = list(REMAT)
    for name in names[names.index(setup.net.remat) + 1 :]:
        other = dataclasses.replace(setup, net=setup.net.clone(remat=name))
        memory = compile_step(make_program(config, other)).memory
        if memory.fits:
            return f"batch_size {config.batch_size} fits with --config.remat={name}: {memory}"
    return f"batch_size {config.batch_size} fits with no setting of remat"


def _unit(config: ConfigDict, setup: Setup) -> int:
    """The smallest batch whose rows of both kinds the mesh and the microbatches divide.

    Its multiples can be trained, too.
    """
    parts = _parts(config, setup)
    fallback = None
    for size in range(parts, 65 * parts, parts):
        try:
            for multiple in range(size, 9 * size, size):
                check_batch(setup.step, multiple, setup.mesh, config.accumulate)
        except ValueError:
            continue
        fallback = fallback or size
        if setup.step.num_instant(size) % parts == 0:
            return size
    if fallback is None:
        raise SetupError(
            f"config.accumulate {config.accumulate} and the objective's rows divide no batch"
        )
    return fallback


def _parts(config: ConfigDict, setup: Setup) -> int:
    """Into how many parts the devices and the microbatches split a batch."""
    return config.accumulate * int(np.prod([setup.mesh.shape[a] for a in sharding.BATCH_AXES]))


def show(config: ConfigDict, program: Program, fit: bool) -> None:
    """Prints what the step takes, and with `fit` the largest batch that fits.

    Raises:
      SetupError: the step does not fit the devices.
    """
    text, memory = describe(program)
    print(text, flush=True)
    instant, parts = (
        program.setup.step.num_instant(config.batch_size),
        _parts(config, program.setup),
    )
    if instant % parts:
        print(
            f"the {instant} rows with s = t do not divide into {parts} parts, so that devices "
            f"exchange rows; they do with multiples of {_unit(config, program.setup)} as batch_size"
        )
    if fit and not memory.fits:
        print(fitting_remat(config, program.setup), flush=True)
    if fit:
        print(largest_batch(config, program.setup), flush=True)
    if not memory.fits:
        raise SetupError(
            f"batch_size {config.batch_size} does not fit: {_gib(memory.total)} of "
            f"{_gib(memory.capacity)} per device; use a smaller batch_size, remat=products or "
            "full, accumulate, or a larger mesh.fsdp"
        )
