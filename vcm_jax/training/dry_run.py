"""The dry run: what a run would take, from its compiled step."""

import jax
import numpy as np
from clu import parameter_overview

from vcm_jax.devices import sharding
from vcm_jax.training import monitor
from vcm_jax.training.program import Program


def _gib(size: float) -> str:
    return f"{size / 2**30:.3f} GiB"


def _nbytes(tree) -> int:
    return sum(int(np.prod(a.shape)) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def describe(program: Program) -> str:
    """Compiles the step and describes it, one topic a line: parameters, memory, FLOPs, input."""
    compiled, flops = program.compile()
    mesh, batch, abstract = program.setup.mesh, program.batch, program.abstract
    devices, batch_size = mesh.devices.size, len(batch["latent_mean"])
    held = {
        name: sharding.device_bytes(getattr(abstract, name), getattr(program.shardings, name))
        for name in ("params", "opt_state", "ema")
    }
    memory = compiled.memory_analysis()
    step_flops = flops * batch_size
    kind = mesh.devices.flat[0].device_kind
    lines = [
        parameter_overview.get_parameter_overview(abstract.params, include_stats=False),
        f"mesh: {dict(mesh.shape)}, {devices} devices ({kind}), {jax.process_count()} processes",
        f"state per device: {_gib(sum(held.values()))} of {_gib(_nbytes(abstract))} in all: "
        + ", ".join(f"{name} {_gib(size)}" for name, size in held.items()),
        f"activations and other temporaries per device: {_gib(memory.temp_size_in_bytes)} "
        f"(batch {batch_size}, {batch_size / devices:g} rows per device)",
        f"model FLOPs: {flops / 1e9:.4g} G per sample, {step_flops / 1e12:.4g} T per step; "
        f"XLA counts {monitor.xla_flops(compiled) / 1e12:.4g} T per step",
        f"input: {_nbytes(batch) / batch_size / 2**10:.1f} KiB per sample, "
        f"{_nbytes(batch) / 1e6:.4g} MB per step",
    ]
    peak = next((p for name, p in monitor.PEAK_TFLOPS.items() if kind.startswith(name)), None)
    rate = 0.4 * peak * 1e12 * devices / flops if peak else 1000.0
    at = f"at an MFU of 40% of {peak} TFLOP/s: " if peak else "at "
    bandwidth = rate * _nbytes(batch) / batch_size / 1e9
    lines.append(f"{at}{rate:.4g} samples/s, which need {bandwidth:.3g} GB/s of input")
    return "\n".join(lines)
